//! `pileus info`: of instances, of snapshots, or of both.

use std::collections::BTreeMap;

use futures_util::future::join_all;
use pileus_api::{Instance, InstanceState, Snapshot};
use pileus_client::Client;

use crate::commands::list;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::info::Shown;
use crate::render::{self, Format, FormatOption};
use crate::several::{self, Target, Unusable};
use crate::{client_settings, complete};

/// Display information about instances or snapshots
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Instances and snapshots; all instances if none is given
    #[arg(value_name = "NAME[.SNAPSHOT]", add = complete::targets())]
    pub names: Vec<String>,
    #[command(flatten)]
    pub format: FormatOption,
    /// The snapshots of the instances instead of the instances
    #[arg(long)]
    pub snapshots: bool,
    /// The old way to ask for all
    #[arg(long, hide = true)]
    pub all: bool,
    /// Only what the daemon knows without the guest
    #[arg(long, hide = true)]
    pub no_runtime_information: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    if args.all {
        if !args.names.is_empty() {
            return Err(CommandError::usage(
                "Cannot specify name(s) when --all option set",
            ));
        }
        context.warn("the option --all is not needed any more: info shows all if no name is given");
    }
    let targets: Vec<Target> = args.names.iter().map(|name| Target::of(name)).collect();
    let of_snapshots = targets.iter().filter(|t| t.snapshot.is_some()).count();
    let mixed = of_snapshots > 0 && of_snapshots < targets.len() && !args.snapshots;
    if mixed && args.format.format == Format::Csv {
        return Err(CommandError::usage(
            "Mixed snapshot and instance arguments are not supported with CSV format",
        ));
    }
    let client = context.client().await?;
    let mut instances = client.instances().await?;
    let primary = client_settings::primary_name(&context.env)?;
    list::sort(&mut instances, primary.as_deref());
    let snapshots = match args.snapshots || of_snapshots > 0 {
        true => client.all_snapshots().await?,
        false => Vec::new(),
    };
    let mut shown = choose(&instances, snapshots, &targets, args.snapshots)
        .map_err(|errors| several::all_errors(&errors))?;
    let instances = shown.iter_mut().filter_map(|one| one.instance.as_mut());
    if args.no_runtime_information {
        for instance in instances {
            instance.report = None;
            instance.ipv4.clear();
        }
    } else {
        refresh(&client, instances).await;
    }
    let nothing = match args.snapshots || of_snapshots > 0 {
        true => "No snapshots found.",
        false => "No instances found.",
    };
    let view = context.view(args.format);
    context.print(&render::info::render(&shown, nothing, &view))
}

/// What is to be shown, by instance, in the order of the names; or every name that can't be used.
/// `all_snapshots`: a name without a snapshot means all snapshots of that instance.
fn choose(
    instances: &[Instance],
    mut snapshots: Vec<Snapshot>,
    targets: &[Target],
    all_snapshots: bool,
) -> Result<Vec<Shown>, Vec<Unusable>> {
    snapshots.sort_by_key(|s| s.created_at);
    let named: Vec<Target> = match targets {
        [] => instances
            .iter()
            .map(|i| Target::of(i.name.as_str()))
            .collect(),
        targets => targets.to_vec(),
    };
    let by_name: BTreeMap<&str, &Instance> =
        instances.iter().map(|i| (i.name.as_str(), i)).collect();
    let mut shown: Vec<Shown> = Vec::new();
    let mut errors = Vec::new();
    for target in named {
        let Some(&instance) = by_name.get(target.instance.as_str()) else {
            errors.push(Unusable::Missing(target.instance));
            continue;
        };
        let at = shown.iter().position(|one| one.name == instance.name);
        let at = at.unwrap_or_else(|| {
            shown.push(Shown {
                name: instance.name.clone(),
                instance: None,
                snapshots: Vec::new(),
            });
            shown.len() - 1
        });
        if target.snapshot.is_none() && !all_snapshots {
            shown[at].instance = Some(instance.clone());
            continue;
        }
        let wanted = |s: &&Snapshot| {
            let this = target
                .snapshot
                .as_deref()
                .is_none_or(|name| name == s.name.as_str());
            s.instance == instance.name && this
        };
        let found: Vec<Snapshot> = snapshots.iter().filter(wanted).cloned().collect();
        if found.is_empty() && target.snapshot.is_some() {
            errors.push(Unusable::NoSnapshot(target));
            continue;
        }
        let new = found
            .into_iter()
            .filter(|s| !shown[at].snapshots.contains(s));
        let new: Vec<Snapshot> = new.collect();
        shown[at].snapshots.extend(new);
    }
    if errors.is_empty() {
        return Ok(shown);
    }
    Err(errors)
}

/// Asks for what the guests tell at this moment, which a list does not hold. An instance that is gone
/// meanwhile is shown as it was.
async fn refresh(client: &Client, instances: impl Iterator<Item = &mut Instance>) {
    let asked = instances.map(|instance| async {
        if instance.deleted
            || matches!(
                instance.state,
                InstanceState::Stopped | InstanceState::Suspended
            )
        {
            return;
        }
        if let Ok(now) = client.instance(instance.name.as_str()).await {
            *instance = now;
        }
    });
    join_all(asked).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    fn chosen(names: &[&str], snapshots: bool) -> Result<Vec<String>, Vec<String>> {
        let targets: Vec<Target> = names.iter().map(|name| Target::of(name)).collect();
        let shown = choose(
            &samples::instances(),
            samples::snapshots(),
            &targets,
            snapshots,
        );
        let texts = |shown: Vec<Shown>| {
            let text = |one: Shown| {
                let snapshots: Vec<&str> = one.snapshots.iter().map(|s| s.name.as_str()).collect();
                let own = one.instance.map_or("", |_| "+");
                format!("{}{own} {}", one.name, snapshots.join(","))
                    .trim()
                    .to_owned()
            };
            shown.into_iter().map(text).collect()
        };
        let errors = |errors: Vec<Unusable>| errors.iter().map(Unusable::text).collect();
        shown.map(texts).map_err(errors)
    }

    #[test]
    fn instances_and_snapshots_by_name() {
        assert_eq!(chosen(&["foo"], false).unwrap(), ["foo+"]);
        assert_eq!(
            chosen(&["foo.second", "foo"], false).unwrap(),
            ["foo+ second"]
        );
        assert_eq!(chosen(&["foo"], true).unwrap(), ["foo snapshot1,second"]);
        assert_eq!(
            chosen(&["foo", "foo.second", "bar.snapshot1"], true).unwrap(),
            ["foo snapshot1,second", "bar snapshot1"]
        );
        assert_eq!(
            chosen(&[], false).unwrap().len(),
            samples::instances().len()
        );
        assert_eq!(
            chosen(&["x", "foo.x", "y.z", "foo"], false).unwrap_err(),
            [
                "instance \"x\" does not exist",
                "No such snapshot: foo.x",
                "instance \"y\" does not exist"
            ]
        );
    }
}
