//! `pileus import`: a new instance out of a file that `pileus export` wrote, or of standard input.

use std::io::{self, Read};
use std::path::PathBuf;

use bytes::Bytes;
use pileus_api::{InstanceName, OperationEvent, Phase, Progress};
use pileus_base::{Error, ResultExt};
use tokio::sync::mpsc;

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::session;
use crate::signals::Signals;

const PIECE: usize = 256 << 10;

/// Make a new instance out of a file that export wrote
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The new instance has the disk and the snapshots of the exported one and an identity of its own, as a clone has;
it is stopped. An archive from anybody is safe to import: it is checked as it comes, and if it is damaged nothing
is kept of it. What its guest then does is another matter.

Examples:
  pileus import web.pileus
  pileus import web.pileus --name web2
  ssh backup cat web.pileus | pileus import -")]
pub struct Args {
    /// The archive; - is standard input
    #[arg(value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub file: PathBuf,
    /// Name of the new instance; the exported one's if not given
    #[arg(short, long, value_name = "NAME")]
    pub name: Option<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let name = args.name.as_deref().map(str::parse::<InstanceName>);
    let name = name.transpose()?;
    let source: Box<dyn Read + Send> = match args.file.as_os_str() == "-" {
        true if context.env.terminals.stdin => {
            return Err(
                CommandError::usage("An archive does not come from a terminal")
                    .hint("Give a file, or send one: … | pileus import -"),
            );
        }
        true => Box::new(io::stdin()),
        false => {
            let what = format!("Opening {}", args.file.display());
            Box::new(std::fs::File::open(&args.file).io(what)?)
        }
    };
    let total = args.file.metadata().ok().filter(|found| found.is_file());
    let total = total.map(|found| found.len());
    let client = context.client().await?;
    let mut signals = Signals::to_end().io("Listening to signals")?;
    let target = match &name {
        Some(name) => name.to_string(),
        None => args.file.display().to_string(),
    };
    let mut line = context.progress().line(&target);
    line.event(&OperationEvent::Phase {
        phase: Phase::Archiving,
    });
    let (pieces, mut sent) = read(source);
    let archive = futures_util::stream::unfold(pieces, |mut pieces| async {
        Some((pieces.recv().await?, pieces))
    });
    let mut import = std::pin::pin!(client.import(name, archive));
    let operation = loop {
        tokio::select! {
            done = &mut import => break done?,
            Some(done) = sent.recv() => {
                let progress = Progress { done, total };
                line.event(&OperationEvent::Progress { progress });
            }
            // The daemon sees the connection close, and undoes its part.
            signal = signals.next() => return Err(session::ended_by(signal)),
        }
    };
    line.end(&operation);
    drop(line);
    let name = operation
        .result
        .ok_or_else(|| Error::internal("The daemon does not name the new instance"))?;
    context.print(&format!("Imported: {name}\n"))
}

type Pieces = mpsc::Receiver<io::Result<Bytes>>;

/// Reads the archive in a thread, as fast as the daemon takes it; also tells how much was read.
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
