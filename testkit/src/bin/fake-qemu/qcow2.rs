//! As much of qcow2 as a guest needs that writes whole clusters behind each other and reads them again: so what
//! the stand-in leaves is data, for qemu-img and the daemon too. Files are as `pileus_images::overlay` makes them.

use std::fs::File;
use std::io::{Error, Result};
use std::os::unix::fs::FileExt;

/// Bytes of a cluster, which is what all files here have.
const CLUSTER: u64 = 1 << 16;
const CLUSTER_BITS_AT: u64 = 20;
const TABLE_AT: u64 = 40;
const REFCOUNTS_AT: u64 = 48;
/// An entry of a table that belongs to this file alone, and the bits of it that are a place.
const OWN: u64 = 1 << 63;
const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
const ENTRIES: u64 = CLUSTER / 8;

fn number(file: &File, at: u64) -> Result<u64> {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, at)?;
    Ok(u64::from_be_bytes(bytes))
}

fn put(file: &File, at: u64, number: u64) -> Result<()> {
    file.write_all_at(&number.to_be_bytes(), at)
}

/// Where the file has its entry for the guest's cluster; `None` if it has no table for it.
fn entry(file: &File, cluster: u64) -> Result<Option<u64>> {
    let first = number(file, TABLE_AT)? + cluster / ENTRIES * 8;
    Ok(match number(file, first)? & PLACE {
        0 => None,
        table => Some(table + cluster % ENTRIES * 8),
    })
}

/// The begin of the guest's cluster, if this very file has it.
pub fn read(file: &File, cluster: u64, bytes: &mut [u8]) -> Result<bool> {
    let place = match entry(file, cluster)? {
        Some(entry) => number(file, entry)? & PLACE,
        None => 0,
    };
    if place == 0 {
        return Ok(false);
    }
    file.read_exact_at(bytes, place)?;
    Ok(true)
}

/// Writes a cluster that the file does not have yet. Whoever is killed meanwhile leaves space that nobody uses, and
/// nothing else.
pub fn write(file: &File, cluster: u64, bytes: &[u8]) -> Result<()> {
    let data = take(file)?;
    file.write_all_at(bytes, data)?;
    let entry = match entry(file, cluster)? {
        Some(entry) => entry,
        None => {
            let table = take(file)?;
            put(
                file,
                number(file, TABLE_AT)? + cluster / ENTRIES * 8,
                table | OWN,
            )?;
            table + cluster % ENTRIES * 8
        }
    };
    put(file, entry, data | OWN)
}

/// Writes behind all that the file has; its table only tells that something was written.
pub fn append(file: &File, bytes: &[u8]) -> Result<()> {
    let end = file.metadata()?.len();
    file.write_all_at(&[0xff], number(file, TABLE_AT)?)?;
    file.write_all_at(bytes, end)
}

/// One more cluster at the file's end, full of nothing.
fn take(file: &File) -> Result<u64> {
    let mut bits = [0; 4];
    file.read_exact_at(&mut bits, CLUSTER_BITS_AT)?;
    let place = file.metadata()?.len().next_multiple_of(CLUSTER);
    let counts = number(file, number(file, REFCOUNTS_AT)?)? & PLACE;
    // One block of counts is enough for two gibibytes.
    let count = counts + place / CLUSTER * 2;
    if 1 << u32::from_be_bytes(bits) != CLUSTER || counts == 0 || count >= counts + CLUSTER {
        return Err(Error::other("fake: a qcow2 file that it can't write to"));
    }
    file.set_len(place + CLUSTER)?;
    file.write_all_at(&1_u16.to_be_bytes(), count)?;
    Ok(place)
}
