//! What every part of pileus stands on: errors, names, sizes, digests, paths, atomic files and the
//! handle through which long work reports progress. Nothing here knows HTTP, QEMU or a terminal,
//! and nothing here reads the environment or the clock.
//!
//! Next step on the way of the data: `api/` (the types that travel between clients and the daemon).
#![forbid(unsafe_code)]

pub mod digest;
pub mod error;
pub mod files;
pub mod layout;
pub mod mac;
pub mod name;
pub mod process;
pub mod progress;
pub mod size;

pub use digest::Digest;
pub use error::{Class, Code, Error, Result, ResultExt};
pub use layout::Layout;
pub use mac::Mac;
pub use name::{InstanceName, SnapshotName};
pub use progress::{Phase, Reporter, Update};
pub use size::Size;
