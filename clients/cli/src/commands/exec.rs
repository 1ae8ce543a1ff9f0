//! `pileus exec`.

use pileus_api::StartRequest;

use crate::context::Context;
use crate::error::Outcome;
use crate::{complete, session};

/// Run a command on an instance
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The command gets this terminal, or the pipes that stand in its place; its exit code is returned.
An instance that is stopped is started first.

Examples:
  pileus exec web -- systemctl status nginx
  pileus exec web -d /srv -- ls -l
  tar c . | pileus exec web -- tar x -C /srv")]
pub struct Args {
    /// Name of the instance
    #[arg(value_name = "NAME", add = complete::instances())]
    pub name: String,
    /// Folder in the guest to run the command in
    #[arg(short = 'd', long, value_name = "DIR")]
    pub working_directory: Option<String>,
    /// Do not follow the current folder into a mount
    #[arg(short, long, conflicts_with = "working_directory")]
    pub no_map_working_directory: bool,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", required = true, trailing_var_arg = true)]
    pub command: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Outcome {
    session::run(
        context,
        &args.name,
        args.command,
        args.working_directory,
        StartRequest::default(),
    )
    .await
}
