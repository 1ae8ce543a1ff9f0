//! The stages before the walk, each in a thread of its own with a short queue behind it: reading and hashing the
//! archive, and decompressing it. What fails says so to nobody but the end: the stages behind it see that the stream
//! stops, those before it that nobody takes any more. So all threads end, and of several errors the one that lies first
//! in the stream counts.

use std::io::{self, BufRead, Read};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::ScopedJoinHandle;

use pileus_base::{Digest, Error, Reporter, Result, Size};
use sha2::Digest as _;

use super::Budgets;
use crate::packed::frames::Frames;
use crate::packed::rule::Rule;

const PIECE: usize = 256 << 10;
/// Pieces that wait between two stages.
const QUEUE: usize = 8;

/// What the archive was.
#[derive(Debug)]
pub struct Archive {
    pub digest: Digest,
    pub bytes: u64,
}

/// Why a stage ended early.
enum Stop {
    Failed(Error),
    /// A stage before or behind it did.
    Other,
}

impl From<Error> for Stop {
    fn from(err: Error) -> Self {
        Self::Failed(err)
    }
}

/// Gives `work` what the archive decompresses to. It must read that to its end.
pub fn run<T>(
    input: impl Read + Send,
    budgets: &Budgets,
    report: &Reporter,
    work: impl FnOnce(Stream<'_>) -> Result<T>,
) -> Result<(T, Archive)> {
    let cut = AtomicBool::new(false);
    let done = std::thread::scope(|scope| {
        let (compressed, to_decode) = queue();
        let (decoded, to_walk) = queue();
        let reading = scope.spawn(move || read(input, budgets, report, &compressed));
        let decoding = scope.spawn(move || decode(&to_decode, budgets, report, &decoded));
        let stream = Stream {
            pieces: to_walk,
            piece: Vec::new(),
            at: 0,
            ended: false,
            cut: &cut,
        };
        // The stream ends in there, and with it, sooner or later, both threads.
        let worked = work(stream);
        let (decoded, archive) = (join(decoding), join(reading));
        match (worked, decoded, archive) {
            (Ok(worked), Ok(()), Ok(archive)) => Ok((worked, archive)),
            (Err(err), _, _) if !cut.load(Ordering::Relaxed) => Err(err),
            (_, Err(Stop::Failed(err)), _) | (_, _, Err(Stop::Failed(err))) | (Err(err), _, _) => {
                Err(err)
            }
            (Ok(_), _, _) => Err(Error::internal("An archive was not read to its end")),
        }
    });
    // What an input says that was cancelled is of no interest.
    done.or_else(|err| report.check().and(Err(err)))
}

fn join<T>(thread: ScopedJoinHandle<'_, Result<T, Stop>>) -> Result<T, Stop> {
    thread
        .join()
        .unwrap_or_else(|_| Err(Stop::Failed(Error::internal("Unpacking an image panicked"))))
}

fn read(
    mut input: impl Read,
    budgets: &Budgets,
    report: &Reporter,
    to: &Pieces,
) -> Result<Archive, Stop> {
    let mut hash = sha2::Sha256::new();
    let mut bytes = 0;
    loop {
        let mut piece = to.empty();
        let mut len = 0;
        while len < piece.len() {
            report.check()?;
            match input.read(&mut piece[len..]) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => return Err(Stop::Failed(failed(err))),
            }
        }
        if len == 0 {
            to.send(Piece::End)?;
            return Ok(Archive {
                digest: Digest::from_bytes(hash.finalize().into()),
                bytes,
            });
        }
        bytes += len as u64;
        if bytes > budgets.archive {
            let limit = Size(budgets.archive);
            return Err(Rule::ArchiveTooLarge
                .because(format_args!("the limit is {limit}"))
                .into());
        }
        piece.truncate(len);
        hash.update(&piece);
        to.send(Piece::Bytes(piece))?;
    }
}

/// An input's error; one that carries ours is that one.
fn failed(err: io::Error) -> Error {
    match err.downcast::<Error>() {
        Ok(ours) => ours,
        Err(err) => Error::io("Reading the archive", err),
    }
}

fn decode(from: &Taken, budgets: &Budgets, report: &Reporter, to: &Pieces) -> Result<(), Stop> {
    let mut frames = Frames::new()?;
    let (mut piece, mut len, mut given) = (to.empty(), 0, 0);
    let mut send = |piece: &mut Vec<u8>, len: &mut usize, taken: u64| {
        given += *len as u64;
        if given > budgets.ratio_from && given / budgets.ratio.max(1) > taken {
            return Err(Stop::Failed(
                Rule::Ratio.because(format_args!("more than {} to 1", budgets.ratio)),
            ));
        }
        let mut full = std::mem::replace(piece, to.empty());
        full.truncate(std::mem::take(len));
        to.send(Piece::Bytes(full))
    };
    loop {
        report.check()?;
        let compressed = match from.pieces.recv() {
            Ok(Piece::Bytes(bytes)) => bytes,
            Ok(Piece::End) => break,
            Err(_) => return Err(Stop::Other),
        };
        let mut rest = &compressed[..];
        loop {
            len += frames.decompress(&mut rest, &mut piece[len..])?;
            if len < piece.len() {
                break;
            }
            send(&mut piece, &mut len, frames.taken())?;
        }
        from.give_back(compressed);
    }
    frames.finish()?;
    if len > 0 {
        send(&mut piece, &mut len, frames.taken())?;
    }
    to.send(Piece::End)
}

enum Piece {
    Bytes(Vec<u8>),
    End,
}

/// A queue's beginning.
struct Pieces {
    pieces: SyncSender<Piece>,
    used: Receiver<Vec<u8>>,
}

/// Its end.
struct Taken {
    pieces: Receiver<Piece>,
    used: Sender<Vec<u8>>,
}

/// A queue, and its way back: a piece's memory is used again.
fn queue() -> (Pieces, Taken) {
    let (to, from) = sync_channel(QUEUE);
    let (back, used) = channel();
    (
        Pieces { pieces: to, used },
        Taken {
            pieces: from,
            used: back,
        },
    )
}

impl Pieces {
    fn empty(&self) -> Vec<u8> {
        let mut piece = self.used.try_recv().unwrap_or_default();
        piece.resize(PIECE, 0);
        piece
    }

    fn send(&self, piece: Piece) -> Result<(), Stop> {
        self.pieces.send(piece).map_err(|_| Stop::Other)
    }
}

impl Taken {
    fn give_back(&self, piece: Vec<u8>) {
        // Nobody may want it any more.
        let _ = self.used.send(piece);
    }
}

/// What the archive decompresses to.
pub struct Stream<'a> {
    pieces: Taken,
    piece: Vec<u8>,
    at: usize,
    ended: bool,
    /// A stage before it failed.
    cut: &'a AtomicBool,
}

impl BufRead for Stream<'_> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.at == self.piece.len() && !self.ended {
            self.pieces.give_back(std::mem::take(&mut self.piece));
            self.at = 0;
            match self.pieces.pieces.recv() {
                Ok(Piece::Bytes(piece)) => self.piece = piece,
                Ok(Piece::End) => self.ended = true,
                Err(_) => {
                    self.cut.store(true, Ordering::Relaxed);
                    return Err(io::Error::other("a stage before this one failed"));
                }
            }
        }
        Ok(&self.piece[self.at..])
    }

    fn consume(&mut self, len: usize) {
        self.at = (self.at + len).min(self.piece.len());
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let piece = self.fill_buf()?;
        let len = piece.len().min(buffer.len());
        buffer[..len].copy_from_slice(&piece[..len]);
        self.consume(len);
        Ok(len)
    }
}
