//! A machine in QEMU's words: the arguments. The caller opens what QEMU is to inherit and says under
//! which number; apart from that this is pure, and a change shows in the snapshots beside this file.
//!
//! Every device has a fixed address, so that a guest (and a saved state) finds the same machine at
//! each start. No path of ours occurs in the arguments: disks and logs are `/dev/fdset/K`, sockets
//! and taps are `fd=N`; kernel, initrd and a file of memory are `/proc/self/fd/N`.
//!
//! A change that the guest can see (a device, an address, an order) makes saved machines useless:
//! then raise [`LAYOUT`].

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use pileus_base::{Mac, Result};

use super::spec::{
    AGENT_PORT, Accelerator, Boot, MachineSpec, Memory, Nic, Port, SSH_PORTS, ssh_port,
};

/// Version of the machine that the guest sees. A state saved with another one is never restored.
pub const LAYOUT: u32 = 1;

/// The ids of further NICs begin so; a number from 1 on follows.
const EXTRA_NIC: &str = "nic";

/// The further NICs on a command line that was made here, in their order.
pub fn extra_nics(args: &[String]) -> Vec<Mac> {
    let options = args.iter().map(|arg| arg.split(',').collect::<Vec<_>>());
    let nics = options.filter(|words| words[0] == "virtio-net-pci");
    nics.filter_map(|words| {
        let value = |key: &str| words.iter().find_map(|word| word.strip_prefix(key));
        let number: u8 = value("id=")?.strip_prefix(EXTRA_NIC)?.parse().ok()?;
        let mac = value("mac=")?.parse().ok()?;
        (number > 0).then_some(mac)
    })
    .collect()
}

/// Something that QEMU inherits as a descriptor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    Read(PathBuf),
    ReadWrite(PathBuf),
    /// Created if it isn't there.
    Append(PathBuf),
    /// A Unix socket, bound and listening.
    Listen(PathBuf),
    /// The tap of the next NIC.
    Tap,
    /// A tap that leads nowhere.
    LooseTap,
    /// The file of the guest's memory; a link is refused.
    Memory {
        path: PathBuf,
        write: bool,
    },
}

/// The arguments of QEMU, without the program. `hand` is asked, in order, for each descriptor's
/// number in QEMU's process.
pub fn arguments(
    spec: &MachineSpec,
    hand: &mut dyn FnMut(What) -> Result<RawFd>,
) -> Result<Vec<String>> {
    spec.check()?;
    let mut line = Builder {
        args: Vec::new(),
        sets: 0,
        hand,
    };
    line.basics(spec);
    line.memory(spec)?;
    line.processors(spec);
    line.control(spec)?;
    line.root_ports();
    line.disks(spec)?;
    line.console_and_ports(spec)?;
    line.small_devices();
    line.nic(spec)?;
    line.extra_nics(spec)?;
    line.boot(&spec.boot)?;
    line.incoming(spec);
    Ok(line.args)
}

struct Builder<'a> {
    args: Vec<String>,
    sets: u32,
    hand: &'a mut dyn FnMut(What) -> Result<RawFd>,
}

impl Builder<'_> {
    fn flag(&mut self, name: &str) {
        self.args.push(name.to_owned());
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.args.push(name.to_owned());
        self.args.push(value.into());
    }

    /// Hands a file over so that QEMU can open it as a path, which is returned.
    fn file(&mut self, what: What) -> Result<String> {
        let fd = (self.hand)(what)?;
        self.sets += 1;
        let set = self.sets;
        self.option("-add-fd", format!("fd={fd},set={set}"));
        Ok(format!("/dev/fdset/{set}"))
    }

    fn listener(&mut self, id: &str, path: PathBuf, more: &str) -> Result<()> {
        let fd = (self.hand)(What::Listen(path))?;
        self.option(
            "-chardev",
            format!("socket,id={id},fd={fd},server=on,wait=off{more}"),
        );
        Ok(())
    }

    fn basics(&mut self, spec: &MachineSpec) {
        self.flag("-nodefaults");
        self.flag("-no-user-config");
        self.option("-name", format!("guest={},debug-threads=on", spec.name));
        self.option("-uuid", spec.uuid.to_string());
        self.option(
            "-sandbox",
            "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        );
        self.option("-msg", "timestamp=on");
        self.option("-display", "none");
        self.option("-vga", "none");
        // A reboot stays in this process; a power-off and a panic end it.
        self.option("-action", "reboot=reset,shutdown=poweroff,panic=shutdown");
    }

    fn memory(&mut self, spec: &MachineSpec) -> Result<()> {
        let size = spec.ram_bytes();
        let backend = match &spec.ram {
            // Plain anonymous memory: a private mapping of a memfd would take each touched page
            // twice.
            Memory::Private => format!("memory-backend-ram,id=ram,size={size},share=off"),
            Memory::Shared(path) => {
                let path = self.memory_file(path, true)?;
                format!("memory-backend-file,id=ram,size={size},mem-path={path},share=on")
            }
            // rom=off: only the file is read-only, not the guest's memory.
            Memory::CopyOnWrite(path) => {
                let path = self.memory_file(path, false)?;
                format!(
                    "memory-backend-file,id=ram,size={size},mem-path={path},share=off,\
                     readonly=on,rom=off"
                )
            }
        };
        self.option("-object", backend);
        Ok(())
    }

    /// A path for what QEMU opens by `open(2)` alone, which knows no descriptor sets. The file's
    /// owner is asked again then, so QEMU's user must own it at that moment (`loan.rs`).
    fn memory_file(&mut self, path: &Path, write: bool) -> Result<String> {
        let path = path.to_owned();
        let fd = (self.hand)(What::Memory { path, write })?;
        Ok(format!("/proc/self/fd/{fd}"))
    }

    fn processors(&mut self, spec: &MachineSpec) {
        self.option(
            "-machine",
            format!(
                "{},memory-backend=ram,vmport=off,mem-merge=off,dump-guest-core=off",
                spec.machine_type
            ),
        );
        match spec.accelerator {
            Accelerator::Kvm => {
                self.option("-accel", "kvm");
                self.option("-cpu", "host");
                self.option("-global", "kvm-pit.lost_tick_policy=delay");
            }
            Accelerator::Tcg => {
                self.option("-accel", "tcg,thread=multi");
                self.option("-cpu", "max");
            }
        }
        let cpus = spec.cpus;
        self.option(
            "-smp",
            format!("cpus={cpus},sockets=1,cores={cpus},threads=1"),
        );
        self.option("-rtc", "base=utc,driftfix=slew");
        // Suspend would only look like a machine that hangs.
        self.option("-global", "ICH9-LPC.disable_s3=1");
        self.option("-global", "ICH9-LPC.disable_s4=1");
    }

    fn control(&mut self, spec: &MachineSpec) -> Result<()> {
        self.listener("qmp", spec.paths.qmp(), "")?;
        self.option("-mon", "chardev=qmp,mode=control");
        Ok(())
    }

    fn root_ports(&mut self) {
        let port = |port: Port, chassis: u8, addr: &str| {
            format!("pcie-root-port,id={port},bus=pcie.0,chassis={chassis},slot={chassis},{addr}")
        };
        self.option("-device", port(Port::Nic, 1, "addr=0x8"));
        for n in 0..Port::SPARE {
            let addr = match n {
                0 => "addr=0x10.0x0,multifunction=on".to_owned(),
                _ => format!("addr=0x10.{n:#x}"),
            };
            self.option("-device", port(Port::Spare(n), n + 2, &addr));
        }
    }

    fn disks(&mut self, spec: &MachineSpec) -> Result<()> {
        self.read_only_node("base", "raw", &spec.disk.base, None)?;
        let mut below = "base".to_owned();
        let top = spec.disk.layers.len().saturating_sub(1);
        for (n, layer) in spec.disk.layers.iter().enumerate() {
            if n < top {
                let name = format!("layer{n}");
                self.read_only_node(&name, "qcow2", layer, Some(&below))?;
                below = name;
                continue;
            }
            let file = self.file(What::ReadWrite(layer.clone()))?;
            // A snapshot makes this node read-only, and then QEMU looks for such a descriptor.
            let read = (self.hand)(What::Read(layer.clone()))?;
            let set = self.sets;
            self.option("-add-fd", format!("fd={read},set={set},opaque=disk"));
            // Nobody reads the disk of a throw-away machine after its end: its writes need not reach
            // the host's disk.
            let flush = match spec.ends_with_daemon {
                true => ",cache.no-flush=on,file.cache.no-flush=on",
                false => "",
            };
            // The file within, not beside: a node of its own would stay writable.
            self.option(
                "-blockdev",
                format!(
                    "driver=qcow2,node-name=disk,file.driver=file,file.node-name=disk-file,\
                     file.filename={file},file.discard=unmap,backing={below},discard=unmap,\
                     detect-zeroes=unmap{flush}"
                ),
            );
        }
        self.option(
            "-device",
            "virtio-blk-pci,id=vda,drive=disk,bus=pcie.0,addr=0x2,disable-legacy=on,\
             serial=pileus-disk,bootindex=1",
        );
        if let Some(seed) = &spec.seed {
            self.read_only_node("seed", "raw", seed, None)?;
            self.option(
                "-device",
                "virtio-blk-pci,id=vdb,drive=seed,bus=pcie.0,addr=0x3,disable-legacy=on,\
                 serial=pileus-seed",
            );
        }
        Ok(())
    }

    /// A format node that nobody writes, over a file node; the format is never guessed, and the
    /// backing node never taken from the file.
    fn read_only_node(
        &mut self,
        name: &str,
        format: &str,
        path: &Path,
        backing: Option<&str>,
    ) -> Result<()> {
        let file = self.file(What::Read(path.to_owned()))?;
        self.option(
            "-blockdev",
            format!(
                "driver=file,node-name={name}-file,filename={file},read-only=on,auto-read-only=off"
            ),
        );
        let backing = backing.map_or(String::new(), |node| format!(",backing={node}"));
        self.option(
            "-blockdev",
            format!("driver={format},node-name={name},file={name}-file,read-only=on{backing}"),
        );
        Ok(())
    }

    fn console_and_ports(&mut self, spec: &MachineSpec) -> Result<()> {
        let log = self.file(What::Append(spec.paths.console_log.clone()))?;
        self.listener(
            "console",
            spec.paths.console(),
            &format!(",logfile={log},logappend=on"),
        )?;
        self.option("-device", "isa-serial,id=serial0,chardev=console");
        self.option(
            "-device",
            "virtio-serial-pci,id=ports,bus=pcie.0,addr=0x4,disable-legacy=on",
        );
        let mut ports = vec![(
            "agent".to_owned(),
            spec.paths.agent(),
            AGENT_PORT.to_owned(),
        )];
        for number in 0..SSH_PORTS {
            let (id, path) = (format!("ssh{number}"), spec.paths.ssh(number));
            ports.push((id, path, ssh_port(number)));
        }
        for (nr, (id, path, name)) in (1..).zip(ports) {
            self.listener(&id, path, "")?;
            self.option(
                "-device",
                format!("virtserialport,id=port-{id},bus=ports.0,nr={nr},chardev={id},name={name}"),
            );
        }
        Ok(())
    }

    fn small_devices(&mut self) {
        self.option(
            "-device",
            "virtio-rng-pci,id=rng,bus=pcie.0,addr=0x5,disable-legacy=on",
        );
        self.option("-device", "pvpanic-pci,id=panic,bus=pcie.0,addr=0x6");
        self.option("-device", "vmgenid,id=generation,guid=auto");
    }

    fn nic(&mut self, spec: &MachineSpec) -> Result<()> {
        let (mac, tap) = match spec.nic {
            Nic::None => return Ok(()),
            Nic::Tap(mac) => (mac, What::Tap),
            Nic::Disconnected(mac) => (mac, What::LooseTap),
        };
        self.one_nic("nic0", mac, Port::Nic, tap)
    }

    fn extra_nics(&mut self, spec: &MachineSpec) -> Result<()> {
        for (n, mac) in (0..Port::SPARE).zip(&spec.extra_nics) {
            let id = format!("{EXTRA_NIC}{}", n + 1);
            self.one_nic(&id, *mac, Port::Spare(n), What::Tap)?;
        }
        Ok(())
    }

    fn one_nic(&mut self, id: &str, mac: Mac, port: Port, tap: What) -> Result<()> {
        let fd = (self.hand)(tap)?;
        self.option("-netdev", format!("tap,id={id},fd={fd},vhost=off"));
        // No boot ROM: nobody boots from the network, and the firmware is faster without.
        self.option(
            "-device",
            format!("virtio-net-pci,id={id},netdev={id},mac={mac},bus={port},romfile="),
        );
        Ok(())
    }

    /// Deferred, so that the capabilities can be set before; and not run when it is loaded.
    fn incoming(&mut self, spec: &MachineSpec) {
        if spec.incoming {
            self.option("-incoming", "defer");
            self.flag("-S");
        }
    }

    fn boot(&mut self, boot: &Boot) -> Result<()> {
        match boot {
            Boot::Firmware => self.option("-boot", "strict=on"),
            Boot::Kernel {
                kernel,
                initrd,
                cmdline,
            } => {
                let fd = (self.hand)(What::Read(kernel.clone()))?;
                self.option("-kernel", format!("/proc/self/fd/{fd}"));
                if let Some(initrd) = initrd {
                    let fd = (self.hand)(What::Read(initrd.clone()))?;
                    self.option("-initrd", format!("/proc/self/fd/{fd}"));
                }
                self.option("-append", cmdline.clone());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pileus_base::Size;

    use super::super::spec::{Disk, Paths};
    use super::*;

    fn spec() -> MachineSpec {
        MachineSpec {
            name: "mossy-otter".parse().unwrap(),
            uuid: uuid::uuid!("6f9b0a0e-3c3f-4d27-9d1e-000000000001"),
            cpus: 2,
            memory: Size::gib(1),
            machine_type: "pc-q35-10.0".into(),
            accelerator: Accelerator::Tcg,
            disk: Disk {
                base: "/images/x/disk.raw".into(),
                layers: vec!["/i/disk.qcow2".into()],
            },
            seed: Some("/i/seed.iso".into()),
            boot: Boot::Kernel {
                kernel: "/images/x/vmlinuz".into(),
                initrd: Some("/images/x/initrd.img".into()),
                cmdline: "root=LABEL=cloudimg-rootfs ro console=ttyS0".into(),
            },
            nic: Nic::Tap("52:54:00:00:00:01".parse().unwrap()),
            extra_nics: Vec::new(),
            ram: Memory::Private,
            incoming: false,
            ends_with_daemon: false,
            in_background: false,
            paths: Paths::of(Path::new("/run/p/i/6f9b0a0e"), Path::new("/i")),
        }
    }

    /// Numbers count from 3.
    fn line(spec: &MachineSpec) -> Result<(Vec<String>, Vec<What>)> {
        let mut fds = Vec::new();
        let args = arguments(spec, &mut |what| {
            fds.push(what);
            Ok(fds.len() as RawFd + 2)
        })?;
        Ok((args, fds))
    }

    /// One option a line, then what the numbers stand for.
    fn shown(spec: &MachineSpec) -> String {
        use std::fmt::Write;
        let (args, fds) = line(spec).unwrap();
        let mut text = String::new();
        for arg in &args {
            let gap = if arg.starts_with('-') { '\n' } else { ' ' };
            text.push(gap);
            text.push_str(arg);
        }
        text.push('\n');
        for (number, what) in (3..).zip(&fds) {
            writeln!(text, "{number} = {what:?}").unwrap();
        }
        text
    }

    #[test]
    fn tcg_with_kernel_seed_and_nic() {
        insta::assert_snapshot!(shown(&spec()));
    }

    #[test]
    fn kvm_with_firmware_layers_and_nothing_else() {
        let spec = MachineSpec {
            accelerator: Accelerator::Kvm,
            seed: None,
            boot: Boot::Firmware,
            nic: Nic::None,
            disk: Disk {
                base: "/images/x/disk.raw".into(),
                layers: vec!["/i/0.qcow2".into(), "/i/1.qcow2".into()],
            },
            ..spec()
        };
        insta::assert_snapshot!(shown(&spec));
    }

    #[test]
    fn a_template_being_made() {
        let spec = MachineSpec {
            nic: Nic::None,
            ram: Memory::Shared("/t/ram".into()),
            ends_with_daemon: true,
            in_background: false,
            ..spec()
        };
        insta::assert_snapshot!(differences(&spec));
    }

    #[test]
    fn a_clone_of_a_template() {
        let spec = MachineSpec {
            nic: Nic::None,
            ram: Memory::CopyOnWrite("/t/ram".into()),
            incoming: true,
            ..spec()
        };
        insta::assert_snapshot!(differences(&spec));
    }

    #[test]
    fn a_fork() {
        let mac = "52:54:00:00:00:01".parse().unwrap();
        let spec = MachineSpec {
            nic: Nic::Disconnected(mac),
            incoming: true,
            ..spec()
        };
        insta::assert_snapshot!(differences(&spec));
    }

    #[test]
    fn further_nics_are_on_spare_ports_and_read_back() {
        let macs = ["52:54:00:00:00:02", "52:54:00:00:00:03"].map(|mac| mac.parse().unwrap());
        let mut spec = MachineSpec {
            extra_nics: macs.to_vec(),
            ..spec()
        };
        insta::assert_snapshot!(differences(&spec));
        let (args, fds) = line(&spec).unwrap();
        assert_eq!(extra_nics(&args), macs);
        assert_eq!(fds.iter().filter(|what| **what == What::Tap).count(), 3);
        spec.extra_nics = vec![macs[0]; usize::from(Port::SPARE) + 1];
        assert!(line(&spec).is_err());
    }

    /// What is more (`+`) and less (`-`) than in the usual command line, without the numbers of
    /// descriptors: nothing else may differ, or the guest would see another machine.
    fn differences(other: &MachineSpec) -> String {
        let plain = |spec| {
            let shown = shown(spec);
            let lines = shown.lines().map(|line| {
                let words = line.split(',').filter(|word| !word.contains("fd="));
                words.collect::<Vec<_>>().join(",")
            });
            let keep = |line: &String| line.starts_with('-') && !line.contains("/proc/self/fd/1");
            lines.filter(keep).collect::<Vec<_>>()
        };
        let (usual, other) = (plain(&spec()), plain(other));
        let only = |these: &[String], those: &[String], sign: &str| {
            let only = these.iter().filter(|line| !those.contains(line));
            only.map(|line| format!("{sign} {line}\n"))
                .collect::<String>()
        };
        only(&usual, &other, "-") + &only(&other, &usual, "+")
    }

    #[test]
    fn no_private_path_is_in_the_arguments() {
        let clone = MachineSpec {
            ram: Memory::CopyOnWrite("/t/ram".into()),
            ..spec()
        };
        let clone = line(&clone).unwrap().0;
        for arg in line(&spec()).unwrap().0.into_iter().chain(clone) {
            for private in ["/images", "/i/", "/run/p", "/t/"] {
                assert!(!arg.contains(private), "{arg}");
            }
        }
    }

    #[test]
    fn what_would_break_an_option_is_refused() {
        let refused = |change: fn(&mut MachineSpec)| {
            let mut spec = spec();
            change(&mut spec);
            assert!(line(&spec).is_err());
        };
        refused(|s| s.machine_type = "pc,accel=kvm".into());
        refused(|s| s.machine_type = String::new());
        refused(|s| s.cpus = 0);
        refused(|s| s.memory = Size::kib(4));
        refused(|s| s.disk.layers.clear());
    }
}
