//! QEMU as the driver of an instance's task: puts the hypervisor (`qemu/`), the guest channel
//! (`guest/`) and the wiring that the daemon passes in (a tap) together into what `machine/` asks for.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use pileus_base::process::ProcessId;
use pileus_base::{InstanceName, Reporter, Result, Size, files};
use tokio::sync::{broadcast, mpsc};
use uuid::Uuid;

pub use crate::guest::handle::Guest;
use crate::guest::keys::InstanceKeys;
use crate::guest::watch;
use crate::machine::{Driver, Freeze, Frozen, GuestEvent, Vm, VmEvent};
use crate::qemu::{
    self, Accelerator, Boot, Confinement, Disk, Mac, MachineSpec, Memory, Nic, Paths, Port, Qemu,
    log,
};

/// Bytes of the console that an error shows, and lines at most.
const TAIL_BYTES: u64 = 8 << 10;
const TAIL_LINES: usize = 20;

/// The hypervisor of this host.
#[derive(Debug, Clone)]
pub struct Host {
    pub qemu: Qemu,
    pub accelerator: Accelerator,
    /// One sentence about the accelerator, to be shown once.
    pub warning: Option<String>,
}

type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What the daemon does for an instance on the host: its place in the network, its rights.
pub trait Wiring: Send + Sync + 'static {
    /// The hypervisor to use, looked for again if it was not there.
    fn host(&self) -> Later<'_, Result<Arc<Host>>>;
    /// A tap, plugged in and up.
    fn plug(&self) -> Later<'_, Result<OwnedFd>>;
    fn unplug(&self) -> Later<'_, ()>;
    /// The qcow2 layers of the disk above the image, the lowest first; the last one is written.
    fn layers(&self) -> Vec<PathBuf>;
    /// The user that QEMU becomes; none if it stays who we are.
    fn confinement(&self, accelerator: Accelerator) -> Option<Confinement>;
}

/// Everything about one instance that a start needs.
#[derive(Debug, Clone)]
pub struct Setup {
    pub name: InstanceName,
    pub id: Uuid,
    pub cpus: u32,
    pub memory: Size,
    /// The type that it was made with; the host's current one if it never started.
    pub machine_type: Option<String>,
    /// The image's raw disk.
    pub base: PathBuf,
    /// Kernel and initrd beside the image, with their command line.
    pub direct_boot: Option<DirectBoot>,
    /// `seed.iso`, keys and logs lie here, and mostly the disk.
    pub folder: PathBuf,
    /// The sockets lie here.
    pub run: PathBuf,
    pub mac: Mac,
    pub address: Ipv4Addr,
    /// Its VM ends with the daemon: it is a throw-away one.
    pub ends_with_daemon: bool,
}

#[derive(Debug, Clone)]
pub struct DirectBoot {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
}

/// File names in an instance's folder.
pub const DISK: &str = "disk.qcow2";
pub const SEED: &str = "seed.iso";

impl Setup {
    pub fn paths(&self) -> Paths {
        Paths::of(&self.run, &self.folder)
    }

    fn spec(&self, host: &Host, layers: Vec<PathBuf>, firmware_boot: bool) -> MachineSpec {
        let boot = match &self.direct_boot {
            Some(direct) if !firmware_boot => Boot::Kernel {
                kernel: direct.kernel.clone(),
                initrd: direct.initrd.clone(),
                cmdline: direct.cmdline.clone(),
            },
            _ => Boot::Firmware,
        };
        let machine_type = self.machine_type.as_ref();
        MachineSpec {
            name: self.name.clone(),
            uuid: self.id,
            cpus: self.cpus,
            memory: self.memory,
            machine_type: machine_type.unwrap_or(&host.qemu.machine_type).clone(),
            accelerator: host.accelerator,
            disk: Disk {
                base: self.base.clone(),
                layers,
            },
            seed: Some(self.folder.join(SEED)),
            boot,
            nic: Nic::Tap(self.mac),
            ram: Memory::Private,
            incoming: false,
            ends_with_daemon: self.ends_with_daemon,
            in_background: false,
            paths: self.paths(),
        }
    }
}

/// Drives one instance with QEMU.
pub struct QemuDriver {
    setup: Setup,
    wiring: Arc<dyn Wiring>,
}

impl QemuDriver {
    pub fn new(setup: Setup, wiring: Arc<dyn Wiring>) -> Self {
        Self { setup, wiring }
    }

    /// Finds the VM that an earlier daemon started, if it still runs.
    pub async fn adopt(&self) -> Result<Option<RunningVm>> {
        let paths = self.setup.paths();
        let Some(process) = qemu::process::find(&paths, self.setup.id) else {
            return Ok(None);
        };
        let (vm, events) = qemu::Vm::adopt(process, &paths).await?;
        self.running(vm, events).map(Some)
    }

    pub(crate) fn setup(&self) -> &Setup {
        &self.setup
    }

    /// The machine as it would be started now.
    pub(crate) fn spec(&self, host: &Host, firmware_boot: bool) -> MachineSpec {
        self.setup.spec(host, self.wiring.layers(), firmware_boot)
    }

    pub(crate) fn wiring(&self) -> &dyn Wiring {
        &*self.wiring
    }

    /// Starts QEMU and connects to where its guest will answer. On error no process is left, but the
    /// run folder may be.
    pub(crate) async fn launch(
        &self,
        host: &Host,
        spec: &MachineSpec,
        tap: Option<OwnedFd>,
    ) -> Result<RunningVm> {
        files::create_folder(&self.setup.run, 0o700)?;
        let confinement = self.wiring.confinement(host.accelerator);
        let (vm, events) = qemu::Vm::start(&host.qemu, spec, tap, confinement).await?;
        self.running(vm, events)
    }

    /// Gives a restored machine its NIC.
    pub(crate) async fn plug_nic(&self, vm: &RunningVm, tap: OwnedFd) -> Result<()> {
        vm.vm.plug_nic("nic0", Port::Nic, self.setup.mac, tap).await
    }

    fn running(
        &self,
        vm: qemu::Vm,
        events: broadcast::Receiver<qemu::VmEvent>,
    ) -> Result<RunningVm> {
        let keys = InstanceKeys::load(&self.setup.folder)?;
        let paths = self.setup.paths();
        let guest = Guest::connect(&paths, &self.setup.folder, keys, self.setup.address);
        let guest_events = watch::watch(guest.clone());
        Ok(RunningVm {
            vm,
            events,
            guest,
            guest_events,
            orderly: false,
        })
    }
}

impl Driver for QemuDriver {
    type Vm = RunningVm;

    async fn start(&self, firmware_boot: bool, _report: &Reporter) -> Result<RunningVm> {
        let host = self.wiring.host().await?;
        let spec = self.spec(&host, firmware_boot);
        let started = async {
            let tap = self.wiring.plug().await?;
            self.launch(&host, &spec, Some(tap)).await
        };
        match started.await {
            Ok(vm) => Ok(vm),
            Err(err) => {
                self.release().await;
                Err(err)
            }
        }
    }

    async fn release(&self) {
        self.wiring.unplug().await;
        if let Err(err) = files::remove_folder(&self.setup.run) {
            tracing::warn!(instance = %self.setup.name, %err, "its sockets can't be removed");
        }
    }

    fn console_tail(&self) -> Vec<String> {
        let text = files::tail(&self.setup.paths().console_log, TAIL_BYTES);
        let lines: Vec<String> = text
            .lines()
            .map(crate::guest::wire::clean)
            .filter(|line| !line.trim().is_empty())
            .collect();
        lines[lines.len().saturating_sub(TAIL_LINES)..].to_vec()
    }

    fn trim_console(&self) {
        if let Err(err) = log::trim_all(&self.setup.paths()) {
            tracing::warn!(instance = %self.setup.name, %err, "its logs can't be trimmed");
        }
    }
}

/// A QEMU that runs, and its guest.
pub struct RunningVm {
    vm: qemu::Vm,
    events: broadcast::Receiver<qemu::VmEvent>,
    guest: Guest,
    guest_events: mpsc::Receiver<GuestEvent>,
    /// The end that comes is one that was asked for.
    orderly: bool,
}

impl Vm for RunningVm {
    type Guest = Guest;

    fn process(&self) -> ProcessId {
        self.vm.process()
    }

    fn guest(&self) -> Guest {
        self.guest.clone()
    }

    async fn power_down(&self) -> Result<()> {
        self.vm.powerdown().await
    }

    async fn reboot(&self) -> Result<()> {
        // The agent lets the guest shut its services down; a guest without one is reset.
        if self.guest.reboot().await.is_ok() {
            return Ok(());
        }
        self.vm.reset().await
    }

    async fn resume(&self) -> Result<()> {
        self.vm.resume().await
    }

    async fn freeze(&self, freeze: Freeze) -> Result<Frozen> {
        let (stream, paused) = self.vm.freeze(&freeze.layer, freeze.memory).await?;
        Ok(Frozen { stream, paused })
    }

    async fn kill(&self) {
        if let Err(err) = self.vm.quit().await {
            tracing::error!(%err, "QEMU can't be ended");
        }
    }

    async fn next(&mut self) -> VmEvent {
        loop {
            tokio::select! {
                biased;
                event = self.events.recv() => match event {
                    Ok(event) => if let Some(event) = self.translate(event) {
                        return event;
                    },
                    Err(broadcast::error::RecvError::Lagged(missed)) => {
                        tracing::warn!(missed, "events of QEMU were missed");
                    }
                    Err(broadcast::error::RecvError::Closed) => {
                        let exit = self.vm.wait().await;
                        return VmEvent::Exited { reason: self.reason(exit) };
                    }
                },
                Some(event) = self.guest_events.recv() => {
                    if event == GuestEvent::Up {
                        let guest = self.guest.clone();
                        tokio::spawn(async move { guest.warm_up().await });
                    }
                    return VmEvent::Guest(event);
                }
            }
        }
    }
}

impl RunningVm {
    pub(crate) fn qemu(&self) -> &qemu::Vm {
        &self.vm
    }

    /// Forgets what the guest told so far: a restored one told of the machine that was saved.
    pub fn watched_from_now(mut self) -> Self {
        self.guest_events = watch::watch(self.guest.clone());
        self
    }

    fn translate(&mut self, event: qemu::VmEvent) -> Option<VmEvent> {
        match event {
            qemu::VmEvent::Shutdown { guest, .. } => {
                self.orderly = true;
                Some(VmEvent::Shutdown { by_guest: guest })
            }
            qemu::VmEvent::Reset { .. } => {
                self.guest.was_reset();
                Some(VmEvent::Reset)
            }
            qemu::VmEvent::Panicked => Some(VmEvent::Panicked),
            qemu::VmEvent::DiskError { no_space, reason } => {
                Some(VmEvent::DiskError { no_space, reason })
            }
            qemu::VmEvent::Exited(exit) => Some(VmEvent::Exited {
                reason: self.reason(exit),
            }),
            qemu::VmEvent::Disconnected => {
                tracing::warn!(
                    pid = self.vm.process().pid,
                    "QEMU closed its control socket"
                );
                None
            }
            qemu::VmEvent::Stopped
            | qemu::VmEvent::Resumed
            | qemu::VmEvent::GuestPort { .. }
            | qemu::VmEvent::DeviceGone { .. } => None,
        }
    }

    /// Why the process ended, unless that was asked for.
    fn reason(&self, exit: qemu::Exit) -> Option<String> {
        if self.orderly || exit.code == Some(0) {
            return None;
        }
        Some(format!("QEMU {exit}"))
    }
}
