//! Where a disk's data lies and what its digest is, in one look at it by many threads: a tar wants to be told
//! of the holes before it gets the data.

use std::fs::File;

use pileus_base::{Digest, Result};

use crate::archive::extents::{BLOCK, Extent, Found};
use crate::packed::digest::{CHUNK, Chunk, each_chunk, of_found};
use crate::sparse::is_zero;

const BLOCKS: usize = (CHUNK / BLOCK) as usize;

/// What was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    pub extents: Vec<Extent>,
    pub digest: Digest,
    /// Bytes that are not zero, in whole blocks.
    pub data: u64,
}

/// Of a chunk that is not all zero: a bit for each block that isn't.
struct Seen([u64; BLOCKS / 64]);

impl Seen {
    fn of(bytes: &[u8]) -> Option<Self> {
        let mut blocks = [0; BLOCKS / 64];
        for (n, block) in bytes.chunks(BLOCK as usize).enumerate() {
            if !is_zero(block) {
                blocks[n / 64] |= 1 << (n % 64);
            }
        }
        (blocks != [0; BLOCKS / 64]).then_some(Self(blocks))
    }

    fn has(&self, n: usize) -> bool {
        self.0[n / 64] >> (n % 64) & 1 == 1
    }
}

/// Looks at a disk. Blocks.
pub fn survey(
    disk: &File,
    size: u64,
    threads: usize,
    moved: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Survey> {
    let chunks = each_chunk(disk, size, threads, moved, &Seen::of)?;
    let mut found = Found::default();
    let mut data = 0;
    for Chunk {
        index, found: seen, ..
    } in &chunks
    {
        for n in (0..BLOCKS).filter(|n| seen.has(*n)) {
            let offset = index * CHUNK + n as u64 * BLOCK;
            let len = BLOCK.min(size - offset);
            found.add(offset, len);
            data += len;
        }
    }
    Ok(Survey {
        extents: found.extents,
        digest: of_found(size, &chunks),
        data,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::extents::Source;
    use crate::packed::digest::of_file;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn it_sees_what_one_thread_sees(
            blocks in proptest::collection::btree_set(0..1200_u64, 0..80),
            tail in 0..5000_u64,
            threads in 1..4_usize,
            dense in any::<bool>(),
        ) {
            let file = tempfile::tempfile().unwrap();
            let size = 1200 * BLOCK + tail;
            if dense {
                file.write_all_at(&vec![0; size as usize], 0).unwrap();
            }
            file.set_len(size).unwrap();
            for n in &blocks {
                file.write_all_at(&[7], n * BLOCK + n).unwrap();
            }
            let seen = survey(&file, size, threads, &mut |_| Ok(())).unwrap();
            let source = Source::whole(&file).unwrap();
            prop_assert_eq!(seen.extents, source.extents(&mut |_| Ok(())).unwrap());
            prop_assert_eq!(seen.digest, of_file(&file, 1, &mut |_| Ok(())).unwrap());
            prop_assert_eq!(seen.data, blocks.len() as u64 * BLOCK);
        }
    }
}
