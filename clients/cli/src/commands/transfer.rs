//! `pileus transfer`.

use std::ffi::OsString;

use crate::context::Context;
use crate::error::Outcome;
use crate::transfer::{self, Options, Plan};

/// Transfer files between the host and instances
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
A path in an instance is NAME:PATH, from the user's home on; - is standard input or output. Files keep
their modes, links stay links. A file appears under its name when it is complete. An instance that is not
running is not started.

Examples:
  pileus transfer notes.txt web:
  pileus transfer -r site web:/srv/www
  pileus transfer -p web:/var/log/syslog logs/web/
  pg_dump shop | pileus transfer - web:shop.sql
  pileus transfer web:shop.sql - | gzip > shop.sql.gz")]
pub struct Args {
    /// Copy folders with all that is in them
    #[arg(short, long)]
    pub recursive: bool,
    /// Make the folders above the destination
    #[arg(short, long)]
    pub parents: bool,
    /// What to copy, and last where to
    #[arg(value_name = "SOURCE… DESTINATION", num_args = 0..)]
    pub paths: Vec<OsString>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let plan = Plan::of(&args.paths)?;
    let options = Options {
        recursive: args.recursive,
        parents: args.parents,
    };
    let terminals = context.env.terminals;
    // Progress would be drawn into what is shown.
    let to_terminal = terminals.stdout && matches!(plan, Plan::GetStream { .. });
    let client = context.client().await?;
    let prefix = match context.multipass() {
        true => "[error] [sftp]",
        false => "transfer:",
    };
    transfer::run(
        &client,
        plan,
        options,
        terminals.stderr && !to_terminal,
        prefix,
    )
    .await
}
