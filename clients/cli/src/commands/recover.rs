//! `pileus recover`.

use futures_util::future::join_all;

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::several::{self, Group, Names};

/// Recover deleted instances
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub names: Names,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    args.names.check()?;
    let client = context.client().await?;
    let instances = several::select(&client, &args.names, Group::Deleted).await?;
    // What is not in the trash needs no recovering.
    let names = instances.into_iter().filter(|i| i.deleted).map(|i| i.name);
    let work = names.map(|name| {
        let client = &client;
        async move { (name.to_string(), client.recover(name.as_str()).await) }
    });
    let mut errors = Vec::new();
    for (name, result) in join_all(work).await {
        if let Err(err) = result {
            errors.push((name, CommandError::from(err)));
        }
    }
    if errors.is_empty() {
        return Ok(0);
    }
    Err(CommandError::several(errors))
}
