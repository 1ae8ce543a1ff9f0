//! A disk's digest: what it consists of, whatever way it came and wherever it lies. SHA-256 over
//!
//! ```text
//! "pileus disk 1\n"
//! the size                                    u64, big endian
//! of each chunk of 1 MiB that is not all zero, in order
//!     its index                               u64, big endian
//!     the SHA-256 of its bytes                32 bytes; the last chunk may be short
//! ```
//!
//! So holes cost nothing, and chunks can be hashed in any order, by many threads. [`DiskDigest`] makes it of
//! pieces while a disk streams by, [`of_file`] of a file.
//!
//! Next step: `manifest` (says it of a disk), `pack` (makes it while it looks for a disk's data).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::sync_channel;
use std::sync::{Mutex, PoisonError};

use pileus_base::{Digest, Error, Result, ResultExt};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use sha2::Digest as _;
use sha2::Sha256;

use crate::sparse::is_zero;

/// Bytes that are hashed as one.
pub const CHUNK: u64 = 1 << 20;
const BEGINNING: &[u8] = b"pileus disk 1\n";
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// A chunk's bytes, hashed.
pub type ChunkHash = [u8; 32];

/// Shown a chunk's bytes; nothing, if they are all zero.
pub(crate) type Look<'a, T> = &'a (dyn Fn(&[u8]) -> Option<T> + Sync);

/// A chunk that is not all zero, and what was found of it.
#[derive(Debug)]
pub(crate) struct Chunk<T> {
    pub index: u64,
    pub hash: ChunkHash,
    pub found: T,
}

/// Told of each piece of data that was looked at, and able to end the work.
type Moved<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

/// The digest of a disk that comes in pieces, in rising order. What is left out is zero.
#[derive(Debug, Clone)]
pub struct DiskDigest {
    size: u64,
    whole: Sha256,
    /// Where the last piece ended.
    end: u64,
    /// The chunk at `end`, if it has anything but zeros so far: the hash of its bytes before `end`.
    chunk: Option<Sha256>,
}

impl DiskDigest {
    /// Of a disk of so many bytes.
    pub fn new(size: u64) -> Self {
        let mut whole = Sha256::new();
        whole.update(BEGINNING);
        whole.update(size.to_be_bytes());
        Self {
            size,
            whole,
            end: 0,
            chunk: None,
        }
    }

    /// The next piece, of any length. One that goes back, or beyond the disk's end, is a defect of the caller.
    pub fn update(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        let fits = end.is_some_and(|end| end <= self.size);
        if offset < self.end || !fits {
            return Err(Error::internal(
                "A disk's pieces came in another order than they lie in",
            ));
        }
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let room = CHUNK - at % CHUNK;
            let (now, later) = rest.split_at(rest.len().min(room as usize));
            self.piece(at, now);
            at += now.len() as u64;
            rest = later;
        }
        Ok(())
    }

    /// A piece within one chunk.
    fn piece(&mut self, at: u64, bytes: &[u8]) {
        if at / CHUNK > self.end / CHUNK {
            self.skip(at / CHUNK * CHUNK);
        }
        if self.chunk.is_some() || !is_zero(bytes) {
            let before = match self.chunk {
                Some(_) => at - self.end,
                // All of it before was zero.
                None => at % CHUNK,
            };
            let hash = self.chunk.get_or_insert_default();
            zeros(hash, before);
            hash.update(bytes);
        }
        self.end = at + bytes.len() as u64;
        if self.end.is_multiple_of(CHUNK) {
            self.close(self.end / CHUNK - 1);
        }
    }

    /// Goes on at the beginning of a later chunk, or at the end.
    fn skip(&mut self, to: u64) {
        let index = self.end / CHUNK;
        if let Some(hash) = &mut self.chunk {
            let chunk_end = ((index + 1) * CHUNK).min(self.size);
            zeros(hash, chunk_end - self.end);
        }
        self.close(index);
        self.end = to;
    }

    fn close(&mut self, index: u64) {
        if let Some(hash) = self.chunk.take() {
            self.add(index, &hash.finalize().into());
        }
    }

    fn add(&mut self, index: u64, chunk: &ChunkHash) {
        self.whole.update(index.to_be_bytes());
        self.whole.update(chunk);
    }

    pub fn finish(mut self) -> Digest {
        self.skip(self.size);
        Digest::from_bytes(self.whole.finalize().into())
    }

    /// Of chunks that were hashed apart: those that are not all zero, in order.
    pub fn of_chunks<'a>(
        size: u64,
        chunks: impl IntoIterator<Item = (u64, &'a ChunkHash)>,
    ) -> Digest {
        let mut digest = Self::new(size);
        for (index, hash) in chunks {
            digest.add(index, hash);
        }
        Digest::from_bytes(digest.whole.finalize().into())
    }
}

fn zeros(hash: &mut Sha256, mut len: u64) {
    while len > 0 {
        let now = len.min(ZEROS.len() as u64);
        hash.update(&ZEROS[..now as usize]);
        len -= now;
    }
}

/// The digest of a whole file. Blocks; reads what is no hole in `threads` threads. `moved` is told the bytes
/// that were read.
pub fn of_file(file: &File, threads: usize, moved: Moved<'_>) -> Result<Digest> {
    let size = file.metadata().io("Looking at a disk")?.len();
    let chunks = each_chunk(file, size, threads, moved, &|bytes| {
        (!is_zero(bytes)).then_some(())
    })?;
    Ok(of_found(size, &chunks))
}

/// A chunk's hash.
pub fn hash_of(bytes: &[u8]) -> ChunkHash {
    Sha256::digest(bytes).into()
}

/// The hashes of two chunks. Each step of a hash waits for the one before it, so that a processor has time for
/// another one's meanwhile: both take a quarter less time than one after the other.
fn hash_both(first: &[u8], second: &[u8]) -> [ChunkHash; 2] {
    const STEP: usize = 128;
    let (mut one, mut other) = (Sha256::new(), Sha256::new());
    let mut at = 0;
    for (first, second) in first.chunks(STEP).zip(second.chunks(STEP)) {
        one.update(first);
        other.update(second);
        at += STEP;
    }
    // Only the last chunk of a disk is shorter.
    one.update(first.get(at..).unwrap_or_default());
    other.update(second.get(at..).unwrap_or_default());
    [one.finalize().into(), other.finalize().into()]
}

/// The digest of a disk of which all chunks were looked at.
pub(crate) fn of_found<T>(size: u64, chunks: &[Chunk<T>]) -> Digest {
    DiskDigest::of_chunks(size, chunks.iter().map(|chunk| (chunk.index, &chunk.hash)))
}

/// Shows `look` each chunk that may have data, and hashes those of which it finds something, in `threads` threads.
/// Gives them in order.
pub(crate) fn each_chunk<T: Send>(
    file: &File,
    size: u64,
    threads: usize,
    moved: Moved<'_>,
    look: Look<'_, T>,
) -> Result<Vec<Chunk<T>>> {
    let next = Mutex::new(Next {
        file,
        size,
        at: 0,
        data_end: 0,
    });
    let stop = AtomicBool::new(false);
    let mut found = std::thread::scope(|scope| {
        let (looked, all) = sync_channel(64);
        for _ in 0..threads.max(1) {
            let (next, stop, looked) = (&next, &stop, looked.clone());
            let tell = move |one| looked.send(one).is_ok() && !stop.load(Ordering::Relaxed);
            scope.spawn(move || work(next, look, &tell));
        }
        drop(looked);
        let mut kept = Vec::new();
        let mut outcome = Ok(());
        // To the end even after an error: nobody waits at a full queue then.
        for one in all {
            if outcome.is_err() {
                continue;
            }
            outcome = one.and_then(|one: Looked<T>| {
                kept.extend(one.chunk);
                moved(one.len)
            });
            stop.store(outcome.is_err(), Ordering::Relaxed);
        }
        outcome.map(|()| kept)
    })?;
    found.sort_unstable_by_key(|chunk| chunk.index);
    Ok(found)
}

/// Bytes that were looked at, and what is to be kept of them.
struct Looked<T> {
    len: u64,
    chunk: Option<Chunk<T>>,
}

/// Looks at chunks until none is left, or whom it tells of them wants no more.
fn work<T>(next: &Mutex<Next<'_>>, look: Look<'_, T>, tell: &dyn Fn(Result<Looked<T>>) -> bool) {
    let told = |index, hash, len: usize, found| {
        let chunk = Some(Chunk { index, hash, found });
        tell(Ok(Looked {
            len: len as u64,
            chunk,
        }))
    };
    let (mut first, mut second) = (Vec::new(), Vec::new());
    // What `first` has, which waits for another one to be hashed with.
    let mut held = None;
    loop {
        let index = match read_next(next, &mut second) {
            Ok(Some(index)) => index,
            Ok(None) => break,
            Err(err) => {
                tell(Err(err));
                return;
            }
        };
        let wanted = match (look(&second), held.take()) {
            (None, before) => {
                held = before;
                tell(Ok(Looked {
                    len: second.len() as u64,
                    chunk: None,
                }))
            }
            (Some(found), None) => {
                std::mem::swap(&mut first, &mut second);
                held = Some((index, found));
                true
            }
            (Some(found), Some((before, of_before))) => {
                let [hash, own] = hash_both(&first, &second);
                told(before, hash, first.len(), of_before) && told(index, own, second.len(), found)
            }
        };
        if !wanted {
            return;
        }
    }
    if let Some((index, found)) = held {
        told(index, hash_of(&first), first.len(), found);
    }
}

/// Fills `bytes` with the next chunk that may have data.
fn read_next(next: &Mutex<Next<'_>>, bytes: &mut Vec<u8>) -> Result<Option<u64>> {
    let (file, index, len) = {
        let mut next = next.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = next.chunk().io("Looking for a disk's data")? else {
            return Ok(None);
        };
        (next.file, index, (next.size - index * CHUNK).min(CHUNK))
    };
    bytes.resize(len as usize, 0);
    file.read_exact_at(bytes, index * CHUNK)
        .io("Reading a disk")?;
    Ok(Some(index))
}

/// Where the next data is.
struct Next<'a> {
    file: &'a File,
    size: u64,
    at: u64,
    /// What the file system has as data goes up to here.
    data_end: u64,
}

impl Next<'_> {
    fn chunk(&mut self) -> Result<Option<u64>, Errno> {
        if self.at >= self.size {
            return Ok(None);
        }
        if self.at >= self.data_end {
            let data = match rustix::fs::seek(self.file, SeekFrom::Data(self.at)) {
                Ok(data) => data,
                // No data behind.
                Err(Errno::NXIO) => self.size,
                // A file system that knows nothing of holes.
                Err(Errno::INVAL) => self.at,
                Err(err) => return Err(err),
            };
            if data >= self.size {
                self.at = self.size;
                return Ok(None);
            }
            self.data_end = rustix::fs::seek(self.file, SeekFrom::Hole(data)).unwrap_or(self.size);
            self.at = self.at.max(data / CHUNK * CHUNK);
        }
        let index = self.at / CHUNK;
        self.at = (index + 1) * CHUNK;
        Ok(Some(index))
    }
}

#[cfg(test)]
#[path = "digest_tests.rs"]
mod tests;
