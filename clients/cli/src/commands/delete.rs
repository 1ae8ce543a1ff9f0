//! `pileus delete`: instances to the trash or for good, snapshots always for good.

use pileus_api::{Code, Instance, InstanceName};
use pileus_base::Error;
use pileus_client::Client;

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::several::{self, Group, Names, Target, Unusable};
use crate::{aliases, complete, prompt};

/// Delete instances (to the trash, or for good) and snapshots
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Instances, and snapshots of instances
    #[arg(value_name = "NAME[.SNAPSHOT]", add = complete::targets())]
    pub targets: Vec<String>,
    /// All instances
    #[arg(long)]
    pub all: bool,
    /// Delete for good instead of moving to the trash
    #[arg(short, long)]
    pub purge: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let names = Names {
        names: args.targets.clone(),
        all: args.all,
    };
    names.check()?;
    let client = context.client().await?;
    let Chosen {
        instances,
        snapshots,
    } = choose(&client, &names, args.purge).await?;
    if !snapshots.is_empty() && !args.purge && !may_purge(context).await? {
        return context.print("Cancelled.\n");
    }
    // One after the other, and before their instances: each changes what the next stands on.
    for snapshot in &snapshots {
        let name = [snapshot.instance.parse::<InstanceName>()?];
        let deleted = several::operate(context, &client, &name, async |client, instance| {
            let snapshot = snapshot.snapshot.as_deref().unwrap_or_default();
            client.delete_snapshot(instance, snapshot).await
        });
        deleted.await?;
    }
    let names: Vec<_> = instances
        .into_iter()
        // What lies in the trash already is deleted as the user wants it.
        .filter(|instance| args.purge || !instance.deleted)
        .map(|instance| instance.name)
        .collect();
    let deleted = several::operate(context, &client, &names, async |client, name| {
        client.delete(name, args.purge).await
    });
    let deleted = deleted.await;
    if args.purge {
        aliases::forget_gone(&context.env, &client, &names).await;
    }
    deleted.map_err(|mut err| {
        if err.error.code == Code::WrongState && !args.purge {
            let text = "Use --purge to forcefully delete it.".to_owned();
            match context.multipass() {
                true => err.error.details.push(text),
                false => err.hints.push(text),
            }
        }
        err
    })
}

struct Chosen {
    instances: Vec<Instance>,
    snapshots: Vec<Target>,
}

/// Looks up all that was named; if some of it can't be used, all of that is told and nothing is done.
async fn choose(client: &Client, names: &Names, purge: bool) -> Result<Chosen, CommandError> {
    if names.all {
        return Ok(Chosen {
            instances: several::select(client, names, Group::All).await?,
            snapshots: Vec::new(),
        });
    }
    let all = client.instances().await?;
    let targets: Vec<Target> = names.names.iter().map(|name| Target::of(name)).collect();
    let mut errors = Vec::new();
    let mut snapshots: Vec<Target> = Vec::new();
    let mut of_deleted = Vec::new();
    for target in targets.iter().filter(|target| target.snapshot.is_some()) {
        let found = all.iter().find(|i| i.name.as_str() == target.instance);
        let name = target.snapshot.as_deref().unwrap_or_default();
        match found {
            None => errors.push(Unusable::Missing(target.instance.clone())),
            Some(instance) if instance.deleted => {
                of_deleted.push(format!("{}.{name}", instance.name))
            }
            Some(_) => match client.snapshot(&target.instance, name).await {
                Err(err) if err.code == Code::SnapshotNotFound => {
                    errors.push(Unusable::NoSnapshot(target.clone()));
                }
                Err(err) => return Err(err.into()),
                Ok(_) if !snapshots.contains(target) => snapshots.push(target.clone()),
                Ok(_) => {}
            },
        }
    }
    let names: Vec<String> = targets
        .iter()
        .filter(|target| target.snapshot.is_none())
        .map(|target| target.instance.clone())
        .collect();
    let instances = several::choose(all, &names, Group::All).unwrap_or_else(|unusable| {
        errors.extend(unusable);
        Vec::new()
    });
    if !errors.is_empty() {
        return Err(several::all_errors(&errors));
    }
    if !of_deleted.is_empty() {
        let text = format!(
            "Cannot delete snapshots of deleted instances: {}",
            of_deleted.join(", ")
        );
        return Err(Error::new(Code::InstanceDeleted, text).into());
    }
    // An instance that goes for good takes its snapshots along.
    if purge {
        snapshots.retain(|s| instances.iter().all(|i| i.name.as_str() != s.instance));
    }
    Ok(Chosen {
        instances,
        snapshots,
    })
}

/// There is no trash for snapshots: the user must want that.
async fn may_purge(context: &Context) -> Result<bool, CommandError> {
    const ONLY: &str = "Snapshots can only be purged (after deletion, they cannot be recovered).";
    if !prompt::live(context) {
        let text = format!(
            "{ONLY} Unable to query client for confirmation. Please use the `--purge` flag if that \
             is what you want"
        );
        return Err(Error::new(Code::InvalidArgument, text).into());
    }
    prompt::confirmed(
        context,
        &format!("{ONLY} Are you sure you want to continue?"),
    )
    .await
}
