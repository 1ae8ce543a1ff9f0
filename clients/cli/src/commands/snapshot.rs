//! `pileus snapshot`: under this name of running instances too.

use pileus_api::{Instance, InstanceState, OperationState, SnapshotRequest};
use pileus_base::{Code, Error};
use pileus_client::Client;

use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};

/// Take a snapshot of an instance, which may run
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  pileus snapshot web -n before-upgrade -c 'all is well'
  pileus snapshot web --with-memory      a restore goes on at this very moment")]
pub struct Args {
    /// Name of the instance
    #[arg(value_name = "NAME", add = complete::instances())]
    pub instance: String,
    /// Name of the snapshot; snapshotN if not given
    #[arg(short, long, value_name = "NAME")]
    pub name: Option<String>,
    /// What to remember of it
    #[arg(
        short,
        long,
        short_alias = 'm',
        value_name = "TEXT",
        allow_hyphen_values = true
    )]
    pub comment: Option<String>,
    /// Save the memory of a running instance too
    #[arg(long)]
    pub with_memory: bool,
}

pub(crate) async fn run(context: &Context, args: Args) -> Outcome {
    let name = args.name.as_deref().map(str::parse).transpose()?;
    let client = context.client().await?;
    if context.multipass() {
        let what = "Multipass can only take snapshots of stopped instances.";
        usable(&client, &args.instance, what).await?;
    }
    let request = SnapshotRequest {
        name,
        comment: args.comment.unwrap_or_default(),
        with_memory: args.with_memory,
    };
    take(context, &client, &args.instance, &request).await?;
    Ok(0)
}

/// Takes a snapshot and says so.
pub(crate) async fn take(
    context: &Context,
    client: &Client,
    instance: &str,
    request: &SnapshotRequest,
) -> Result<(), CommandError> {
    let mut line = context.progress().line(instance);
    let reply = client.take_snapshot(instance, request).await?;
    let operation = client
        .follow(reply.operation, |event| line.event(event))
        .await?;
    line.end(&operation);
    line.times(&operation);
    drop(line);
    if operation.state != OperationState::Succeeded {
        return Err(CommandError::of_operation(operation));
    }
    context.print(&format!("Snapshot taken: {instance}.{}\n", reply.name))?;
    Ok(())
}

/// Under the name `multipass` an instance must be stopped for what is done with snapshots: scripts know
/// that, and may rely on it. `what` is the text for one that is not.
pub(crate) async fn usable(
    client: &Client,
    name: &str,
    what: &str,
) -> Result<Instance, CommandError> {
    let instance = client.instance(name).await?;
    if instance.deleted {
        let text = format!("instance \"{name}\" is deleted");
        return Err(Error::new(Code::InstanceDeleted, text).into());
    }
    if instance.state != InstanceState::Stopped {
        return Err(Error::new(Code::WrongState, what).into());
    }
    Ok(instance)
}
