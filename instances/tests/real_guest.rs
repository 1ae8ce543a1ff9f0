//! One machine with a real system inside, by hand: `PILEUS_TEST_IMAGE=FOLDER cargo test -p
//! pileus-instances --test real_guest -- --ignored --nocapture`, where FOLDER holds disk.raw, vmlinuz,
//! initrd.img and cmdline. The whole-system tests do more of this through the daemon.

#[path = "support/machine.rs"]
#[allow(dead_code)]
mod machine;

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use machine::{Machine, event};
use pileus_base::Size;
use pileus_instances::qemu::{Boot, Confinement, Disk, Port, Vm, VmEvent};

#[tokio::test]
#[ignore = "by hand: PILEUS_TEST_IMAGE names an image's folder"]
async fn a_real_guest_boots_shut_in_takes_and_gives_back_a_nic_and_powers_off() {
    let image = std::env::var_os("PILEUS_TEST_IMAGE").map(PathBuf::from);
    let image = image.expect("PILEUS_TEST_IMAGE names a folder");
    let Some(qemu) = machine::qemu("a_real_guest").await else {
        return;
    };
    let mut machine = Machine::new(&qemu);
    let overlay = machine.folder.path().join("real.qcow2");
    let base = image.join("disk.raw");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .args([&base, &overlay])
        .arg("5G")
        .status();
    assert!(made.unwrap().success());
    machine.spec.disk = Disk {
        base,
        layers: vec![overlay],
    };
    machine.spec.cpus = 2;
    machine.spec.memory = Size::gib(1);
    if std::env::var_os("PILEUS_TEST_FIRMWARE").is_none() {
        machine.spec.boot = Boot::Kernel {
            kernel: image.join("vmlinuz"),
            initrd: Some(image.join("initrd.img")),
            cmdline: std::fs::read_to_string(image.join("cmdline"))
                .unwrap()
                .trim()
                .to_owned(),
        };
    }
    let other = rustix::process::geteuid().is_root().then_some(Confinement {
        uid: 0x7000_0003,
        gid: 0x7000_0003,
        groups: vec![],
    });
    let started = Instant::now();
    let (vm, mut events) = Vm::start(&qemu, &machine.spec, Vec::new(), other)
        .await
        .unwrap();
    eprintln!("{:?} QEMU answers", started.elapsed());
    while !machine.console().contains("login:") {
        assert!(started.elapsed() < Duration::from_secs(240), "no login");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    eprintln!("{:?} login", started.elapsed());

    for (round, (id, port)) in [
        ("nic0", Port::Nic),
        ("nic5", Port::Spare(5)),
        ("nic0", Port::Nic),
    ]
    .into_iter()
    .enumerate()
    {
        let tap = match machine::tap_in_own_namespace(&format!("real{round}")) {
            Ok(tap) => tap,
            Err(err) => {
                eprintln!("SKIPPED: the NIC of a_real_guest: {err}");
                break;
            }
        };
        let mac = "52:54:00:00:00:09".parse().unwrap();
        vm.plug_nic(id, port, mac, tap).await.unwrap();
        // Taken up by the guest's driver, or it could not be given back in good order.
        tokio::time::sleep(Duration::from_secs(2)).await;
        let at = Instant::now();
        vm.unplug_nic(id).await.unwrap();
        eprintln!("{:?} to give {id} back", at.elapsed());
    }

    let at = Instant::now();
    vm.powerdown().await.unwrap();
    let end = event(&mut events, |e| matches!(e, VmEvent::Exited(_))).await;
    eprintln!("{:?} to power off: {end:?}", at.elapsed());
    let log = std::fs::read_to_string(&machine.spec.paths.qemu_log).unwrap();
    assert_eq!(log, "", "QEMU complained");
}
