//! Writing a stream to a file so that its zero blocks become holes, within a budget of bytes.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};

/// Holes are made of whole blocks of this size, the usual one of file systems.
const BLOCK: usize = 4096;
static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// Whether there is nothing but zeros: a comparison with zeros, which the C library does at the speed of memory.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(BLOCK)
        .all(|block| block == &ZEROS[..block.len()])
}

/// A writer that skips zero blocks. `finish` must be called: it sets the length.
#[derive(Debug)]
pub struct SparseWriter {
    file: File,
    position: u64,
    limit: u64,
}

impl SparseWriter {
    /// `file` must be empty. Writing more than `limit` bytes fails with `FileTooLarge`.
    pub fn new(file: File, limit: u64) -> Self {
        Self {
            file,
            position: 0,
            limit,
        }
    }

    pub fn position(&self) -> u64 {
        self.position
    }

    /// Goes on at `position`; what is skipped becomes a hole.
    pub fn skip_to(&mut self, position: u64) {
        self.position = position;
    }

    pub fn finish(self) -> io::Result<File> {
        self.file.set_len(self.position)?;
        Ok(self.file)
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        if !is_zero(bytes) {
            self.file.seek(SeekFrom::Start(self.position))?;
            self.file.write_all(bytes)?;
        }
        self.position += bytes.len() as u64;
        Ok(())
    }
}

impl Write for SparseWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.position + bytes.len() as u64 > self.limit {
            return Err(io::Error::new(
                io::ErrorKind::FileTooLarge,
                format!("more than {} bytes", self.limit),
            ));
        }
        // Up to the next block's beginning, then runs of blocks that are all zero or all not.
        let head = (BLOCK - (self.position % BLOCK as u64) as usize) % BLOCK;
        let (head, mut rest) = bytes.split_at(head.min(bytes.len()));
        if !head.is_empty() {
            self.put(head)?;
        }
        while !rest.is_empty() {
            let zero = is_zero(&rest[..rest.len().min(BLOCK)]);
            let run: usize = rest
                .chunks(BLOCK)
                .take_while(|block| is_zero(block) == zero)
                .map(<[u8]>::len)
                .sum();
            let (now, later) = rest.split_at(run);
            if zero {
                self.position += now.len() as u64;
            } else {
                self.file.seek(SeekFrom::Start(self.position))?;
                self.file.write_all(now)?;
                self.position += now.len() as u64;
            }
            rest = later;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn zeros_take_no_room_and_the_limit_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let mut writer = SparseWriter::new(File::create(&path).unwrap(), 64 << 20);
        writer.write_all(b"begin").unwrap();
        writer.write_all(&vec![0; 32 << 20]).unwrap();
        writer.write_all(b"end").unwrap();
        assert_eq!(
            writer.write_all(&vec![0; 32 << 20]).unwrap_err().kind(),
            io::ErrorKind::FileTooLarge
        );
        writer.finish().unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), (32 << 20) + 8);
        assert!(meta.blocks() * 512 < 1 << 20, "{}", meta.blocks());
    }

    proptest! {
        #[test]
        fn what_is_read_is_what_was_written(
            pieces in proptest::collection::vec((0_usize..9000, any::<bool>()), 0..20)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("f");
            let mut writer = SparseWriter::new(File::create(&path).unwrap(), u64::MAX);
            let mut want = Vec::new();
            for (len, zero) in pieces {
                let piece = vec![if zero { 0 } else { 7 }; len];
                writer.write_all(&piece).unwrap();
                want.extend(piece);
            }
            writer.finish().unwrap();
            prop_assert!(std::fs::read(&path).unwrap() == want);
        }
    }
}
