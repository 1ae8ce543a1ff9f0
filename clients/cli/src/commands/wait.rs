//! `pileus wait`: until an instance is as it should be.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use futures_util::StreamExt;
use pileus_api::{CloudInitStatus, Code, Event, Instance, InstanceState};
use pileus_base::Error;
use pileus_client::Client;

use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::several;

/// Between two looks at what no event tells of.
const PAUSE: Duration = Duration::from_secs(1);
/// How long a daemon that is restarted may be away.
const RESTART: Duration = Duration::from_secs(30);

/// Wait until an instance fulfils a condition
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Conditions:
  running, stopped, suspended   the instance is in that state
  deleted                       it is in the trash, or gone
  cloud-init                    cloud-init has ended; exit code 2 if it failed
  ip                            it has an address
  ssh                           its SSH server answers
  port:N                        something listens on TCP port N in the guest

Exit code 5 if --timeout is over first.

Examples:
  pileus wait web stopped && pileus snapshot web
  pileus wait web port:8080 --timeout 60")]
pub struct Args {
    /// Name of the instance
    #[arg(value_name = "NAME", add = complete::instances())]
    pub name: String,
    /// What to wait for
    #[arg(value_name = "CONDITION")]
    pub condition: Condition,
    /// Wait so many seconds at most
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub timeout: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    State(InstanceState),
    Deleted,
    CloudInit,
    Ip,
    Port(u16),
}

impl FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "running" => Condition::State(InstanceState::Running),
            "stopped" => Condition::State(InstanceState::Stopped),
            "suspended" => Condition::State(InstanceState::Suspended),
            "deleted" => Condition::Deleted,
            "cloud-init" => Condition::CloudInit,
            "ip" => Condition::Ip,
            "ssh" | "ssh-port" => Condition::Port(22),
            _ => {
                let port = text
                    .strip_prefix("port:")
                    .and_then(|port| port.parse().ok());
                match port {
                    Some(port) if port > 0 => Condition::Port(port),
                    _ => {
                        return Err("it can be running, stopped, suspended, deleted, \
                                    cloud-init, ip, ssh or port:N"
                            .to_owned());
                    }
                }
            }
        })
    }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Condition::State(state) => f.write_str(state.as_str()),
            Condition::Deleted => f.write_str("deleted"),
            Condition::CloudInit => f.write_str("cloud-init"),
            Condition::Ip => f.write_str("ip"),
            Condition::Port(port) => write!(f, "port:{port}"),
        }
    }
}

impl Condition {
    /// Whether an event tells of each change that matters.
    fn has_events(self) -> bool {
        matches!(self, Condition::State(_) | Condition::Deleted)
    }
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let timeout = several::timeout(args.timeout.as_deref())?;
    let client = context.client().await?;
    let line = context.progress().line(&args.name);
    line.message(&format!("Waiting for {}: {}", args.name, args.condition));
    let message = format!("Timed out waiting for {}: {}.", args.name, args.condition);
    several::within(timeout, &message, until(&client, args)).await?;
    Ok(0)
}

async fn until(client: &Client, args: &Args) -> Result<(), CommandError> {
    let mut away = None;
    loop {
        match watch(client, args).await {
            Ok(true) => return Ok(()),
            // The daemon has ended; the next one goes on, and has as long as this one had.
            Ok(false) => away = None,
            Err(err) if err.code == Code::DaemonUnreachable => {
                let since = away.get_or_insert_with(std::time::Instant::now);
                if since.elapsed() > RESTART {
                    return Err(err.into());
                }
            }
            Err(err) => return Err(err.into()),
        }
        tokio::time::sleep(PAUSE / 4).await;
    }
}

/// Looks at each change; false if the daemon tells no more.
async fn watch(client: &Client, args: &Args) -> Result<bool, Error> {
    // Before the first look, so that nothing is missed between the two.
    let mut events = Box::pin(client.events().await?);
    loop {
        if holds(client, args).await? {
            return Ok(true);
        }
        let changed = async {
            while let Some(event) = events.next().await {
                match event? {
                    Event::Instance { name, .. } | Event::InstancePurged { name, .. }
                        if name.as_str() != args.name => {}
                    Event::Images | Event::Templates => {}
                    _ => return Ok::<bool, Error>(true),
                }
            }
            Ok(false)
        };
        tokio::select! {
            more = changed => if !more? {
                return Ok(false);
            },
            () = tokio::time::sleep(PAUSE), if !args.condition.has_events() => {}
        }
    }
}

async fn holds(client: &Client, args: &Args) -> Result<bool, Error> {
    let instance = match client.instance(&args.name).await {
        Err(err) if err.code == Code::InstanceNotFound && args.condition == Condition::Deleted => {
            return Ok(true);
        }
        result => result?,
    };
    if instance.deleted {
        if args.condition == Condition::Deleted {
            return Ok(true);
        }
        let text = format!("instance \"{}\" is deleted", args.name);
        return Err(Error::new(Code::InstanceDeleted, text));
    }
    let running = instance.state == InstanceState::Running;
    match args.condition {
        Condition::State(state) => Ok(instance.state == state),
        Condition::Deleted => Ok(false),
        Condition::CloudInit => cloud_init(&instance),
        Condition::Ip => Ok(running && !instance.ipv4.is_empty()),
        // Whoever listens there gets a connection that ends at once.
        Condition::Port(port) => Ok(running && client.port(&args.name, port).await.is_ok()),
    }
}

fn cloud_init(instance: &Instance) -> Result<bool, Error> {
    let Some(told) = &instance.cloud_init else {
        return Ok(false);
    };
    match told.status {
        CloudInitStatus::Running => Ok(false),
        CloudInitStatus::Done | CloudInitStatus::Degraded | CloudInitStatus::Absent => Ok(true),
        CloudInitStatus::Error => {
            let mut err = Error::new(
                Code::CloudInitFailed,
                format!("cloud-init of {} ended with errors", instance.name),
            );
            err.details = told.errors.clone();
            Err(err)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conditions() {
        for text in [
            "running",
            "stopped",
            "suspended",
            "deleted",
            "cloud-init",
            "ip",
            "port:8080",
        ] {
            assert_eq!(text.parse::<Condition>().unwrap().to_string(), text);
        }
        assert_eq!("ssh".parse(), Ok(Condition::Port(22)));
        for bad in [
            "",
            "Running",
            "starting",
            "port",
            "port:",
            "port:0",
            "port:70000",
            "port:-1",
        ] {
            assert!(bad.parse::<Condition>().is_err(), "{bad}");
        }
    }
}
