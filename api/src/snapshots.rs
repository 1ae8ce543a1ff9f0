//! Snapshots, clones and what else makes one instance out of another's past.

use pileus_base::{InstanceName, Size, SnapshotName};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::Timestamp;
use crate::operations::Operation;

/// An instance as it was at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    pub id: Uuid,
    pub instance: InstanceName,
    pub name: SnapshotName,
    pub comment: String,
    /// The snapshot that the instance stood on when this one was taken; none for the first.
    pub parent: Option<SnapshotName>,
    /// Those that were taken on top of this one, by name.
    pub children: Vec<SnapshotName>,
    /// Whether the instance stands on this one: its next snapshot will have it as parent.
    pub head: bool,
    #[schema(value_type = String, format = "date-time")]
    pub created_at: Timestamp,
    pub cpus: u32,
    pub memory: Size,
    pub disk: Size,
    /// Its memory was saved too: a restore goes on at that very moment.
    pub with_memory: bool,
    /// Bytes on the host's disk that belong to it: its layer, and its memory.
    pub size: Size,
}

/// Asks for a snapshot. Of a running instance the disk is taken while it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// `snapshotN` if not given, N one more than were ever taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<SnapshotName>,
    /// 10 KiB at most.
    #[serde(default)]
    pub comment: String,
    /// Save the memory too. Only of a running instance.
    #[serde(default)]
    pub with_memory: bool,
}

/// A snapshot that is being taken.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct SnapshotReply {
    pub operation: Operation,
    pub name: SnapshotName,
}

/// Brings an instance back to a snapshot; what it is now is lost. A running one is ended first; it runs
/// afterwards if it ran before, or if the snapshot has its memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreRequest {
    /// Only the disk, even if the snapshot has memory.
    #[serde(default)]
    pub disk_only: bool,
}

/// Asks for a new, stopped instance with the disk of another one, which may run.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneRequest {
    /// `SOURCE-cloneN` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<InstanceName>,
    /// As it was then, not as it is now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<SnapshotName>,
}

/// A clone that is being made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CloneReply {
    pub operation: Operation,
    pub name: InstanceName,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenameRequest {
    pub name: InstanceName,
}
