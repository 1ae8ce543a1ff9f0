//! `pileus export`: an instance with its snapshots as one file, or on standard output.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures_util::StreamExt;
use pileus_api::OperationState;
use pileus_base::{Error, ResultExt, files};
use pileus_client::Client;
use tokio::sync::{mpsc, oneshot};

use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::session;
use crate::signals::Signals;

/// Write an instance with its snapshots to one file
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The instance may run and goes on running; of a running one the disk is as after a power cut, so let the guest
write what it has (sync) if that matters. Memory is not exported. The file is a tar archive compressed with
zstd; it appears under its name when it is complete.

Examples:
  pileus export web web.pileus
  pileus export web - | ssh backup 'cat > web.pileus'
  zstd -dqc web.pileus | tar -t            what is in it")]
pub struct Args {
    /// Name of the instance
    #[arg(value_name = "NAME", add = complete::instances())]
    pub name: String,
    /// Where to write it; - is standard output
    #[arg(value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub file: PathBuf,
    /// Replace a file that is there
    #[arg(short, long)]
    pub force: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let stdout = args.file.as_os_str() == "-";
    if stdout && context.env.terminals.stdout {
        return Err(CommandError::usage("An archive is not for a terminal")
            .hint("Give a file, or send it on: pileus export NAME - | …"));
    }
    if !stdout && !args.force && args.file.symlink_metadata().is_ok() {
        return Err(exists(&args.file));
    }
    let client = context.client().await?;
    let mut signals = Signals::to_end().io("Listening to signals")?;
    let work = async {
        match stdout {
            true => fetch(context, &client, &args.name, io::stdout()).await,
            false => to_file(context, &client, args).await,
        }
    };
    tokio::select! {
        done = work => done?,
        // The daemon sees the connection close, and ends its part.
        signal = signals.next() => return Err(session::ended_by(signal)),
    };
    match stdout {
        true => Ok(0),
        false => context.print(&format!("Exported: {}\n", args.name)),
    }
}

async fn to_file(context: &Context, client: &Client, args: &Args) -> Result<(), CommandError> {
    let file = &args.file;
    // Special files are written as they are.
    let special = file
        .metadata()
        .is_ok_and(|found| !found.is_file() && !found.is_dir());
    if special {
        let what = format!("Opening {}", file.display());
        let into = File::options().write(true).open(file).io(what)?;
        return fetch(context, client, &args.name, into).await;
    }
    let part = Part::create(file)?;
    let into = part.file.try_clone().io("Opening the archive")?;
    fetch(context, client, &args.name, into).await?;
    let (part, file, force) = (part, file.clone(), args.force);
    tokio::task::spawn_blocking(move || part.finish(&file, force))
        .await
        .map_err(|err| Error::internal("Work broke off").with_source(err))?
}

/// Receives the archive and writes it.
async fn fetch(
    context: &Context,
    client: &Client,
    name: &str,
    to: impl Write + Send + 'static,
) -> Result<(), CommandError> {
    let mut line = context.progress().line(name);
    let (id, bytes) = client.export(name).await?;
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
            written => Ok::<_, CommandError>(written.io("Writing the archive")?),
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

/// A file that gets its name when it is complete; dropped before, it goes.
struct Part {
    path: PathBuf,
    file: File,
    kept: bool,
}

impl Part {
    fn create(target: &Path) -> Result<Self, CommandError> {
        if target.file_name().is_none() || target.is_dir() {
            let text = format!("{} is a folder", target.display());
            return Err(CommandError::usage(text).hint("Name a file to write to."));
        }
        let mut path = target.as_os_str().to_owned();
        path.push(".part");
        let path = PathBuf::from(path);
        // What an export that was killed has left.
        files::remove_file(&path)?;
        let file = File::create_new(&path).io(format_args!("Creating {}", path.display()))?;
        Ok(Self {
            path,
            file,
            kept: false,
        })
    }

    fn finish(mut self, target: &Path, force: bool) -> Result<(), CommandError> {
        let what = format!("Writing {}", target.display());
        self.file.sync_all().io(&what)?;
        match force {
            true => std::fs::rename(&self.path, target).io(&what)?,
            // Without replacing one that came meanwhile; a file system that has no links is asked differently.
            false => match std::fs::hard_link(&self.path, target) {
                Ok(()) => {
                    self.kept = true;
                    files::remove_file(&self.path)?;
                }
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(exists(target));
                }
                Err(_) if target.symlink_metadata().is_ok() => return Err(exists(target)),
                Err(_) => std::fs::rename(&self.path, target).io(&what)?,
            },
        }
        self.kept = true;
        let folder = target.parent().filter(|p| !p.as_os_str().is_empty());
        files::sync_folder(folder.unwrap_or(Path::new(".")))?;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if !self.kept {
            // There is nobody left to tell.
            let _ = files::remove_file(&self.path);
        }
    }
}

fn exists(file: &Path) -> CommandError {
    let text = format!("{} is there already", file.display());
    CommandError::usage(text).hint("--force replaces it.")
}
