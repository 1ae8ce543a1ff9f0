//! All the hardware that an image may choose, on the real QEMU: each thing on each chipset starts, and
//! QEMU has nothing to complain about.

#[path = "support/machine.rs"]
#[allow(dead_code)]
mod machine;

use machine::Machine;
use pileus_instances::qemu::hardware::{
    Abilities, Graphics, Hardware, NicModel, Sound, Topology, UsbController, UsbInput,
};
use pileus_instances::qemu::{Confinement, Nic, Qemu, Vm};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

const INPUTS: [UsbInput; 3] = [UsbInput::Keyboard, UsbInput::Mouse, UsbInput::Tablet];
const LAYOUTS: &str = "ar da de de-ch en-gb en-us es et fi fo fr fr-be fr-ca fr-ch hr hu is it ja lt \
                       lv mk nl nl-be no pl pt pt-br ru sl sv th tr";

/// Starts a machine with this hardware, halted, and ends it; QEMU's complaints.
async fn try_out(qemu: &Qemu, machine: &mut Machine, hardware: Hardware, running: bool) -> String {
    let _ = std::fs::remove_file(&machine.spec.paths.qemu_log);
    machine.spec.cpus = hardware
        .topology
        .map_or(1, |each| each.sockets * each.cores * each.threads);
    machine.spec.incoming = !running;
    let shown = format!("{} {hardware:?}", machine.spec.machine_type);
    machine.spec.hardware = hardware;
    match Vm::start(qemu, &machine.spec, Vec::new(), None).await {
        Ok((vm, _events)) => {
            if running {
                machine.greeted(1).await;
            }
            vm.quit().await.unwrap();
        }
        Err(err) => panic!("{shown}: {err} {:?}", err.details),
    }
    let log = std::fs::read_to_string(&machine.spec.paths.qemu_log).unwrap_or_default();
    // The guest sees no threads there; the processors are there all the same.
    let known = "family of AMD CPU doesn't support hyperthreading";
    match log.lines().all(|line| line.contains(known)) {
        true => String::new(),
        false => format!("{shown}:\n{log}"),
    }
}

/// Every choice that there is, one at a time, and all at once.
fn choices() -> Vec<Hardware> {
    let usual = Hardware::default;
    let mut all = vec![usual()];
    let nics = NicModel::ALL.iter();
    all.extend(nics.map(|nic| Hardware {
        nic: *nic,
        ..usual()
    }));
    all.extend(UsbController::ALL.iter().map(|usb| Hardware {
        usb: Some(*usb),
        inputs: INPUTS.to_vec(),
        ..usual()
    }));
    all.extend(INPUTS.iter().map(|input| Hardware {
        usb: Some(UsbController::Piix3),
        inputs: vec![*input],
        ..usual()
    }));
    all.extend(Graphics::ALL.iter().map(|graphics| Hardware {
        graphics: Some(*graphics),
        ..usual()
    }));
    all.extend(Sound::ALL.iter().map(|sound| Hardware {
        sound: Some(*sound),
        ..usual()
    }));
    all.extend(
        [(1, 2, 2), (2, 1, 1), (1, 1, 3)].map(|(sockets, cores, threads)| Hardware {
            topology: Some(Topology {
                sockets,
                cores,
                threads,
            }),
            ..usual()
        }),
    );
    all.push(full());
    all
}

fn full() -> Hardware {
    Hardware {
        topology: Some(Topology {
            sockets: 1,
            cores: 1,
            threads: 2,
        }),
        nic: NicModel::E1000,
        usb: Some(UsbController::Piix4),
        graphics: Some(Graphics::Vga),
        sound: Some(Sound::DuplexIntel),
        inputs: INPUTS.to_vec(),
        keyboard_layout: Some("de".into()),
        uuid: Some(uuid::uuid!("52bab607-10f1-4049-a0f8-ee4725cb715b")),
        ..Hardware::default()
    }
}

/// The machine types of both chipsets.
fn chipsets(qemu: &Qemu, has: &Abilities) -> Vec<String> {
    let old = has.i440fx.clone();
    if old.is_none() {
        eprintln!("SKIPPED: this QEMU has no i440fx");
    }
    [Some(qemu.machine_type.clone()), old]
        .into_iter()
        .flatten()
        .collect()
}

#[tokio::test]
async fn every_choice_starts_on_every_chipset() {
    let Some(qemu) = machine::qemu("every_choice_starts").await else {
        return;
    };
    let has = qemu.abilities().await.unwrap();
    let mut complaints = String::new();
    for machine_type in chipsets(&qemu, &has) {
        let mut machine = Machine::new(&qemu);
        machine.spec.machine_type = machine_type;
        match machine::tap_in_own_namespace("probe") {
            Ok(_) => machine.spec.nic = Nic::Disconnected("52:54:00:00:00:01".parse().unwrap()),
            Err(err) => eprintln!("SKIPPED: the NICs of every_choice_starts: {err}"),
        }
        for mut hardware in choices() {
            let wanted = hardware.clone();
            let notes = hardware.fit(&has);
            assert_eq!(notes.is_empty(), hardware == wanted);
            if !notes.is_empty() {
                eprintln!("SKIPPED: {notes:?}");
            }
            complaints += &try_out(&qemu, &mut machine, hardware, false).await;
        }
    }
    assert_eq!(complaints, "");
}

#[tokio::test]
async fn every_keyboard_layout_is_known() {
    let Some(qemu) = machine::qemu("every_keyboard_layout_is_known").await else {
        return;
    };
    let mut complaints = String::new();
    let mut machine = Machine::new(&qemu);
    for layout in LAYOUTS.split_whitespace() {
        let hardware = Hardware {
            graphics: Some(Graphics::Vga),
            keyboard_layout: Some(layout.to_owned()),
            ..Hardware::default()
        };
        complaints += &try_out(&qemu, &mut machine, hardware, false).await;
    }
    assert_eq!(complaints, "");
}

#[tokio::test]
async fn both_chipsets_boot_from_the_disk_with_everything() {
    let Some(qemu) = machine::qemu("both_chipsets_boot").await else {
        return;
    };
    let has = qemu.abilities().await.unwrap();
    for machine_type in chipsets(&qemu, &has) {
        let mut machine = Machine::new(&qemu);
        machine.spec.machine_type = machine_type;
        let mut hardware = full();
        hardware.fit(&has);
        let complaints = try_out(&qemu, &mut machine, hardware, true).await;
        assert_eq!(complaints, "");
    }
}

#[tokio::test]
async fn a_display_is_seen_through_a_socket_that_only_its_owner_can_reach() {
    use std::os::unix::fs::MetadataExt;

    let Some(qemu) = machine::qemu("a_display_is_seen").await else {
        return;
    };
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: the other user of a_display_is_seen: needs root");
    }
    let other = root.then_some(Confinement {
        uid: 0x7000_0004,
        gid: 0x7000_0004,
        groups: vec![],
    });
    let mut machine = Machine::new(&qemu);
    let paths = machine.spec.paths.clone();
    let (vm, _events) = Vm::start(&qemu, &machine.spec, Vec::new(), other.clone())
        .await
        .unwrap();
    assert!(!paths.display_folder().exists());
    vm.quit().await.unwrap();

    machine.spec.hardware = full();
    machine.spec.cpus = 2;
    // Twice: what the first one left is no obstacle.
    for _ in 0..2 {
        let (vm, _events) = Vm::start(&qemu, &machine.spec, Vec::new(), other.clone())
            .await
            .unwrap();
        let folder = paths.display_folder().metadata().unwrap();
        let socket = paths.display().metadata().unwrap();
        assert_eq!(folder.mode() & 0o777, 0o700);
        assert_eq!(socket.mode() & 0o077, 0);
        if let Some(other) = &other {
            assert_eq!((folder.uid(), socket.uid()), (other.uid, other.uid));
        }
        let mut display = UnixStream::connect(paths.display()).await.unwrap();
        let mut hello = [0; 12];
        display.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"RFB 003.008\n");
        // No port is open to anyone.
        let sockets = machine::links_of_fds(vm.process().pid);
        let own: Vec<_> = sockets
            .iter()
            .filter_map(|link| {
                let link = link.to_str()?.strip_prefix("socket:[")?;
                link.strip_suffix(']').map(str::to_owned)
            })
            .collect();
        for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
            let table = std::fs::read_to_string(table).unwrap_or_default();
            for line in table.lines() {
                let inode = line.split_whitespace().nth(9).unwrap_or_default();
                assert!(!own.iter().any(|own| own == inode), "{line}");
            }
        }
        vm.quit().await.unwrap();
    }
}
