//! `pileus console`: the serial console, both ways. What the guest writes reaches the terminal as it is, as
//! on a real one.

use bytes::Bytes;
use pileus_base::{Error, ResultExt};

use crate::complete;
use crate::context::Context;
use crate::error::Outcome;
use crate::pump::{Take, pump};
use crate::session;
use crate::signals::Signals;
use crate::terminal::{RawMode, tell};

/// Ctrl-].
const LEAVE: u8 = 0x1d;

/// Attach to the serial console of an instance
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Works without any network of the guest, also while it boots. Ctrl-] leaves; the instance goes on. The login
user has no password unless you set one: pileus exec NAME -- sudo passwd ubuntu.

Examples:
  pileus console web
  echo | pileus console web | grep -m1 login:")]
pub struct Args {
    /// Name of the instance
    #[arg(value_name = "NAME", add = complete::instances())]
    pub name: String,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let client = context.client().await?;
    let (input, output) = client.console(&args.name).await?;
    let terminals = context.env.terminals;
    if !terminals.stdin || !terminals.stdout {
        pump(input, output, Take::Send).await?;
        return Ok(0);
    }
    let name = &args.name;
    tell(&format!(
        "Attached to the console of {name}; Ctrl-] leaves."
    ));
    let mut signals = Signals::to_forward().io("Listening to signals")?;
    let raw = RawMode::enter().map_err(|err| Error::io("Setting up the terminal", err))?;
    let ended = tokio::select! {
        result = pump(input, output, take) => result,
        signal = signals.next() => Err(session::ended_by(signal)),
    };
    drop(raw);
    tell("");
    ended?;
    tell(&format!("Detached from the console of {name}."));
    Ok(0)
}

/// Looks for the key that leaves.
fn take(mut piece: Bytes) -> Take {
    match piece.iter().position(|byte| *byte == LEAVE) {
        Some(at) => {
            piece.truncate(at);
            Take::Leave(piece)
        }
        None => Take::Send(piece),
    }
}
