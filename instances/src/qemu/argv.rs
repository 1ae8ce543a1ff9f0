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

use super::hardware::{NicModel, Slots, Socket, is_old, slots};
use super::spec::{
    AGENT_PORT, Accelerator, Boot, DISPLAY_SOCKET, Growth, MachineSpec, Memory, Nic, Port,
    SSH_PORTS, ssh_port,
};

/// Version of the machine that the guest sees. A state saved with another one is never restored.
pub const LAYOUT: u32 = 2;

/// The ids of further NICs begin so; a number from 1 on follows.
const EXTRA_NIC: &str = "nic";

/// The id of the device that gives memory, and the beginning of those of processors that came later.
pub const MORE_MEMORY: &str = "more-memory";
pub const MORE_CPU: &str = "more-cpu";

/// The further NICs on a command line that was made here, in their order.
pub fn extra_nics(args: &[String]) -> Vec<Mac> {
    let options = args.iter().map(|arg| arg.split(',').collect::<Vec<_>>());
    let models = NicModel::ALL.iter().map(|model| model.as_str());
    let nics = options.filter(|words| models.clone().any(|model| model == words[0]));
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
    /// A folder that QEMU may make a file in.
    Folder(PathBuf),
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
        slots: slots(&spec.machine_type),
        hand,
    };
    line.basics(spec);
    line.memory(spec)?;
    line.processors(spec);
    line.control(spec)?;
    line.root_ports(spec);
    line.disks(spec)?;
    line.console_and_ports(spec)?;
    line.small_devices();
    line.nic(spec)?;
    line.extra_nics(spec)?;
    line.hardware(spec)?;
    line.boot(&spec.boot)?;
    line.incoming(spec);
    Ok(line.args)
}

struct Builder<'a> {
    args: Vec<String>,
    sets: u32,
    slots: &'static Slots,
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
        if let Some(uuid) = spec.hardware.uuid {
            // The one above stays: by it the process is found.
            self.option("-smbios", format!("type=1,uuid={uuid}"));
        }
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
        self.growth(spec);
        Ok(())
    }

    /// A device that memory is given through while the machine runs; the guest can give it back.
    fn growth(&mut self, spec: &MachineSpec) {
        let (size, room) = (spec.ram_bytes(), spec.growth.room.bytes());
        if room == 0 || is_old(&spec.machine_type) {
            return;
        }
        self.option("-m", format!("size={size}B,maxmem={}B", size + room));
        // Nothing of it is taken, or promised, before the guest has it.
        self.option(
            "-object",
            format!("memory-backend-ram,id=more,size={room},share=off,reserve=off"),
        );
        self.option(
            "-device",
            format!(
                "virtio-mem-pci,id={MORE_MEMORY},memdev=more,block-size={},requested-size={},\
                 bus=pcie.0,addr=0x7,disable-legacy=on",
                Growth::STEP,
                spec.growth.memory.bytes()
            ),
        );
    }

    /// Processors that it got since its boot.
    fn more_processors(&mut self, spec: &MachineSpec) {
        let kind = match spec.accelerator {
            Accelerator::Kvm => "host",
            Accelerator::Tcg => "max",
        };
        for number in 0..spec.growth.cpus {
            let (socket, core) = (1 + number / spec.cpus, number % spec.cpus);
            self.option(
                "-device",
                format!(
                    "{kind}-x86_64-cpu,id={MORE_CPU}{number},socket-id={socket},core-id={core},\
                     thread-id=0"
                ),
            );
        }
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
        if let Some(each) = spec.hardware.topology {
            let (sockets, cores, threads) = (each.sockets, each.cores, each.threads);
            self.option(
                "-smp",
                format!("cpus={cpus},sockets={sockets},cores={cores},threads={threads}"),
            );
            return self.clock();
        }
        let sockets = spec.growth.sockets(cpus);
        let most = match sockets {
            1 => String::new(),
            _ => format!(",maxcpus={}", sockets * cpus),
        };
        self.option(
            "-smp",
            format!("cpus={cpus},sockets={sockets},cores={cpus},threads=1{most}"),
        );
        self.more_processors(spec);
        self.clock();
    }

    fn clock(&mut self) {
        self.option("-rtc", "base=utc,driftfix=slew");
        // Suspend would only look like a machine that hangs.
        let power = self.slots.power;
        self.option("-global", format!("{power}.disable_s3=1"));
        self.option("-global", format!("{power}.disable_s4=1"));
    }

    fn control(&mut self, spec: &MachineSpec) -> Result<()> {
        self.listener("qmp", spec.paths.qmp(), "")?;
        self.option("-mon", "chardev=qmp,mode=control");
        Ok(())
    }

    fn root_ports(&mut self, spec: &MachineSpec) {
        if is_old(&spec.machine_type) {
            return;
        }
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
        let Slots {
            bus,
            virtio,
            disk,
            seed,
            ..
        } = self.slots;
        self.option(
            "-device",
            format!(
                "virtio-blk-pci,id=vda,drive=disk,bus={bus},addr={disk}{virtio},\
                 serial=pileus-disk,bootindex=1"
            ),
        );
        if let Some(file) = &spec.seed {
            self.read_only_node("seed", "raw", file, None)?;
            self.option(
                "-device",
                format!(
                    "virtio-blk-pci,id=vdb,drive=seed,bus={bus},addr={seed}{virtio},\
                     serial=pileus-seed"
                ),
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
        let Slots {
            bus, virtio, ports, ..
        } = self.slots;
        self.option(
            "-device",
            format!("virtio-serial-pci,id=ports,bus={bus},addr={ports}{virtio}"),
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
        let Slots {
            bus,
            virtio,
            rng,
            panic,
            ..
        } = self.slots;
        self.option(
            "-device",
            format!("virtio-rng-pci,id=rng,bus={bus},addr={rng}{virtio}"),
        );
        self.option(
            "-device",
            format!("pvpanic-pci,id=panic,bus={bus},addr={panic}"),
        );
        self.option("-device", "vmgenid,id=generation,guid=auto");
    }

    fn nic(&mut self, spec: &MachineSpec) -> Result<()> {
        let (mac, tap) = match spec.nic {
            Nic::None => return Ok(()),
            Nic::Tap(mac) => (mac, What::Tap),
            Nic::Disconnected(mac) => (mac, What::LooseTap),
        };
        self.one_nic(spec, "nic0", mac, (Port::Nic, tap))
    }

    fn extra_nics(&mut self, spec: &MachineSpec) -> Result<()> {
        for (n, mac) in (0..Port::SPARE).zip(&spec.extra_nics) {
            let id = format!("{EXTRA_NIC}{}", n + 1);
            self.one_nic(spec, &id, *mac, (Port::Spare(n), What::Tap))?;
        }
        Ok(())
    }

    fn one_nic(
        &mut self,
        spec: &MachineSpec,
        id: &str,
        mac: Mac,
        (port, tap): (Port, What),
    ) -> Result<()> {
        let fd = (self.hand)(tap)?;
        self.option("-netdev", format!("tap,id={id},fd={fd},vhost=off"));
        // No boot ROM: nobody boots from the network, and the firmware is faster without.
        self.option(
            "-device",
            format!(
                "{},id={id},netdev={id},mac={mac},{},romfile=",
                spec.hardware.nic.as_str(),
                Socket::of(&spec.machine_type, port).option()
            ),
        );
        Ok(())
    }

    /// What an image chose, and a way to see its display.
    fn hardware(&mut self, spec: &MachineSpec) -> Result<()> {
        if let Some(file) = &spec.hardware.cdrom {
            self.read_only_node("cdrom", "raw", file, None)?;
            let device = "ide-cd,id=cdrom,bus=ide.1,drive=cdrom,bootindex=2";
            self.option("-device", device);
        }
        for (name, value) in spec.hardware.options(self.slots) {
            self.option(name, value);
        }
        if spec.hardware.graphics.is_none() {
            return Ok(());
        }
        let fd = (self.hand)(What::Folder(spec.paths.display_folder()))?;
        self.option(
            "-vnc",
            format!("unix:/proc/self/fd/{fd}/{DISPLAY_SOCKET},share=force-shared"),
        );
        if let Some(keymap) = spec.hardware.keymap() {
            self.option("-k", keymap);
        }
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
#[path = "argv_tests.rs"]
mod tests;
