//! `pileus rename`.

use pileus_api::RenameRequest;

use crate::commands::launch;
use crate::complete;
use crate::context::Context;
use crate::error::Outcome;

/// Give an instance another name
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Name of the instance
    #[arg(value_name = "NAME", add = complete::instances())]
    pub name: String,
    /// Its new name
    #[arg(value_name = "NEW")]
    pub new: String,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let name = launch::name(&args.new)?;
    let client = context.client().await?;
    client.rename(&args.name, &RenameRequest { name }).await?;
    Ok(0)
}
