//! Settings of the daemon.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// One setting, as text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Setting {
    /// `local.warm`.
    pub key: String,
    pub value: String,
    /// What may be given, for a person.
    pub values: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SettingRequest {
    pub value: String,
}
