//! The L1 and L2 tables of a layer. It must never panic, whatever the bytes (see `fuzz/`).

use pileus_base::{Result, ResultExt};

use crate::packed::rule::Rule;
use crate::qcow2::header::Header;

/// The bits of an L1 or L2 entry that are an offset.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster has one reference.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// The cluster reads as zeros.
const ZERO: u64 = 1;

/// Walks the L1 and L2 tables of a file of `len` bytes: every table and every cluster that they name lies in it. Returns
/// how many bytes of the disk they replace. `read` reads at an offset within the file.
pub fn data(
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
