//! Commands on several instances: choose them by name or `--all`, work on all at once, tell every
//! error.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::future::join_all;
use pileus_api::{Code, Instance, InstanceName, Operation, OperationState};
use pileus_base::{Error, Result};
use pileus_client::Client;

use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};

#[derive(Debug, Clone, Default, clap::Args)]
pub struct Names {
    /// Names of instances
    #[arg(value_name = "NAME", add = complete::instances())]
    pub names: Vec<String>,
    /// All instances
    #[arg(long)]
    pub all: bool,
}

/// Which instances a command works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    /// Those that are not in the trash; naming one of the trash is an error.
    Operative,
    /// All of them; `--all` means those in the trash too.
    All,
    /// `--all` means those in the trash; naming another one is fine.
    Deleted,
}

/// An instance, or one of its snapshots: `NAME` or `NAME.SNAPSHOT`. Names have no dots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Target {
    pub instance: String,
    pub snapshot: Option<String>,
}

impl Target {
    pub fn of(text: &str) -> Self {
        match text.split_once('.') {
            Some((instance, snapshot)) => Self {
                instance: instance.to_owned(),
                snapshot: Some(snapshot.to_owned()),
            },
            None => Self {
                instance: text.to_owned(),
                snapshot: None,
            },
        }
    }
}

impl Names {
    /// Refuses a call with neither names nor `--all`, or with both.
    pub fn check(&self) -> Result<(), CommandError> {
        match (self.names.is_empty(), self.all) {
            (true, false) => Err(CommandError::usage("Name argument or --all is required")
                .hint("pileus list shows the instances.")),
            (false, true) => Err(CommandError::usage(
                "Cannot specify name(s) when --all option set",
            )),
            _ => Ok(()),
        }
    }
}

/// Looks the instances up; every name that can't be used is told of, and then nothing is done.
pub(crate) async fn select(
    client: &Client,
    names: &Names,
    group: Group,
) -> Result<Vec<Instance>, CommandError> {
    names.check()?;
    let instances = client.instances().await?;
    if names.all {
        let wanted = |i: &Instance| match group {
            Group::Operative => !i.deleted,
            Group::All => true,
            Group::Deleted => i.deleted,
        };
        return Ok(instances.into_iter().filter(wanted).collect());
    }
    choose(instances, &names.names, group).map_err(|errors| all_errors(&errors))
}

/// A name that can't be used.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Unusable {
    Missing(String),
    Deleted(String),
    NoSnapshot(Target),
}

impl Unusable {
    pub fn text(&self) -> String {
        match self {
            Unusable::Missing(name) => format!("instance \"{name}\" does not exist"),
            Unusable::Deleted(name) => format!("instance \"{name}\" is deleted"),
            Unusable::NoSnapshot(target) => {
                let snapshot = target.snapshot.as_deref().unwrap_or_default();
                format!("No such snapshot: {}.{snapshot}", target.instance)
            }
        }
    }

    fn code(&self) -> Code {
        match self {
            Unusable::Missing(_) => Code::InstanceNotFound,
            Unusable::Deleted(_) => Code::InstanceDeleted,
            Unusable::NoSnapshot(_) => Code::SnapshotNotFound,
        }
    }
}

/// The named instances, each once, in the order of the names.
pub(crate) fn choose(
    instances: Vec<Instance>,
    names: &[String],
    group: Group,
) -> Result<Vec<Instance>, Vec<Unusable>> {
    let mut by_name: BTreeMap<String, Instance> = instances
        .into_iter()
        .map(|instance| (instance.name.to_string(), instance))
        .collect();
    let mut chosen: Vec<Instance> = Vec::new();
    let mut errors = Vec::new();
    for name in names {
        match by_name.remove(name) {
            Some(instance) if instance.deleted && group == Group::Operative => {
                errors.push(Unusable::Deleted(name.clone()));
            }
            Some(instance) => chosen.push(instance),
            None if chosen.iter().any(|i| i.name.as_str() == name) => {}
            None => errors.push(Unusable::Missing(name.clone())),
        }
    }
    if errors.is_empty() {
        return Ok(chosen);
    }
    Err(errors)
}

pub(crate) fn all_errors(errors: &[Unusable]) -> CommandError {
    let mut all = Error::new(Code::InstanceNotFound, "The following errors occurred:");
    for error in errors {
        // The one with a hint counts.
        if !matches!(error, Unusable::Missing(_)) {
            all.code = error.code();
        }
        all.details.push(error.text());
    }
    all.into()
}

/// Begins an operation on each instance, follows all of them at once and waits for the last.
pub(crate) async fn operate(
    context: &Context,
    client: &Client,
    names: &[InstanceName],
    begin: impl AsyncFn(&Client, &str) -> Result<Operation>,
) -> Outcome {
    let progress = context.progress();
    let work = names.iter().map(|name| {
        let mut line = progress.line(name.as_str());
        let begin = &begin;
        async move {
            let done = async {
                let operation = begin(client, name.as_str()).await?;
                let operation = client.follow(operation, |event| line.event(event)).await?;
                line.end(&operation);
                line.times(&operation);
                match operation.state {
                    OperationState::Succeeded => Ok(()),
                    _ => Err(CommandError::of_operation(operation)),
                }
            };
            (name.to_string(), done.await)
        }
    });
    let mut errors = Vec::new();
    for (name, result) in join_all(work).await {
        if let Err(err) = result {
            errors.push((name, err));
        }
    }
    if errors.is_empty() {
        return Ok(0);
    }
    Err(CommandError::several(errors))
}

/// Waits for work that the daemon bounds itself by the user's `--timeout` (once for the boot, once for
/// cloud-init), so that its error, with the console's last lines, is the one that is shown. Should the
/// daemon say nothing, the client gives up on its own.
pub(crate) async fn within_daemons<T>(
    timeout: Option<u64>,
    message: &str,
    work: impl Future<Output = Result<T, CommandError>>,
) -> Result<T, CommandError> {
    within(timeout.map(patience), message, work)
        .await
        .map_err(|err| {
            if timeout.is_some() {
                err.by_time()
            } else {
                err
            }
        })
}

/// Seconds that a client waits for a daemon that has `timeout` for each of two phases.
pub(crate) fn patience(timeout: u64) -> u64 {
    timeout.saturating_mul(2).saturating_add(5)
}

/// Ends `work` with the exit code of a time-out if the user's `--timeout` is over first.
pub(crate) async fn within<T>(
    timeout: Option<u64>,
    message: &str,
    work: impl Future<Output = Result<T, CommandError>>,
) -> Result<T, CommandError> {
    let Some(seconds) = timeout else {
        return work.await;
    };
    match tokio::time::timeout(Duration::from_secs(seconds), work).await {
        Ok(result) => result,
        Err(_) => Err(CommandError::timed_out(message)),
    }
}

/// Reads the value of `--timeout`.
pub(crate) fn timeout(text: Option<&str>) -> Result<Option<u64>, CommandError> {
    let Some(text) = text else { return Ok(None) };
    match text.parse::<u64>() {
        // Ten years: what is more can only be a slip, and times can be added without overflow.
        Ok(seconds) if (1..=315_360_000).contains(&seconds) => Ok(Some(seconds)),
        _ => Err(CommandError::usage(
            "error: --timeout value has to be a positive integer",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|n| (*n).to_owned()).collect()
    }

    #[test]
    fn every_unusable_name_is_told() {
        let errors = choose(
            samples::instances(),
            &names(&["x", "foo", "old", "y"]),
            Group::Operative,
        )
        .unwrap_err();
        let text = all_errors(&errors).text("stop");
        assert_eq!(
            text.lines().take(4).collect::<Vec<_>>(),
            [
                "stop failed: The following errors occurred:",
                "instance \"x\" does not exist",
                "instance \"old\" is deleted",
                "instance \"y\" does not exist",
            ]
        );
    }

    #[test]
    fn a_name_given_twice_is_one_instance() {
        let chosen = choose(
            samples::instances(),
            &names(&["foo", "foo", "old"]),
            Group::All,
        )
        .unwrap();
        let chosen: Vec<&str> = chosen.iter().map(|i| i.name.as_str()).collect();
        assert_eq!(chosen, ["foo", "old"]);
    }

    #[test]
    fn timeouts() {
        assert_eq!(timeout(None).unwrap(), None);
        assert_eq!(timeout(Some("300")).unwrap(), Some(300));
        for bad in ["0", "-1", "x", "1.5", "", "99999999999999999999"] {
            assert_eq!(timeout(Some(bad)).unwrap_err().kind.exit_code(), 1, "{bad}");
        }
    }
}
