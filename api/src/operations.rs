//! Operations: long work that answers at once, tells what it does, and can be awaited or cancelled.
//!
//! ```text
//!   running ──▶ succeeded
//!      │ ├────▶ failed
//!      │ └────▶ cancelled
//!      └──────▶ failed (interrupted)   the daemon ended; its next start finished or undid the work
//! ```

use pileus_base::Phase;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::Timestamp;
use crate::error::ErrorBody;
use crate::instances::PhaseTime;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OperationKind {
    Launch,
    Start,
    Stop,
    Restart,
    Delete,
    /// Brings an image into the store.
    Pull,
    /// Boots a machine and saves it as a template.
    CreateTemplate,
    /// Clones a running instance.
    Fork,
    Suspend,
    Snapshot,
    /// Brings an instance back to a snapshot.
    Restore,
    DeleteSnapshot,
    Clone,
    Rename,
    /// Writes an instance with its snapshots to an archive.
    Export,
    Import,
    /// Takes an image that a client sends.
    ImportImage,
    /// Writes an image as `image.tar.zst`.
    ExportImage,
    /// Judges an image that a client sends, without keeping it.
    InspectImage,
    /// Reads images of the store again and compares them with what they were.
    VerifyImages,
    /// Makes an image of an instance.
    PackImage,
    /// Makes an image by a recipe.
    BuildImage,
}

impl OperationKind {
    pub fn as_str(self) -> &'static str {
        match self {
            OperationKind::Launch => "launch",
            OperationKind::Start => "start",
            OperationKind::Stop => "stop",
            OperationKind::Restart => "restart",
            OperationKind::Delete => "delete",
            OperationKind::Pull => "pull",
            OperationKind::CreateTemplate => "create-template",
            OperationKind::Fork => "fork",
            OperationKind::Suspend => "suspend",
            OperationKind::Snapshot => "snapshot",
            OperationKind::Restore => "restore",
            OperationKind::DeleteSnapshot => "delete-snapshot",
            OperationKind::Clone => "clone",
            OperationKind::Rename => "rename",
            OperationKind::Export => "export",
            OperationKind::Import => "import",
            OperationKind::ImportImage => "import-image",
            OperationKind::ExportImage => "export-image",
            OperationKind::InspectImage => "inspect-image",
            OperationKind::VerifyImages => "verify-images",
            OperationKind::PackImage => "pack-image",
            OperationKind::BuildImage => "build-image",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OperationState {
    Running,
    Succeeded,
    Failed,
    Cancelled,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Operation {
    pub id: Uuid,
    pub kind: OperationKind,
    /// Name of the instance or image that it works on.
    pub target: String,
    pub state: OperationState,
    pub phase: Option<Phase>,
    pub progress: Option<Progress>,
    /// Phases that are over, in order.
    pub phases: Vec<PhaseTime>,
    pub warnings: Vec<String>,
    /// What came of it, if that has a name of its own: a template's id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<String>,
    pub error: Option<ErrorBody>,
    #[schema(value_type = String, format = "date-time")]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub ended_at: Option<Timestamp>,
}

impl Operation {
    pub fn is_over(&self) -> bool {
        self.state != OperationState::Running
    }
}

/// Bytes done and, if known, in all, within the current phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    pub done: u64,
    pub total: Option<u64>,
}

/// What the stream at `/v1/operations/{id}/events` sends. A new reader first gets the current phase.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum OperationEvent {
    Phase {
        phase: Phase,
    },
    Progress {
        progress: Progress,
    },
    Log {
        line: String,
    },
    Warning {
        line: String,
    },
    /// The last event.
    Done {
        operation: Box<Operation>,
    },
}
