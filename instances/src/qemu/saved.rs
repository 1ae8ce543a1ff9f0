//! Saves a machine to a file and restores it. QEMU calls both a migration.
//!
//! * A *template*: its memory is a file already (`Memory::Shared`), so only its devices are saved
//!   ([`Vm::save_devices`], half a megabyte), and a clone maps that file ([`Vm::restore`]).
//! * A *fork*: devices and memory go into one file ([`Vm::save_all`], [`Vm::restore_all`]).
//!
//! A machine is halted before it is saved, and is halted after it is restored: the caller lets it
//! run. One that was saved can be resumed and goes on as if nothing had been.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use pileus_base::{Code, Error, Result, ResultExt};
use pileus_qmp::commands::{
    AddFd, BlockdevSetActive, Migrate, MigrateCancel, MigrateIncoming, MigrateSetCapabilities,
    MigrateSetParameters, MigrationCapability, QueryMigrate, RemoveFd,
};
use serde::{Deserialize, Serialize};

use super::vm::{PowerState, Vm, said_since};

/// Bound on devices alone; measured 5 to 20 ms.
const DEVICES_BOUND: Duration = Duration::from_secs(30);
/// Bound on devices and memory; measured about a second per GiB that the guest touched.
const ALL_BOUND: Duration = Duration::from_secs(600);
/// QEMU's own limit is 128 MiB/s; this one is none.
const NO_LIMIT: u64 = 1 << 40;

/// How memory lies in a file of [`Vm::save_all`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stream {
    /// One page after the other.
    Plain,
    /// Each page at a place of its own, so that the file is sparse (QEMU 9.0 and newer).
    Mapped,
}

impl Vm {
    /// Writes the state of the devices to an empty file. The machine must be halted, and its memory
    /// must be a file that is shared.
    pub async fn save_devices(&self, state: File) -> Result<()> {
        self.save(&state, true, Stream::Plain, DEVICES_BOUND).await
    }

    /// Loads what [`Vm::save_devices`] wrote, into a machine started with `incoming` on the same
    /// memory. If it fails, the machine is of no use any more and must be ended.
    pub async fn restore(&self, state: File) -> Result<()> {
        self.load(&state, true, Stream::Plain, DEVICES_BOUND).await
    }

    /// Writes devices and memory to an empty file. The machine must be halted.
    pub async fn save_all(&self, file: File) -> Result<Stream> {
        let stream = self.stream();
        self.save(&file, false, stream, ALL_BOUND).await?;
        Ok(stream)
    }

    /// Loads what [`Vm::save_all`] wrote, into a machine started with `incoming`.
    pub async fn restore_all(&self, file: File, stream: Stream) -> Result<()> {
        self.load(&file, false, stream, ALL_BOUND).await
    }

    /// The best that this QEMU has.
    fn stream(&self) -> Stream {
        let version = self.client().version();
        match (version.major, version.minor) >= (9, 0) {
            true => Stream::Mapped,
            false => Stream::Plain,
        }
    }

    async fn save(
        &self,
        file: &File,
        shared: bool,
        stream: Stream,
        within: Duration,
    ) -> Result<()> {
        if self.status().await? != PowerState::Paused {
            return Err(Error::internal("A machine that runs can't be saved"));
        }
        self.prepare(shared, stream).await?;
        let set = self.lend(file, OpenOptions::new().write(true)).await?;
        let uri = format!("file:/dev/fdset/{set}");
        let saved = async {
            self.client().run(&Migrate { uri }).await?;
            self.migrated("saved", within).await
        };
        let saved = saved.await;
        self.forget(set).await;
        saved
    }

    async fn load(
        &self,
        file: &File,
        shared: bool,
        stream: Stream,
        within: Duration,
    ) -> Result<()> {
        let log_before = std::fs::metadata(self.log()).map_or(0, |m| m.len());
        let loaded = async {
            self.prepare(shared, stream).await?;
            let set = self.lend(file, OpenOptions::new().read(true)).await?;
            let version = self.client().version();
            let stays = (version.major, version.minor) >= (9, 1);
            let incoming = MigrateIncoming {
                uri: format!("file:/dev/fdset/{set}"),
                exit_on_error: stays.then_some(false),
            };
            self.client().run(&incoming).await?;
            self.migrated("restored", within).await?;
            self.forget(set).await;
            self.activate_disks().await
        };
        loaded.await.map_err(|err: Error| {
            let said = said_since(self.log(), log_before);
            said.into_iter().fold(err, Error::detail)
        })
    }

    /// From QEMU 10.0 on a restored machine's disks can't be used (or grown) before it runs, unless
    /// they are activated; an older one activates them itself.
    async fn activate_disks(&self) -> Result<()> {
        if self.client().version().major >= 10 {
            self.client()
                .run(&BlockdevSetActive { active: true })
                .await?;
        }
        Ok(())
    }

    /// Sets all capabilities that we use, whatever they were set to before.
    async fn prepare(&self, shared: bool, stream: Stream) -> Result<()> {
        let mut capabilities = vec![MigrationCapability {
            capability: "x-ignore-shared",
            state: shared,
        }];
        // An older QEMU doesn't know the name.
        if self.stream() == Stream::Mapped || stream == Stream::Mapped {
            capabilities.push(MigrationCapability {
                capability: "mapped-ram",
                state: stream == Stream::Mapped,
            });
        }
        let client = self.client();
        client.run(&MigrateSetCapabilities { capabilities }).await?;
        let max_bandwidth = NO_LIMIT;
        client.run(&MigrateSetParameters { max_bandwidth }).await?;
        Ok(())
    }

    /// Hands the file over as a new set and returns its number. It is opened again, because QEMU
    /// takes none but a descriptor of just the kind that it would have opened.
    async fn lend(&self, file: &File, options: &OpenOptions) -> Result<u32> {
        let again = options
            .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
            .io("Opening a saved state")?;
        let add = AddFd {
            fdset_id: None,
            opaque: None,
        };
        let added = self.client().run_with_fd(&add, again.into()).await?;
        Ok(added.fdset_id)
    }

    async fn forget(&self, fdset_id: u32) {
        if let Err(err) = self.client().run(&RemoveFd { fdset_id }).await {
            tracing::debug!(%err, "QEMU keeps a descriptor that it needs no more");
        }
    }

    /// Waits for the end of what was begun. Asked again and again, because the event for it would
    /// have to be switched on first and is lost if the daemon changes in between.
    async fn migrated(&self, done: &str, within: Duration) -> Result<()> {
        let failed = |why: &str| {
            Error::new(
                Code::QemuFailed,
                format!("The machine could not be {done}: {why}"),
            )
        };
        let begun = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            let now = self.client().run(&QueryMigrate {}).await?;
            match now.status.as_str() {
                "completed" => return Ok(()),
                "failed" | "cancelled" | "postcopy-paused" => {
                    let why = now
                        .error_desc
                        .unwrap_or_else(|| "QEMU does not say why".into());
                    return Err(failed(&why));
                }
                _ if begun.elapsed() > within => {
                    // Best effort: on the receiving side there is nothing to cancel.
                    let _ = self.client().run(&MigrateCancel {}).await;
                    return Err(failed(&format!("it was not done within {within:?}")));
                }
                _ => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}
