//! Writing an archive to a stream: tar into zstd, in one pass, with bounded memory. A reader that has gone is
//! an error of the next write.

use std::fs::File;
use std::io::{self, Write};

use pileus_base::{Digest, Error, Result};

use super::DIGESTS;
use super::extents::{Extent, Source, is_dense};
use super::member::{MemberHash, Moved};
use super::out::{Encoder, Tar, compress, failed};

const CHUNK: usize = 256 << 10;

/// Writes members one after the other.
pub struct Writer<W: Write> {
    out: Tar<Encoder<W>>,
    digests: serde_json::Map<String, serde_json::Value>,
}

impl<W: Write> Writer<W> {
    /// Compresses in threads of its own; how many makes no difference to the bytes.
    pub fn new(to: W, threads: u32) -> Result<Self> {
        Ok(Self {
            out: Tar::new(compress(to, threads)?),
            digests: serde_json::Map::new(),
        })
    }

    /// A small member.
    pub fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<Digest> {
        let mut hash = MemberHash::new(true);
        hash.data(bytes);
        self.out.bytes(name, bytes)?;
        Ok(self.note(name, hash.finish(bytes.len() as u64)))
    }

    /// A file that doesn't change meanwhile, with holes where it has zeros.
    pub fn file(&mut self, name: &str, source: Source<'_>, moved: Moved<'_>) -> Result<Digest> {
        let extents = extents(name, source, moved)?;
        let dense = is_dense(&extents, source.len);
        self.out.begin_member(name, &extents, source.len, dense)?;
        let mut hash = MemberHash::new(dense);
        let out = &mut self.out;
        walk(name, source, &extents, &mut hash, &mut |piece| {
            out.data(piece)?;
            moved(piece.len() as u64)
        })?;
        self.out.end_member()?;
        Ok(self.note(name, hash.finish(source.len)))
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
        let mut to = self.out.finish()?.finish().map_err(failed)?;
        to.flush().map_err(failed)?;
        Ok(to)
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
