//! The host as clients see it: networks, what instances use of it, whether all is there that pileus needs.

use pileus_base::InstanceName;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A network interface of the host that instances can be connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostNetwork {
    pub name: String,
    /// `bridge` or `ethernet`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `Network bridge with eth0`.
    pub description: String,
}

/// What an instance has used of the host since its VM started. Rates come from two of these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceUsage {
    pub name: InstanceName,
    /// Nanoseconds of processor time, of all its processors.
    pub cpu_nanoseconds: u64,
    pub cpus: u32,
    /// Bytes of the host's memory: its share of what is shared (PSS).
    pub memory: u64,
    /// Bytes that it was promised.
    pub memory_total: u64,
    /// Bytes read from and written to its disk.
    pub disk_read: u64,
    pub disk_written: u64,
    /// Bytes over its network card, as the guest sees them.
    pub net_received: u64,
    pub net_sent: u64,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Check {
    /// `virtualisation`, `qemu`, `network`, `space`, `memory`, `permissions`, …
    pub name: String,
    pub verdict: Verdict,
    /// What was found, one sentence.
    pub message: String,
    /// What to do, if something is to be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub advice: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Good,
    /// It works, but not as well as it could.
    Warning,
    /// It does not work.
    Bad,
}

/// What the host has, and how it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct HostInfo {
    pub cpus: u32,
    /// Bytes.
    pub memory: u64,
    pub memory_available: u64,
    /// Bytes free where instances are stored.
    pub space_available: u64,
    pub checks: Vec<Check>,
}

/// How to reach an instance with an ordinary SSH client.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SshInfo {
    pub name: InstanceName,
    pub user: String,
    /// On pileus's own network.
    #[schema(value_type = String, format = "ipv4")]
    pub address: std::net::Ipv4Addr,
    pub port: u16,
    /// OpenSSH's format; the instance's own, good for nothing else.
    pub private_key: String,
    /// The instance's host key, `ssh-ed25519 AAAA…`.
    pub host_key: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AuthenticateRequest {
    pub passphrase: String,
}
