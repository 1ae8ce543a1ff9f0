//! A tar as a stream on its way out: headers that say nothing of the host, GNU's old sparse members. And zstd
//! around it, in threads of its own.
//!
//! Next step: `write` (instances), `packed/pack` (images).

use std::io::{self, Write};

use pileus_base::{Code, Error, Result};
use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};
use zstd::zstd_safe::CParameter;

use super::extents::Extent;
use super::member::BLOCK;

/// The ancestor's level, and zstd's own default.
const LEVEL: i32 = 3;
/// Bytes that one thread compresses by itself.
const JOB: u32 = 16 << 20;
/// A tar's length is a multiple of this.
const RECORD: u64 = 10_240;

pub type Encoder<W> = zstd::stream::write::Encoder<'static, W>;

/// Compresses in threads of its own; how many makes no difference to the bytes.
pub fn compress<W: Write>(to: W, threads: u32) -> Result<Encoder<W>> {
    let encoder = || {
        let mut encoder = Encoder::new(to, LEVEL)?;
        encoder.include_checksum(true)?;
        encoder.multithread(threads.max(1))?;
        // Pieces begin without a look at the one before: nothing is read twice, and of pieces this long the archive
        // gets hardly larger.
        encoder.set_parameter(CParameter::JobSize(JOB))?;
        encoder.set_parameter(CParameter::OverlapSizeLog(1))?;
        Ok::<_, io::Error>(encoder)
    };
    encoder().map_err(failed)
}

/// A tar in the making.
#[derive(Debug)]
pub struct Tar<W> {
    to: W,
    written: u64,
}

impl<W: Write> Tar<W> {
    pub fn new(to: W) -> Self {
        Self { to, written: 0 }
    }

    /// A small member.
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut header = header(name, EntryType::Regular, bytes.len() as u64)?;
        header.set_cksum();
        self.data(header.as_bytes())?;
        self.data(bytes)?;
        self.end_member()
    }

    /// A member's beginning; the data of its extents must follow, and then [`Tar::end_member`].
    pub fn begin_member(
        &mut self,
        name: &str,
        extents: &[Extent],
        len: u64,
        dense: bool,
    ) -> Result<()> {
        if dense {
            let mut header = header(name, EntryType::Regular, len)?;
            header.set_cksum();
            return self.data(header.as_bytes());
        }
        let stored = extents.iter().map(|extent| extent.len).sum();
        let mut header = header(name, EntryType::GNUSparse, stored)?;
        // The end of the file, if that is a hole.
        let end = Extent {
            offset: len,
            len: 0,
        };
        let end = extents
            .last()
            .is_none_or(|last| last.end() < len)
            .then_some(end);
        let mut map = extents.iter().copied().chain(end).peekable();
        let gnu = header
            .as_gnu_mut()
            .ok_or_else(|| Error::internal("A new tar header has another form"))?;
        fill(&mut gnu.sparse, &mut map);
        gnu.set_real_size(len);
        gnu.set_is_extended(map.peek().is_some());
        header.set_cksum();
        self.data(header.as_bytes())?;
        while map.peek().is_some() {
            let mut more = GnuExtSparseHeader::new();
            fill(more.sparse_mut(), &mut map);
            more.set_is_extended(map.peek().is_some());
            self.data(more.as_bytes())?;
        }
        Ok(())
    }

    pub fn data(&mut self, bytes: &[u8]) -> Result<()> {
        self.to.write_all(bytes).map_err(failed)?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Counts data that gets to its place another way.
    pub fn skip(&mut self, len: u64) {
        self.written += len;
    }

    /// Bytes so far.
    pub fn written(&self) -> u64 {
        self.written
    }

    pub fn end_member(&mut self) -> Result<()> {
        self.pad(BLOCK)
    }

    /// Zeros up to a multiple of `to`.
    fn pad(&mut self, to: u64) -> Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        self.data(&[0; RECORD as usize][..missing as usize])
    }

    /// Writes the end.
    pub fn finish(mut self) -> Result<W> {
        self.data(&[0; 2 * BLOCK as usize])?;
        self.pad(RECORD)?;
        Ok(self.to)
    }
}

fn fill(entries: &mut [GnuSparseHeader], map: &mut impl Iterator<Item = Extent>) {
    // The iterator must not be asked for more than there is room for.
    for (entry, extent) in entries.iter_mut().zip(map) {
        entry.set_offset(extent.offset);
        entry.set_length(extent.len);
    }
}

/// A header that says nothing of this host.
fn header(name: &str, kind: EntryType, size: u64) -> Result<Header> {
    let mut header = Header::new_gnu();
    header
        .set_path(name)
        .map_err(|err| Error::internal(format!("{name} is no name for a member: {err}")))?;
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    Ok(header)
}

/// Errors of the way out: a reader that has gone wants nothing more.
pub fn failed(err: io::Error) -> Error {
    match err.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            Error::new(Code::Cancelled, "The archive's reader has gone").with_source(err)
        }
        _ => Error::io("Writing the archive", err),
    }
}
