//! What a hypervisor must do for an instance's task. QEMU's driver is `instances/src/driver.rs`.

use std::fs::File;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use pileus_api::{CloudInit, GuestReport};
use pileus_base::process::ProcessId;
use pileus_base::{Reporter, Result};

use super::Snapshot;
use crate::qemu::Stream;

/// Starts the VM of one instance, and tidies up after it.
pub trait Driver: Send + Sync + 'static {
    type Vm: Vm;

    /// Starts the VM. On error nothing of it is left behind.
    fn start(
        &self,
        firmware_boot: bool,
        report: &Reporter,
    ) -> impl Future<Output = Result<Self::Vm>> + Send;

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

    /// Lets the processors run again after a disk error halted them.
    fn resume(&self) -> impl Future<Output = Result<()>> + Send;

    /// Writes devices and memory to a file while the guest runs, and puts a new layer over its disk at
    /// the moment that was saved; the guest stands still for that moment, and goes on in any case.
    fn freeze(&self, freeze: Freeze) -> impl Future<Output = Result<Frozen>> + Send;

    /// Ends the VM now, whatever state it is in, and waits until it is gone.
    fn kill(&self) -> impl Future<Output = ()> + Send;

    /// The next thing that happens. Dropping the future loses nothing. After `Exited` nothing comes.
    fn next(&mut self) -> impl Future<Output = VmEvent> + Send;
}

/// What a frozen machine is written to.
#[derive(Debug)]
pub struct Freeze {
    /// An empty qcow2 file that takes the guest's writes from now on.
    pub layer: PathBuf,
    /// An empty file for devices and memory.
    pub memory: File,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frozen {
    pub stream: Stream,
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
