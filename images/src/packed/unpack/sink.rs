//! A member's data on its way into a sparse file: chunk by chunk, so that zero blocks become holes whatever the archive
//! says of them, and so that the disk's digest is made beside it, in a thread of its own.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use pileus_base::{Code, Error, Reporter, Result, Size};
use rustix::fs::Advice;

use super::folder::Folder;
use crate::packed::digest::{self, CHUNK, ChunkHash, DiskDigest};
use crate::packed::manifest::DiskMember;
use crate::packed::members::Each;
use crate::packed::rule::Rule;
use crate::sparse::is_zero;

/// Holes are made of whole blocks of this size.
const BLOCK: usize = 4096;
/// How much is written before free space is looked at again.
const LOOK: u64 = 64 << 20;
/// How much is written before the disk may begin with it: whoever syncs the file in the end waits for little then.
const PUSH: u64 = 16 << 20;
/// Chunks that wait to be hashed.
const QUEUE: usize = 4;

/// Where a member goes.
pub struct Sink<'a> {
    pub name: &'static str,
    pub file: &'a File,
    pub folder: &'a Folder,
    /// Bytes of the file.
    pub size: u64,
    /// Bytes of data that may be written.
    pub left: u64,
    /// Free bytes that stay.
    pub reserve: u64,
    pub report: &'a Reporter,
}

/// Takes what `feed` gives, in rising order, and tells what the file consists of.
pub fn write(sink: Sink<'_>, feed: impl FnOnce(Each<'_>) -> Result<()>) -> Result<DiskMember> {
    let size = sink.size;
    sink.check_space()?;
    sink.file.set_len(size).map_err(|err| sink.failed(err))?;
    std::thread::scope(|scope| {
        let (to_hash, chunks) = sync_channel(QUEUE);
        let (back, used) = channel();
        let hashing = scope.spawn(move || hash(&chunks, &back));
        let mut writing = Writing {
            sink,
            index: 0,
            chunk: vec![0; CHUNK as usize],
            filled: 0,
            data: 0,
            looked: 0,
            pushed: (0, 0),
            to_hash,
            used,
        };
        let fed = feed(&mut |at, bytes| writing.put(at, bytes)).and_then(|()| writing.flush());
        let data = writing.data;
        // With it goes the queue's beginning, which ends the thread.
        drop(writing);
        let hashes = hashing.join();
        fed?;
        let hashes = hashes.map_err(|_| Error::internal("Hashing a disk panicked"))?;
        let hashes = hashes.iter().map(|(index, hash)| (*index, hash));
        Ok(DiskMember {
            size,
            data,
            digest: DiskDigest::of_chunks(size, hashes),
        })
    })
}

fn hash(chunks: &Receiver<(u64, Vec<u8>)>, back: &Sender<Vec<u8>>) -> Vec<(u64, ChunkHash)> {
    let mut hashes = Vec::new();
    for (index, chunk) in chunks {
        hashes.push((index, digest::hash_of(&chunk)));
        // Nobody may want it any more.
        let _ = back.send(chunk);
    }
    hashes
}

impl Sink<'_> {
    fn check_space(&self) -> Result<()> {
        let free = self.folder.free()?;
        if free >= self.reserve {
            return Ok(());
        }
        Err(Error::new(
            Code::NoSpace,
            format!(
                "{} has {} left, and {} have to stay free",
                self.folder.path().display(),
                Size(free),
                Size(self.reserve)
            ),
        )
        .advise("Free some space, or remove unused images with `pileus image prune`."))
    }

    fn failed(&self, err: std::io::Error) -> Error {
        Error::io(format_args!("Writing {}", self.name), err)
    }
}

struct Writing<'a> {
    sink: Sink<'a>,
    /// The chunk that is being filled.
    index: u64,
    chunk: Vec<u8>,
    /// How many of its bytes are as they should be; what is behind them is zero in the file.
    filled: usize,
    data: u64,
    /// `data` when free space was looked at.
    looked: u64,
    /// `data` when the disk was told to begin, and up to where in the file.
    pushed: (u64, u64),
    to_hash: SyncSender<(u64, Vec<u8>)>,
    used: Receiver<Vec<u8>>,
}

impl Writing<'_> {
    fn put(&mut self, mut at: u64, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            if at / CHUNK != self.index {
                self.flush()?;
                self.index = at / CHUNK;
            }
            let within = (at % CHUNK) as usize;
            let (now, later) = bytes.split_at(bytes.len().min(CHUNK as usize - within));
            self.chunk[self.filled..within].fill(0);
            self.filled = within + now.len();
            self.chunk[within..self.filled].copy_from_slice(now);
            at += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    /// Writes the chunk, if it has anything but zeros.
    fn flush(&mut self) -> Result<()> {
        self.sink.report.check()?;
        let start = self.index * CHUNK;
        let len = self.sink.size.saturating_sub(start).min(CHUNK) as usize;
        let filled = std::mem::take(&mut self.filled);
        let mut run = None;
        let mut any = false;
        for at in (0..filled.min(len)).step_by(BLOCK) {
            let end = (at + BLOCK).min(len);
            self.chunk[filled.min(end)..end].fill(0);
            match (is_zero(&self.chunk[at..end]), run) {
                (false, None) => run = Some(at),
                (true, Some(from)) => {
                    self.write(from, at)?;
                    run = None;
                }
                _ => {}
            }
            any |= run.is_some();
        }
        if let Some(from) = run {
            self.write(from, filled.next_multiple_of(BLOCK).min(len))?;
        }
        if any {
            self.chunk[filled.min(len)..len].fill(0);
            let next = self.used.try_recv();
            let mut full = std::mem::replace(&mut self.chunk, next.unwrap_or_default());
            self.chunk.resize(CHUNK as usize, 0);
            full.truncate(len);
            let hashed = self.to_hash.send((self.index, full));
            hashed.map_err(|_| Error::internal("Nobody hashes the disk"))?;
        }
        Ok(())
    }

    /// Writes a part of the chunk that has data.
    fn write(&mut self, from: usize, to: usize) -> Result<()> {
        let bytes = &self.chunk[from..to];
        let data = self.data + bytes.len() as u64;
        if data > self.sink.left {
            return Err(Rule::DataTooLarge.because(self.sink.name));
        }
        if data - self.looked > LOOK {
            self.sink.check_space()?;
            self.looked = data;
        }
        let at = self.index * CHUNK + from as u64;
        self.sink
            .file
            .write_all_at(bytes, at)
            .map_err(|err| self.sink.failed(err))?;
        self.data = data;
        if data - self.pushed.0 > PUSH {
            self.push(at + bytes.len() as u64);
        }
        Ok(())
    }

    /// Begins to write back what is new. Advice: a system that doesn't heed it does so later.
    fn push(&mut self, end: u64) {
        let from = std::mem::replace(&mut self.pushed, (self.data, end)).1;
        let len = std::num::NonZeroU64::new(end - from);
        let _ = rustix::fs::fadvise(self.sink.file, from, len, Advice::DontNeed);
    }
}
