//! A file or standard input on its way to the daemon, as fast as that takes it.

use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use pileus_api::{OperationEvent, Progress};
use pileus_base::{Result, ResultExt};
use tokio::sync::mpsc;

use crate::context::Context;
use crate::error::CommandError;
use crate::progress::Line;
use crate::session;
use crate::signals::Signals;

const PIECE: usize = 256 << 10;

/// What is sent.
pub(crate) struct Source {
    from: Box<dyn Read + Send>,
    /// Bytes in all, if that is known.
    total: Option<u64>,
    /// What it takes on its disk, if it is a file.
    room: Option<u64>,
}

impl Source {
    /// Opens the file, or standard input for `-`, which must be no terminal. `what` is told in that case (`An archive`), and
    /// how to do better (`pileus import -`).
    pub fn open(
        context: &Context,
        file: &Path,
        what: &str,
        command: &str,
    ) -> Result<Self, CommandError> {
        if file.as_os_str() == "-" {
            if context.env.terminals.stdin {
                let text = format!("{what} does not come from a terminal");
                let hint = format!("Give a file, or send one: … | {command}");
                return Err(CommandError::usage(text).hint(hint));
            }
            return Ok(Self {
                from: Box::new(io::stdin()),
                total: None,
                room: None,
            });
        }
        let opening = format!("Opening {}", file.display());
        let opened = std::fs::File::open(file).io(&opening)?;
        let found = opened.metadata().io(&opening)?;
        if found.is_dir() {
            let text = format!("{} is a folder", file.display());
            return Err(CommandError::usage(text).hint("Name a file."));
        }
        let takes = found.len().min(found.blocks().saturating_mul(512));
        Ok(Self {
            total: found.is_file().then_some(found.len()),
            room: found.is_file().then_some(takes),
            from: Box::new(opened),
        })
    }

    /// Bytes that it takes on its disk, without the holes, if that is known.
    pub fn room(&self) -> Option<u64> {
        self.room
    }

    /// Hands the bytes to `upload` and shows on `line` how many went. A signal ends it; the daemon sees the connection
    /// close, and undoes its part.
    pub async fn send<T>(
        self,
        line: &mut Line,
        upload: impl AsyncFnOnce(Bytewise) -> Result<T>,
    ) -> Result<T, CommandError> {
        let mut signals = Signals::to_end().io("Listening to signals")?;
        let total = self.total;
        let (mut pieces, mut sent) = read(self.from);
        // The daemon does not wait long for bytes; what sends us some may only be making them (`image pack … - |`).
        let first = tokio::select! {
            first = pieces.recv() => first,
            signal = signals.next() => return Err(session::ended_by(signal)),
        };
        let mut upload = std::pin::pin!(upload(stream(first, pieces)));
        loop {
            tokio::select! {
                done = &mut upload => return Ok(done?),
                Some(done) = sent.recv() => {
                    let progress = Progress { done, total };
                    line.event(&OperationEvent::Progress { progress });
                }
                signal = signals.next() => return Err(session::ended_by(signal)),
            }
        }
    }
}

/// What a call of the client takes.
pub(crate) type Bytewise = std::pin::Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

fn stream(first: Option<io::Result<Bytes>>, pieces: Pieces) -> Bytewise {
    let rest = futures_util::stream::unfold(pieces, |mut pieces| async move {
        Some((pieces.recv().await?, pieces))
    });
    Box::pin(futures_util::stream::iter(first).chain(rest))
}

type Pieces = mpsc::Receiver<io::Result<Bytes>>;

/// Reads in a thread, as fast as the daemon takes it; also tells how much was read.
fn read(mut source: Box<dyn Read + Send>) -> (Pieces, mpsc::Receiver<u64>) {
    let (sender, pieces) = mpsc::channel(4);
    let (told, sent) = mpsc::channel(16);
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        let mut done = 0;
        loop {
            let piece = match source.read(&mut buffer) {
                Ok(0) => return,
                Ok(len) => Ok(Bytes::copy_from_slice(&buffer[..len])),
                Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                Err(err) => Err(err),
            };
            let failed = piece.is_err();
            done += piece.as_ref().map_or(0, |piece| piece.len() as u64);
            if sender.blocking_send(piece).is_err() || failed {
                return;
            }
            // Progress may be missed.
            let _ = told.try_send(done);
        }
    });
    (pieces, sent)
}
