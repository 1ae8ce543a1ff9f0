//! `pileus shell`.

use pileus_api::StartRequest;

use crate::context::Context;
use crate::error::Outcome;
use crate::{complete, session, several};

/// Open a shell on an instance
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
With standard input from a pipe or file, its lines are run and the shell ends.
An instance that is stopped is started first.")]
pub struct Args {
    /// Name of the instance
    #[arg(value_name = "NAME", add = complete::instances())]
    pub name: String,
    /// Seconds for the start of a stopped instance
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub timeout: Option<String>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Outcome {
    let timeout = several::timeout(args.timeout.as_deref())?;
    let start = StartRequest { timeout };
    session::run(context, &args.name, Vec::new(), None, start).await
}
