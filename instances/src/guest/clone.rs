//! How one saved machine becomes many different ones: requests to the agent in the guest.
//!
//! ```text
//!  template   boots ── quiesce ──▸ still: no keys, no ids, nothing about to wake up ── saved
//!  clone      runs on from there ── identify ──▸ somebody, with a network ── Up
//!  standby    the same, and later ── name ──▸ the instance that somebody has launched
//!  booted     a copy of another one's disk has booted ── identify ──▸ somebody else
//!  any        identity ──▸ every value that must differ between two guests
//! ```
//!
//! An agent that was made quiet answers hello with `template` until it is told who it is; `watch.rs`
//! takes no such hello for a sign of life. What each item needs: `docs/decisions/0010-warm-launch.md`.
//! The guest's side: `agent/quiesce.py`, `agent/identify.py`, `agent/booted.py`, `agent/identity.py`.

use std::fmt;
use std::net::Ipv4Addr;
use std::time::Duration;

use pileus_base::{Code, Error, Mac, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::LOGIN_USER;
use super::agent::AgentLink;
use super::handle::Guest;
use super::keys::InstanceKeys;
use super::wire::clean;

/// What a guest may tell at most; what is more is cut.
const MAX_ITEMS: usize = 64;
const MAX_VALUES: usize = 32;
const MAX_STEPS: usize = 64;
/// The link's own way there and back, on top of what the agent is granted.
const SLACK: Duration = Duration::from_secs(2);

/// Where a clone comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CloneMode {
    /// From a template that was made quiet: what cached an identity holds none.
    Warm,
    /// From a running instance: those who cached its identity are started anew.
    Full,
    /// It has just booted from a copy of another one's disk, with its own seed and card: what cloud-init
    /// and PID 1 have not made new is. To be asked when cloud-init has ended; may be asked again if it
    /// was interrupted.
    Booted,
}

/// A clone's only network card, which the host plugs in while the agent gives the guest its identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CloneNic {
    pub mac: Mac,
    /// What DHCP is going to give it.
    pub address: Ipv4Addr,
    pub prefix: u8,
    pub gateway: Ipv4Addr,
    /// The name server that DHCP tells.
    pub dns: Ipv4Addr,
}

/// Who a clone is to be.
#[derive(Clone)]
pub struct IdentitySpec {
    /// cloud-init's instance-id; the one in the clone's seed.
    pub instance: String,
    pub hostname: String,
    /// 32 hexadecimal digits.
    pub machine_id: String,
    /// From the host's own generator, at least 32 bytes.
    pub entropy: Vec<u8>,
    /// The host's clock now, seconds since 1970.
    pub time: f64,
    pub keys: InstanceKeys,
    /// More public keys that may log in, one line each.
    pub authorized: Vec<String>,
    /// IANA name.
    pub timezone: Option<String>,
    pub nic: Option<CloneNic>,
    /// The disk is larger than the one that was saved.
    pub grow: bool,
    /// The seed holds user data: cloud-init is run for the new instance. It is not waited for; its state
    /// comes as it does in a boot.
    pub cloud_init: bool,
    /// Its name is provisional: [`Guest::name`] follows, and what depends on the name waits for that.
    pub standby: bool,
    pub mode: CloneMode,
}

/// What a clone that stood by learns when it is launched. Its ids and keys are its own already.
#[derive(Clone)]
pub struct NameSpec {
    pub hostname: String,
    /// From the host's own generator, at least 32 bytes.
    pub entropy: Vec<u8>,
    /// The host's clock now, seconds since 1970.
    pub time: f64,
    /// IANA name.
    pub timezone: Option<String>,
    /// The disk is larger than the one that was saved.
    pub grow: bool,
    /// As in [`IdentitySpec`]; the seed was exchanged before.
    pub cloud_init: bool,
}

impl NameSpec {
    fn request(&self) -> Value {
        let mut request = json!({
            "hostname": self.hostname,
            "entropy": hex(&self.entropy),
            "time": self.time,
            "grow": self.grow,
            "cloud_init": self.cloud_init,
        });
        if let Some(zone) = &self.timezone {
            request["timezone"] = zone.as_str().into();
        }
        request
    }
}

// The entropy does not get into a log.
impl fmt::Debug for NameSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NameSpec")
            .field("hostname", &self.hostname)
            .finish_non_exhaustive()
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

// Neither the host key nor the entropy gets into a log.
impl fmt::Debug for IdentitySpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IdentitySpec")
            .field("instance", &self.instance)
            .field("hostname", &self.hostname)
            .field("nic", &self.nic)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl IdentitySpec {
    fn request(&self) -> Result<Value> {
        let mut authorized = vec![self.keys.client_public_line()?];
        authorized.extend(self.authorized.iter().cloned());
        let mut request = json!({
            "instance": self.instance,
            "hostname": self.hostname,
            "machine_id": self.machine_id,
            "entropy": hex(&self.entropy),
            "time": self.time,
            "host_key": self.keys.host_private_text()?,
            "host_public": self.keys.host_public_line()?,
            "authorized": authorized,
            "user": LOGIN_USER,
            "uid": 1000,
            "grow": self.grow,
            "cloud_init": self.cloud_init,
            "standby": self.standby,
            "mode": match self.mode {
                CloneMode::Warm => "warm",
                CloneMode::Full => "full",
                CloneMode::Booted => "booted",
            },
        });
        if let Some(zone) = &self.timezone {
            request["timezone"] = zone.as_str().into();
        }
        if let Some(nic) = &self.nic {
            request["nic"] = json!({
                "mac": nic.mac.to_string(),
                "address": format!("{}/{}", nic.address, nic.prefix),
                "gateway": nic.gateway,
                "dns": nic.dns,
            });
        }
        Ok(request)
    }
}

impl AgentLink {
    /// Brings a template's guest to rest. After the answer the processors are to be stopped within
    /// seconds.
    pub async fn quiesce(&self, bound: Duration) -> Result<()> {
        let args = json!({ "bound": bound.as_secs_f64() });
        self.request("quiesce", args, bound + SLACK).await.map(drop)
    }

    /// Makes a clone the machine that `spec` describes; returns what was done and the milliseconds that
    /// each step took. After an error the clone must not be used.
    pub async fn identify(
        &self,
        spec: &IdentitySpec,
        bound: Duration,
    ) -> Result<Vec<(String, u64)>> {
        let mut args = spec.request()?;
        args["bound"] = bound.as_secs_f64().into();
        let answer = self.request("identify", args, bound + SLACK).await?;
        steps(&answer).ok_or_else(|| nonsense("identify"))
    }

    /// Gives a clone that stood by its final name. After an error it must not be used.
    pub async fn name(&self, spec: &NameSpec, bound: Duration) -> Result<Vec<(String, u64)>> {
        let answer = self.request("name", spec.request(), bound + SLACK).await?;
        steps(&answer).ok_or_else(|| nonsense("name"))
    }

    /// Every value of the guest that no other guest may have, by name. Secrets come as SHA-256.
    pub async fn identity(&self, bound: Duration) -> Result<Vec<(String, Vec<String>)>> {
        let answer = self.request("identity", json!({}), bound).await?;
        items(&answer).ok_or_else(|| nonsense("identity"))
    }
}

impl Guest {
    /// [`AgentLink::quiesce`].
    pub async fn quiesce(&self, bound: Duration) -> Result<()> {
        self.agent().quiesce(bound).await
    }

    /// [`AgentLink::identify`].
    pub async fn identify(
        &self,
        spec: &IdentitySpec,
        bound: Duration,
    ) -> Result<Vec<(String, u64)>> {
        self.agent().identify(spec, bound).await
    }

    /// [`AgentLink::name`].
    pub async fn name(&self, spec: &NameSpec, bound: Duration) -> Result<Vec<(String, u64)>> {
        self.agent().name(spec, bound).await
    }

    /// [`AgentLink::identity`].
    pub async fn identity(&self, bound: Duration) -> Result<Vec<(String, Vec<String>)>> {
        self.agent().identity(bound).await
    }
}

fn nonsense(what: &str) -> Error {
    Error::new(
        Code::GuestUnreachable,
        format!("The guest's agent gave no valid answer to {what}"),
    )
}

fn steps(answer: &Map<String, Value>) -> Option<Vec<(String, u64)>> {
    let steps = Vec::<(String, u64)>::deserialize(answer.get("steps")?).ok()?;
    let cut = steps.into_iter().take(MAX_STEPS);
    Some(cut.map(|(name, ms)| (clean(&name), ms)).collect())
}

fn items(answer: &Map<String, Value>) -> Option<Vec<(String, Vec<String>)>> {
    let items = answer.get("items")?.as_object()?;
    let mut all = Vec::new();
    for (name, values) in items.iter().take(MAX_ITEMS) {
        let mut texts = Vec::new();
        for value in values.as_array()?.iter().take(MAX_VALUES) {
            texts.push(clean(value.as_str()?));
        }
        all.push((clean(name), texts));
    }
    Some(all)
}

#[cfg(test)]
#[path = "clone_tests.rs"]
mod tests;

#[cfg(test)]
#[path = "booted_tests.rs"]
mod booted_tests;
