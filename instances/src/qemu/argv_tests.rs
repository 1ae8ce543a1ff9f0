//! Command lines as snapshots: what each kind of machine adds to the usual one, and what is refused.

use pileus_base::Size;

use super::super::hardware::{Graphics, Hardware, Sound, Topology, UsbController, UsbInput};
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
        hardware: Hardware::default(),
        extra_nics: Vec::new(),
        growth: Growth::default(),
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
fn one_that_can_grow_and_one_that_did() {
    let room = Growth {
        most_cpus: 5,
        room: Size::gib(8),
        ..Growth::default()
    };
    let spec = MachineSpec {
        growth: room,
        ..spec()
    };
    let grown = MachineSpec {
        growth: Growth {
            cpus: 2,
            memory: Size::mib(512),
            ..room
        },
        ..spec.clone()
    };
    insta::assert_snapshot!(differences(&spec) + "\n" + &differences(&grown));
}

/// With everything that an image can choose.
fn chosen(machine_type: &str) -> MachineSpec {
    MachineSpec {
        machine_type: machine_type.into(),
        cpus: 4,
        extra_nics: vec!["52:54:00:00:00:02".parse().unwrap()],
        hardware: Hardware {
            topology: Some(Topology {
                sockets: 1,
                cores: 2,
                threads: 2,
            }),
            nic: NicModel::E1000,
            usb: Some(UsbController::Piix3),
            graphics: Some(Graphics::Vga),
            sound: Some(Sound::DuplexIntel),
            inputs: vec![UsbInput::Keyboard, UsbInput::Mouse, UsbInput::Tablet],
            keyboard_layout: Some("nl-be".into()),
            uuid: Some(uuid::uuid!("52bab607-10f1-4049-a0f8-ee4725cb715b")),
            cdrom: None,
        },
        ..spec()
    }
}

#[test]
fn hardware_that_an_image_chose() {
    insta::assert_snapshot!(differences(&chosen("pc-q35-10.0")));
}

#[test]
fn hardware_on_the_old_chipset() {
    insta::assert_snapshot!(differences(&chosen("pc-i440fx-10.0")));
    let (args, fds) = line(&chosen("pc-i440fx-10.0")).unwrap();
    assert_eq!(extra_nics(&args), chosen("").extra_nics);
    let folder = Path::new("/run/p/i/6f9b0a0e/display").to_owned();
    assert!(fds.contains(&What::Folder(folder)));
    // By it the process is found.
    let at = args.iter().position(|arg| arg == "-uuid").unwrap();
    assert_eq!(args[at + 1], spec().uuid.to_string());
    assert!(!args.iter().any(|arg| arg.contains("pcie")), "{args:?}");
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
    refused(|s| s.hardware.keyboard_layout = Some("de,x".into()));
    refused(|s| {
        s.hardware.topology = Some(Topology {
            sockets: 1,
            cores: 3,
            threads: 1,
        });
    });
    refused(|s| {
        s.hardware.topology = Some(Topology {
            sockets: u32::MAX,
            cores: u32::MAX,
            threads: 2,
        });
    });
}
