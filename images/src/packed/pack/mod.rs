//! A disk and a machine → `image.tar.zst`, as a stream or as a file that is there whole or not there. The same
//! content gives the same bytes: whatever the file system has of the disk, whoever packs it and in how many
//! threads.
//!
//! ```text
//! survey   the disk's data, holes and digest     many threads, page cache warm afterwards
//! layer    an empty layer.qcow2
//! stream   the tar as it will be, any part of it
//! press    the tar → frames of zstd             many threads
//! file     the archive, into a file
//! ```
//!
//! The small members go first, so that who looks at an archive needs not read all of it.
//!
//! Next step: `unpack` takes it in again.

mod file;
mod layer;
mod press;
mod stream;
mod survey;

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;

use pileus_base::{Code, Digest, Error, Phase, Reporter, Result, ResultExt};
use sha2::Digest as _;

use super::machine::Machine;
use super::manifest::{DiskMember, Manifest, Member, Members, Provenance};
use super::{LAYER, MACHINE, MANIFEST};
use crate::archive::out::{Tar, failed};
pub use file::pack_to_file;
use press::press;
use stream::Stream;
use survey::survey;

const LOOKING: &str = "Looking at the disk";
const SECTOR: u64 = 512;

/// What an archive is made of.
#[derive(Debug, Clone)]
pub struct PackSource<'a> {
    /// Raw, of whole sectors; it must not change meanwhile.
    pub disk: &'a File,
    pub machine: &'a Machine,
    pub provenance: Provenance,
}

/// An archive that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packed {
    /// SHA-256 of the archive: the image's name in a store that takes it in.
    pub digest: Digest,
    /// Bytes of the archive.
    pub size: u64,
    pub manifest: Manifest,
}

/// Writes an archive to a stream. Blocks; `threads` (at least one) look at the disk, and as many compress.
/// A reader that has gone is [`Code::Cancelled`].
pub fn pack(
    source: &PackSource<'_>,
    to: impl Write,
    threads: usize,
    report: &Reporter,
) -> Result<Packed> {
    report.phase(Phase::Archiving);
    let before = State::of(source.disk)?;
    let size = before.size;
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("A disk of {size} bytes can't be packed: it must consist of whole sectors"),
        ));
    }
    let allocated = source.disk.metadata().io(LOOKING)?.blocks() * 512;
    let mut progress = Progress::new(report, allocated.min(size));
    let seen = survey(source.disk, size, threads, &mut |bytes| {
        progress.moved(bytes)
    })?;
    let layer = layer::empty(size)?;
    let machine = source.machine.to_json();
    let manifest = Manifest::new(
        Members {
            disk: DiskMember {
                size,
                data: seen.data,
                digest: seen.digest.clone(),
            },
            layer: Member::of(&layer),
            machine: Member::of(&machine),
        },
        source.provenance.clone(),
    );
    let mut tar = Tar::new(Vec::new());
    tar.bytes(MANIFEST, &manifest.to_json()?)?;
    tar.bytes(MACHINE, &machine)?;
    tar.bytes(LAYER, &layer)?;
    let stream = Stream::new(tar, source.disk, size, &seen.extents)?;
    progress.write(stream.len());
    let mut hashed = Hashed::new(to);
    press(&stream, threads, &mut |frame, bytes| {
        hashed.write_all(frame).map_err(failed)?;
        progress.moved(bytes)
    })?;
    hashed.flush().map_err(failed)?;
    if State::of(source.disk)? != before {
        return Err(Error::new(
            Code::WrongState,
            "The disk was written to while it was packed",
        )
        .advise("Stop what uses it, and pack it again."));
    }
    Ok(Packed {
        digest: Digest::from_bytes(hashed.hash.finalize().into()),
        size: hashed.written,
        manifest,
    })
}

/// What shows that a file was written to.
#[derive(Debug, PartialEq, Eq)]
struct State {
    size: u64,
    modified: (i64, i64),
}

impl State {
    fn of(file: &File) -> Result<Self> {
        let found = file.metadata().io(LOOKING)?;
        Ok(Self {
            size: found.len(),
            modified: (found.mtime(), found.mtime_nsec()),
        })
    }
}

/// Counts and hashes what goes through.
struct Hashed<W> {
    to: W,
    hash: sha2::Sha256,
    written: u64,
}

impl<W> Hashed<W> {
    fn new(to: W) -> Self {
        Self {
            to,
            hash: sha2::Sha256::new(),
            written: 0,
        }
    }
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.to.write(bytes)?;
        self.hash.update(&bytes[..len]);
        self.written += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

/// The disk is looked at, which is told as the first tenth of the work, and then written.
struct Progress<'a> {
    report: &'a Reporter,
    /// Bytes that the disk has by what its file system says.
    whole: u64,
    /// Of `of` in this part.
    done: u64,
    of: u64,
    writing: bool,
}

impl<'a> Progress<'a> {
    fn new(report: &'a Reporter, whole: u64) -> Self {
        Self {
            report,
            whole,
            done: 0,
            of: whole,
            writing: false,
        }
    }

    fn write(&mut self, bytes: u64) {
        self.done = 0;
        self.of = bytes;
        self.writing = true;
    }

    fn moved(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        let tenth = self.whole / 10;
        let (before, share) = match self.writing {
            false => (0, tenth),
            true => (tenth, self.whole - tenth),
        };
        let part = u128::from(share) * u128::from(self.done.min(self.of));
        let part = part / u128::from(self.of.max(1));
        self.report.progress(before + part as u64, Some(self.whole));
        self.report.check()
    }
}
