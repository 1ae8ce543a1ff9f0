//! A machine for tests that boots in a tenth of a second and needs no operating system: a boot
//! sector that greets on the serial console, powers off when the power button is pressed or when it
//! reads `x`, and resets the machine when it reads `r`.

use std::os::fd::{FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use pileus_base::Size;
use pileus_instances::qemu::{
    Accelerator, Boot, Disk, MachineSpec, Memory, Nic, Paths, Qemu, Vm, VmEvent, process,
};
use tokio::sync::broadcast::Receiver;

pub const BANNER: &str = "pileus test guest\r\n";

/// Prints the text at its end; enables the power button (PM1_EN at 0x602); then, at each timer
/// tick: button pressed (PM1_STS) or `x` read: S5 through PM1_CNT; `r` read: reset through 0xcf9.
const BOOT_SECTOR: &[u8] = b"\x31\xc0\x8e\xd8\xbe\x55\x7c\xac\x84\xc0\x74\x12\x88\xc3\xba\xfd\x03\
    \xec\xa8\x20\x74\xfb\xba\xf8\x03\x88\xd8\xee\xeb\xe9\xba\x02\x06\xb8\x00\x01\xef\xfb\xf4\xba\
    \x00\x06\xed\xf6\xc4\x01\x75\x14\xba\xfd\x03\xec\xa8\x01\x74\xed\xba\xf8\x03\xec\x3c\x72\x74\
    \x0d\x3c\x78\x75\xe1\xba\x04\x06\xb8\x00\x20\xef\xeb\xd8\xba\xf9\x0c\xb0\x06\xee\xeb\xd0";

/// The host's QEMU, or `None` after saying loudly that the test can't run.
pub async fn qemu(test: &str) -> Option<Qemu> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    match Qemu::find(None, &path).await {
        Ok(qemu) => Some(qemu),
        Err(err) => {
            eprintln!("SKIPPED: {test}: {err}");
            None
        }
    }
}

/// Files and sockets of one test machine. Its process is killed when this goes.
pub struct Machine {
    pub folder: tempfile::TempDir,
    pub spec: MachineSpec,
}

impl Machine {
    pub fn new(qemu: &Qemu) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let spec = make(folder.path(), qemu);
        Self { folder, spec }
    }

    pub fn console(&self) -> String {
        let bytes = std::fs::read(&self.spec.paths.console_log).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Waits until the guest has greeted `times` times.
    pub async fn greeted(&self, times: usize) {
        for _ in 0..600 {
            if self.console().matches(BANNER).count() >= times {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("no {times} greetings in {:?}", self.console());
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(process) = process::find(&self.spec.paths, self.spec.uuid) {
            let _ = process::kill(process);
        }
    }
}

/// Makes disk and overlay in `folder`.
pub fn make(folder: &Path, qemu: &Qemu) -> MachineSpec {
    let base = folder.join("base.raw");
    let overlay = folder.join("disk.qcow2");
    let mut sector = BOOT_SECTOR.to_vec();
    sector.extend_from_slice(BANNER.as_bytes());
    sector.resize(510, 0);
    sector.extend_from_slice(&[0x55, 0xaa]);
    sector.resize(1 << 20, 0);
    std::fs::write(&base, sector).unwrap();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&base, &overlay])
        .status()
        .unwrap();
    assert!(made.success());
    MachineSpec {
        name: "tester".parse().unwrap(),
        uuid: uuid::Uuid::new_v4(),
        cpus: 1,
        memory: Size::mib(32),
        machine_type: qemu.machine_type.clone(),
        accelerator: Accelerator::Tcg,
        disk: Disk {
            base,
            layers: vec![overlay],
        },
        seed: None,
        boot: Boot::Firmware,
        nic: Nic::None,
        extra_nics: Vec::new(),
        hardware: Default::default(),
        growth: Default::default(),
        ram: Memory::Private,
        incoming: false,
        ends_with_daemon: false,
        in_background: false,
        paths: Paths::of(&folder.join("run"), folder),
    }
}

/// The next event that `wanted` accepts.
pub async fn event(
    events: &mut Receiver<VmEvent>,
    mut wanted: impl FnMut(&VmEvent) -> bool,
) -> VmEvent {
    let found = async {
        loop {
            let event = events.recv().await.unwrap();
            if wanted(&event) {
                return event;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), found)
        .await
        .expect("the event did not come")
}

pub async fn start(qemu: &Qemu, machine: &Machine) -> (Vm, Receiver<VmEvent>) {
    Vm::start(qemu, &machine.spec, Vec::new(), None)
        .await
        .unwrap()
}

/// A tap in a network namespace of its own, so that nothing of it reaches the host.
pub fn tap_in_own_namespace(name: &str) -> std::io::Result<OwnedFd> {
    let name = name.to_owned();
    let work = move || {
        let failed = || Err(std::io::Error::last_os_error());
        // SAFETY: plain system calls; the request outlives the ioctl, and the descriptor that
        // open returns is owned by nobody else.
        unsafe {
            if libc::unshare(libc::CLONE_NEWNET) < 0 {
                return failed();
            }
            let fd = libc::open(c"/dev/net/tun".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
            if fd < 0 {
                return failed();
            }
            let fd = OwnedFd::from_raw_fd(fd);
            let mut request: libc::ifreq = std::mem::zeroed();
            for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
                *to = from.cast_signed();
            }
            let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
            request.ifr_ifru.ifru_flags = flags as i16;
            let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
            if libc::ioctl(raw, libc::TUNSETIFF, &request) < 0 {
                return failed();
            }
            Ok(fd)
        }
    };
    std::thread::spawn(work).join().unwrap()
}

pub fn status_field(pid: i32, field: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_once(':').unwrap().1.trim().to_owned()
}

pub fn links_of_fds(pid: i32) -> Vec<PathBuf> {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .collect()
}
