//! `pileus suspend`.

use pileus_api::InstanceState;

use crate::context::Context;
use crate::error::Outcome;
use crate::primary;
use crate::several::{self, Group, Names};

/// Suspend running instances: their memory goes to disk, and start goes on where they were
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub names: Names,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let names = primary::or_primary(context, &args.names)?;
    let client = context.client().await?;
    let instances = several::select(&client, &names, Group::Operative).await?;
    let names: Vec<_> = instances
        .into_iter()
        // What does not run is as good as suspended.
        .filter(|i| !matches!(i.state, InstanceState::Stopped | InstanceState::Suspended))
        .map(|instance| instance.name)
        .collect();
    several::operate(context, &client, &names, async |client, name| {
        client.suspend(name).await
    })
    .await
}
