//! zstd as an archive may have it: frames one after the other, skippable ones between them, each of them whole, and
//! nothing else. Gives bytes as it gets them; who asks bounds what comes in and what comes out.
//!
//! Next step: `members` (the tar within).

use pileus_base::{Error, Result};
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, get_error_name};

use super::rule::Rule;
use crate::archive::parts::MAX_WINDOW_LOG;

/// Of zstd's error codes, which are stable.
const UNKNOWN_FRAME: usize = 10;
const WINDOW_TOO_LARGE: usize = 16;
const NO_MEMORY: usize = 64;

/// A stream of frames.
pub struct Frames {
    context: DCtx<'static>,
    /// A frame was begun and did not end.
    within: bool,
    /// One did end, so it is zstd.
    known: bool,
    /// Bytes that came in.
    taken: u64,
    /// The first bytes, to tell what it is if it is not zstd.
    head: Vec<u8>,
}

impl Frames {
    pub fn new() -> Result<Self> {
        let no_memory = || Error::internal("No memory for a zstd decoder");
        let mut context = DCtx::try_create().ok_or_else(no_memory)?;
        context
            .set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))
            .map_err(|code| Error::internal(get_error_name(code)))?;
        Ok(Self {
            context,
            within: false,
            known: false,
            taken: 0,
            head: Vec::new(),
        })
    }

    /// Bytes that came in so far.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Takes from `input` and gives to `output`; returns how many bytes it gave. With less than `output` has room for,
    /// all of `input` was taken.
    pub fn decompress(&mut self, input: &mut &[u8], output: &mut [u8]) -> Result<usize> {
        if self.head.len() < 264 {
            let room = 264 - self.head.len();
            self.head.extend_from_slice(&input[..input.len().min(room)]);
        }
        let mut given = OutBuffer::around(output);
        while given.pos() < given.capacity() {
            let mut taken = InBuffer::around(input);
            let before = given.pos();
            let left = self
                .context
                .decompress_stream(&mut given, &mut taken)
                .map_err(|code| self.refuse(code))?;
            let moved = taken.pos > 0 || given.pos() > before;
            self.taken += taken.pos as u64;
            *input = &input[taken.pos..];
            if moved {
                self.within = left != 0;
                self.known |= left == 0;
            }
            if input.is_empty() && given.pos() < given.capacity() || !moved {
                break;
            }
        }
        Ok(given.pos())
    }

    /// At the end of the input.
    pub fn finish(&self) -> Result<()> {
        match (self.within, self.other_format()) {
            (_, Some(what)) => Err(Rule::NotZstd.because(what)),
            (true, _) => Err(Rule::Truncated.refuse()),
            (false, _) if self.taken == 0 => Err(Rule::NotZstd.because("it is empty")),
            (false, _) => Ok(()),
        }
    }

    fn refuse(&self, code: usize) -> Error {
        let text = get_error_name(code);
        match 0_usize.wrapping_sub(code) {
            UNKNOWN_FRAME => match self.other_format() {
                Some(what) => Rule::NotZstd.because(what).advise(
                    "A packed image is a tar, compressed with zstd: unpack this one and run \
                     `tar -Sc disk.img layer.qcow2 machine.json | zstd` on what it holds.",
                ),
                None if !self.known => Rule::NotZstd.refuse(),
                None => Rule::ZstdTrailing.refuse(),
            },
            WINDOW_TOO_LARGE => Rule::ZstdWindow
                .refuse()
                .advise("Compress it with `--long=27` at most."),
            NO_MEMORY => Error::internal(text),
            _ => Rule::ZstdDamaged.because(text),
        }
    }

    /// What the first bytes say that is not zstd.
    fn other_format(&self) -> Option<&'static str> {
        let head = &self.head[..];
        [
            (&b"\x1f\x8b"[..], "it is compressed with gzip"),
            (b"\xfd7zXZ\0", "it is compressed with xz"),
            (b"BZh", "it is compressed with bzip2"),
            (b"\x04\x22\x4d\x18", "it is compressed with lz4"),
            (b"PK\x03\x04", "it is a zip archive"),
            (b"QFI\xfb", "it is a qcow2 disk"),
        ]
        .into_iter()
        .find(|(magic, _)| head.starts_with(magic))
        .map(|(_, what)| what)
        .or_else(|| {
            (head.get(257..262) == Some(b"ustar")).then_some("it is a tar without compression")
        })
    }
}

impl std::fmt::Debug for Frames {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Frames")
            .field("taken", &self.taken)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[path = "frames_tests.rs"]
mod tests;
