//! QEMU as the driver of an instance's task: puts the hypervisor (`qemu/`), the guest channel
//! (`guest/`) and the wiring that the daemon passes in (a tap) together into what `machine/` asks for.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pileus_base::{Code, Error, InstanceName, Phase, Reporter, Result, ResultExt, Size, files};
use tokio::sync::broadcast;
use uuid::Uuid;

use crate::guest::clone::IdentitySpec;
pub use crate::guest::handle::Guest;
use crate::guest::keys::InstanceKeys;
use crate::guest::watch;
use crate::machine::{Driver, Freeze, Frozen, Saved, SavedFile};
use crate::qemu::hardware::{self, Hardware, Socket};
use crate::qemu::{
    self, Accelerator, Boot, Confinement, Disk, Growth, Mac, MachineSpec, Memory, Nic, Paths, Port,
    Qemu, Stream, grow::Grown, log,
};
pub use crate::running::RunningVm;

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
    /// The room that machines get to grow in.
    pub growth: Growth,
}

/// The guest has to write what it holds back.
const SYNC_BOUND: Duration = Duration::from_secs(5);
/// A process that broke its connection off is gone by then, if it is going.
const EXIT_BOUND: Duration = Duration::from_secs(5);
/// A clone's first boot.
const IDENTIFY_BOUND: Duration = Duration::from_secs(120);

type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// What the daemon does for an instance on the host: its place in the network, its rights. A machine that is no
/// instance's (a template's, an installer's) has no more than what has to be given.
pub trait Wiring: Send + Sync + 'static {
    /// The hypervisor to use, looked for again if it was not there.
    fn host(&self) -> Later<'_, Result<Arc<Host>>>;
    /// A tap, plugged in and up.
    fn plug(&self) -> Later<'_, Result<OwnedFd>>;
    /// A tap in the host's network that the further card with this address is in; none if the instance
    /// has no such card any more.
    fn plug_extra(&self, _number: usize, _mac: Mac) -> Later<'_, Result<Option<OwnedFd>>> {
        Box::pin(async { Ok(None) })
    }
    /// Takes the first card's place away; that of the others goes with their taps.
    fn unplug(&self) -> Later<'_, ()>;
    /// The instance as it is now; `None` if nobody knows any more.
    fn setup(&self) -> Option<Setup> {
        None
    }
    /// What the guest is to become after its next boot, if it stands on a copy of another one's disk.
    fn identity(&self) -> Result<Option<IdentitySpec>> {
        Ok(None)
    }
    /// The guest has become that.
    fn identified(&self) -> Later<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }
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
    /// What it has besides the usual.
    pub hardware: Hardware,
    /// Its cards in networks of the host.
    pub extra_nics: Vec<Mac>,
    pub address: Ipv4Addr,
    /// Its VM ends with the daemon: it is a throw-away one.
    pub ends_with_daemon: bool,
    /// What the kernel is told that the machine's id is, if the disk may say something else.
    pub machine_id: Option<Uuid>,
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
/// Devices and memory of a suspended instance.
pub const SUSPENDED: &str = "suspended.memory";
/// Below it lies the memory of snapshots that have it.
pub const SNAPSHOTS: &str = "snapshots";

impl Setup {
    pub fn paths(&self) -> Paths {
        Paths::of(&self.run, &self.folder)
    }

    /// Where a saved machine lies.
    pub fn saved(&self, file: SavedFile) -> PathBuf {
        saved(&self.folder, file)
    }

    fn machine_type<'a>(&'a self, host: &'a Host) -> &'a str {
        let own = self.machine_type.as_ref();
        own.unwrap_or(&host.qemu.machine_type)
    }

    fn spec(&self, host: &Host, layers: Vec<PathBuf>, firmware_boot: bool) -> MachineSpec {
        let boot = match &self.direct_boot {
            Some(direct) if !firmware_boot => Boot::Kernel {
                kernel: direct.kernel.clone(),
                initrd: direct.initrd.clone(),
                cmdline: match self.machine_id {
                    Some(id) => format!("{} systemd.machine_id={}", direct.cmdline, id.simple()),
                    None => direct.cmdline.clone(),
                },
            },
            _ => Boot::Firmware,
        };
        MachineSpec {
            name: self.name.clone(),
            uuid: self.id,
            cpus: self.cpus,
            memory: self.memory,
            machine_type: self.machine_type(host).to_owned(),
            accelerator: host.accelerator,
            disk: Disk {
                base: self.base.clone(),
                layers,
            },
            seed: Some(self.folder.join(SEED)),
            boot,
            nic: Nic::Tap(self.mac),
            extra_nics: self.extra_nics.clone(),
            hardware: self.hardware.with_cpus(self.cpus),
            // An image's own choice of hardware is kept as it is.
            growth: match self.hardware == Hardware::default() {
                true => host.growth,
                false => Growth::default(),
            },
            ram: Memory::Private,
            incoming: false,
            ends_with_daemon: self.ends_with_daemon,
            in_background: false,
            paths: self.paths(),
        }
    }
}

/// Where a saved machine of the instance with this folder lies.
pub fn saved(folder: &Path, file: SavedFile) -> PathBuf {
    match file {
        SavedFile::Suspended => folder.join(SUSPENDED),
        SavedFile::Snapshot(id) => folder.join(SNAPSHOTS).join(format!("{id}.memory")),
    }
}

/// Drives one instance with QEMU.
pub struct QemuDriver {
    /// What it was at first; what never changes may be read from here.
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
        let keys = InstanceKeys::load(&self.setup.folder)?;
        let (vm, events) = match qemu::Vm::adopt(process, &paths).await {
            Ok(adopted) => adopted,
            Err(err) => {
                // The usual cause of a broken connection is that QEMU is gone, because its guest was just
                // shutting down. Then it is as if it had not been found.
                let exit = qemu::process::wait_exit(process);
                return match tokio::time::timeout(EXIT_BOUND, exit).await {
                    Ok(Ok(_)) => Ok(None),
                    _ => Err(err),
                };
            }
        };
        // The daemon before may have ended while it saved the machine.
        if let Err(err) = vm.wake().await {
            tracing::error!(instance = %self.name(), %err, "it stands still");
        }
        Ok(Some(self.running(vm, events, keys)))
    }

    pub(crate) fn setup(&self) -> Setup {
        self.wiring.setup().unwrap_or_else(|| self.setup.clone())
    }

    /// The machine as it would be started now.
    pub(crate) fn spec(&self, host: &Host, firmware_boot: bool) -> MachineSpec {
        self.setup().spec(host, self.wiring.layers(), firmware_boot)
    }

    /// The machine that can take up what was saved.
    fn spec_of_saved(&self, host: &Host, saved: &Saved) -> Result<MachineSpec> {
        if saved.accelerator != host.accelerator {
            return Err(cant_resume(&format!(
                "it ran with {}, and this host now uses {}",
                saved.accelerator.as_str(),
                host.accelerator.as_str()
            )));
        }
        let mut spec = self.spec(host, saved.firmware_boot);
        spec.machine_type.clone_from(&saved.machine_type);
        spec.cpus = saved.cpus;
        spec.hardware = self.setup().hardware.with_cpus(saved.cpus);
        spec.memory = saved.memory;
        spec.growth = saved.growth;
        spec.extra_nics.clone_from(&saved.extra_nics);
        spec.incoming = true;
        Ok(spec)
    }

    /// What is to be known of a machine that runs with this command line and was written. The line is read
    /// before: QEMU may end right after, and what it wrote is whole all the same.
    fn saved_now(
        &self,
        vm: &RunningVm,
        (running, grown): &(Vec<String>, Grown),
        (file, written): (SavedFile, &File),
        stream: Stream,
    ) -> Result<Saved> {
        let meta = written.metadata().io("Looking at a saved machine")?;
        let version = vm.vm.client().version();
        let value = |option: &str| {
            let at = running.iter().position(|arg| arg == option)?;
            running.get(at + 1).cloned()
        };
        let machine = value("-machine").unwrap_or_default();
        let accelerator = match running.iter().any(|arg| arg.starts_with("kvm")) {
            true => Accelerator::Kvm,
            false => Accelerator::Tcg,
        };
        Ok(Saved {
            at: pileus_api::Timestamp::now(),
            file,
            stream,
            bytes: std::os::unix::fs::MetadataExt::blocks(&meta) * 512,
            machine_type: machine.split(',').next().unwrap_or_default().to_owned(),
            qemu: format!("{}.{}.{}", version.major, version.minor, version.micro),
            accelerator,
            cpus: grown.cpus,
            memory: grown.memory,
            growth: grown.growth,
            extra_nics: qemu::extra_nics(running),
            firmware_boot: !running.iter().any(|arg| arg == "-kernel"),
        })
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
        taps: Vec<OwnedFd>,
    ) -> Result<RunningVm> {
        files::create_folder(&self.setup.run, 0o700)?;
        let keys = InstanceKeys::load(&self.setup.folder)?;
        let confinement = self.wiring.confinement(host.accelerator);
        let (vm, events) = qemu::Vm::start(&host.qemu, spec, taps, confinement).await?;
        Ok(self.running(vm, events, keys))
    }

    /// The taps of a machine's NICs.
    async fn taps(&self, spec: &MachineSpec) -> Result<Vec<OwnedFd>> {
        let mut taps = vec![self.wiring.plug().await?];
        for (number, mac) in spec.extra_nics.iter().enumerate() {
            taps.push(match self.wiring.plug_extra(number, *mac).await? {
                Some(tap) => tap,
                // A machine that was saved when it still had the card.
                None => qemu::loose_tap()?,
            });
        }
        Ok(taps)
    }

    /// Gives a restored machine its NIC.
    pub(crate) async fn plug_nic(&self, vm: &RunningVm, tap: OwnedFd) -> Result<()> {
        let (setup, host) = (self.setup(), self.wiring.host().await?);
        let socket = Socket::of(setup.machine_type(&host), Port::Nic);
        let model = setup.hardware.nic;
        let plugged = vm.vm.plug_card("nic0", model, socket, setup.mac, tap);
        plugged.await
    }

    fn running(
        &self,
        vm: qemu::Vm,
        events: broadcast::Receiver<qemu::VmEvent>,
        keys: InstanceKeys,
    ) -> RunningVm {
        let paths = self.setup.paths();
        let guest = Guest::connect(&paths, &self.setup.folder, keys, self.setup.address);
        let guest_events = watch::watch(guest.clone());
        RunningVm {
            vm,
            events,
            guest,
            guest_events,
            orderly: false,
        }
    }
}

impl Driver for QemuDriver {
    type Vm = RunningVm;

    async fn start(&self, firmware_boot: bool, _report: &Reporter) -> Result<RunningVm> {
        let host = self.wiring.host().await?;
        let spec = self.spec(&host, firmware_boot);
        let started = async {
            let taps = self.taps(&spec).await?;
            self.launch(&host, &spec, taps).await
        };
        match started.await {
            Ok(vm) => Ok(vm),
            Err(err) => {
                self.release().await;
                Err(err)
            }
        }
    }

    fn name(&self) -> InstanceName {
        self.setup().name
    }

    /// An image that chose its hardware may be of an age, or a kind, that has no cloud-init.
    fn may_be_silent(&self) -> bool {
        let setup = self.setup();
        let old = setup.machine_type.as_deref().is_some_and(hardware::is_old);
        old || !setup.hardware.is_usual()
    }

    async fn start_empty(&self, saved: &Saved) -> Result<RunningVm> {
        let host = self.wiring.host().await?;
        let spec = self.spec_of_saved(&host, saved)?;
        let started = async {
            let taps = self.taps(&spec).await?;
            self.launch(&host, &spec, taps).await
        };
        match started.await {
            Ok(vm) => Ok(vm),
            Err(err) => {
                self.release().await;
                Err(match err.code {
                    Code::QemuFailed => refused(saved, &host, err),
                    _ => err,
                })
            }
        }
    }

    async fn load(&self, vm: &RunningVm, saved: &Saved) -> Result<()> {
        let path = self.setup().saved(saved.file);
        let file = File::open(&path).io(format_args!("Opening {}", path.display()))?;
        let host = self.wiring.host().await?;
        let loaded = vm.vm.restore_all(file, saved.stream).await;
        loaded.map_err(|err| match err.code {
            Code::QemuFailed => refused(saved, &host, err),
            _ => err,
        })
    }

    async fn save(&self, vm: &RunningVm) -> Result<Saved> {
        let setup = self.setup();
        let path = setup.saved(SavedFile::Suspended);
        room_for(&setup.folder, setup.memory)?;
        files::discard(&path)?;
        let file = files::create_private(&path)?;
        let running = (vm.vm.process().command_line()?, vm.vm.grown().await?);
        vm.vm.pause().await?;
        let stream = vm
            .vm
            .save_all(file.try_clone().io("Saving a machine")?)
            .await?;
        let file = to_stay(file, path).await?;
        self.saved_now(vm, &running, (SavedFile::Suspended, &file), stream)
    }

    async fn unsave(&self, vm: &RunningVm) -> Result<()> {
        vm.vm.cancel_save().await;
        // Not at once while QEMU still writes.
        let resumed = vm.vm.wake().await;
        files::discard(&self.setup().saved(SavedFile::Suspended))?;
        resumed
    }

    fn forget(&self, saved: &Saved) {
        if saved.file == SavedFile::Suspended
            && let Err(err) = files::discard(&self.setup().saved(saved.file))
        {
            tracing::warn!(instance = %self.name(), %err, "its saved memory can't be removed");
        }
    }

    async fn freeze(&self, vm: &RunningVm, freeze: Freeze) -> Result<Frozen> {
        let Some((memory, file)) = freeze.memory else {
            // Without it the guest's last seconds may be missing, as after a power cut.
            if let Err(err) = vm.guest.sync(SYNC_BOUND).await {
                tracing::info!(instance = %self.name(), %err, "the guest did not flush its disks");
            }
            let began = Instant::now();
            vm.vm.snapshot_disk(&freeze.layer, freeze.size).await?;
            return Ok(Frozen {
                saved: None,
                paused: began.elapsed(),
            });
        };
        let written = memory.try_clone().io("Saving a machine")?;
        let running = (vm.vm.process().command_line()?, vm.vm.grown().await?);
        let (stream, paused) = vm.vm.freeze(&freeze.layer, freeze.size, memory).await?;
        let written = match file {
            SavedFile::Snapshot(_) => to_stay(written, self.setup().saved(file)).await?,
            // A fork's, which goes at once.
            SavedFile::Suspended => written,
        };
        Ok(Frozen {
            saved: Some(self.saved_now(vm, &running, (file, &written), stream)?),
            paused,
        })
    }

    async fn identify(&self, vm: &RunningVm, report: &Reporter) -> Result<()> {
        let Some(mut spec) = self.wiring.identity()? else {
            return Ok(());
        };
        report.phase(Phase::Identifying);
        crate::warm::freshen(&mut spec)?;
        for (step, milliseconds) in vm.guest.identify(&spec, IDENTIFY_BOUND).await? {
            tracing::debug!(instance = %self.name(), step, milliseconds, "identified");
        }
        self.wiring.identified().await
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

/// Brings what was written to the disk, with its name: a record will say that it is there.
async fn to_stay(file: File, path: PathBuf) -> Result<File> {
    let sync = move || {
        file.sync_all().io("Saving a machine")?;
        if let Some(folder) = path.parent() {
            files::sync_folder(folder)?;
        }
        Ok::<_, Error>(file)
    };
    tokio::task::spawn_blocking(sync)
        .await
        .map_err(|err| Error::internal("Saving broke off").with_source(err))?
}

/// QEMU does not take what was saved: mostly because it is another one.
fn refused(saved: &Saved, host: &Host, err: Error) -> Error {
    let (major, minor, micro) = host.qemu.version;
    let mut error = cant_resume(&format!(
        "it was saved by QEMU {} as {}, and QEMU {major}.{minor}.{micro} does not take it",
        saved.qemu, saved.machine_type
    ));
    error.details.push(err.message.clone());
    error.details.extend(err.details.iter().cloned());
    error.with_source(err)
}

fn cant_resume(why: &str) -> Error {
    Error::new(Code::CantResume, format!("The saved machine can't go on: {why}")).advise(
        "Its disk is unharmed: `pileus stop --force NAME` gives the saved memory up, and a start then boots it.",
    )
}

/// Refuses to write memory to a disk that may not hold it.
pub fn room_for(folder: &Path, memory: Size) -> Result<()> {
    let free = files::free_space(folder)?;
    let need = memory.bytes() + STATE_ROOM;
    if free >= need {
        return Ok(());
    }
    Err(Error::new(
        Code::NoSpace,
        format!(
            "Up to {} of memory may have to be written to {}, and {} are free",
            Size(need),
            folder.display(),
            Size(free)
        ),
    ))
}

/// The device state beside the memory, and some room.
const STATE_ROOM: u64 = 16 << 20;
