//! Commands in a guest, over a WebSocket at `/v1/instances/{name}/exec`.
//!
//! ```text
//! client → daemon   text: ExecControl (first `start`, then any of the others)   binary: stdin bytes
//! daemon → client   text: ExecEvent                      binary: 1 byte stream (1 out, 2 err) + bytes
//! ```
//!
//! The session ends with `exit`, `signalled` or `error`, and then the daemon closes. A client that
//! closes first hangs up on the command.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::error::ErrorBody;

/// First byte of a binary message from the daemon.
pub const STDOUT: u8 = 1;
/// First byte of a binary message from the daemon.
pub const STDERR: u8 = 2;

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The command and its arguments; empty for the user's login shell.
    #[serde(default)]
    pub command: Vec<String>,
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Folder in the guest to run in; the user's home if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_directory: Option<String>,
    /// A subsystem of the guest's SSH server (`sftp`) instead of a command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subsystem: Option<String>,
    /// A terminal, if the command is to have one (then stderr comes with stdout).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tty: Option<Tty>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tty {
    /// The TERM variable's value.
    pub term: String,
    pub cols: u16,
    pub rows: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ExecControl {
    Start {
        request: ExecRequest,
    },
    /// No more standard input.
    StdinEof,
    Resize {
        cols: u16,
        rows: u16,
    },
    /// A signal for the command, by name without SIG (`INT`, `TERM`, …).
    Signal {
        signal: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum ExecEvent {
    Started,
    Exit { code: i32 },
    Signalled { signal: String },
    Error { error: ErrorBody },
}
