//! The API between clients and the daemon: types, error codes, routes. No logic.
//!
//! Long work answers with an [`Operation`] at once; its events are a stream, it can be awaited and
//! cancelled. Commands in a guest travel over a WebSocket ([`exec`]). The OpenAPI document beside
//! this crate (`api/openapi.json`) is generated from these types and the handlers in
//! `daemon/src/http/`, and a test there proves that it is current.
//!
//! Next step on the way of the data: `daemon/src/http/`.
#![forbid(unsafe_code)]

pub mod archive;
pub mod blob;
pub mod error;
pub mod events;
pub mod exec;
pub mod host;
pub mod identity;
pub mod image_making;
pub mod images;
pub mod instances;
pub mod operations;
pub mod routes;
pub mod server;
pub mod settings;
pub mod snapshots;
pub mod templates;

pub use archive::ImportQuery;
pub use blob::Blob;
pub use error::{ErrorBody, ErrorReply};
pub use events::Event;
pub use exec::{ExecControl, ExecEvent, ExecRequest, Tty};
pub use host::{
    AuthenticateRequest, Check, HostInfo, HostNetwork, InstanceUsage, SshInfo, Verdict,
};
pub use identity::{Identity, IdentityItem};
pub use image_making::{BuildRequest, PackRequest, Recipe};
pub use images::{
    CatalogEntry, CatalogQuery, Image, ImageDetails, ImageImportQuery, ImageInspectQuery,
    ImagePruneQuery, ImageRemoveQuery, Inspection, PruneReply, PrunedImage, PullRequest, Refusal,
    TagRequest, VerifyRequest,
};
pub use instances::{
    Autostart, CloudInit, CloudInitStatus, DeleteQuery, GuestReport, Instance, InstanceHardware,
    InstanceImage, InstanceNetwork, InstanceState, LaunchNetwork, LaunchRequest, LeaseRequest,
    LogQuery, NetworkMode, OnCrash, Origin, Pending, PhaseTime, PortQuery, StartRequest,
    StopRequest, Suspended, Topology, Usage, Warm,
};
pub use operations::{Operation, OperationEvent, OperationKind, OperationState, Progress};
pub use pileus_base::{Class, Code, Digest, InstanceName, Phase, Size, SnapshotName};
pub use server::{Hypervisor, ServerInfo};
pub use settings::{Setting, SettingRequest};
pub use snapshots::{
    CloneReply, CloneRequest, RenameRequest, RestoreRequest, Snapshot, SnapshotReply,
    SnapshotRequest,
};
pub use templates::{
    ForkReply, ForkRequest, PrunedTemplate, Template, TemplatePruneQuery, TemplateRequest,
    TemplateState,
};

/// A point in time, RFC 3339 in UTC.
pub type Timestamp = jiff::Timestamp;
