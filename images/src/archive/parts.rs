//! What the two strict readers of tars have in common: `read` (instances' archives) and `packed/members`
//! (packed images). Each of them says in its own words what is wrong.

use std::fmt;

use tar::GnuSparseHeader;

use super::extents::Extent;

/// 2^27 bytes: what a decoder may allocate for an archive, and what the ancestor's readers took.
pub const MAX_WINDOW_LOG: u32 = 27;
/// Zeros behind the end: a tar's last record, and as much again as anybody may have padded it with.
pub const MOST_PADDING: u64 = 1 << 20;
/// No size is larger, so that sums of two of them can't overflow.
const MOST: u64 = 1 << 62;

/// What is wrong with a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    Number,
    Checksum,
    Extent,
    EmptyExtent,
    TooManyExtents,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Number => "a number is none, or makes no sense",
            Self::Checksum => "it is no tar, or damaged",
            Self::Extent => "an extent lies outside of its file, or in another one",
            Self::EmptyExtent => "an extent is empty",
            Self::TooManyExtents => "a member has too many extents",
        })
    }
}

/// A number of a header: octal digits between spaces or NULs, or base-256 where it needs more digits.
pub fn number(field: &[u8]) -> Result<u64, Fault> {
    let value = match field {
        [0x80, rest @ ..] => {
            let (high, low) = rest.split_at(rest.len().saturating_sub(8));
            let zero = high.iter().all(|byte| *byte == 0);
            let value = low
                .iter()
                .fold(0, |value, byte| value << 8 | u64::from(*byte));
            zero.then_some(value)
        }
        _ => octal(field),
    };
    value.filter(|value| *value <= MOST).ok_or(Fault::Number)
}

fn octal(field: &[u8]) -> Option<u64> {
    let digits = field.trim_ascii_start();
    let end = digits.iter().position(|byte| matches!(byte, 0 | b' '));
    let (digits, rest) = digits.split_at(end.unwrap_or(digits.len()));
    if digits.is_empty() || !rest.iter().all(|byte| matches!(byte, 0 | b' ')) {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

/// Compares a header with its checksum.
pub fn checksum(header: &[u8; 512]) -> Result<(), Fault> {
    let stored = number(&header[148..156]).map_err(|_| Fault::Checksum)?;
    let all: u64 = header.iter().map(|byte| u64::from(*byte)).sum();
    let own: u64 = header[148..156].iter().map(|byte| u64::from(*byte)).sum();
    match all - own + 8 * u64::from(b' ') == stored {
        true => Ok(()),
        false => Err(Fault::Checksum),
    }
}

/// A sparse member's map as it comes in: extents in rising order, none in another, all within the file.
#[derive(Debug)]
pub struct SparseMap {
    size: u64,
    most: usize,
    extents: Vec<Extent>,
    /// Behind the entry that only tells the file's end.
    ended: bool,
}

impl SparseMap {
    /// Of a file of `size` bytes with at most so many extents.
    pub fn new(size: u64, most: usize) -> Self {
        Self {
            size,
            most,
            extents: Vec::new(),
            ended: false,
        }
    }

    /// Entries of a GNU header; what it doesn't use is empty.
    pub fn add_all(&mut self, entries: &[GnuSparseHeader]) -> Result<(), Fault> {
        for entry in entries {
            if entry.offset[0] != 0 || entry.numbytes[0] != 0 {
                self.add(number(&entry.offset)?, number(&entry.numbytes)?)?;
            }
        }
        Ok(())
    }

    pub fn add(&mut self, offset: u64, len: u64) -> Result<(), Fault> {
        let before = self.extents.last().map_or(0, |last| last.end());
        let end = offset.checked_add(len);
        let inside = end.is_some_and(|end| end <= self.size) && offset >= before;
        if !inside || self.ended {
            return Err(Fault::Extent);
        }
        if len == 0 {
            if offset != self.size {
                return Err(Fault::EmptyExtent);
            }
            self.ended = true;
            return Ok(());
        }
        if self.extents.len() >= self.most {
            return Err(Fault::TooManyExtents);
        }
        self.extents.push(Extent { offset, len });
        Ok(())
    }

    /// The extents, and how many bytes they have.
    pub fn finish(self) -> (Vec<Extent>, u64) {
        let stored = self.extents.iter().map(|extent| extent.len).sum();
        (self.extents, stored)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (field, want) in [
            (&b"00000000017\0"[..], Some(15)),
            (b"     17 \0", Some(15)),
            (b"77777777777\0", Some((8 << 30) - 1)),
            (b"777777777777", Some((64 << 30) - 1)),
            (b"\x80\0\0\0\0\0\0\x02\0\0\0\0", Some(8 << 30)),
            (b"\x80\0\0\x01\0\0\0\x02\0\0\0\0", None),
            (b"\x80\0\0\0\x7f\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\0\0\0\0\0\0\0\0", None),
            (b"        ", None),
            (b"12 34\0\0\0", None),
            (b"0000008\0", None),
            (b"-000001\0", None),
        ] {
            assert_eq!(number(field).ok(), want, "{field:?}");
        }
    }

    #[test]
    fn a_map_rises_and_stays_inside() {
        let map = |entries: &[(u64, u64)]| {
            let mut map = SparseMap::new(100, 2);
            entries.iter().try_for_each(|(at, len)| map.add(*at, *len))
        };
        assert_eq!(map(&[(0, 10), (10, 90), (100, 0)]), Ok(()));
        assert_eq!(map(&[(0, 10), (9, 1)]), Err(Fault::Extent));
        assert_eq!(map(&[(0, 101)]), Err(Fault::Extent));
        assert_eq!(map(&[(1, u64::MAX)]), Err(Fault::Extent));
        assert_eq!(map(&[(100, 0), (100, 0)]), Err(Fault::Extent));
        assert_eq!(map(&[(50, 0)]), Err(Fault::EmptyExtent));
        assert_eq!(map(&[(0, 1), (2, 1), (4, 1)]), Err(Fault::TooManyExtents));
    }
}
