//! Writing an archive to a stream: tar into zstd, in one pass, with bounded memory. A reader that has gone is
//! an error of the next write.

use std::fs::File;
use std::io::{self, Write};

use pileus_base::{Code, Digest, Error, Result};
use tar::{EntryType, GnuExtSparseHeader, GnuSparseHeader, Header};

use super::DIGESTS;
use super::extents::{Extent, Source, is_dense};
use super::member::{BLOCK, MemberHash, Moved};

/// The ancestor's level, and zstd's own default.
const LEVEL: i32 = 3;
const CHUNK: usize = 256 << 10;
/// A tar's length is a multiple of this.
const RECORD: u64 = 10_240;

/// Writes members one after the other.
pub struct Writer<W: Write> {
    out: Counted<zstd::stream::write::Encoder<'static, W>>,
    digests: serde_json::Map<String, serde_json::Value>,
}

impl<W: Write> Writer<W> {
    /// Compresses in threads of its own; how many makes no difference to the bytes.
    pub fn new(to: W, threads: u32) -> Result<Self> {
        let encoder = || {
            let mut encoder = zstd::stream::write::Encoder::new(to, LEVEL)?;
            encoder.include_checksum(true)?;
            encoder.multithread(threads.max(1))?;
            Ok::<_, io::Error>(encoder)
        };
        Ok(Self {
            out: Counted {
                to: encoder().map_err(failed)?,
                written: 0,
            },
            digests: serde_json::Map::new(),
        })
    }

    /// A small member.
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<Digest> {
        let mut hash = MemberHash::new(true);
        hash.data(bytes);
        let mut header = header(name, EntryType::Regular, bytes.len() as u64)?;
        header.set_cksum();
        let mut write = || {
            self.out.write_all(header.as_bytes())?;
            self.out.write_all(bytes)?;
            self.out.pad(BLOCK)
        };
        write().map_err(failed)?;
        Ok(self.note(name, hash.finish(bytes.len() as u64)))
    }

    /// A file that doesn't change meanwhile, with holes where it has zeros.
    pub fn file(&mut self, name: &str, source: Source<'_>, moved: Moved<'_>) -> Result<Digest> {
        let extents = extents(name, source, moved)?;
        let dense = is_dense(&extents, source.len);
        self.head(name, &extents, source.len, dense)?;
        let mut hash = MemberHash::new(dense);
        let out = &mut self.out;
        walk(name, source, &extents, &mut hash, &mut |piece| {
            out.write_all(piece).map_err(failed)?;
            moved(piece.len() as u64)
        })?;
        self.out.pad(BLOCK).map_err(failed)?;
        Ok(self.note(name, hash.finish(source.len)))
    }

    fn head(&mut self, name: &str, extents: &[Extent], len: u64, dense: bool) -> Result<()> {
        if dense {
            let mut header = header(name, EntryType::Regular, len)?;
            header.set_cksum();
            return self.out.write_all(header.as_bytes()).map_err(failed);
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
        self.out.write_all(header.as_bytes()).map_err(failed)?;
        while map.peek().is_some() {
            let mut more = GnuExtSparseHeader::new();
            fill(more.sparse_mut(), &mut map);
            more.set_is_extended(map.peek().is_some());
            self.out.write_all(more.as_bytes()).map_err(failed)?;
        }
        Ok(())
    }

    fn note(&mut self, name: &str, digest: Digest) -> Digest {
        self.digests
            .insert(name.to_owned(), digest.to_string().into());
        digest
    }

    /// Writes the digests and the end.
    pub fn finish(mut self) -> Result<W> {
        let digests = std::mem::take(&mut self.digests);
        let text = serde_json::to_vec_pretty(&digests)
            .map_err(|err| Error::internal(format!("Writing {DIGESTS}: {err}")))?;
        self.bytes(DIGESTS, &text)?;
        let mut end = || {
            self.out.write_all(&[0; 2 * BLOCK as usize])?;
            self.out.pad(RECORD)
        };
        end().map_err(failed)?;
        let mut to = self.out.to.finish().map_err(failed)?;
        to.flush().map_err(failed)?;
        Ok(to)
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
fn failed(err: io::Error) -> Error {
    match err.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
            Error::new(Code::Cancelled, "The archive's reader has gone").with_source(err)
        }
        _ => Error::io("Writing the archive", err),
    }
}

struct Counted<W> {
    to: W,
    written: u64,
}

impl<W: Write> Counted<W> {
    /// Zeros up to a multiple of `to`.
    fn pad(&mut self, to: u64) -> io::Result<()> {
        let missing = self.written.next_multiple_of(to) - self.written;
        self.write_all(&[0; RECORD as usize][..missing as usize])
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

/// A file's digest as [`Writer::file`] makes it, without an archive.
pub fn digest_of(file: &File, moved: Moved<'_>) -> Result<Digest> {
    let name = "a file";
    let source = Source::whole(file).map_err(|err| Error::io("Looking at a file", err))?;
    let extents = extents(name, source, moved)?;
    let mut hash = MemberHash::new(is_dense(&extents, source.len));
    walk(name, source, &extents, &mut hash, &mut |piece| {
        moved(piece.len() as u64)
    })?;
    Ok(hash.finish(source.len))
}

fn extents(name: &str, source: Source<'_>, moved: Moved<'_>) -> Result<Vec<Extent>> {
    // Its own error travels past the file's.
    let mut stopped = None;
    let looked = source.extents(&mut |_| {
        moved(0).map_err(|err| {
            stopped = Some(err);
            io::ErrorKind::Interrupted.into()
        })
    });
    match stopped {
        Some(err) => Err(err),
        None => looked.map_err(|err| Error::io(format!("Reading {name}"), err)),
    }
}

/// Hashes the data of the extents and hands it on.
fn walk(
    name: &str,
    source: Source<'_>,
    extents: &[Extent],
    hash: &mut MemberHash,
    each: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut buffer = vec![0; CHUNK];
    for extent in extents {
        hash.extent(*extent);
        let mut at = extent.offset;
        while at < extent.end() {
            let len = (extent.end() - at).min(CHUNK as u64) as usize;
            let piece = &mut buffer[..len];
            source
                .read_at(piece, at)
                .map_err(|err| Error::io(format!("Reading {name}"), err))?;
            hash.data(piece);
            each(piece)?;
            at += len as u64;
        }
    }
    Ok(())
}
