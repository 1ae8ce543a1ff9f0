//! `pileus delete`.

use crate::context::Context;
use crate::error::Outcome;
use crate::several::{self, Group, Names};

/// Delete instances: to the trash, or for good
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub names: Names,
    /// Delete for good instead of moving to the trash
    #[arg(short, long)]
    pub purge: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    args.names.check()?;
    let client = context.client().await?;
    let instances = several::select(&client, &args.names, Group::All).await?;
    let names: Vec<_> = instances
        .into_iter()
        // What lies in the trash already is deleted as the user wants it.
        .filter(|instance| args.purge || !instance.deleted)
        .map(|instance| instance.name)
        .collect();
    several::operate(context, &client, &names, async |client, name| {
        client.delete(name, args.purge).await
    })
    .await
}
