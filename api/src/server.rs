//! What the daemon says of itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ServerInfo {
    /// The daemon's version.
    pub version: String,
    /// Version of the API; grows when something is added.
    pub api: u32,
    pub pid: u32,
    /// `system` (root) or `user`.
    pub mode: String,
    pub hypervisor: Hypervisor,
    /// Where the instances and images lie.
    pub storage: String,
    /// What doesn't work as it should, a sentence each.
    pub warnings: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Hypervisor {
    /// QEMU's version, empty if QEMU was not found.
    pub version: String,
    /// `kvm` or `tcg`.
    pub accelerator: String,
}
