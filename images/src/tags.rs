//! Tags: names that persons give to images of the store. A tag launches its image, whatever the hosts know by
//! that name, and keeps it from being collected or pruned. Each is one small file that holds the digest.
//!
//! Next step: `lookup` (asks here first), `collect` (spares what has a tag).

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pileus_base::{Code, Digest, Error, Result, ResultExt, files};

use crate::image::Image;
use crate::lock::{self, Grip, Hold};
use crate::reference::{ImageRef, is_name};
use crate::store::{Store, not_here};

impl Store {
    /// Gives an image a name; returns the image that had it before. Blocks for a moment.
    pub fn tag(&self, name: &str, digest: &Digest) -> Result<Option<Digest>> {
        let path = self.tag_path(name)?;
        // Held until the tag is there, so that nobody takes the image away in between.
        let image = self.load(digest)?.ok_or_else(|| not_here(digest.hex()))?;
        let before = read(&path);
        lock::write_small(&path, format!("{}\n", image.digest()).as_bytes())?;
        Ok(before)
    }

    /// Takes a name away; returns the image that had it, which stays. Blocks for a moment.
    pub fn untag(&self, name: &str) -> Result<Digest> {
        let path = self.tag_path(name)?;
        let _hold = Hold::shared(&self.tags_folder())?;
        let digest = read(&path).ok_or_else(|| no_tag(name))?;
        files::remove_file(&path)?;
        files::sync_folder(&self.tags_folder())?;
        Ok(digest)
    }

    /// All names that were given, and to what.
    pub fn tags(&self) -> Result<BTreeMap<String, Digest>> {
        let folder = self.tags_folder();
        let what = || format!("Reading {}", folder.display());
        let mut tags = BTreeMap::new();
        for entry in std::fs::read_dir(&folder).io(what())? {
            let entry = entry.io(what())?;
            let Ok(name) = entry.file_name().into_string() else {
                continue;
            };
            if check(&name).is_ok()
                && let Some(digest) = read(&entry.path())
            {
                tags.insert(name, digest);
            }
        }
        Ok(tags)
    }

    /// The image that a name was given to, if it was given to one.
    pub(crate) fn tagged(&self, reference: &ImageRef) -> Result<Option<Arc<Image>>> {
        let ImageRef::Name(name) = reference else {
            return Ok(None);
        };
        let Some(digest) = self.tag_path(name).ok().and_then(|path| read(&path)) else {
            return Ok(None);
        };
        match self.load(&digest)? {
            Some(image) => Ok(Some(image)),
            None => Err(Error::new(
                Code::ImageNotFound,
                format!(
                    "The tag {name} is that of the image {}, which is not in the store",
                    digest.short()
                ),
            )
            .advise(format!("Remove the tag with `pileus image untag {name}`."))),
        }
    }

    /// The names that were given to an image.
    pub(crate) fn tags_of(&self, digest: &Digest) -> Result<Vec<String>> {
        let tags = self.tags()?.into_iter();
        Ok(tags
            .filter(|(_, tagged)| tagged == digest)
            .map(|(name, _)| name)
            .collect())
    }

    /// Takes all of an image's names away. For one that is held alone, so that it gets no new ones.
    pub(crate) fn untag_all(&self, digest: &Digest) -> Result<()> {
        for name in self.tags_of(digest)? {
            files::remove_file(&self.tag_path(&name)?)?;
        }
        files::sync_folder(&self.tags_folder())
    }

    /// Removes the tags of images that somebody took away by hand, and files that are no tags.
    pub(crate) fn sweep_tags(&self, patience: Duration) -> Result<()> {
        // Nobody gives one while it is held.
        let Grip::Held(_hold) = Hold::exclusive(&self.tags_folder(), patience)? else {
            return Ok(());
        };
        for (name, digest) in self.tags()? {
            if !self.has(&digest) {
                tracing::warn!(name, image = digest.short(), "tag of a lost image removed");
                files::remove_file(&self.tag_path(&name)?)?;
            }
        }
        Ok(())
    }

    fn tag_path(&self, name: &str) -> Result<PathBuf> {
        check(name)?;
        Ok(self.tags_folder().join(name))
    }
}

/// A tag is a name that stands alone: nothing that means a remote, a file, a URL or a digest.
fn check(name: &str) -> Result<()> {
    let plain = matches!(name.parse(), Ok(ImageRef::Name(parsed)) if parsed == name);
    if plain && is_name(name) && !name.contains('/') {
        return Ok(());
    }
    Err(Error::new(
        Code::InvalidName,
        format!("{name:?} can't be an image's tag"),
    )
    .advise(
        "Give letters, digits, and . _ + - in between; not what looks like a digest, and no `remote:`.",
    ))
}

fn read(path: &std::path::Path) -> Option<Digest> {
    let bytes = files::read_bounded(path, 256).ok()?;
    std::str::from_utf8(&bytes).ok()?.trim().parse().ok()
}

fn no_tag(name: &str) -> Error {
    Error::new(Code::ImageNotFound, format!("There is no tag {name}"))
        .advise("`pileus image list` shows the tags.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_a_tag() {
        for good in ["mine", "ci-base_2.1+x", "24.04", "abcdef", "default"] {
            check(good).unwrap();
        }
        for bad in [
            "",
            ".",
            "..",
            ".x.tmp",
            "a/b",
            "a:b",
            "build:debian-13",
            "file:///x",
            "http://h/x",
            "sha256:ab",
            "abcdefabcdef",
            "a b",
            "a\n",
            "é",
            &"x".repeat(129),
        ] {
            assert_eq!(check(bad).unwrap_err().code, Code::InvalidName, "{bad:?}");
        }
    }
}
