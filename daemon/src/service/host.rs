//! The host that the daemon runs on: what it has, whether that is enough (`host/checks.rs`, from what
//! `host/facts.rs` finds), and how an ordinary SSH client reaches an instance.

mod checks;
mod facts;

use pileus_api::{HostInfo, InstanceState, SshInfo};
use pileus_base::{Code, Error, Result, files};
use pileus_instances::guest::LOGIN_USER;
use pileus_instances::guest::keys::InstanceKeys;

use super::{Service, blocking};
use crate::state::instances::Stage;

const SSH_PORT: u16 = 22;

impl Service {
    /// What the host has, and what it lacks.
    pub async fn host(&self) -> Result<HostInfo> {
        let facts = self.facts().await?;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Ok(HostInfo {
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory: facts.memory.bytes(),
            memory_available: facts.memory_available.bytes(),
            space_available: files::free_space(&self.parts.layout.instances())?,
            checks: checks::checks(&facts),
        })
    }

    /// Address and keys of an instance, whatever its state: they stay the same for its whole life.
    pub async fn ssh_info(&self, name: &str) -> Result<SshInfo> {
        let row = self.parts.registry.get_usable(name)?.row();
        if row.stage == Stage::Is(InstanceState::Creating) {
            return Err(Error::new(
                Code::WrongState,
                format!("instance \"{name}\" is being prepared"),
            )
            .advise("Wait until its launch has ended."));
        }
        let folder = self.parts.layout.instance(row.id);
        let keys = move || {
            let keys = InstanceKeys::load(&folder)?;
            let private = keys
                .client()
                .to_openssh(Default::default())
                .map_err(|err| {
                    Error::internal(format!("The instance's key can't be written: {err}"))
                })?;
            Ok((private.to_string(), keys.host_public_line()?))
        };
        let (private_key, host_key) = blocking(keys).await?;
        Ok(SshInfo {
            name: row.name,
            user: LOGIN_USER.to_owned(),
            address: row.address,
            port: SSH_PORT,
            private_key,
            host_key: host_key.trim_end().to_owned(),
        })
    }
}
