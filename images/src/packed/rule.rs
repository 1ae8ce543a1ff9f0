//! What a packed image can be refused for: each rule has a name that stays, for programs, and a sentence. An
//! error that refuses an archive has its rule as its source.
//!
//! Next step: `members`, `unpack` and `layer`, which hold to them; docs/image-security.md lists them.

use std::fmt;

use pileus_base::{Code, Error};

macro_rules! rules {
    ($($variant:ident = $name:literal, $code:ident, $sentence:literal;)*) => {
        /// A rule that an archive breaks.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Rule { $(#[doc = $sentence] $variant,)* }

        impl Rule {
            pub const ALL: &'static [Rule] = &[$(Rule::$variant,)*];

            /// The rule's name.
            pub fn as_str(self) -> &'static str {
                match self { $(Rule::$variant => $name,)* }
            }

            /// `BadImage`, or `ImageTooLarge` for a budget.
            pub fn code(self) -> Code {
                match self { $(Rule::$variant => Code::$code,)* }
            }

            fn sentence(self) -> &'static str {
                match self { $(Rule::$variant => $sentence,)* }
            }
        }
    };
}

rules! {
    NotZstd = "not-zstd", BadImage, "the archive is not compressed with zstd";
    ZstdDamaged = "zstd-damaged", BadImage, "the archive's compressed data is damaged";
    ZstdWindow = "zstd-window", BadImage, "decompressing the archive takes a window of more than 128 MiB";
    ZstdTrailing = "zstd-trailing", BadImage, "something that is not zstd follows the archive";
    Truncated = "truncated", BadImage, "the archive ends in its middle";
    ArchiveTooLarge = "archive-too-large", ImageTooLarge, "the archive has more bytes than it may";
    Ratio = "ratio", ImageTooLarge, "the archive unpacks to far more than its own size";

    NotTar = "not-tar", BadImage, "there is no tar in the archive";
    HeaderChecksum = "header-checksum", BadImage, "a member's header is damaged";
    HeaderNumber = "header-number", BadImage, "a number in a member's header is none";
    HeaderName = "header-name", BadImage, "a member's name can't be read";
    MemberData = "member-data", BadImage, "a member that is no file has data";
    Padding = "padding", BadImage, "there is something between two members";
    TarTrailing = "tar-trailing", BadImage, "there is something behind the archive's end";
    TooManyMembers = "too-many-members", ImageTooLarge, "the archive has too many members";
    SkippedTooLarge = "skipped-too-large", ImageTooLarge, "what else is in the archive is too large";
    PaxMalformed = "pax-malformed", BadImage, "a member's extended header can't be read";
    PaxTooLarge = "pax-too-large", ImageTooLarge, "a member's extended header is too large";
    PaxGlobal = "pax-global", BadImage, "a global header changes what the members are";
    SparseVersion = "sparse-version", BadImage, "a sparse member is of a form that is not supported";
    SparseMap = "sparse-map", BadImage, "a sparse member's map makes no sense";
    TooManyExtents = "too-many-extents", ImageTooLarge, "a sparse member has too many extents";

    MemberPath = "member-path", BadImage, "a member is not at the top of the archive";
    MemberKind = "member-kind", BadImage, "a member is not an ordinary file";
    DuplicateMember = "duplicate-member", BadImage, "a member is there twice";
    MissingMember = "missing-member", BadImage, "a member is missing";
    MemberTooLarge = "member-too-large", ImageTooLarge, "a member is too large";
    DiskSize = "disk-size", BadImage, "the disk is empty or does not consist of whole sectors";
    DiskTooLarge = "disk-too-large", ImageTooLarge, "the disk is larger than the limit";
    DataTooLarge = "data-too-large", ImageTooLarge, "the archive holds more data than it may";

    LayerNotQcow2 = "layer-not-qcow2", BadImage, "layer.qcow2 is not a qcow2 file";
    LayerVersion = "layer-version", BadImage, "layer.qcow2 is of a version that is not supported";
    LayerHeader = "layer-header", BadImage, "layer.qcow2 has a header that makes no sense";
    LayerBacking = "layer-backing", BadImage, "layer.qcow2 does not stand on disk.img";
    LayerBackingFormat = "layer-backing-format", BadImage, "layer.qcow2 does not take disk.img for a raw disk";
    LayerDataFile = "layer-data-file", BadImage, "layer.qcow2 has its data in another file";
    LayerEncrypted = "layer-encrypted", BadImage, "layer.qcow2 is encrypted";
    LayerSnapshots = "layer-snapshots", BadImage, "layer.qcow2 holds snapshots";
    LayerBitmaps = "layer-bitmaps", BadImage, "layer.qcow2 holds bitmaps";
    LayerDirty = "layer-dirty", BadImage, "layer.qcow2 was not closed properly";
    LayerCorrupt = "layer-corrupt", BadImage, "layer.qcow2 is marked as corrupt";
    LayerFeature = "layer-feature", BadImage, "layer.qcow2 uses a feature that is not supported";
    LayerExtension = "layer-extension", BadImage, "layer.qcow2 has a header extension that is not allowed";
    LayerSize = "layer-size", BadImage, "layer.qcow2 is not of the disk's size";
    LayerTables = "layer-tables", BadImage, "the tables of layer.qcow2 lie outside of it, or make no sense";
    LayerCompressed = "layer-compressed", BadImage, "layer.qcow2 has compressed data";

    Machine = "machine", BadImage, "machine.json is not a machine";
    Manifest = "manifest", BadImage, "manifest.json can't be read";
    ManifestMismatch = "manifest-mismatch", BadImage, "manifest.json says other things than the archive holds";
}

impl Rule {
    /// The rule that an error was made for.
    pub fn of(err: &Error) -> Option<Self> {
        let mut next = err
            .source
            .as_deref()
            .map(|source| source as &dyn std::error::Error);
        while let Some(source) = next {
            if let Some(rule) = source.downcast_ref() {
                return Some(*rule);
            }
            next = source.source();
        }
        None
    }

    /// The error that refuses an archive.
    pub fn refuse(self) -> Error {
        self.error(format!("The packed image is refused: {self}"))
    }

    /// The same with what it is about.
    pub fn because(self, detail: impl fmt::Display) -> Error {
        self.error(format!("The packed image is refused: {self} ({detail})"))
    }

    fn error(self, message: String) -> Error {
        Error::new(self.code(), message)
            .detail(format!("rule: {}", self.as_str()))
            .with_source(self)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.sentence())
    }
}

impl std::error::Error for Rule {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_found_again() {
        let mut seen = std::collections::HashSet::new();
        for rule in Rule::ALL {
            let name = rule.as_str();
            assert!(seen.insert(name), "{name} twice");
            assert!(
                name.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            );
            let err = rule.because("it");
            assert_eq!((Rule::of(&err), err.code), (Some(*rule), rule.code()));
            let outer = Error::internal("x").with_source(err);
            assert_eq!(Rule::of(&outer), Some(*rule));
        }
        assert_eq!(Rule::of(&Error::internal("x")), None);
    }

    #[test]
    fn the_page_lists_each_rule_as_it_is() {
        let page = include_str!("../../../docs/image-security.md");
        for rule in Rule::ALL {
            let line = format!("| `{}` | {rule}", rule.as_str());
            assert!(page.contains(&line), "{line}");
        }
    }
}
