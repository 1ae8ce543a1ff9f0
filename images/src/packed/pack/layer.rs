//! The layer.qcow2 that we write: empty, on top of disk.img, the same bytes for each size of disk.
//!
//! ```text
//! cluster 0    header, the backing file's format and name
//! cluster 1    the table of refcount blocks: one
//! cluster 2    that block: this file's own clusters, each used once
//! cluster 3 …  the first level's table: nothing is allocated
//! ```

use pileus_base::{Code, Error, Result, Size};

use crate::archive::layer::{HEADER, VERSION_3, put_below};
use crate::packed::DISK;
use crate::qcow2::header::MAGIC;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// What one entry of the first level's table covers.
const COVERED: u64 = CLUSTER * (CLUSTER / 8);
/// QEMU's bound of that table.
const MOST_L1_BYTES: u64 = 32 << 20;
/// Refcounts have 16 bits.
const REFCOUNT_ORDER: u32 = 4;
const SECTOR: u64 = 512;

/// A layer for a disk of so many bytes, of which nothing is allocated.
pub fn empty(disk: u64) -> Result<Vec<u8>> {
    let entries = disk.div_ceil(COVERED);
    if entries * 8 > MOST_L1_BYTES {
        return Err(Error::new(
            Code::ImageTooLarge,
            format!("A disk of {} is too large for a packed image", Size(disk)),
        ));
    }
    let l1 = 3 * CLUSTER;
    // As QEMU does, the last cluster is as long as what is in it.
    let mut file = vec![0; (l1 + (entries * 8).next_multiple_of(SECTOR)) as usize];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &MAGIC);
    put(4, &VERSION_3.to_be_bytes());
    put(20, &CLUSTER_BITS.to_be_bytes());
    put(24, &disk.to_be_bytes());
    put(36, &(entries as u32).to_be_bytes());
    put(40, &l1.to_be_bytes());
    put(48, &CLUSTER.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &REFCOUNT_ORDER.to_be_bytes());
    put(100, &(HEADER as u32).to_be_bytes());
    put(CLUSTER as usize, &(2 * CLUSTER).to_be_bytes());
    let clusters = (file.len() as u64).div_ceil(CLUSTER);
    for n in 0..clusters {
        let at = (2 * CLUSTER + 2 * n) as usize;
        file[at..at + 2].copy_from_slice(&1_u16.to_be_bytes());
    }
    put_below(&mut file[..CLUSTER as usize], DISK, "raw");
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header;

    #[test]
    fn its_tables_fit_for_every_size() {
        for disk in [512, 1 << 20, 20 << 30, 50 << 30, (2 << 40) - 512, 1 << 46] {
            let layer = empty(disk).unwrap();
            let entries = disk.div_ceil(512 << 20);
            assert!(layer.len() as u64 >= 3 * CLUSTER + entries * 8);
            assert!(layer.len() as u64 - entries * 8 - 3 * CLUSTER < 512);
            // An image that stands alone must not name another file: this is all that it has against it.
            let refused = header::parse(&layer, layer.len() as u64, disk).unwrap_err();
            assert_eq!(refused, header::Refusal::BackingFile);
        }
        assert_eq!(empty(1 << 60).unwrap_err().code, Code::ImageTooLarge);
    }
}
