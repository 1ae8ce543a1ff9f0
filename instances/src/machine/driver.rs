//! What a hypervisor must do for an instance's task. QEMU's driver is `instances/src/driver.rs`.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use pileus_api::{CloudInit, GuestReport, Timestamp};
use pileus_base::process::ProcessId;
use pileus_base::{InstanceName, Mac, Reporter, Result, Size};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Snapshot;
use crate::qemu::{Accelerator, Growth, Stream};

/// Starts the VM of one instance, saves and resumes it, and tidies up after it.
pub trait Driver: Send + Sync + 'static {
    type Vm: Vm;

    /// The instance's name now.
    fn name(&self) -> InstanceName;

    /// Whether the guest may be a system that knows nothing of us: then it is no fault if it says nothing.
    fn may_be_silent(&self) -> bool {
        false
    }

    /// Starts the VM. On error nothing of it is left behind.
    fn start(
        &self,
        firmware_boot: bool,
        report: &Reporter,
    ) -> impl Future<Output = Result<Self::Vm>> + Send;

    /// Starts a VM that can take up what was saved; nothing is loaded yet. On error nothing of it is left
    /// behind.
    fn start_empty(&self, saved: &Saved) -> impl Future<Output = Result<Self::Vm>> + Send;

    /// Loads what was saved. The VM is halted afterwards; if it fails, it is of no use.
    fn load(&self, vm: &Self::Vm, saved: &Saved) -> impl Future<Output = Result<()>> + Send;

    /// Halts the VM and writes its devices and memory to the instance's folder. It stays halted; if this
    /// fails, or the future is dropped, [`Driver::unsave`] lets it go on.
    fn save(&self, vm: &Self::Vm) -> impl Future<Output = Result<Saved>> + Send;

    /// Lets a VM go on that was being saved, or that a daemon that is gone had halted; what was written is
    /// removed.
    fn unsave(&self, vm: &Self::Vm) -> impl Future<Output = Result<()>> + Send;

    /// Removes what was saved, unless a snapshot needs it.
    fn forget(&self, saved: &Saved);

    /// Puts a new layer over the disk of a VM that runs, and may write devices and memory at that moment;
    /// the guest stands still for that moment only, and goes on in any case.
    fn freeze(&self, vm: &Self::Vm, freeze: Freeze) -> impl Future<Output = Result<Frozen>> + Send;

    /// A guest that booted from a copy of another one's disk gets an identity of its own.
    fn identify(&self, vm: &Self::Vm, report: &Reporter)
    -> impl Future<Output = Result<()>> + Send;

    /// Gives back what the VM used (tap, sockets), after it ended.
    fn release(&self) -> impl Future<Output = ()> + Send;

    /// The last lines of the serial console, made harmless for a terminal.
    fn console_tail(&self) -> Vec<String>;

    /// Keeps the console's log within its bound; called every few seconds.
    fn trim_console(&self);
}

/// A VM that runs.
pub trait Vm: Send + Sync + 'static {
    /// What reaches the guest: commands, files. A cheap handle.
    type Guest: Clone + Send + 'static;

    fn process(&self) -> ProcessId;

    fn guest(&self) -> Self::Guest;

    /// Asks the guest to shut down.
    fn power_down(&self) -> impl Future<Output = Result<()>> + Send;

    /// Asks the guest to reboot, or resets it if it doesn't listen.
    fn reboot(&self) -> impl Future<Output = Result<()>> + Send;

    /// Resets the machine, whatever the guest does.
    fn reset(&self) -> impl Future<Output = Result<()>> + Send;

    /// Lets the processors run: after a load, or after a disk error halted them.
    fn resume(&self) -> impl Future<Output = Result<()>> + Send;

    /// Tells the guest that time has passed while it stood still, and its name, which may be another one
    /// by now. Best effort, with a bound of its own.
    fn resumed(&self, name: &InstanceName) -> impl Future<Output = ()> + Send;

    /// Grows the disk; the guest is told, and grows its file system if it can.
    fn grow_disk(&self, size: Size) -> impl Future<Output = Result<()>> + Send;

    /// Gives the guest processors and memory, or takes memory back, as far as it and the machine can. What
    /// it has afterwards in all.
    fn grow(&self, want: Shape) -> impl Future<Output = Result<Shape>> + Send;

    /// Ends the VM now, whatever state it is in, and waits until it is gone.
    fn kill(&self) -> impl Future<Output = ()> + Send;

    /// The next thing that happens. Dropping the future loses nothing. After `Exited` nothing comes.
    fn next(&mut self) -> impl Future<Output = VmEvent> + Send;
}

/// How much of the host a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub cpus: u32,
    pub memory: Size,
}

/// A machine that lies in a file, and what it takes to go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saved {
    pub at: Timestamp,
    pub file: SavedFile,
    pub stream: Stream,
    /// Bytes that the file takes on the disk.
    pub bytes: u64,
    pub machine_type: String,
    /// QEMU's version, for messages.
    pub qemu: String,
    pub accelerator: Accelerator,
    /// What it was booted with; `growth` has what it got since.
    pub cpus: u32,
    pub memory: Size,
    #[serde(default)]
    pub growth: Growth,
    /// How the machine was booted: the ROMs differ.
    pub firmware_boot: bool,
    /// Its cards besides the first one.
    #[serde(default)]
    pub extra_nics: Vec<Mac>,
}

/// Where a saved machine lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SavedFile {
    /// The instance's own: goes when the instance goes on.
    Suspended,
    /// A snapshot's: stays.
    Snapshot(Uuid),
}

/// What a machine is frozen with.
#[derive(Debug)]
pub struct Freeze {
    /// An empty qcow2 file that takes the guest's writes from now on.
    pub layer: PathBuf,
    /// What the guest sees, and what the file must have.
    pub size: Size,
    /// An empty file for devices and memory, if they are wanted, and what it is called.
    pub memory: Option<(File, SavedFile)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frozen {
    /// The memory, if it was wanted.
    pub saved: Option<Saved>,
    /// How long the guest stood still.
    pub paused: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub enum VmEvent {
    /// The guest or we shut the machine down; `Exited` follows.
    Shutdown {
        by_guest: bool,
    },
    /// The machine was reset: the guest boots again.
    Reset,
    Panicked,
    /// The host could not write or read the disk; without space the machine is halted as well.
    DiskError {
        no_space: bool,
        reason: String,
    },
    /// The process is gone. A reason if it was no orderly shutdown.
    Exited {
        reason: Option<String>,
    },
    Guest(GuestEvent),
}

#[derive(Debug, Clone, PartialEq)]
pub enum GuestEvent {
    /// The guest shows signs of life and takes commands.
    Up,
    /// What cloud-init says now.
    CloudInit(CloudInit),
    Report {
        report: GuestReport,
        addresses: Vec<Ipv4Addr>,
        /// The guest would boot another kernel than the one given to it.
        other_kernel: bool,
    },
}

/// Keeps what the task knows, so that a daemon that starts again can go on. Saved before the task
/// goes on to the next step.
pub trait Journal: Send + Sync + 'static {
    fn save<'a>(
        &'a self,
        snapshot: &'a Snapshot,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>>;
}

/// How often the task looks after the console's log.
pub(super) const TRIM_EVERY: Duration = Duration::from_secs(5);
