//! The one handle on a running guest: its agent, commands in it, a fresh report. Chooses the way:
//! virtio-serial while an agent answers, the network for a guest without one.
//!
//! Next: `ssh.rs` and `exec.rs` (commands), `watch.rs` (what the guest tells by itself).

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pileus_base::{Code, Error, Result};
use serde_json::json;
use tokio::time::Instant;

use super::LOGIN_USER;
use super::agent::AgentLink;
use super::console::{Console, ConsolePlace};
use super::exec::{ExecSession, ExecSpec};
use super::keys::InstanceKeys;
use super::port::PortStream;
use super::ssh::{Access, SshPool};
use crate::qemu::Paths;
use crate::qemu::spec::{SSH_PORTS, ssh_port};

/// How long a command waits for an agent that is starting (a guest that reboots, a daemon that has
/// just started) before it tries the network.
const AGENT_WAIT: Duration = Duration::from_secs(5);
const ANSWER_BOUND: Duration = Duration::from_secs(5);

/// Cheap to clone.
#[derive(Clone)]
pub struct Guest {
    shared: Arc<Shared>,
}

struct Shared {
    agent: AgentLink,
    /// Over the virtio-serial port.
    port: SshPool,
    /// Over the network.
    network: SshPool,
    address: Ipv4Addr,
    console: ConsolePlace,
    reported: Mutex<Option<Instant>>,
}

impl Guest {
    /// Nothing is opened but the agent's link; `folder` is the instance's own.
    pub fn connect(paths: &Paths, folder: &Path, keys: InstanceKeys, address: Ipv4Addr) -> Self {
        let agent = AgentLink::connect(paths.agent());
        let port = Access::Agent {
            link: agent.clone(),
            ports: (0..SSH_PORTS)
                .map(|number| (ssh_port(number), paths.ssh(number)))
                .collect(),
        };
        let network = Access::Tcp {
            address: SocketAddr::from((address, 22)),
            pin_file: folder.join("host_key.pinned"),
        };
        Self {
            shared: Arc::new(Shared {
                agent,
                port: SshPool::new(port, LOGIN_USER, keys.clone()),
                network: SshPool::new(network, LOGIN_USER, keys),
                address,
                console: ConsolePlace::new(paths.console()),
                reported: Mutex::new(None),
            }),
        }
    }

    pub fn agent(&self) -> &AgentLink {
        &self.shared.agent
    }

    pub fn address(&self) -> Ipv4Addr {
        self.shared.address
    }

    /// Runs a command or a shell.
    pub async fn exec(&self, spec: &ExecSpec) -> Result<ExecSession> {
        self.way().await?.exec(spec).await
    }

    /// Connects to a TCP port on the guest's loopback.
    pub async fn port(&self, port: u16) -> Result<PortStream> {
        self.way().await?.port(port).await
    }

    /// Attaches to the serial console; [`Code::WrongState`] if somebody is.
    pub async fn console(&self) -> Result<Console> {
        self.shared.console.open().await
    }

    /// Opens the first connection ahead of the first command; failing is no matter.
    pub async fn warm_up(&self) {
        if self.shared.agent.hello().borrow().is_some() {
            let _ = self.shared.port.warm_up().await;
        }
    }

    /// The guest was reset: its agent comes up anew, and what was open is gone.
    pub fn was_reset(&self) {
        self.shared.agent.reconnect();
    }

    /// The pool to use now.
    async fn way(&self) -> Result<&SshPool> {
        let hello = tokio::time::timeout(AGENT_WAIT, self.shared.agent.wait_hello());
        if let Ok(Ok(_)) = hello.await {
            return Ok(&self.shared.port);
        }
        match self.shared.network.warm_up().await {
            Ok(()) => Ok(&self.shared.network),
            Err(err) => Err(Error::new(
                Code::GuestUnreachable,
                format!(
                    "The guest's agent does not answer, and SSH to {} does not work: {err}",
                    self.shared.address
                ),
            )
            .advise("Wait if it is still booting; `pileus logs` shows its console.")
            .with_source(err)),
        }
    }

    /// Asks for a report if the last one is older than `age`; it arrives like all others.
    pub async fn refresh_report(&self, age: Duration) {
        let fresh = {
            let mut reported = self
                .shared
                .reported
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let fresh = reported.is_some_and(|at| at.elapsed() < age);
            if !fresh {
                // Set before the answer: of many who ask at once one goes.
                *reported = Some(Instant::now());
            }
            fresh
        };
        if !fresh && self.shared.agent.hello().borrow().is_some() {
            let _ = self.shared.agent.fresh_report(ANSWER_BOUND).await;
        }
    }

    /// Asks the guest to reboot in good order.
    pub async fn reboot(&self) -> Result<()> {
        if self.shared.agent.hello().borrow().is_none() {
            return Err(Error::new(
                Code::GuestUnreachable,
                "The guest's agent does not answer",
            ));
        }
        self.shared
            .agent
            .request("reboot", json!({}), ANSWER_BOUND)
            .await
            .map(drop)
    }
}
