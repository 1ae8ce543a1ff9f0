//! Saves a machine to a file and restores it. QEMU calls both a migration.
//!
//! * A *template*: its memory is a file already (`Memory::Shared`), so only its devices are saved
//!   ([`Vm::save_devices`], half a megabyte), and a clone maps that file ([`Vm::restore`]).
//! * A *fork*: devices and memory go into one file, of a machine that runs ([`Vm::freeze`]) or is
//!   halted ([`Vm::save_all`]), and back ([`Vm::restore_all`]).
//!
//! A machine is halted before it is saved, and is halted after it is restored: the caller lets it
//! run. One that was saved can be resumed and goes on as if nothing had been.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use pileus_base::{Code, Error, Result, ResultExt, Size};
use pileus_qmp::commands::{
    AddFd, BlockdevSetActive, Migrate, MigrateCancel, MigrateContinue, MigrateIncoming,
    MigrateSetCapabilities, MigrateSetParameters, MigrationCapability, QueryMigrate, RemoveFd,
};
use serde::{Deserialize, Serialize};

use super::vm::{PowerState, Vm, VmEvent, said_since};

/// Bound on devices alone; measured 5 to 20 ms.
const DEVICES_BOUND: Duration = Duration::from_secs(30);
/// Bound on devices and memory; measured about a second per GiB that the guest touched.
const ALL_BOUND: Duration = Duration::from_secs(600);
/// After this a guest is halted so that its saving comes to an end.
const LIVE_BOUND: Duration = Duration::from_secs(30);
/// How long a guest may be halted for the last of its memory; QEMU's own choice is 300 ms.
const HALT: Duration = Duration::from_millis(50);
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

    /// Lets a machine run that was halted to be saved, or that would be: a save that somebody began and nobody
    /// waits for is given up. One that runs for itself, or that a full disk halted, is left alone.
    pub async fn wake(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            // Asked in this order: what halts it is a save, and there is no new one.
            let saved = self.client().run(&QueryMigrate {}).await?.is_under_way();
            let status = self.status().await?;
            if !saved && status != PowerState::Paused {
                return Ok(());
            }
            tracing::debug!(?status, saved, "it is woken");
            self.cancel_save().await;
            // While QEMU still writes it can't.
            let resumed = match status {
                PowerState::Paused => self.resume().await,
                _ => Ok(()),
            };
            if begun.elapsed() > DEVICES_BOUND {
                return match (resumed, saved) {
                    (Err(err), _) => Err(err),
                    (Ok(()), false) => Ok(()),
                    (Ok(()), true) => Err(failed("woken", Some("a save does not end"))),
                };
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Gives up a save that is under way, if there is one.
    pub async fn cancel_save(&self) {
        if let Err(err) = self.client().run(&MigrateCancel {}).await {
            tracing::debug!(%err, "no save to cancel");
        }
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
        self.prepare(shared, stream, false).await?;
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
            self.prepare(shared, stream, false).await?;
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

    /// Writes devices and memory of a machine to an empty file *while it runs*, and puts a new layer
    /// on its disk at the moment that was saved (see [`Vm::snapshot_disk`]). The guest stands still
    /// for that moment only, which is what is returned, and runs again afterwards, also on error.
    ///
    /// If it fails, the layer may be there all the same: [`Vm::layers_added`] tells.
    pub async fn freeze(
        &self,
        layer: &Path,
        size: Size,
        memory: File,
    ) -> Result<(Stream, Duration)> {
        let stream = self.stream();
        self.prepare(false, stream, true).await?;
        let set = self.lend(&memory, OpenOptions::new().write(true)).await?;
        let saved = self.freeze_to((layer, size), set).await;
        // The guest goes on in any case; that it does not is the worse fault.
        match &saved {
            Ok(_) => self.resume().await?,
            Err(_) => {
                self.cancel_save().await;
                self.wake().await?;
            }
        }
        self.forget(set).await;
        Ok((stream, saved?.elapsed()))
    }

    /// Returns when the guest was halted, which it still is.
    async fn freeze_to(&self, (layer, size): (&Path, Size), set: u32) -> Result<Instant> {
        let begun = Instant::now();
        let mut halted = None;
        let mut events = self.subscribe();
        let uri = format!("file:/dev/fdset/{set}");
        self.client().run(&Migrate { uri }).await?;
        loop {
            let now = self.client().run(&QueryMigrate {}).await?;
            match now.status.as_str() {
                "pre-switchover" => break,
                "setup" | "active" | "device" => (),
                _ => return Err(failed("saved", now.error_desc.as_deref())),
            }
            // A guest that writes faster than we do would never be done.
            if halted.is_none() && begun.elapsed() > LIVE_BOUND {
                halted = Some(Instant::now());
                self.pause().await?;
            }
            if begun.elapsed() > ALL_BOUND {
                return Err(failed("saved", Some("it took too long")));
            }
            if halted.is_some() {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            }
            // The sender is ours, so this never ends by itself.
            let stopped = async { while !matches!(events.recv().await, Ok(VmEvent::Stopped)) {} };
            let stopped = tokio::time::timeout(Duration::from_millis(20), stopped).await;
            halted = stopped.ok().map(|()| Instant::now());
        }
        let halted = halted.unwrap_or_else(Instant::now);
        self.snapshot_disk(layer, size).await?;
        let go_on = MigrateContinue {
            state: "pre-switchover",
        };
        self.client().run(&go_on).await?;
        self.migrated("saved", ALL_BOUND).await?;
        Ok(halted)
    }

    /// Sets all capabilities that we use, whatever they were set to before.
    async fn prepare(&self, shared: bool, stream: Stream, live: bool) -> Result<()> {
        let set = |capability, state| MigrationCapability { capability, state };
        let mut capabilities = vec![
            set("x-ignore-shared", shared),
            set("pause-before-switchover", live),
        ];
        // An older QEMU doesn't know the name.
        if self.stream() == Stream::Mapped || stream == Stream::Mapped {
            capabilities.push(set("mapped-ram", stream == Stream::Mapped));
        }
        let client = self.client();
        client.run(&MigrateSetCapabilities { capabilities }).await?;
        let parameters = MigrateSetParameters {
            max_bandwidth: NO_LIMIT,
            downtime_limit: u64::try_from(HALT.as_millis()).unwrap_or(u64::MAX),
        };
        client.run(&parameters).await?;
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
        let begun = Instant::now();
        let mut pause = Duration::from_millis(1);
        loop {
            let now = self.client().run(&QueryMigrate {}).await?;
            match now.status.as_str() {
                "completed" => return Ok(()),
                "failed" | "cancelled" | "postcopy-paused" => {
                    return Err(failed(done, now.error_desc.as_deref()));
                }
                _ if begun.elapsed() > within => {
                    // Best effort: on the receiving side there is nothing to cancel.
                    let _ = self.client().run(&MigrateCancel {}).await;
                    return Err(failed(done, Some("it took too long")));
                }
                _ => tokio::time::sleep(pause).await,
            }
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}

fn failed(done: &str, why: Option<&str>) -> Error {
    let why = why.unwrap_or("QEMU does not say why");
    let what = format!("The machine could not be {done}: {why}");
    Error::new(Code::QemuFailed, what)
}
