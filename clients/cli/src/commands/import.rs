//! `pileus import`: a new instance out of a file that `pileus export` wrote, or of standard input.

use std::path::PathBuf;

use pileus_api::{InstanceName, OperationEvent, Phase};
use pileus_base::Error;

use crate::context::Context;
use crate::error::Outcome;
use crate::streams::send::Source;

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
    let source = Source::open(context, &args.file, "An archive", "pileus import -")?;
    let client = context.client().await?;
    let target = match &name {
        Some(name) => name.to_string(),
        None => args.file.display().to_string(),
    };
    let mut line = context.progress().line(&target);
    line.event(&OperationEvent::Phase {
        phase: Phase::Archiving,
    });
    let upload = async |bytes| client.import(name, bytes).await;
    let operation = source.send(&mut line, upload).await?;
    line.end(&operation);
    drop(line);
    let name = operation
        .result
        .ok_or_else(|| Error::internal("The daemon does not name the new instance"))?;
    context.print(&format!("Imported: {name}\n"))
}
