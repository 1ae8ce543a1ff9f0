//! A layer of an instance's disk on its way into an archive and out of one. What stands below a layer is told
//! by the archive's manifest and then by the host's own records: no name of a file travels, and one that comes
//! in a layer is refused. The first cluster, which holds the header and nothing else, is written anew both
//! ways, of the few fields that a layer needs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pileus_base::{Error, Result, ResultExt};

use super::extents::Source;
use super::read::bad;
use crate::qcow2::header::{self, Header};

/// Bytes of a header as QEMU writes it today.
pub(crate) const HEADER: usize = 112;
pub(crate) const VERSION_3: u32 = 3;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Fields that are kept: cluster bits, virtual size and crypt method; the tables and snapshots; the features
/// that a reader must know; the refcounts' width.
const KEPT: [std::ops::Range<usize>; 4] = [20..36, 36..72, 72..80, 96..100];
const COMPRESSION: usize = 104;

/// A layer of this host as it is to travel: what takes the place of its head.
pub fn to_travel(file: &File) -> Result<(Header, Vec<u8>)> {
    let head = clean(file, None)?;
    let header = checked(file, &head, u64::MAX)?;
    Ok((header, head))
}

/// Checks a layer that came, whose guest sees `virtual_size` bytes.
pub fn check(file: &File, virtual_size: u64) -> Result<()> {
    let mut head = vec![0; header::HEAD.min(length(file)? as usize)];
    file.read_exact_at(&mut head, 0).io("Reading a layer")?;
    let header = checked(file, &head, virtual_size)?;
    if header.version != VERSION_3 || header.virtual_size != virtual_size {
        return Err(bad("a layer is not what the manifest says of it"));
    }
    Ok(())
}

/// Gives a layer that was checked a head of ours, with the name of what it stands on: for people and for
/// qemu-img; a machine is given its layers one by one.
pub fn settle(file: &File, below: &Path, format: &str) -> Result<()> {
    let head = clean(file, below.to_str().map(|name| (name, format)))?;
    file.write_all_at(&head, 0).io("Writing a layer's head")?;
    file.sync_all().io("Writing a layer's head")
}

/// The layer as an archive's member.
pub fn source<'a>(file: &'a File, head: &'a [u8]) -> Result<Source<'a>> {
    Ok(Source {
        file,
        len: length(file)?,
        head,
    })
}

fn length(file: &File) -> Result<u64> {
    Ok(file.metadata().io("Looking at a layer")?.len())
}

fn checked(file: &File, head: &[u8], max_size: u64) -> Result<Header> {
    header::parse(head, length(file)?, max_size).map_err(|refusal| {
        bad(&format!("a layer is not as it must be: {refusal}")).with_source(Error::from(refusal))
    })
}

/// A first cluster with what is kept of the file's own.
fn clean(file: &File, below: Option<(&str, &str)>) -> Result<Vec<u8>> {
    let mut old = [0; HEADER];
    if length(file)? < HEADER as u64 {
        return Err(bad("a layer is too short"));
    }
    file.read_exact_at(&mut old, 0).io("Reading a layer")?;
    let number = |at: usize| u32::from_be_bytes([old[at], old[at + 1], old[at + 2], old[at + 3]]);
    let cluster_bits = number(20);
    if old[..4] != header::MAGIC || number(4) != VERSION_3 || !(9..=21).contains(&cluster_bits) {
        return Err(bad("a layer is no qcow2 file of version 3"));
    }
    let mut head = vec![0; 1 << cluster_bits];
    head[..8].copy_from_slice(&old[..8]);
    for range in KEPT {
        head[range.clone()].copy_from_slice(&old[range]);
    }
    // A header that is shorter has no compression type, which means the first one.
    if number(100) > COMPRESSION as u32 {
        head[COMPRESSION] = old[COMPRESSION];
    }
    head[100..104].copy_from_slice(&(HEADER as u32).to_be_bytes());
    if let Some((name, format)) = below {
        put_below(&mut head, name, format);
    }
    Ok(head)
}

/// The format's extension, the end of the extensions, and the name behind them; not if there is no room.
pub(crate) fn put_below(head: &mut [u8], name: &str, format: &str) {
    let format_end = HEADER + 8 + format.len().next_multiple_of(8);
    let at = format_end + 8;
    // QEMU takes 1023 bytes.
    if name.len() > 1023 || at + name.len() > head.len() {
        return;
    }
    head[HEADER..HEADER + 4].copy_from_slice(&EXT_BACKING_FORMAT.to_be_bytes());
    head[HEADER + 4..HEADER + 8].copy_from_slice(&(format.len() as u32).to_be_bytes());
    head[HEADER + 8..HEADER + 8 + format.len()].copy_from_slice(format.as_bytes());
    head[at..at + name.len()].copy_from_slice(name.as_bytes());
    head[8..16].copy_from_slice(&(at as u64).to_be_bytes());
    head[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
}
