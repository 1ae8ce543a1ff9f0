//! Typed calls to the daemon over its Unix socket, shared by the command line, other clients and
//! tests. It holds no state of the machines, prints nothing and never starts a daemon.
//!
//! ```text
//! http.rs         one request, one typed answer; errors become pileus_base::Error
//! instances.rs    launch, start, stop, … and lists
//! images.rs       the store and the catalog
//! operations.rs   follow long work to its end, cancel it
//! sse.rs          server-sent events → typed events
//! exec.rs         a command in a guest, over a WebSocket
//! ```
//!
//! Next step on the way of the data: `api/src/routes.rs`, then `daemon/src/http/`.
#![forbid(unsafe_code)]

mod exec;
mod http;
mod images;
mod instances;
mod operations;
mod sse;

pub use exec::{ExecInput, ExecOutput, ExecPart};
pub use http::Client;
pub use operations::into_result;
