//! What a machine is: processors, memory, disks, boot, and where its files lie. Plain data that can
//! be kept, compared and turned into a command line (`argv.rs`).

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use pileus_base::{Code, Error, InstanceName, Mac, Result, Size};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::hardware::Hardware;

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

/// What the user wants; `Auto` is decided in `host.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorChoice {
    #[default]
    Auto,
    Kvm,
    Tcg,
}

impl FromStr for AcceleratorChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "tcg" => Ok(Self::Tcg),
            _ => Err(
                Error::new(Code::InvalidArgument, format!("{text} is no accelerator"))
                    .advise("Choose auto, kvm or tcg."),
            ),
        }
    }
}

/// Everything that makes a machine, except the open taps of its NICs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineSpec {
    pub name: InstanceName,
    /// The instance's id; also the SMBIOS UUID, and how a process is recognised as ours.
    pub uuid: Uuid,
    pub cpus: u32,
    pub memory: Size,
    /// What the guest's memory is made of; the guest can't tell.
    pub ram: Memory,
    /// The versioned type (`pc-q35-10.0`), kept with the instance so that the guest sees the same
    /// machine under a later QEMU.
    pub machine_type: String,
    pub accelerator: Accelerator,
    pub disk: Disk,
    /// A NoCloud seed, shown to the guest as a read-only disk.
    pub seed: Option<PathBuf>,
    pub boot: Boot,
    pub nic: Nic,
    /// Further NICs `nic1`, `nic2` … on the spare ports from the first on. Their taps are given to
    /// `Vm::start` behind that of the first NIC.
    #[serde(default)]
    pub extra_nics: Vec<Mac>,
    /// What it may get, and has got, while it runs.
    #[serde(default)]
    pub growth: Growth,
    /// What it has besides the usual.
    #[serde(default)]
    pub hardware: Hardware,
    /// The machine waits for a saved state (`Vm::restore`), and then to be resumed.
    pub incoming: bool,
    /// QEMU is killed when this process ends, however it ends: the machine belongs to no instance.
    pub ends_with_daemon: bool,
    /// Nobody waits for it: it runs when the host has nothing else to do.
    pub in_background: bool,
    pub paths: Paths,
}

/// How a machine may grow while it runs (`grow.rs`), and how far it did since it was booted. The room is part
/// of what the guest sees, so it stays the same as long as the machine lives, in files too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growth {
    /// Processors that it can have in all; those that it was booted with if that is more.
    pub most_cpus: u32,
    /// Memory that it can get beside what it was booted with; none if zero.
    pub room: Size,
    /// Processors that it got.
    pub cpus: u32,
    /// Memory that it got, in steps of [`Growth::STEP`].
    pub memory: Size,
}

impl Default for Growth {
    /// No room.
    fn default() -> Self {
        Self {
            most_cpus: 0,
            room: Size(0),
            cpus: 0,
            memory: Size(0),
        }
    }
}

impl Growth {
    /// Memory comes in pieces of this size.
    pub const STEP: u64 = 2 << 20;

    /// The room that this host gives: as much as it has itself.
    pub fn of_host() -> Self {
        let info = rustix::system::sysinfo();
        let bytes = (info.totalram as u64).saturating_mul(u64::from(info.mem_unit.max(1)));
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            most_cpus: u32::try_from(cpus).unwrap_or(u32::MAX).min(255),
            // What the kernel keeps for itself differs a little from boot to boot.
            room: Size((bytes >> 30) << 30),
            ..Self::default()
        }
    }

    /// Sockets for this many processors each, enough for `most_cpus`: guests take no processor into a
    /// socket that they already know.
    pub(crate) fn sockets(&self, cpus: u32) -> u32 {
        (self.most_cpus.max(cpus) / cpus.max(1)).max(1)
    }
}

/// What a guest's memory is made of. The files are sparse, 0600, ours, and as long as
/// [`MachineSpec::ram_bytes`]; they may lie anywhere, but may not be links.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Memory {
    /// Anonymous memory.
    #[default]
    Private,
    /// The file itself: what the guest writes is in it. For a template while it is made.
    Shared(PathBuf),
    /// The file as it is; what the guest writes is its own. The file must never change again.
    CopyOnWrite(PathBuf),
}

impl Memory {
    pub fn file(&self) -> Option<&Path> {
        match self {
            Self::Private => None,
            Self::Shared(file) | Self::CopyOnWrite(file) => Some(file),
        }
    }
}

/// The NIC on [`Port::Nic`], with the id `nic0`, that is there from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Nic {
    None,
    /// Its tap is given to `Vm::start`.
    Tap(Mac),
    /// The same for the guest and for a saved state, on a tap that nobody else sees. QEMU has
    /// network back ends that lead nowhere, but none that a state saved with a tap can be
    /// restored on ("saved image requires vnet_hdr=on").
    Disconnected(Mac),
}

/// A raw base that nobody writes, and qcow2 layers above it; the last one is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    pub base: PathBuf,
    pub layers: Vec<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Boot {
    /// The firmware finds the disk's boot loader.
    Firmware,
    /// The kernel is put into memory. The files must be readable by QEMU's user (they are opened
    /// again through `/proc/self/fd`), their folders need not be.
    Kernel {
        kernel: PathBuf,
        initrd: Option<PathBuf>,
        cmdline: String,
    },
}

/// Where a machine's own files lie.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paths {
    /// Folder of the sockets and of `qemu.pid`; `Layout::instance_run`.
    pub run: PathBuf,
    /// What the guest wrote to its serial console.
    pub console_log: PathBuf,
    /// What QEMU itself wrote.
    pub qemu_log: PathBuf,
}

impl Paths {
    /// The usual places: sockets in `run`, logs in the instance's own folder.
    pub fn of(run: &Path, folder: &Path) -> Self {
        Self {
            run: run.to_owned(),
            console_log: folder.join("console.log"),
            qemu_log: folder.join("qemu.log"),
        }
    }

    pub fn qmp(&self) -> PathBuf {
        self.run.join("qmp.sock")
    }

    /// The guest agent's virtio-serial port.
    pub fn agent(&self) -> PathBuf {
        self.run.join("agent.sock")
    }

    /// A virtio-serial port that carries SSH, below [`SSH_PORTS`].
    pub fn ssh(&self, number: u8) -> PathBuf {
        self.run.join(format!("ssh{number}.sock"))
    }

    /// The serial console, both ways; one client at a time.
    pub fn console(&self) -> PathBuf {
        self.run.join("console.sock")
    }

    /// The folder of the display's socket, which QEMU makes itself.
    pub fn display_folder(&self) -> PathBuf {
        self.run.join("display")
    }

    /// VNC, where the machine has a display. Who can enter the folder can see and type.
    pub fn display(&self) -> PathBuf {
        self.display_folder().join(DISPLAY_SOCKET)
    }

    pub fn pid_file(&self) -> PathBuf {
        self.run.join("qemu.pid")
    }
}

/// Name of the display's socket in its folder.
pub const DISPLAY_SOCKET: &str = "vnc.sock";
/// Name of the agent's virtio-serial port, as the guest sees it in `/dev/virtio-ports/`.
pub const AGENT_PORT: &str = "pileus.agent.0";
/// How many ports carry SSH: one connection each, so that a session whose reader sleeps holds up
/// only those that share its connection (`instances/src/guest/ssh.rs`).
pub const SSH_PORTS: u8 = 4;

/// Name of a port for SSH, as the guest sees it.
pub fn ssh_port(number: u8) -> String {
    format!("pileus.ssh.{number}")
}

/// A PCIe root port that a device can be plugged into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Port {
    /// The first NIC's, so that its name in the guest is always the same.
    Nic,
    /// One of the spare ones, below [`Port::SPARE`].
    Spare(u8),
}

impl Port {
    pub const SPARE: u8 = 8;
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nic => f.write_str("port-nic"),
            Self::Spare(n) => write!(f, "port{n}"),
        }
    }
}

/// Length of the memory of a guest that was promised `memory`.
pub(crate) fn ram_bytes(memory: Size) -> u64 {
    memory.round_up(2 << 20).bytes()
}

impl MachineSpec {
    /// Length of the guest's memory, and of the file that it is made of.
    pub fn ram_bytes(&self) -> u64 {
        ram_bytes(self.memory)
    }

    /// Refuses what QEMU would refuse in words of its own, or take for something else.
    pub fn check(&self) -> Result<()> {
        let bad = |what: String| Err(Error::new(Code::InvalidArgument, what));
        if self.cpus == 0 || self.cpus > 255 {
            return bad(format!("A machine can't have {} CPUs", self.cpus));
        }
        if self.memory < Size::mib(16) {
            return bad(format!("A machine can't have {} of memory", self.memory));
        }
        // It lands in a comma-separated option.
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_');
        if self.machine_type.is_empty() || !self.machine_type.bytes().all(plain) {
            return bad(format!("{:?} is no machine type", self.machine_type));
        }
        if !self.hardware.is_sound() {
            return bad(format!("{:?} is no possible hardware", self.hardware));
        }
        if let Some(each) = self.hardware.topology
            && self.hardware.with_cpus(self.cpus).topology.is_none()
        {
            return bad(format!("{each:?} does not make {} CPUs", self.cpus));
        }
        if self.extra_nics.len() > usize::from(Port::SPARE) {
            return bad(format!(
                "A machine can't have {} further NICs",
                self.extra_nics.len()
            ));
        }
        if self.disk.layers.is_empty() {
            return Err(Error::internal("A machine's disk has no layer to write to"));
        }
        if let Boot::Kernel { cmdline, .. } = &self.boot
            && (cmdline.len() > 2047 || cmdline.contains('\0'))
        {
            return bad("The kernel's command line is too long".into());
        }
        Ok(())
    }
}
