//! `pileus stop`.

use pileus_api::{InstanceState, StopRequest};

use crate::context::Context;
use crate::error::Outcome;
use crate::several::{self, Group, Names};

/// Stop running instances
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub names: Names,
    /// Cut the power instead of asking the guest to shut down
    #[arg(long)]
    pub force: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    args.names.check()?;
    let client = context.client().await?;
    let instances = several::select(&client, &args.names, Group::Operative).await?;
    let names: Vec<_> = instances
        .into_iter()
        .filter(|instance| instance.state != InstanceState::Stopped)
        .map(|instance| instance.name)
        .collect();
    let request = StopRequest {
        force: args.force,
        timeout: None,
        ..Default::default()
    };
    several::operate(context, &client, &names, async |client, name| {
        client.stop(name, &request).await
    })
    .await
}
