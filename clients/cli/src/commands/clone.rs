//! `pileus clone`: under this name of running instances and of snapshots too.

use pileus_api::{CloneRequest, OperationState};
use pileus_base::Error;

use crate::commands::snapshot;
use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::several::Target;

/// Clone an instance, which may run, or a snapshot
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The clone has the disk of its source and an identity of its own; it is stopped.

Examples:
  pileus clone web -n web2
  pileus clone web.before-upgrade      as it was then")]
pub struct Args {
    /// The instance, or one of its snapshots
    #[arg(value_name = "NAME[.SNAPSHOT]", add = complete::targets())]
    pub source: String,
    /// Name of the clone; NAME-cloneN if not given
    #[arg(short, long, value_name = "NAME")]
    pub name: Option<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let name = args.name.as_deref().map(|name| {
        name.parse().map_err(|_: Error| {
            let text = format!("Invalid destination instance name: {name}");
            Error::new(pileus_api::Code::InvalidName, text)
        })
    });
    let name = name.transpose()?;
    let client = context.client().await?;
    // Names have no dots, so a snapshot is no instance there.
    let target = match context.multipass() {
        true => Target {
            instance: args.source.clone(),
            snapshot: None,
        },
        false => Target::of(&args.source),
    };
    if context.multipass() {
        let what = "Multipass can only clone stopped instances.";
        snapshot::usable(&client, &target.instance, what).await?;
    }
    let request = CloneRequest {
        name,
        snapshot: target.snapshot.as_deref().map(str::parse).transpose()?,
    };
    let mut line = context.progress().line(&target.instance);
    let reply = client.clone_instance(&target.instance, &request).await?;
    let operation = client
        .follow(reply.operation, |event| line.event(event))
        .await?;
    line.end(&operation);
    drop(line);
    if operation.state != OperationState::Succeeded {
        return Err(CommandError::of_operation(operation));
    }
    context.print(&format!("Cloned from {} to {}.\n", args.source, reply.name))
}
