//! What makes an instance itself, as its guest tells: for `pileus verify-unique`.

use pileus_base::InstanceName;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Every item that two instances must not share. No secret is among the values, only prints of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Identity {
    pub name: InstanceName,
    pub items: Vec<IdentityItem>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct IdentityItem {
    /// Stable name, `machine-id`, `ssh-host-key`, `boot-id`.
    pub name: String,
    /// Empty if the guest has no such thing.
    pub values: Vec<String>,
}
