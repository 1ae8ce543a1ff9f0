//! Templates: saved machines that launches start from (docs/decisions/0010-warm-launch.md).

use pileus_base::{InstanceName, Size};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Timestamp;
use crate::instances::InstanceImage;
use crate::operations::Operation;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TemplateState {
    /// Its machine boots or is being saved.
    Building,
    Ready,
}

impl TemplateState {
    pub fn as_str(self) -> &'static str {
        match self {
            TemplateState::Building => "building",
            TemplateState::Ready => "ready",
        }
    }
}

/// A machine of one image and shape, booted to a quiet point and saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Template {
    /// 16 hexadecimal digits.
    pub id: String,
    pub state: TemplateState,
    pub image: InstanceImage,
    pub cpus: u32,
    pub memory: Size,
    /// The guest's disk; launches may ask for a larger one.
    pub disk: Size,
    /// The versioned machine type, `pc-q35-10.0`.
    pub machine_type: String,
    pub accelerator: String,
    /// The first line of `--version` of the QEMU that saved it.
    pub qemu: String,
    #[schema(value_type = String, format = "date-time")]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub last_used_at: Option<Timestamp>,
    /// Bytes that its saved memory really takes.
    pub memory_used: Size,
    /// Bytes that its disk layer and device state really take.
    pub disk_used: Size,
    /// The saved memory lies on a tmpfs.
    pub in_memory: bool,
    /// Instances that stand on its disk.
    pub instances: u32,
}

/// Asks for a template. What is not given is what a launch would take.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TemplateRequest {
    /// As in a launch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    /// Seconds for the boot, and again for cloud-init; 300 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct TemplatePruneQuery {
    /// All that can go, not only those that no launch would use any more.
    #[serde(default)]
    pub all: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PrunedTemplate {
    pub id: String,
    /// Bytes that are free again.
    pub freed: Size,
}

/// Asks for clones of a running instance, its memory included.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// 1 to 100; as many as there are names, or 1, if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
    /// The first ones' names; the others are called NAME-fork1, NAME-fork2, …
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<InstanceName>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ForkReply {
    /// Among its phases, `halted` is the time for which the instance stood still.
    pub operation: Operation,
    pub names: Vec<InstanceName>,
}
