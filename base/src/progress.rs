//! How long work tells what it is doing and learns that it is no longer wanted: one handle, passed
//! down by reference. The daemon's operations receive the updates (`daemon/src/operations/`).

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use crate::{Code, Error, Result};

/// The steps of long work, in the order in which a launch passes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Waiting for another operation on the same thing.
    Queued,
    /// Finding out which image is meant.
    ResolvingImage,
    /// Making an image on this host.
    BuildingImage,
    /// Downloading an image.
    RetrievingImage,
    /// Checking an image's digest and structure.
    VerifyingImage,
    /// Decompressing or converting an image.
    PreparingImage,
    /// Making the instance's disk, seed and keys.
    Configuring,
    /// Starting the hypervisor.
    Starting,
    /// Waiting for the guest's first sign of life.
    Booting,
    /// Waiting until cloud-init is done.
    Initializing,
    /// Loading a template's memory and devices.
    Restoring,
    /// Giving a restored guest an identity of its own.
    Identifying,
    /// Bringing a guest to a quiet point.
    Quieting,
    /// Saving a machine as a template.
    Saving,
    /// How long a guest stood still while its disk or memory was taken.
    Halted,
    /// Waiting for the guest to shut down.
    Stopping,
    /// Writing an instance's memory to disk, to go on later.
    Suspending,
    /// Loading a suspended instance.
    Resuming,
    /// Freezing an instance's disk.
    Snapshotting,
    /// Writing an instance or an image to an archive, or reading one.
    Archiving,
    /// Carrying out a recipe's steps in a guest.
    Provisioning,
    /// Making a guest forget who it was.
    Cleaning,
    /// Making one disk of an instance's layers.
    Flattening,
    Deleting,
}

impl Phase {
    pub fn as_str(self) -> &'static str {
        match self {
            Phase::Queued => "queued",
            Phase::ResolvingImage => "resolving-image",
            Phase::BuildingImage => "building-image",
            Phase::RetrievingImage => "retrieving-image",
            Phase::VerifyingImage => "verifying-image",
            Phase::PreparingImage => "preparing-image",
            Phase::Configuring => "configuring",
            Phase::Starting => "starting",
            Phase::Booting => "booting",
            Phase::Initializing => "initializing",
            Phase::Restoring => "restoring",
            Phase::Identifying => "identifying",
            Phase::Quieting => "quieting",
            Phase::Saving => "saving",
            Phase::Halted => "halted",
            Phase::Stopping => "stopping",
            Phase::Suspending => "suspending",
            Phase::Resuming => "resuming",
            Phase::Snapshotting => "snapshotting",
            Phase::Archiving => "archiving",
            Phase::Provisioning => "provisioning",
            Phase::Cleaning => "cleaning",
            Phase::Flattening => "flattening",
            Phase::Deleting => "deleting",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Update {
    Phase(Phase),
    /// Bytes done and, if known, in all, within the current phase.
    Progress {
        done: u64,
        total: Option<u64>,
    },
    /// A phase within the current one, measured by who did it.
    Took(Phase, Duration),
    /// The name of what came of the work.
    Result(String),
    /// One line about what is going on, for a person.
    Log(String),
    /// Something that is not an error but that the user should know.
    Warning(String),
}

type Sink = dyn Fn(Update) + Send + Sync;

/// Reports updates and carries the wish to cancel. Cheap to clone.
#[derive(Clone)]
pub struct Reporter {
    sink: Arc<Sink>,
    cancel: CancellationToken,
}

impl Reporter {
    pub fn new(sink: impl Fn(Update) + Send + Sync + 'static, cancel: CancellationToken) -> Self {
        Self {
            sink: Arc::new(sink),
            cancel,
        }
    }

    /// One that tells nobody and is never cancelled.
    pub fn silent() -> Self {
        Self::new(|_| (), CancellationToken::new())
    }

    pub fn phase(&self, phase: Phase) {
        (self.sink)(Update::Phase(phase));
    }

    pub fn progress(&self, done: u64, total: Option<u64>) {
        (self.sink)(Update::Progress { done, total });
    }

    pub fn took(&self, phase: Phase, time: Duration) {
        (self.sink)(Update::Took(phase, time));
    }

    pub fn result(&self, name: impl Into<String>) {
        (self.sink)(Update::Result(name.into()));
    }

    pub fn log(&self, line: impl Into<String>) {
        (self.sink)(Update::Log(line.into()));
    }

    pub fn warn(&self, line: impl Into<String>) {
        (self.sink)(Update::Warning(line.into()));
    }

    pub fn cancel_token(&self) -> &CancellationToken {
        &self.cancel
    }

    /// Completes when the work is no longer wanted.
    pub async fn cancelled(&self) {
        self.cancel.cancelled().await;
    }

    /// An error once the work is no longer wanted; for loops that don't await.
    pub fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(Error::new(Code::Cancelled, "The operation was cancelled"));
        }
        Ok(())
    }

    /// Runs `work` until it ends or the work is cancelled (then `work` is dropped).
    pub async fn or_cancelled<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match self.cancel.run_until_cancelled(work).await {
            Some(done) => done,
            None => Err(Error::new(Code::Cancelled, "The operation was cancelled")),
        }
    }
}

impl std::fmt::Debug for Reporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reporter").finish_non_exhaustive()
    }
}
