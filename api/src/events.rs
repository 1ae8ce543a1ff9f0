//! The stream at `/v1/events`: what changed, for every client that watches.

use pileus_base::InstanceName;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::instances::InstanceState;
use crate::operations::Operation;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Event {
    /// An instance has a new state (also when it was created).
    Instance {
        id: Uuid,
        name: InstanceName,
        state: InstanceState,
        deleted: bool,
    },
    /// An instance is gone for good.
    InstancePurged { id: Uuid, name: InstanceName },
    /// An operation began or ended.
    Operation { operation: Box<Operation> },
    /// An image was added to or removed from the store.
    Images,
    /// A template was made or removed.
    Templates,
    /// The reader was too slow and missed events: it should fetch the lists again.
    Lagged { missed: u64 },
}
