//! `pileus restart`.

use pileus_api::StartRequest;

use crate::context::Context;
use crate::error::Outcome;
use crate::several::{self, Group, Names};

/// Restart instances
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub names: Names,
    /// Wait so many seconds at most; the work goes on after that
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub timeout: Option<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let timeout = several::timeout(args.timeout.as_deref())?;
    args.names.check()?;
    let client = context.client().await?;
    let instances = several::select(&client, &args.names, Group::Operative).await?;
    let names: Vec<_> = instances
        .into_iter()
        .map(|instance| instance.name)
        .collect();
    let request = StartRequest { timeout };
    let work = several::operate(context, &client, &names, async |client, name| {
        client.restart(name, &request).await
    });
    several::within_daemons(timeout, "Timed out waiting for instance to restart.", work).await
}
