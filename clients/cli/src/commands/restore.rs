//! `pileus restore`.

use pileus_api::{OperationState, RestoreRequest, SnapshotRequest};
use pileus_base::{Code, Error};

use crate::commands::snapshot;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::several::Target;
use crate::{complete, prompt};

/// Restore an instance from a snapshot
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
What the instance is now is lost; you are asked whether to take a snapshot of that first.
One that runs is ended, and runs again afterwards.")]
pub struct Args {
    /// The instance and its snapshot
    #[arg(value_name = "NAME.SNAPSHOT", add = complete::targets())]
    pub target: String,
    /// Discard what the instance is now, without asking
    #[arg(short, long)]
    pub destructive: bool,
    /// Only the disk, even if the memory was saved too
    #[arg(long)]
    pub disk_only: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let Target {
        instance,
        snapshot: Some(name),
    } = Target::of(&args.target)
    else {
        return Err(CommandError::usage(
            "Invalid format. Please specify the snapshot as <instance-name>.<snapshot-name>.",
        ));
    };
    let client = context.client().await?;
    if context.multipass() {
        let what = "Multipass can only restore snapshots of stopped instances.";
        snapshot::usable(&client, &instance, what).await?;
    }
    // Before anything is asked or taken: is there something to restore?
    client.snapshot(&instance, &name).await?;
    if !args.destructive {
        if !prompt::live(context) {
            let text = "Unable to query client for confirmation. Use '--destructive' to \
                        automatically discard current machine state.";
            return Err(Error::new(Code::InvalidArgument, text).into());
        }
        let question = format!(
            "Do you want to take a snapshot of {instance} before discarding its current state?"
        );
        if prompt::confirmed(context, &question).await? {
            let request = SnapshotRequest {
                comment: format!("Before restoring {name}"),
                ..Default::default()
            };
            snapshot::take(context, &client, &instance, &request).await?;
        }
    }
    let mut line = context.progress().line(&instance);
    let request = RestoreRequest {
        // There a restored instance is a stopped one.
        disk_only: args.disk_only || context.multipass(),
    };
    let operation = client.restore(&instance, &name, &request).await?;
    let operation = client.follow(operation, |event| line.event(event)).await?;
    line.end(&operation);
    line.times(&operation);
    drop(line);
    if operation.state != OperationState::Succeeded {
        return Err(CommandError::of_operation(operation));
    }
    context.print(&format!("Snapshot restored: {instance}.{name}\n"))
}
