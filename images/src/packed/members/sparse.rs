//! Where a sparse member has its data: GNU's old form has it in the header and blocks behind it, PAX 0.1 in a record,
//! PAX 1.0 as decimal lines at the beginning of the data.

use std::io::BufRead;

use pileus_base::Result;
use tar::GnuExtSparseHeader;

use super::super::rule::Rule;
use super::header::Header;
use super::pax::{self, Sparse};
use super::{BLOCK, Found, Walk, fault};
use crate::archive::parts::{self, SparseMap};

impl<R: BufRead> Walk<R> {
    pub(super) fn old_sparse(&mut self, header: &Header, found: &mut Found) -> Result<()> {
        let gnu = header.gnu();
        let gnu = gnu.ok_or_else(|| Rule::SparseVersion.because("the header is not GNU's"))?;
        let size = parts::number(&gnu.realsize).map_err(fault)?;
        let mut map = SparseMap::new(size, self.bounds.extents);
        map.add_all(&gnu.sparse).map_err(fault)?;
        let mut more = gnu.is_extended();
        // One block may have no extents, so the number of extents is not enough of a bound.
        let mut blocks = self.bounds.extents / 21 + 2;
        while more {
            blocks = blocks
                .checked_sub(1)
                .ok_or_else(|| Rule::TooManyExtents.refuse())?;
            let mut entries = GnuExtSparseHeader::new();
            self.fill(entries.as_mut_bytes())?;
            map.add_all(entries.sparse()).map_err(fault)?;
            more = entries.is_extended();
        }
        found.size = size;
        found.finish(map)
    }

    pub(super) fn pax_sparse(&mut self, how: Sparse, found: &mut Found) -> Result<()> {
        let mut map = SparseMap::new(how.size, self.bounds.extents);
        found.size = how.size;
        match how.map {
            Some(pairs) => {
                for pair in pairs.chunks_exact(2) {
                    map.add(pair[0], pair[1]).map_err(fault)?;
                }
            }
            None => self.map_of_data(&mut map, found)?,
        }
        found.finish(map)
    }

    /// Version 1.0: how many extents, then place and length of each, a line a number, in whole blocks.
    fn map_of_data(&mut self, map: &mut SparseMap, found: &mut Found) -> Result<()> {
        let mut lines = Lines {
            block: [0; BLOCK as usize],
            at: BLOCK as usize,
        };
        let extents = lines.number(self, found)?;
        // One more: that which only tells the file's end.
        if extents > self.bounds.extents as u64 + 1 {
            return Err(Rule::TooManyExtents.refuse());
        }
        for _ in 0..extents {
            let offset = lines.number(self, found)?;
            let len = lines.number(self, found)?;
            map.add(offset, len).map_err(fault)?;
        }
        match lines.block[lines.at..].iter().all(|byte| *byte == 0) {
            true => Ok(()),
            false => Err(Rule::SparseMap.because("there is something behind it")),
        }
    }
}

impl Found {
    fn finish(&mut self, map: SparseMap) -> Result<()> {
        let (extents, stored) = map.finish();
        if stored != self.stored {
            return Err(Rule::SparseMap.because("its extents are not the data's size"));
        }
        self.extents = Some(extents);
        Ok(())
    }
}

/// Numbers out of blocks.
struct Lines {
    block: [u8; BLOCK as usize],
    at: usize,
}

impl Lines {
    fn number<R: BufRead>(&mut self, walk: &mut Walk<R>, found: &mut Found) -> Result<u64> {
        let mut digits = Vec::new();
        loop {
            if self.at == self.block.len() {
                let left = found.stored.checked_sub(BLOCK);
                found.stored =
                    left.ok_or_else(|| Rule::SparseMap.because("it ends in its middle"))?;
                walk.fill(&mut self.block)?;
                self.at = 0;
            }
            let byte = self.block[self.at];
            self.at += 1;
            match byte {
                b'\n' => {
                    return pax::number(&digits)
                        .map_err(|_| Rule::SparseMap.because("a number is none"));
                }
                _ if digits.len() < 20 => digits.push(byte),
                _ => return Err(Rule::SparseMap.because("a number is none")),
            }
        }
    }
}
