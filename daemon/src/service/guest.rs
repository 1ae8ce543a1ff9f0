//! Commands in a guest.

use std::time::Duration;

use pileus_api::{ExecRequest, Identity, IdentityItem};
use pileus_base::{Code, Error, Result};
use pileus_instances::guest::exec::{ExecSession, ExecSpec, Tty};
use pileus_instances::guest::port::PortStream;

use super::Service;

/// A guest collects its identity in less than a second.
const IDENTITY_BOUND: Duration = Duration::from_secs(60);

impl Service {
    /// What makes the instance itself, as its guest tells.
    pub async fn identity(&self, name: &str) -> Result<Identity> {
        let instance = self.parts.registry.get_usable(name)?;
        let guest = instance.machine_soon().await?.guest()?;
        let items = guest.identity(IDENTITY_BOUND).await?;
        Ok(Identity {
            name: instance.row().name,
            items: items
                .into_iter()
                .map(|(name, values)| IdentityItem { name, values })
                .collect(),
        })
    }

    /// Runs a command (or a shell) in a running instance.
    pub async fn exec(&self, name: &str, request: ExecRequest) -> Result<ExecSession> {
        let instance = self.parts.registry.get_usable(name)?;
        let sftp = match request.subsystem.as_deref() {
            None => false,
            Some("sftp") if request.command.is_empty() && request.tty.is_none() => true,
            Some(other) => {
                return Err(Error::new(
                    Code::InvalidArgument,
                    format!("{other:?} is no subsystem, or it came with a command or a terminal"),
                )
                .advise("There is one: sftp."));
            }
        };
        let guest = instance.machine_soon().await?.guest()?;
        guest
            .exec(&ExecSpec {
                command: request.command,
                cwd: request.working_directory,
                env: request.env.into_iter().collect(),
                tty: request.tty.map(|tty| Tty {
                    term: tty.term,
                    cols: tty.cols.into(),
                    rows: tty.rows.into(),
                    modes: Vec::new(),
                }),
                sftp,
            })
            .await
    }
    /// Connects to a TCP port on a running guest's loopback.
    pub async fn port(&self, name: &str, port: u16) -> Result<PortStream> {
        let instance = self.parts.registry.get_usable(name)?;
        let guest = instance.machine_soon().await?.guest()?;
        guest.port(port).await
    }
}
