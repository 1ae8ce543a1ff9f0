//! `pileus verify-unique`: whether instances that may come from one saved machine share what must be
//! their own.

use futures_util::future::join_all;

use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::{self, FormatOption};

/// Check that instances share nothing that must be an instance's own
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The guests are asked for their machine-id, boot-id, host keys, addresses and more; every item is
compared between all of them. The exit code is 0 if nothing is shared and 1 if something is.")]
pub struct Args {
    /// Names of two or more instances
    #[arg(value_name = "NAME", num_args = 2.., required = true, add = complete::instances())]
    pub names: Vec<String>,
    #[command(flatten)]
    pub format: FormatOption,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    for (i, name) in args.names.iter().enumerate() {
        if args.names[..i].contains(name) {
            return Err(CommandError::usage(format!("error: {name} is named twice")));
        }
    }
    let client = context.client().await?;
    let asked = args.names.iter().map(|name| {
        let client = &client;
        async move { (name.clone(), client.identity(name).await) }
    });
    let mut identities = Vec::new();
    let mut failed = Vec::new();
    for (name, result) in join_all(asked).await {
        match result {
            Ok(identity) => identities.push(identity),
            Err(err) => failed.push((name, CommandError::from(err))),
        }
    }
    if !failed.is_empty() {
        return Err(CommandError::several(failed));
    }
    let items = render::identity::compare(&identities);
    context.print(&render::identity::render(&items, args.format.format))?;
    let shared = items.iter().any(|item| !item.shared.is_empty());
    Ok(u8::from(shared))
}
