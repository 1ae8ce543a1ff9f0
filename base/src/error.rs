//! The one error shape of pileus: a stable code, a sentence for a person, what to do next, and the
//! cause. Codes become HTTP statuses in one place (`api/src/error.rs`); the CLI adds hints for codes
//! that carry no advice of their own in one place (`clients/cli/src/hints.rs`).

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Whose fault an error is, so that a person knows whom to ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Class {
    /// The request can't work as it was made; another request can.
    User,
    /// The host lacks something: space, a program, a permission.
    Host,
    /// The guest system failed or did not answer.
    Guest,
    /// The work was cancelled or a bound on time was reached by choice.
    Cancelled,
    /// pileus broke; please report it.
    Internal,
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $class:ident;)*) => {
        /// Stable error codes. Programs may rely on the text forms.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
        pub enum Code { $($(#[$doc])* #[serde(rename = $text)] $variant,)* }

        impl Code {
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            pub fn as_str(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            pub fn class(self) -> Class {
                match self { $(Code::$variant => Class::$class,)* }
            }
        }
    };
}

codes! {
    /// An argument or a request body that can't be understood.
    InvalidArgument = "invalid-argument", User;
    /// An instance or snapshot name that breaks the naming rule.
    InvalidName = "invalid-name", User;
    /// A size that can't be read, or that is below a minimum.
    InvalidSize = "invalid-size", User;
    /// User data that cloud-init would not accept.
    InvalidCloudInit = "invalid-cloud-init", User;
    /// The requested disk is smaller than the image.
    DiskTooSmall = "disk-too-small", User;
    /// The instance name is in use.
    InstanceExists = "instance-exists", User;
    InstanceNotFound = "instance-not-found", User;
    /// The instance is in the trash.
    InstanceDeleted = "instance-deleted", User;
    /// The instance's state doesn't allow this.
    WrongState = "wrong-state", User;
    SnapshotExists = "snapshot-exists", User;
    SnapshotNotFound = "snapshot-not-found", User;
    NetworkNotFound = "network-not-found", User;
    ImageNotFound = "image-not-found", User;
    /// The image is used by an instance.
    ImageInUse = "image-in-use", User;
    /// The downloaded bytes are not those that were asked for.
    ChecksumMismatch = "checksum-mismatch", User;
    /// The image is damaged, of an unknown format, or breaks a safety rule.
    BadImage = "bad-image", User;
    /// The image is larger than the limit.
    ImageTooLarge = "image-too-large", User;
    /// An archive that is damaged, or that breaks a safety rule.
    BadArchive = "bad-archive", User;
    /// A client that was sending something fell silent.
    UploadStalled = "upload-stalled", User;
    OperationNotFound = "operation-not-found", User;
    TemplateNotFound = "template-not-found", User;
    /// No template fits the launch, or the one that would can't be used.
    NoTemplate = "no-template", User;
    SettingNotFound = "setting-not-found", User;
    /// A setting's value that is not possible.
    InvalidSetting = "invalid-setting", User;
    /// The passphrase is not the one that was set.
    WrongPassphrase = "wrong-passphrase", User;
    /// A saved machine can't go on with this host's hypervisor.
    CantResume = "cant-resume", Host;
    /// The caller may not use this daemon.
    PermissionDenied = "permission-denied", User;

    /// The file system has no room for this.
    NoSpace = "no-space", Host;
    /// The host has not enough free memory.
    NoMemory = "no-memory", Host;
    QemuMissing = "qemu-missing", Host;
    QemuTooOld = "qemu-too-old", Host;
    /// QEMU could not be started or ended in error.
    QemuFailed = "qemu-failed", Host;
    /// A program that pileus uses is not installed.
    ToolMissing = "tool-missing", Host;
    /// A program that pileus uses failed.
    ToolFailed = "tool-failed", Host;
    /// /dev/net/tun can't be opened.
    TunUnavailable = "tun-unavailable", Host;
    /// No free subnet was found, or the chosen one is used by another network.
    SubnetTaken = "subnet-taken", Host;
    /// Addresses of the private network are used up.
    NoAddress = "no-address", Host;
    /// A port or bridge name is used by another program.
    PortTaken = "port-taken", Host;
    /// The network could not be set up.
    NetworkFailed = "network-failed", Host;
    /// An image or a file could not be fetched.
    FetchFailed = "fetch-failed", Host;
    /// The storage is in use by another daemon.
    StorageLocked = "storage-locked", Host;
    /// Reading or writing a file failed.
    Io = "io", Host;
    /// No daemon answers on the socket.
    DaemonUnreachable = "daemon-unreachable", Host;

    /// The guest gave no sign of life within its bound.
    BootTimeout = "boot-timeout", Guest;
    /// The guest powered off, crashed or was killed while it was needed.
    GuestStopped = "guest-stopped", Guest;
    /// cloud-init ended with errors.
    CloudInitFailed = "cloud-init-failed", Guest;
    /// cloud-init did not end within its bound.
    CloudInitTimeout = "cloud-init-timeout", Guest;
    /// The guest did not shut down within its bound.
    ShutdownTimeout = "shutdown-timeout", Guest;
    /// The guest can't be reached by agent or SSH.
    GuestUnreachable = "guest-unreachable", Guest;
    /// A guest that was restored did not take its identity.
    IdentityFailed = "identity-failed", Guest;
    /// The command could not be run in the guest.
    ExecFailed = "exec-failed", Guest;
    /// A step of a recipe ended in error.
    StepFailed = "step-failed", Guest;
    /// A guest could not be made to forget who it is.
    CleanUpFailed = "clean-up-failed", Guest;

    Cancelled = "cancelled", Cancelled;
    /// A bound on time that the caller gave was reached.
    TimedOut = "timed-out", Cancelled;
    /// The daemon ended while it worked on this.
    Interrupted = "interrupted", Cancelled;

    /// The state database can't be read or written.
    Database = "database", Internal;
    Internal = "internal", Internal;
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An error with its code, a sentence, optional advice and detail lines, and its cause.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    pub code: Code,
    pub message: String,
    /// What the reader can do, if it depends on the case (otherwise the code's general hint is used).
    pub advice: Option<String>,
    /// Longer material: a console's tail, a program's output, cloud-init's errors.
    pub details: Vec<String>,
    #[source]
    pub source: Option<Box<dyn std::error::Error + Send + Sync + 'static>>,
}

impl Error {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            advice: None,
            details: Vec::new(),
            source: None,
        }
    }

    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Code::Internal, message)
    }

    /// An error of the file system: a full disk is told apart from everything else.
    pub fn io(what: impl fmt::Display, err: std::io::Error) -> Self {
        let code = match err.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Code::NoSpace,
            _ => Code::Io,
        };
        Self::new(code, format!("{what}: {err}")).with_source(err)
    }

    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    #[must_use]
    pub fn detail(mut self, line: impl Into<String>) -> Self {
        self.details.push(line.into());
        self
    }

    #[must_use]
    pub fn with_source(
        mut self,
        source: impl Into<Box<dyn std::error::Error + Send + Sync + 'static>>,
    ) -> Self {
        self.source = Some(source.into());
        self
    }

    pub fn class(&self) -> Class {
        self.code.class()
    }
}

/// Adds "what was being done" to foreign errors.
pub trait ResultExt<T> {
    /// For `std::io::Error` only: keeps "disk full" apart.
    fn io(self, what: impl fmt::Display) -> Result<T>;
}

impl<T> ResultExt<T> for std::result::Result<T, std::io::Error> {
    fn io(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|err| Error::io(what, err))
    }
}

impl<T> ResultExt<T> for std::result::Result<T, rustix::io::Errno> {
    fn io(self, what: impl fmt::Display) -> Result<T> {
        self.map_err(|err| Error::io(what, err.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_texts_are_distinct_and_round_trip() {
        let mut seen = std::collections::HashSet::new();
        for code in Code::ALL {
            assert!(seen.insert(code.as_str()), "{code} twice");
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(json, format!("\"{code}\""));
            assert_eq!(serde_json::from_str::<Code>(&json).unwrap(), *code);
        }
    }

    #[test]
    fn a_full_disk_is_told_apart() {
        let full = std::io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(Error::io("write", full).code, Code::NoSpace);
        let denied = std::io::Error::from_raw_os_error(libc::EACCES);
        assert_eq!(Error::io("write", denied).code, Code::Io);
    }
}
