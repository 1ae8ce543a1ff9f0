//! Typed calls to the daemon over its Unix socket, shared by the command line, other clients and
//! tests. It holds no state of the machines, prints nothing and never starts a daemon.
//!
//! ```text
//! http.rs         one request, one typed answer; errors become pileus_base::Error
//! instances.rs    launch, start, stop, … and lists
//! archive.rs      whole instances as files
//! images.rs       the store and the catalog
//! templates.rs    saved machines       settings.rs   the daemon's settings
//! operations.rs   follow long work to its end, cancel it
//! sse.rs          server-sent events → typed events
//! socket.rs       WebSockets: exec.rs  a command in a guest, port.rs  a TCP port, the console
//! ```
//!
//! Next step on the way of the data: `api/src/routes.rs`, then `daemon/src/http/`.
#![forbid(unsafe_code)]

mod archive;
mod exec;
mod host;
mod http;
mod image_making;
mod images;
mod instances;
mod operations;
mod port;
mod settings;
mod snapshots;
mod socket;
mod sse;
mod templates;

pub use exec::{ExecInput, ExecOutput, ExecPart};
pub use http::Client;
pub use operations::into_result;
pub use port::{PortInput, PortOutput};
