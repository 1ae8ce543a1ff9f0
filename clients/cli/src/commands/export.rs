//! `pileus export`: an instance with its snapshots as one file, or on standard output.

use std::path::PathBuf;

use crate::complete;
use crate::context::Context;
use crate::error::Outcome;
use crate::streams::receive::Target;

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
    let (what, command) = ("An archive", "pileus export NAME -");
    let target = Target::of(context, &args.file, args.force, what, command)?;
    let client = context.client().await?;
    let begin = async || client.export(&args.name).await;
    target.receive(context, &client, &args.name, begin).await?;
    match target.is_stdout() {
        true => Ok(0),
        false => context.print(&format!("Exported: {}\n", args.name)),
    }
}
