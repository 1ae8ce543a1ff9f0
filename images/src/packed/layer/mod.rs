//! layer.qcow2: judged by our own parser before any tool sees it. One without data is thrown away. One that has data is
//! merged into the disk by qemu-img, in bounds, once all of its tables have been checked to lie in the file; which
//! files it works on is said to qemu-img as explicit nodes, never by what the layer says.
//!
//! Next step for the disk that comes of it: the store (`import`), or `mutable`.

mod merge;

use std::fs::File;
use std::os::unix::fs::FileExt;

use pileus_base::{Error, Result, ResultExt};

use super::rule::Rule;
use crate::qcow2::header::{self, Below, Header, Refusal};

pub(crate) use merge::merge;
pub use merge::merge_with;

/// The bits of an L1 or L2 entry that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster has one reference.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros.
const ZERO: u64 = 1;

/// What a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judged {
    Empty,
    /// Bytes that are in the disk instead after merging, at most.
    Data(u64),
}

/// Checks a layer that came in an archive with a disk of so many bytes.
pub fn judge(file: &File, disk_size: u64) -> Result<Judged> {
    let len = file.metadata().io("Looking at a layer")?.len();
    let mut head = vec![0; len.min(header::HEAD as u64) as usize];
    file.read_exact_at(&mut head, 0).io("Reading a layer")?;
    let below = Below {
        name: super::DISK.as_bytes(),
        format: b"raw",
        size: disk_size,
    };
    let header = header::parse_layer(&head, len, below).map_err(refused)?;
    tables(&header, len, |bytes, at| file.read_exact_at(bytes, at)).map(|data| match data {
        0 => Judged::Empty,
        data => Judged::Data(data),
    })
}

fn refused(refusal: Refusal) -> Error {
    let rule = match refusal {
        Refusal::Truncated | Refusal::NotQcow2 => Rule::LayerNotQcow2,
        Refusal::Version(_) => Rule::LayerVersion,
        Refusal::BackingFile | Refusal::BackingName => Rule::LayerBacking,
        Refusal::BackingFormat => Rule::LayerBackingFormat,
        Refusal::DataFile => Rule::LayerDataFile,
        Refusal::Encrypted => Rule::LayerEncrypted,
        Refusal::Snapshots(_) => Rule::LayerSnapshots,
        Refusal::Bitmaps => Rule::LayerBitmaps,
        Refusal::Dirty => Rule::LayerDirty,
        Refusal::Corrupt => Rule::LayerCorrupt,
        Refusal::UnknownFeature(_) => Rule::LayerFeature,
        Refusal::Extension(_) => Rule::LayerExtension,
        Refusal::Empty | Refusal::TooLarge(..) | Refusal::Size(..) => Rule::LayerSize,
        Refusal::L1Table | Refusal::RefcountTable => Rule::LayerTables,
        Refusal::ClusterBits(_)
        | Refusal::HeaderLength(_)
        | Refusal::RefcountOrder(_)
        | Refusal::CompressionType(_) => Rule::LayerHeader,
    };
    rule.because(refusal)
}

/// Walks the L1 and L2 tables of a file of `len` bytes: every table and every cluster that they name lies in it. Returns
/// how many bytes of the disk they replace. `read` reads at an offset within the file.
fn tables(
    header: &Header,
    len: u64,
    mut read: impl FnMut(&mut [u8], u64) -> std::io::Result<()>,
) -> Result<u64> {
    let cluster = 1_u64 << header.cluster_bits;
    let table_inside = |offset: u64| {
        let end = offset.checked_add(cluster);
        offset >= cluster && offset.is_multiple_of(cluster) && end.is_some_and(|end| end <= len)
    };
    // What is missing of the last cluster reads as zeros; QEMU doesn't write it.
    let data_inside =
        |offset: u64| (cluster..len).contains(&offset) && offset.is_multiple_of(cluster);
    let entry = if header.extended_l2 { 16 } else { 8 };
    // The header's check has bounded both.
    let needed = header.virtual_size.div_ceil(cluster * (cluster / entry));
    let mut l1 = vec![0; header.l1_entries as usize * 8];
    read(&mut l1, header.l1_offset).io("Reading a layer")?;
    let mut table = vec![0; cluster as usize];
    let mut data = 0_u64;
    for (index, l1_entry) in numbers(&l1, 8).enumerate() {
        if l1_entry == 0 {
            continue;
        }
        let offset = l1_entry & OFFSET;
        if index as u64 >= needed || l1_entry & !(OFFSET | COPIED) != 0 || !table_inside(offset) {
            return Err(Rule::LayerTables.because("an entry of its L1 table"));
        }
        read(&mut table, offset).io("Reading a layer")?;
        for (l2_entry, subclusters) in
            numbers(&table, entry as usize).zip(subclusters(&table, entry))
        {
            if l2_entry & COMPRESSED != 0 {
                return Err(Rule::LayerCompressed.refuse());
            }
            let flags = if header.extended_l2 || header.version < 3 {
                0
            } else {
                ZERO
            };
            let offset = l2_entry & OFFSET;
            let odd = l2_entry & !(OFFSET | COPIED | flags) != 0;
            if odd || offset != 0 && !data_inside(offset) || offset == 0 && subclusters as u32 != 0
            {
                return Err(Rule::LayerTables.because("an entry of an L2 table"));
            }
            if l2_entry != 0 || subclusters != 0 {
                data += cluster;
            }
        }
    }
    // A table without a single cluster says nothing.
    Ok(data)
}

/// The big-endian numbers at the beginning of each entry.
fn numbers(bytes: &[u8], entry: usize) -> impl Iterator<Item = u64> {
    bytes.chunks_exact(entry).map(|entry| number(&entry[..8]))
}

/// Of an extended entry, which subclusters are there (low half) and which are zeros (high half).
fn subclusters(table: &[u8], entry: u64) -> impl Iterator<Item = u64> {
    let extended = entry == 16;
    table
        .chunks_exact(entry as usize)
        .map(move |entry| if extended { number(&entry[8..]) } else { 0 })
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests;
