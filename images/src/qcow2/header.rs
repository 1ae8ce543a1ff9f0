//! A strict parser of qcow2 headers, for images that come from outside. It is an allow-list: what
//! it doesn't know, it refuses. It must never panic, whatever the bytes (see `fuzz/`).
//!
//! Two kinds of files pass: images, which stand alone ([`parse`]), and layers of packed images, which stand on
//! one file by a fixed name and use less of the format ([`parse_layer`]).
//!
//! Next step for an image that passes: `convert`; for a layer: `packed/layer`.

use std::fmt;

use pileus_base::{Code, Error};

pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// As much of the file as the parser wants to see: the largest cluster there is.
pub const HEAD: usize = 2 << 20;

const V2_LENGTH: usize = 72;
const V3_LENGTH: usize = 104;
/// QEMU's own bounds of the two tables.
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

const DIRTY: u64 = 1;
const CORRUPT: u64 = 1 << 1;
const DATA_FILE: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

const LAZY_REFCOUNTS: u64 = 1;
const AUTOCLEAR_BITMAPS: u64 = 1;
const AUTOCLEAR_DATA_FILE: u64 = 1 << 1;

const EXT_END: u32 = 0;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_DATA_FILE: u32 = 0x4441_5441;
const EXT_ENCRYPTION: u32 = 0x0537_be77;
const EXT_BITMAPS: u32 = 0x2385_2875;

/// The rule that a header breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    Truncated,
    NotQcow2,
    Version(u32),
    BackingFile,
    DataFile,
    Encrypted,
    Snapshots(u32),
    Dirty,
    Corrupt,
    UnknownFeature(u64),
    ClusterBits(u32),
    Empty,
    /// Virtual size and limit, in bytes.
    TooLarge(u64, u64),
    HeaderLength(u32),
    RefcountOrder(u32),
    CompressionType(u8),
    L1Table,
    RefcountTable,
    Extension(u32),
    Bitmaps,
    BackingName,
    BackingFormat,
    /// Virtual size and the one that was wanted, in bytes.
    Size(u64, u64),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated => write!(f, "it ends within its own header"),
            Self::NotQcow2 => write!(f, "it is not a qcow2 file"),
            Self::Version(n) => write!(f, "qcow2 version {n} is not supported (2 and 3 are)"),
            Self::BackingFile => write!(f, "it refers to a backing file"),
            Self::DataFile => write!(f, "it refers to an external data file"),
            Self::Encrypted => write!(f, "it is encrypted"),
            Self::Snapshots(n) => write!(f, "it holds {n} internal snapshots"),
            Self::Dirty => write!(f, "it was not closed properly (dirty)"),
            Self::Corrupt => write!(f, "it is marked as corrupt"),
            Self::UnknownFeature(bits) => write!(f, "it uses unknown features ({bits:#x})"),
            Self::ClusterBits(n) => write!(f, "cluster bits are {n}, not 9 to 21"),
            Self::Empty => write!(f, "its virtual size is 0"),
            Self::TooLarge(size, limit) => {
                write!(f, "its virtual size is {size} bytes, the limit is {limit}")
            }
            Self::HeaderLength(n) => write!(f, "a header of {n} bytes makes no sense"),
            Self::RefcountOrder(n) => write!(f, "refcount order {n} is above 6"),
            Self::CompressionType(n) => write!(f, "compression type {n} is not supported"),
            Self::L1Table => write!(f, "its L1 table has a bad size or lies outside of the file"),
            Self::RefcountTable => {
                write!(
                    f,
                    "its refcount table has a bad size or lies outside of the file"
                )
            }
            Self::Extension(kind) => write!(f, "its header extension {kind:#x} is not allowed"),
            Self::Bitmaps => write!(f, "it holds persistent bitmaps"),
            Self::BackingName => write!(f, "it stands on another file than it should"),
            Self::BackingFormat => write!(
                f,
                "it doesn't say the right format of the file that it stands on"
            ),
            Self::Size(size, want) => write!(f, "its virtual size is {size} bytes, not {want}"),
        }
    }
}

impl From<Refusal> for Error {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal {
            Refusal::TooLarge(..) => Code::ImageTooLarge,
            _ => Code::BadImage,
        };
        Error::new(code, format!("The qcow2 image is refused: {refusal}"))
    }
}

/// What is worth knowing of a header that was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub version: u32,
    /// In bytes.
    pub virtual_size: u64,
    pub cluster_bits: u32,
    pub zstd: bool,
    pub extended_l2: bool,
    /// Where the L1 table lies in the file, and how many entries it has.
    pub l1_offset: u64,
    pub l1_entries: u32,
}

/// What a layer stands on.
#[derive(Debug, Clone, Copy)]
pub struct Below<'a> {
    pub name: &'a [u8],
    pub format: &'a [u8],
    /// Bytes; the layer is of the same size.
    pub size: u64,
}

/// Parses the beginning of a file of `file_len` bytes. `head` is the file's first [`HEAD`] bytes, or
/// all of it; `max_size` bounds the virtual size, in bytes.
pub fn parse(head: &[u8], file_len: u64, max_size: u64) -> Result<Header, Refusal> {
    parse_on(head, file_len, max_size, None)
}

/// The same for a layer, which must stand on just the file that it should.
pub fn parse_layer(head: &[u8], file_len: u64, below: Below<'_>) -> Result<Header, Refusal> {
    let header = parse_on(head, file_len, u64::MAX, Some(below))?;
    match header.virtual_size == below.size {
        true => Ok(header),
        false => Err(Refusal::Size(header.virtual_size, below.size)),
    }
}

fn parse_on(
    head: &[u8],
    file_len: u64,
    max_size: u64,
    below: Option<Below<'_>>,
) -> Result<Header, Refusal> {
    let raw = Fields(head);
    if head.get(..4) != Some(&MAGIC) {
        return Err(Refusal::NotQcow2);
    }
    let version = raw.u32(4)?;
    if !(2..=3).contains(&version) {
        return Err(Refusal::Version(version));
    }
    let (name_at, name_len) = (raw.u64(8)?, raw.u32(16)?);
    match below {
        None if name_at != 0 || name_len != 0 => return Err(Refusal::BackingFile),
        Some(_) if name_at == 0 || name_len == 0 => return Err(Refusal::BackingName),
        _ => {}
    }
    let cluster_bits = raw.u32(20)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(Refusal::ClusterBits(cluster_bits));
    }
    let virtual_size = raw.u64(24)?;
    if virtual_size == 0 {
        return Err(Refusal::Empty);
    }
    if virtual_size > max_size {
        return Err(Refusal::TooLarge(virtual_size, max_size));
    }
    if raw.u32(32)? != 0 {
        return Err(Refusal::Encrypted);
    }
    if raw.u32(60)? != 0 {
        return Err(Refusal::Snapshots(raw.u32(60)?));
    }
    let features = if version == 3 {
        v3_features(raw, cluster_bits)?
    } else {
        Features::default()
    };
    if version == 3 && below.is_some() {
        known_features_only(raw)?;
    }
    check_tables(
        raw,
        file_len,
        virtual_size,
        cluster_bits,
        features.extended_l2,
    )?;
    let begin = features.header_length.max(V2_LENGTH);
    let format = below.map(|below| below.format);
    let end = check_extensions(raw, begin, cluster_bits, format)?;
    if let Some(below) = below {
        check_name(raw, end, cluster_bits, below.name)?;
    }
    Ok(Header {
        version,
        virtual_size,
        cluster_bits,
        zstd: features.zstd,
        extended_l2: features.extended_l2,
        l1_offset: raw.u64(40)?,
        l1_entries: raw.u32(36)?,
    })
}

/// Features that a reader may ignore, or that a writer clears: an image may have them, a layer that came in an archive
/// has at most lazy refcounts, as the ancestor made them.
fn known_features_only(raw: Fields<'_>) -> Result<(), Refusal> {
    let (compatible, autoclear) = (raw.u64(80)?, raw.u64(88)?);
    if autoclear & AUTOCLEAR_BITMAPS != 0 {
        return Err(Refusal::Bitmaps);
    }
    if autoclear & AUTOCLEAR_DATA_FILE != 0 {
        return Err(Refusal::DataFile);
    }
    match compatible & !LAZY_REFCOUNTS | autoclear {
        0 => Ok(()),
        unknown => Err(Refusal::UnknownFeature(unknown)),
    }
}

/// The name of the file below: just these bytes, behind the extensions, in the first cluster.
fn check_name(raw: Fields<'_>, from: usize, cluster_bits: u32, name: &[u8]) -> Result<(), Refusal> {
    let at = usize::try_from(raw.u64(8)?).map_err(|_| Refusal::BackingName)?;
    let len = raw.u32(16)? as usize;
    let inside = at
        .checked_add(len)
        .is_some_and(|end| end <= 1 << cluster_bits);
    if at < from || !inside || len != name.len() || raw.bytes(at, len)? != name {
        return Err(Refusal::BackingName);
    }
    Ok(())
}

#[derive(Debug, Clone, Copy, Default)]
struct Features {
    header_length: usize,
    zstd: bool,
    extended_l2: bool,
}

fn v3_features(raw: Fields<'_>, cluster_bits: u32) -> Result<Features, Refusal> {
    let bits = raw.u64(72)?;
    for (bit, refusal) in [
        (DATA_FILE, Refusal::DataFile),
        (CORRUPT, Refusal::Corrupt),
        (DIRTY, Refusal::Dirty),
    ] {
        if bits & bit != 0 {
            return Err(refusal);
        }
    }
    let unknown = bits & !(COMPRESSION_TYPE | EXTENDED_L2);
    if unknown != 0 {
        return Err(Refusal::UnknownFeature(unknown));
    }
    let order = raw.u32(96)?;
    if order > 6 {
        return Err(Refusal::RefcountOrder(order));
    }
    let length = raw.u32(100)?;
    let header_length = length as usize;
    if header_length < V3_LENGTH
        || !header_length.is_multiple_of(8)
        || header_length >= 1 << cluster_bits
    {
        return Err(Refusal::HeaderLength(length));
    }
    let kind = if header_length > V3_LENGTH {
        raw.bytes(V3_LENGTH, 1)?[0]
    } else {
        0
    };
    let zstd = bits & COMPRESSION_TYPE != 0;
    if kind != u8::from(zstd) {
        return Err(Refusal::CompressionType(kind));
    }
    let extended_l2 = bits & EXTENDED_L2 != 0;
    // 32 subclusters of at least 512 bytes.
    if extended_l2 && cluster_bits < 14 {
        return Err(Refusal::ClusterBits(cluster_bits));
    }
    Ok(Features {
        header_length,
        zstd,
        extended_l2,
    })
}

fn check_tables(
    raw: Fields<'_>,
    file_len: u64,
    virtual_size: u64,
    cluster_bits: u32,
    extended_l2: bool,
) -> Result<(), Refusal> {
    let cluster = 1_u64 << cluster_bits;
    let inside = |offset: u64, len: u64| {
        offset >= cluster
            && offset.is_multiple_of(cluster)
            && offset.checked_add(len).is_some_and(|end| end <= file_len)
    };
    let l2_entries = cluster / if extended_l2 { 16 } else { 8 };
    let needed = virtual_size.div_ceil(cluster * l2_entries);
    let l1_entries = u64::from(raw.u32(36)?);
    let l1_bytes = l1_entries * 8;
    if l1_entries < needed || l1_bytes > MAX_L1_BYTES || !inside(raw.u64(40)?, l1_bytes) {
        return Err(Refusal::L1Table);
    }
    let table_bytes = u64::from(raw.u32(56)?) * cluster;
    if table_bytes == 0
        || table_bytes > MAX_REFCOUNT_TABLE_BYTES
        || !inside(raw.u64(48)?, table_bytes)
    {
        return Err(Refusal::RefcountTable);
    }
    Ok(())
}

/// Extensions follow the header and end within the first cluster. With `format` there is the one that says the format
/// of the file below, once. Returns where they end.
fn check_extensions(
    raw: Fields<'_>,
    mut at: usize,
    cluster_bits: u32,
    format: Option<&[u8]>,
) -> Result<usize, Refusal> {
    let end = 1_usize << cluster_bits;
    let mut seen = false;
    loop {
        // No room for another one is an end as well, as QEMU sees it.
        let kind = if at + 8 > end { EXT_END } else { raw.u32(at)? };
        if kind == EXT_END {
            return match format.is_some() == seen {
                true => Ok((at + 8).min(end)),
                false => Err(Refusal::BackingFormat),
            };
        }
        let len = raw.u32(at + 4)? as usize;
        match kind {
            EXT_FEATURE_NAMES => {}
            EXT_BACKING_FORMAT => match format {
                None => return Err(Refusal::BackingFile),
                Some(format) if seen || raw.bytes(at + 8, len)? != format => {
                    return Err(Refusal::BackingFormat);
                }
                Some(_) => seen = true,
            },
            EXT_DATA_FILE => return Err(Refusal::DataFile),
            EXT_ENCRYPTION => return Err(Refusal::Encrypted),
            EXT_BITMAPS => return Err(Refusal::Bitmaps),
            _ => return Err(Refusal::Extension(kind)),
        }
        if len > end {
            return Err(Refusal::Extension(kind));
        }
        at += 8 + len.next_multiple_of(8);
        if at > end {
            return Err(Refusal::Extension(kind));
        }
    }
}

/// Bounded big-endian reads.
#[derive(Clone, Copy)]
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(self, at: usize, len: usize) -> Result<&'a [u8], Refusal> {
        self.0
            .get(at..)
            .and_then(|rest| rest.get(..len))
            .ok_or(Refusal::Truncated)
    }

    fn u32(self, at: usize) -> Result<u32, Refusal> {
        let bytes = self.bytes(at, 4)?;
        Ok(bytes.iter().fold(0, |n, byte| n << 8 | u32::from(*byte)))
    }

    fn u64(self, at: usize) -> Result<u64, Refusal> {
        Ok(u64::from(self.u32(at)?) << 32 | u64::from(self.u32(at + 4)?))
    }
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
