//! Where a file has data: found by its zero blocks, so that the answer depends on the content only. What the
//! file system knows of holes only saves the reading of them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;

use crate::sparse::is_zero;

/// Zeros are looked for in whole blocks of this size.
pub const BLOCK: u64 = 4096;
/// Holes that are shorter are written as zeros: an entry of the map costs something as well.
const SHORTEST_HOLE: u64 = 64 << 10;
/// A file with more gets longer shortest holes, and a reader takes no more.
pub const MOST: usize = 1 << 18;
const CHUNK: usize = 1 << 20;

/// A run of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
}

impl Extent {
    pub fn end(self) -> u64 {
        self.offset + self.len
    }
}

/// A file of which the first bytes are replaced by others.
#[derive(Debug, Clone, Copy)]
pub struct Source<'a> {
    pub file: &'a File,
    pub len: u64,
    pub head: &'a [u8],
}

impl<'a> Source<'a> {
    /// A file as it is.
    pub fn whole(file: &'a File) -> io::Result<Self> {
        Ok(Self {
            file,
            len: file.metadata()?.len(),
            head: &[],
        })
    }

    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let head = self.head.get(offset as usize..).unwrap_or_default();
        let of_head = head.len().min(bytes.len());
        let (front, rest) = bytes.split_at_mut(of_head);
        front.copy_from_slice(&head[..of_head]);
        self.file.read_exact_at(rest, offset + of_head as u64)
    }

    /// The next data that the file system knows of, from `at` on.
    fn next_data(&self, at: u64) -> io::Result<Option<Extent>> {
        if at < self.head.len() as u64 {
            let end = (self.head.len() as u64).min(self.len);
            return Ok(Some(Extent {
                offset: at,
                len: end - at,
            }));
        }
        let offset = match rustix::fs::seek(self.file, SeekFrom::Data(at)) {
            Ok(offset) => offset,
            // No data behind.
            Err(rustix::io::Errno::NXIO) => return Ok(None),
            // A file system that knows nothing of holes.
            Err(rustix::io::Errno::INVAL) => at,
            Err(err) => return Err(err.into()),
        };
        let end = rustix::fs::seek(self.file, SeekFrom::Hole(offset)).unwrap_or(self.len);
        let end = end.min(self.len);
        Ok((offset < end).then(|| Extent {
            offset,
            len: end - offset,
        }))
    }

    /// Where the data is. Tells `each` how many bytes were looked at since the last time.
    pub fn extents(&self, each: &mut dyn FnMut(u64) -> io::Result<()>) -> io::Result<Vec<Extent>> {
        let mut found = Found::default();
        let mut buffer = vec![0; CHUNK];
        let mut at = 0;
        while at < self.len {
            let Some(data) = self.next_data(at)? else {
                break;
            };
            // Whole blocks, so that the result is the same however the file system has them.
            at = data.offset / BLOCK * BLOCK;
            let end = data.end().next_multiple_of(BLOCK).min(self.len);
            while at < end {
                let len = (end - at).min(CHUNK as u64) as usize;
                self.read_at(&mut buffer[..len], at)?;
                for block in buffer[..len].chunks(BLOCK as usize) {
                    if !is_zero(block) {
                        found.add(at, block.len() as u64);
                    }
                    at += block.len() as u64;
                }
                each(len as u64)?;
            }
        }
        Ok(found.extents)
    }
}

/// A map in the making: runs of data that are near to each other become one.
#[derive(Debug)]
pub struct Found {
    pub extents: Vec<Extent>,
    shortest: u64,
}

impl Default for Found {
    fn default() -> Self {
        Self {
            extents: Vec::new(),
            shortest: SHORTEST_HOLE,
        }
    }
}

impl Found {
    /// The next data, in order.
    pub fn add(&mut self, offset: u64, len: u64) {
        match self.extents.last_mut() {
            Some(last) if offset < last.end() + self.shortest => {
                last.len = offset + len - last.offset
            }
            _ => self.extents.push(Extent { offset, len }),
        }
        while self.extents.len() > MOST {
            self.shortest *= 2;
            for extent in std::mem::take(&mut self.extents) {
                self.add(extent.offset, extent.len);
            }
        }
    }
}

/// Whether a member is written as an ordinary file: it has no holes.
pub fn is_dense(extents: &[Extent], len: u64) -> bool {
    match extents {
        [] => len == 0,
        [one] => one.offset == 0 && one.len == len,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn extents_of(file: &File) -> Vec<(u64, u64)> {
        let source = Source::whole(file).unwrap();
        let found = source.extents(&mut |_| Ok(())).unwrap();
        found.iter().map(|e| (e.offset, e.len)).collect()
    }

    #[test]
    fn zeros_are_holes_whatever_the_file_system_has() {
        let mut bytes = vec![0_u8; 2 << 20];
        bytes[5000] = 1;
        // Near enough to the first to be one with it.
        bytes[40_000] = 1;
        bytes[1 << 20] = 1;
        *bytes.last_mut().unwrap() = 1;
        bytes.extend([7; 10]);
        let mut dense = tempfile::tempfile().unwrap();
        dense.write_all(&bytes).unwrap();
        let sparse = tempfile::tempfile().unwrap();
        for (at, byte) in bytes.iter().enumerate().filter(|(_, byte)| **byte != 0) {
            sparse.write_all_at(&[*byte], at as u64).unwrap();
        }
        let want = vec![
            (4096, 36_864),
            (1 << 20, 4096),
            ((2 << 20) - 4096, 4096 + 10),
        ];
        assert_eq!(extents_of(&dense), want);
        assert_eq!(extents_of(&sparse), want);
        dense.set_len(0).unwrap();
        assert_eq!(extents_of(&dense), []);
        dense.set_len(10 << 30).unwrap();
        assert_eq!(extents_of(&dense), []);
    }

    #[test]
    fn a_head_takes_the_place_of_the_files_own() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        file.set_len(1 << 20).unwrap();
        let head = vec![0; 4096];
        let source = Source {
            file: &file,
            len: 1 << 20,
            head: &head,
        };
        let found = source.extents(&mut |_| Ok(())).unwrap();
        assert_eq!(
            found,
            [Extent {
                offset: 4096,
                len: 4096
            }]
        );
        let mut bytes = [9; 3];
        source.read_at(&mut bytes, 4095).unwrap();
        assert_eq!(bytes, [0, 1, 1]);
    }

    #[test]
    fn a_map_never_grows_beyond_what_readers_take() {
        let mut found = Found::default();
        for n in 0..(MOST as u64 * 2) {
            // Every hundredth hole is a long one.
            found.add(n * (128 << 10) + n / 100 * (1 << 20), 4096);
        }
        assert!(found.extents.len() <= MOST && found.extents.len() > 1000);
        assert_eq!(found.extents.last().unwrap().end() % 4096, 0);
    }
}
