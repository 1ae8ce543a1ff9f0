//! What can go wrong between us and QEMU, told apart so that a caller can act on it.

use std::time::Duration;

use pileus_base::{Code, Error};

#[derive(Debug, Clone, thiserror::Error)]
pub enum QmpError {
    /// QEMU understood the command and refused it.
    #[error("QEMU refused {command}: {description}")]
    Refused {
        command: String,
        /// QEMU's error class, nearly always `GenericError`.
        class: String,
        description: String,
    },
    /// The connection ended before the reply came; the command may have been done or not.
    #[error("The connection to QEMU is closed ({reason})")]
    Closed { reason: String },
    /// No reply within the bound; the command may still be done later.
    #[error("QEMU did not answer {command} within {within:?}")]
    Deadline { command: String, within: Duration },
    /// The reply has another shape than this command's.
    #[error("QEMU's answer to {command} could not be read: {reason}")]
    BadReply { command: String, reason: String },
    /// The socket could not be connected, or what answered is not QEMU.
    #[error("QEMU's control socket could not be used: {reason}")]
    Connect { reason: String },
}

impl QmpError {
    pub fn is_closed(&self) -> bool {
        matches!(self, Self::Closed { .. })
    }
}

impl From<QmpError> for Error {
    fn from(err: QmpError) -> Self {
        Error::new(Code::QemuFailed, err.to_string()).with_source(err)
    }
}
