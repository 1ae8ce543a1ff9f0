//! An archive's tar as it will be, of which any part can be read: what is around the disk's data is in memory, the
//! data is read when it is asked for. So many threads can work at it at once.
//!
//! Next step: `press` compresses it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use pileus_base::Result;

use crate::archive::extents::{Extent, is_dense};
use crate::archive::out::Tar;
use crate::packed::DISK;

/// A tar of some small members and, behind them, a disk.
#[derive(Debug)]
pub struct Stream<'a> {
    head: Vec<u8>,
    disk: &'a File,
    extents: &'a [Extent],
    /// Where each extent begins in the data, which is all of them together.
    begins: Vec<u64>,
    data: u64,
    tail: Vec<u8>,
}

impl<'a> Stream<'a> {
    /// Behind what `tar` has so far come `size` bytes of a disk that has its data in `extents`.
    pub fn new(
        mut tar: Tar<Vec<u8>>,
        disk: &'a File,
        size: u64,
        extents: &'a [Extent],
    ) -> Result<Self> {
        tar.begin_member(DISK, extents, size, is_dense(extents, size))?;
        let head = tar.written() as usize;
        let mut data = 0;
        let begin = |extent: &Extent| {
            data += extent.len;
            data - extent.len
        };
        let begins = extents.iter().map(begin).collect();
        tar.skip(data);
        tar.end_member()?;
        let mut around = tar.finish()?;
        let tail = around.split_off(head);
        Ok(Self {
            head: around,
            disk,
            extents,
            begins,
            data,
            tail,
        })
    }

    /// Bytes of all of it.
    pub fn len(&self) -> u64 {
        self.head.len() as u64 + self.data + self.tail.len() as u64
    }

    /// Fills `bytes` with what lies at `at`; all of that must be within it.
    pub fn read_at(&self, mut bytes: &mut [u8], mut at: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            let read = self.part(bytes, at)?;
            bytes = &mut bytes[read..];
            at += read as u64;
        }
        Ok(())
    }

    /// The first of them, as many as lie in one place.
    fn part(&self, bytes: &mut [u8], at: u64) -> io::Result<usize> {
        let head = self.head.len() as u64;
        let of_data = at.wrapping_sub(head);
        if at < head {
            copy(bytes, &self.head[at as usize..])
        } else if of_data < self.data {
            let n = self.begins.partition_point(|begin| *begin <= of_data) - 1;
            let within = of_data - self.begins[n];
            let left = self.extents[n].len - within;
            let len = bytes.len().min(left as usize);
            let offset = self.extents[n].offset + within;
            self.disk.read_exact_at(&mut bytes[..len], offset)?;
            Ok(len)
        } else {
            let of_tail = (of_data - self.data) as usize;
            copy(bytes, self.tail.get(of_tail..).unwrap_or_default())
        }
    }
}

fn copy(bytes: &mut [u8], from: &[u8]) -> io::Result<usize> {
    let len = bytes.len().min(from.len());
    bytes[..len].copy_from_slice(&from[..len]);
    match len {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(len),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is written one after the other.
    fn written(disk: &File, size: u64, extents: &[Extent]) -> Vec<u8> {
        let mut tar = small();
        let dense = is_dense(extents, size);
        tar.begin_member(DISK, extents, size, dense).unwrap();
        for extent in extents {
            let mut bytes = vec![0; extent.len as usize];
            disk.read_exact_at(&mut bytes, extent.offset).unwrap();
            tar.data(&bytes).unwrap();
        }
        tar.end_member().unwrap();
        tar.finish().unwrap()
    }

    fn small() -> Tar<Vec<u8>> {
        let mut tar = Tar::new(Vec::new());
        tar.bytes("small", b"a member").unwrap();
        tar
    }

    #[test]
    fn each_part_is_what_would_be_written_there() {
        let disk = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..50_000_u32).map(|n| (n % 251) as u8).collect();
        disk.write_all_at(&bytes, 0).unwrap();
        let extent = |offset, len| Extent { offset, len };
        // More than a header names.
        let many: Vec<_> = (0..40).map(|n| extent(n * 1200, 700)).collect();
        for (size, extents) in [
            (50_000, vec![extent(0, 50_000)]),
            (50_000, vec![]),
            (50_000, vec![extent(4096, 1), extent(4098, 5000)]),
            (50_000, vec![extent(49_000, 1000)]),
            (1 << 40, many),
        ] {
            let want = written(&disk, size, &extents);
            let stream = Stream::new(small(), &disk, size, &extents).unwrap();
            assert_eq!(stream.len(), want.len() as u64);
            for piece in [1, 511, 512, 700, 4096, want.len()] {
                for (n, want) in want.chunks(piece).enumerate() {
                    let mut got = vec![0; want.len()];
                    stream.read_at(&mut got, (n * piece) as u64).unwrap();
                    assert!(got == want, "piece {n} of {piece} bytes");
                }
            }
            assert!(stream.read_at(&mut [0; 2], stream.len() - 1).is_err());
        }
    }
}
