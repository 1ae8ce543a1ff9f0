//! The way in for an image's bytes, wherever they come from: a download, a file or an upload pushes them in
//! pieces, one thread hashes them, another makes a disk of them while they come. Queues between the three are
//! short, so the slowest sets the pace, and nothing is kept beside what comes out.
//!
//! ```text
//! source ──push──▶ SHA-256 ──▶ `format::take`: magic bytes, decompression, checks ──▶ the draft's disk
//! ```
//!
//! Next step: `format` (what the bytes are).

use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};

use bytes::{Buf, Bytes};
use pileus_base::{Code, Digest, Error, Reporter, Result, files};
use sha2::Digest as _;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::format::{self, Form, too_large};
use crate::stage::Stage;
use crate::store::Limits;

/// Bytes that are read and passed on at once.
pub(crate) const PIECE: usize = 1 << 20;
/// Pieces that may wait before each of the two threads.
const QUEUE: usize = 4;

/// Where the disk is made, and within which bounds. The stage stays as long as a thread works in it.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub stage: Arc<Stage>,
    pub limits: Limits,
    /// A folder on the file system that is being filled.
    pub folder: PathBuf,
    pub report: Reporter,
    /// Set by a maker that hashes the bytes itself.
    pub hashed: Arc<AtomicBool>,
}

impl Target {
    pub fn new(stage: Arc<Stage>, limits: &Limits, folder: &Path, report: &Reporter) -> Self {
        Self {
            stage,
            limits: limits.clone(),
            folder: folder.to_owned(),
            report: report.clone(),
            hashed: Arc::default(),
        }
    }

    /// An error if there is no room for so many more bytes and the reserve.
    pub fn check_room_for(&self, bytes: u64) -> Result<()> {
        format::check_room(&self.folder, bytes, self.limits.reserve)
    }

    /// Where a file is kept that can't be made a disk while it streams.
    pub fn artifact(&self) -> PathBuf {
        self.stage.path("artifact")
    }

    /// Takes away what was made so far.
    fn clear(&self) -> Result<()> {
        let draft = self.stage.draft().folder;
        files::remove_folder(&draft)?;
        files::create_folder(&draft, 0o755)?;
        files::remove_file(&self.artifact())
    }
}

/// What became of all the bytes.
#[derive(Debug)]
pub(crate) struct Taken {
    /// Of the bytes as they came.
    pub digest: Digest,
    /// How many came.
    pub size: u64,
    pub form: Form,
}

#[derive(Debug)]
pub(crate) struct Intake {
    target: Target,
    /// Begins with the first piece.
    pipe: Option<Pipe>,
    position: u64,
}

impl Intake {
    pub fn new(target: Target) -> Self {
        Self {
            target,
            pipe: None,
            position: 0,
        }
    }

    /// Bytes that were pushed since the last start.
    pub fn position(&self) -> u64 {
        self.position
    }

    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Passes on the next bytes. An error is for good, and mostly what is wrong with the image.
    pub async fn push(&mut self, bytes: Bytes) -> Result<()> {
        let position = self.position.saturating_add(bytes.len() as u64);
        if position > self.target.limits.download {
            return Err(too_large(self.target.limits.download));
        }
        self.send(Part::Bytes(bytes)).await?;
        self.position = position;
        Ok(())
    }

    /// Pushes all of a stream. `total`: how many bytes it should have, for the progress.
    pub async fn pour(
        &mut self,
        mut from: impl AsyncRead + Unpin,
        total: Option<u64>,
        unreadable: impl Fn(io::Error) -> Error,
    ) -> Result<()> {
        let report = self.target.report.clone();
        loop {
            let mut piece = Vec::with_capacity(PIECE);
            while piece.len() < PIECE {
                let read = async {
                    Ok((&mut from)
                        .take((PIECE - piece.len()) as u64)
                        .read_buf(&mut piece)
                        .await)
                };
                match report.or_cancelled(read).await? {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(err) => return Err(unreadable(err)),
                }
            }
            if piece.is_empty() {
                return Ok(());
            }
            report.or_cancelled(self.push(piece.into())).await?;
            report.progress(self.position, total);
        }
    }

    /// Forgets all that came and was made: what comes next is the first byte again.
    pub async fn restart(&mut self) -> Result<()> {
        self.abort().await;
        self.position = 0;
        let target = self.target.clone();
        blocking(move || target.clear()).await
    }

    /// Says that this was all, and waits for what became of it.
    pub async fn finish(&mut self) -> Result<Taken> {
        self.send(Part::End).await?;
        let Some(pipe) = self.pipe.take() else {
            return Err(Error::internal("An image's bytes ended before they began"));
        };
        let hashed = joined(pipe.hasher).await?;
        let form = joined(pipe.maker).await??;
        let digest = match &form {
            Form::Packed(unpacked) => unpacked.archive.clone(),
            _ => hashed.ok_or_else(|| Error::internal("An image's bytes were not all read"))?,
        };
        Ok(Taken {
            digest,
            size: self.position,
            form,
        })
    }

    /// Ends the threads and waits until they did.
    pub async fn abort(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            drop(pipe.sender);
            let _ = pipe.hasher.await;
            let _ = pipe.maker.await;
        }
    }

    async fn send(&mut self, part: Part) -> Result<()> {
        let pipe = match &mut self.pipe {
            Some(pipe) => pipe,
            none => none.insert(Pipe::begin(&self.target)),
        };
        if pipe.sender.send(part).await.is_ok() {
            return Ok(());
        }
        // Nobody reads any more: the maker knows why.
        let Some(pipe) = self.pipe.take() else {
            return Err(Error::internal("An image's bytes have nowhere to go"));
        };
        let _ = pipe.hasher.await;
        match joined(pipe.maker).await? {
            Err(err) => Err(err),
            Ok(_) => Err(Error::internal("An image was made of a part of its bytes")),
        }
    }
}

/// The two threads.
#[derive(Debug)]
struct Pipe {
    sender: mpsc::Sender<Part>,
    hasher: JoinHandle<Option<Digest>>,
    maker: JoinHandle<Result<Form>>,
}

#[derive(Debug, Clone)]
enum Part {
    Bytes(Bytes),
    /// Without it the stream was broken off.
    End,
}

impl Pipe {
    fn begin(target: &Target) -> Self {
        let (sender, mut parts) = mpsc::channel(QUEUE);
        let (hashed, receiver) = sync_channel(QUEUE);
        target.hashed.store(false, Ordering::Relaxed);
        let elsewhere = target.hashed.clone();
        let hasher = tokio::task::spawn_blocking(move || {
            let mut hash = sha2::Sha256::new();
            while let Some(part) = parts.blocking_recv() {
                hashed.send(Part::clone(&part)).ok()?;
                match part {
                    Part::Bytes(_) if elsewhere.load(Ordering::Relaxed) => {}
                    Part::Bytes(bytes) => hash.update(&bytes),
                    Part::End => return Some(Digest::from_bytes(hash.finalize().into())),
                }
            }
            None
        });
        let target = target.clone();
        let maker = tokio::task::spawn_blocking(move || {
            let input = Piped {
                receiver,
                piece: Bytes::new(),
                ended: false,
            };
            format::take(input, &target)
        });
        Self {
            sender,
            hasher,
            maker,
        }
    }
}

/// The bytes as their maker reads them.
#[derive(Debug)]
pub(crate) struct Piped {
    receiver: Receiver<Part>,
    piece: Bytes,
    ended: bool,
}

impl Read for Piped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() && !self.ended {
            match self.receiver.recv() {
                Ok(Part::Bytes(bytes)) => self.piece = bytes,
                Ok(Part::End) => self.ended = true,
                Err(_) => {
                    let why = "the stream was broken off";
                    return Err(io::Error::new(io::ErrorKind::ConnectionAborted, why));
                }
            }
        }
        let len = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}

/// The error of an upload that can't be read on. One of ours inside says why itself.
pub(crate) fn broken_off(err: io::Error) -> Error {
    err.downcast().unwrap_or_else(unreadable)
}

fn unreadable(err: io::Error) -> Error {
    match err.raw_os_error() {
        Some(_) if !is_connection(&err) => Error::io("Reading the image", err),
        _ => Error::new(Code::Cancelled, "The image did not arrive as a whole")
            .advise("Send it again; nothing was kept.")
            .with_source(err),
    }
}

fn is_connection(err: &io::Error) -> bool {
    matches!(
        err.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
            | io::ErrorKind::TimedOut
    )
}

async fn joined<T>(task: JoinHandle<T>) -> Result<T> {
    task.await
        .map_err(|err| Error::internal(format!("Work on an image panicked: {err}")))
}

pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    joined(tokio::task::spawn_blocking(work)).await?
}
