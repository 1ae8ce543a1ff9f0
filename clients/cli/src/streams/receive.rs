//! What the daemon sends, into a file or standard output. A file gets its name when it is complete.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use pileus_api::OperationState;
use pileus_base::{Error, Result, ResultExt};
use pileus_client::Client;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::context::Context;
use crate::error::{CommandError, no_room};
use crate::session;
use crate::signals::Signals;
use crate::streams::part::Part;

/// Where it is to go.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    Stdout,
    File { path: PathBuf, force: bool },
}

impl Target {
    /// Standard output for `-`, which must be no terminal. A file that is there needs `force`. `what` and `command` are told
    /// if that is not so (`An archive`, `pileus export NAME -`).
    pub fn of(
        context: &Context,
        file: &Path,
        force: bool,
        what: &str,
        command: &str,
    ) -> Result<Self, CommandError> {
        if file.as_os_str() == "-" {
            if context.env.terminals.stdout {
                let text = format!("{what} is not for a terminal");
                let hint = format!("Give a file, or send it on: {command} | …");
                return Err(CommandError::usage(text).hint(hint));
            }
            return Ok(Self::Stdout);
        }
        if file.file_name().is_none() || file.is_dir() {
            let text = format!("{} is a folder", file.display());
            return Err(CommandError::usage(text).hint("Name a file to write to."));
        }
        if !force && file.symlink_metadata().is_ok() {
            return Err(exists(file));
        }
        Ok(Self::File {
            path: file.to_owned(),
            force,
        })
    }

    pub fn is_stdout(&self) -> bool {
        matches!(self, Self::Stdout)
    }

    /// Receives what `begin` asks for (the operation that makes the bytes, and the bytes), telling how it goes under the name
    /// `about`. A signal ends it; the daemon sees the connection close, and ends its part.
    pub async fn receive<S>(
        &self,
        context: &Context,
        client: &Client,
        about: &str,
        begin: impl AsyncFnOnce() -> Result<(Uuid, S)>,
    ) -> Result<(), CommandError>
    where
        S: Stream<Item = Result<Bytes>>,
    {
        let mut signals = Signals::to_end().io("Listening to signals")?;
        let work = async {
            match self {
                Self::Stdout => {
                    let to = (io::stdout(), "Writing to standard output");
                    fetch(context, client, about, begin, to).await
                }
                Self::File { path, force } => {
                    let what = format!("Writing {}", path.display());
                    // Special files are written as they are.
                    let special = path.metadata().is_ok_and(|found| !found.is_file());
                    if special {
                        let into = File::options().write(true).open(path).io(&what)?;
                        return fetch(context, client, about, begin, (into, &what)).await;
                    }
                    let part = Part::create(path)?;
                    let into = part.writer()?;
                    fetch(context, client, about, begin, (into, &what)).await?;
                    let (path, force) = (path.clone(), *force);
                    tokio::task::spawn_blocking(move || part.finish(&path, force))
                        .await
                        .map_err(|err| Error::internal("Work broke off").with_source(err))?
                }
            }
        };
        tokio::select! {
            done = work => done,
            signal = signals.next() => Err(session::ended_by(signal)),
        }
    }
}

/// Receives bytes and writes them; `what` says where to, should that fail.
async fn fetch<S>(
    context: &Context,
    client: &Client,
    about: &str,
    begin: impl AsyncFnOnce() -> Result<(Uuid, S)>,
    (to, what): (impl Write + Send + 'static, &str),
) -> Result<(), CommandError>
where
    S: Stream<Item = Result<Bytes>>,
{
    let mut line = context.progress().line(about);
    let (id, bytes) = begin().await?;
    // What the operation tells until its end; nothing if it can't be asked.
    let told = async {
        let operation = client.operation(id).await.ok()?;
        let ended = client.follow(operation, |event| line.event(event)).await;
        ended.ok()
    };
    // With its end the stream is dropped, which ends the daemon's part.
    let received = async move {
        let mut bytes = std::pin::pin!(bytes);
        let (pieces, written) = write(to);
        while let Some(piece) = bytes.next().await {
            // Whoever reads slowly makes the daemon wait. One that reads no more is told below.
            if pieces.send(piece?).await.is_err() {
                break;
            }
        }
        drop(pieces);
        let written = written.await;
        match written.map_err(|_| Error::internal("Writing broke off"))? {
            // Nobody wants to read any more: not an error of this program.
            Err(err) if err.kind() == io::ErrorKind::BrokenPipe => Err(err.into()),
            written => Ok::<_, CommandError>(written.io(what).map_err(no_room)?),
        }
    };
    let (received, told) = tokio::join!(received, told);
    if let Some(operation) = &told {
        line.end(operation);
    }
    match (received, told) {
        // Why the daemon's part failed says more than that the stream broke.
        (Err(_), Some(operation)) if operation.state == OperationState::Failed => {
            Err(CommandError::of_operation(operation))
        }
        (received, _) => received,
    }
}

/// Writes in a thread, so that a signal ends the command even while nobody reads.
fn write(
    mut to: impl Write + Send + 'static,
) -> (mpsc::Sender<Bytes>, oneshot::Receiver<io::Result<()>>) {
    let (sender, mut pieces) = mpsc::channel::<Bytes>(4);
    let (done, written) = oneshot::channel();
    std::thread::spawn(move || {
        let mut write = || {
            while let Some(piece) = pieces.blocking_recv() {
                to.write_all(&piece)?;
            }
            to.flush()
        };
        let result = write();
        // Its end is what makes the daemon stop.
        drop(pieces);
        let _ = done.send(result);
    });
    (sender, written)
}

pub(super) fn exists(file: &Path) -> CommandError {
    let text = format!("{} is there already", file.display());
    CommandError::usage(text).hint("--force replaces it.")
}
