//! Machines on the real QEMU, without a guest operating system: start, power, console, adoption,
//! another user, hot-plug, and everything that can end them.

#[path = "support/machine.rs"]
mod machine;

use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use machine::{BANNER, Machine, event, start, status_field};
use pileus_base::Code;
use pileus_instances::qemu::{
    AcceleratorChoice, Boot, Confinement, Exit, Nic, Port, PowerState, Qemu, Vm, VmEvent, host,
    log, process,
};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

macro_rules! qemu_or_skip {
    ($test:literal) => {
        match machine::qemu($test).await {
            Some(qemu) => qemu,
            None => return,
        }
    };
}

const CLEAN: Exit = Exit {
    code: Some(0),
    signal: None,
};

fn is_exit(event: &VmEvent) -> bool {
    matches!(event, VmEvent::Exited(_))
}

/// Presses the power button until that comes of it: a guest that has just begun does not listen to it yet.
async fn press(
    vm: &Vm,
    events: &mut tokio::sync::broadcast::Receiver<VmEvent>,
    wanted: impl Fn(&VmEvent) -> bool,
) -> VmEvent {
    for _ in 0..30 {
        // One that is on its way out does not answer any more.
        let _ = vm.powerdown().await;
        let seen = tokio::time::timeout(Duration::from_secs(1), event(events, &wanted));
        if let Ok(seen) = seen.await {
            return seen;
        }
    }
    panic!("the guest does not listen to its power button");
}

#[tokio::test]
async fn this_hosts_qemu_and_accelerator() {
    let qemu = qemu_or_skip!("this_hosts_qemu_and_accelerator");
    assert!(qemu.version >= (8, 2, 0));
    assert!(qemu.machine_type.starts_with("pc-q35-"), "{qemu:?}");
    let facts = host::KvmFacts::of_host();
    let chosen = host::choose(AcceleratorChoice::Auto, &facts).unwrap();
    assert_eq!(chosen.warning.is_none(), facts.obstacle().is_none());
}

#[tokio::test]
async fn a_machine_starts_reboots_by_itself_and_powers_off_by_the_button() {
    let qemu = qemu_or_skip!("a_machine_starts");
    let machine = Machine::new(&qemu);
    let (vm, mut events) = start(&qemu, &machine).await;
    assert_eq!(vm.status().await.unwrap(), PowerState::Running);
    machine.greeted(1).await;

    // A reboot wished for inside stays in the same process; the console can be typed on.
    let mut console = UnixStream::connect(machine.spec.paths.console())
        .await
        .unwrap();
    console.write_all(b"r").await.unwrap();
    let reset = event(&mut events, |e| matches!(e, VmEvent::Reset { .. })).await;
    assert!(
        matches!(reset, VmEvent::Reset { guest: true, .. }),
        "{reset:?}"
    );
    machine.greeted(2).await;
    let mut seen = vec![0; BANNER.len()];
    console.read_exact(&mut seen).await.unwrap();
    assert_eq!(seen, BANNER.as_bytes());

    // Cutting the log under the writer.
    std::fs::write(&machine.spec.paths.console_log, vec![b'.'; 5 << 20]).unwrap();
    log::trim_all(&machine.spec.paths).unwrap();
    vm.reset().await.unwrap();
    let reset = event(&mut events, |e| {
        matches!(e, VmEvent::Reset { guest: false, .. })
    })
    .await;
    assert!(matches!(reset, VmEvent::Reset { .. }));
    machine.greeted(1).await;
    assert!(machine.console().len() < 100, "{:?}", machine.console());

    vm.pause().await.unwrap();
    event(&mut events, |e| *e == VmEvent::Stopped).await;
    assert_eq!(vm.status().await.unwrap(), PowerState::Paused);
    vm.resume().await.unwrap();
    event(&mut events, |e| *e == VmEvent::Resumed).await;

    let down = press(&vm, &mut events, |e| matches!(e, VmEvent::Shutdown { .. })).await;
    assert!(
        matches!(down, VmEvent::Shutdown { guest: true, .. }),
        "{down:?}"
    );
    assert_eq!(event(&mut events, is_exit).await, VmEvent::Exited(CLEAN));
    assert_eq!(vm.wait().await, CLEAN);
    assert!(vm.status().await.is_err());
}

#[tokio::test]
async fn a_guest_that_powers_off_ends_its_process() {
    let qemu = qemu_or_skip!("a_guest_that_powers_off");
    let machine = Machine::new(&qemu);
    let (_vm, mut events) = start(&qemu, &machine).await;
    machine.greeted(1).await;
    let mut console = UnixStream::connect(machine.spec.paths.console())
        .await
        .unwrap();
    console.write_all(b"x").await.unwrap();
    let down = event(&mut events, |e| matches!(e, VmEvent::Shutdown { .. })).await;
    assert!(
        matches!(down, VmEvent::Shutdown { guest: true, .. }),
        "{down:?}"
    );
    assert_eq!(event(&mut events, is_exit).await, VmEvent::Exited(CLEAN));
}

#[tokio::test]
async fn quit_kill_and_a_kill_from_outside() {
    let qemu = qemu_or_skip!("quit_kill_and_a_kill_from_outside");
    let machine = Machine::new(&qemu);
    let killed = Exit {
        code: None,
        signal: Some(9),
    };

    let (vm, _events) = start(&qemu, &machine).await;
    assert_eq!(vm.quit().await.unwrap(), CLEAN);
    assert_eq!(process::find(&machine.spec.paths, machine.spec.uuid), None);

    // The same files again: sockets of the last run are no obstacle.
    let (vm, mut events) = start(&qemu, &machine).await;
    assert_eq!(vm.kill().await.unwrap(), killed);
    assert_eq!(event(&mut events, is_exit).await, VmEvent::Exited(killed));
    // Twice is fine.
    assert_eq!(vm.kill().await.unwrap(), killed);

    let (vm, mut events) = start(&qemu, &machine).await;
    process::kill(vm.process()).unwrap();
    assert_eq!(event(&mut events, is_exit).await, VmEvent::Exited(killed));
    assert!(!vm.process().is_alive());
    let err = Vm::adopt(vm.process(), &machine.spec.paths)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::GuestStopped);
}

#[tokio::test]
async fn a_machine_is_left_and_adopted_again_and_again() {
    let qemu = qemu_or_skip!("a_machine_is_left_and_adopted");
    let machine = Machine::new(&qemu);
    let (vm, _) = start(&qemu, &machine).await;
    let first = vm.process();
    drop(vm);
    for _ in 0..3 {
        let found = process::find(&machine.spec.paths, machine.spec.uuid).unwrap();
        assert_eq!(found, first);
        let (vm, _) = Vm::adopt(found, &machine.spec.paths).await.unwrap();
        assert_eq!(vm.status().await.unwrap(), PowerState::Running);
    }
    // The pid of another process is not taken for the machine.
    std::fs::write(
        machine.spec.paths.pid_file(),
        std::process::id().to_string(),
    )
    .unwrap();
    assert_eq!(process::find(&machine.spec.paths, machine.spec.uuid), None);
    process::kill(first).unwrap();
}

/// Runs in a process of its own, started by the test below: starts a machine, says so, and hangs.
#[tokio::test]
#[ignore = "only started by the next test"]
async fn parent_that_is_killed() {
    let folder = std::env::var_os("PILEUS_TEST_FOLDER").unwrap();
    let folder = Path::new(&folder);
    let path = std::env::var_os("PATH").unwrap();
    let qemu = Qemu::find(None, &path).await.unwrap();
    let spec = machine::make(folder, &qemu);
    let (vm, _events) = Vm::start(&qemu, &spec, Vec::new(), None).await.unwrap();
    let text = serde_json::to_vec(&(spec, vm.process())).unwrap();
    pileus_base::files::write_atomic(&folder.join("started"), &text, 0o600).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_machine_survives_the_kill_of_its_parent() {
    let qemu = qemu_or_skip!("a_machine_survives_the_kill_of_its_parent");
    let mut machine = Machine::new(&qemu);
    let mut parent = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "parent_that_is_killed", "--ignored"])
        .env("PILEUS_TEST_FOLDER", machine.folder.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let started = machine.folder.path().join("started");
    for _ in 0..600 {
        if started.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let text = std::fs::read(&started).expect("the parent did not start its machine");
    let (spec, process): (_, pileus_base::process::ProcessId) =
        serde_json::from_slice(&text).unwrap();
    machine.spec = spec;
    parent.kill().unwrap();
    parent.wait().unwrap();

    assert_eq!(
        process::find(&machine.spec.paths, machine.spec.uuid),
        Some(process)
    );
    let (vm, mut events) = Vm::adopt(process, &machine.spec.paths).await.unwrap();
    machine.greeted(1).await;
    let exit = press(&vm, &mut events, is_exit).await;
    // Not our child, so nobody tells us how it ended.
    assert!(matches!(
        exit,
        VmEvent::Exited(Exit {
            code: None,
            signal: None
        })
    ));
}

#[tokio::test]
async fn the_process_is_shut_in() {
    let qemu = qemu_or_skip!("the_process_is_shut_in");
    let machine = Machine::new(&qemu);
    // A descriptor that some library forgot to mark.
    let leaked = std::fs::File::open(machine.folder.path().join("base.raw")).unwrap();
    rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
    let (vm, _events) = start(&qemu, &machine).await;
    let pid = vm.process().pid;
    assert_eq!(status_field(pid, "NoNewPrivs"), "1");
    assert_eq!(status_field(pid, "Seccomp"), "2");
    assert_eq!(status_field(pid, "NSsid"), pid.to_string());
    let links = machine::links_of_fds(pid);
    assert_eq!(
        links.iter().filter(|l| l.ends_with("base.raw")).count(),
        2,
        "{links:?}"
    );
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    assert!(environment.is_empty());
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&machine.spec.paths.run), 0o700);
    assert_eq!(mode(&machine.spec.paths.console_log), 0o600);
    let _ = leaked.as_raw_fd();
    vm.quit().await.unwrap();
}

#[tokio::test]
async fn a_machine_runs_as_a_user_that_may_read_nothing_of_ours() {
    let qemu = qemu_or_skip!("a_machine_runs_as_another_user");
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a_machine_runs_as_another_user: needs root");
        return;
    }
    let machine = Machine::new(&qemu);
    std::fs::set_permissions(machine.folder.path(), PermissionsExt::from_mode(0o700)).unwrap();
    let other = Confinement {
        uid: 0x7000_0001,
        gid: 0x7000_0001,
        groups: vec![],
    };
    let (vm, _events) = Vm::start(&qemu, &machine.spec, Vec::new(), Some(other))
        .await
        .unwrap();
    for field in ["Uid", "Gid"] {
        assert!(
            status_field(vm.process().pid, field)
                .split_whitespace()
                .all(|id| id == 0x7000_0001.to_string())
        );
    }
    assert_eq!(status_field(vm.process().pid, "Groups"), "");
    assert_eq!(status_field(vm.process().pid, "CapEff"), "0000000000000000");
    machine.greeted(1).await;
    drop(vm);
    let found = process::find(&machine.spec.paths, machine.spec.uuid).unwrap();
    let (vm, mut events) = Vm::adopt(found, &machine.spec.paths).await.unwrap();
    let exit = press(&vm, &mut events, is_exit).await;
    assert_eq!(exit, VmEvent::Exited(CLEAN));
}

#[tokio::test]
async fn kernel_and_initrd_are_read_by_a_user_that_can_not_reach_them() {
    let qemu = qemu_or_skip!("kernel_and_initrd");
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: kernel_and_initrd: needs root");
        return;
    }
    let mut machine = Machine::new(&qemu);
    let kernel = machine.folder.path().join("vmlinuz");
    machine.spec.boot = Boot::Kernel {
        kernel: kernel.clone(),
        initrd: Some(machine.folder.path().join("base.raw")),
        cmdline: "a=1,b=2 c".into(),
    };
    let other = Confinement {
        uid: 0x7000_0002,
        gid: 0x7000_0002,
        groups: vec![],
    };
    // Enough of a header for QEMU to load it.
    let mut image = vec![0; 8192];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&[0x0c, 0x02]);
    image[0x211] = 1;
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    std::fs::write(&kernel, &image).unwrap();
    std::fs::set_permissions(&kernel, PermissionsExt::from_mode(0o444)).unwrap();
    let (vm, _events) = Vm::start(&qemu, &machine.spec, Vec::new(), Some(other.clone()))
        .await
        .unwrap();
    vm.quit().await.unwrap();

    // The same without leave to read the file itself: the error says what QEMU said.
    std::fs::set_permissions(&kernel, PermissionsExt::from_mode(0o400)).unwrap();
    let err = Vm::start(&qemu, &machine.spec, Vec::new(), Some(other))
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::QemuFailed);
    assert!(
        err.details.iter().any(|l| l.contains("Permission denied")),
        "{err:?}"
    );
}

#[tokio::test]
async fn a_nic_is_there_or_plugged_later() {
    let qemu = qemu_or_skip!("a_nic_is_there_or_plugged_later");
    let tap = |name| match machine::tap_in_own_namespace(name) {
        Ok(tap) => Some(tap),
        Err(err) => {
            eprintln!("SKIPPED: a_nic_is_there_or_plugged_later: no tap in a namespace: {err}");
            None
        }
    };
    let (Some(first), Some(second), Some(third)) = (tap("t1"), tap("t2"), tap("t3")) else {
        return;
    };
    let mut machine = Machine::new(&qemu);
    machine.spec.nic = Nic::Tap("52:54:00:00:00:01".parse().unwrap());
    let err = Vm::start(&qemu, &machine.spec, Vec::new(), None)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::Internal, "a NIC without a tap");
    let (vm, _events) = Vm::start(&qemu, &machine.spec, vec![first], None)
        .await
        .unwrap();
    machine.greeted(1).await;
    let mac = "52:54:00:00:00:02".parse().unwrap();
    vm.plug_nic("nic1", Port::Spare(7), mac, second)
        .await
        .unwrap();
    let nics = vm
        .client()
        .execute("query-rx-filter", serde_json::Value::Null)
        .await
        .unwrap();
    assert_eq!(nics.as_array().unwrap().len(), 2, "{nics}");
    // The same port twice is refused, and the back end does not stay.
    let err = vm
        .plug_nic("nic2", Port::Spare(7), mac, third)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::QemuFailed);
    let again = vm
        .client()
        .execute("netdev_del", json!({"id":"nic2"}))
        .await;
    assert!(
        again.is_err(),
        "the back end of a NIC that was refused is still there"
    );
    vm.quit().await.unwrap();
}

#[tokio::test]
async fn a_start_that_fails_says_why_and_leaves_nothing() {
    let qemu = qemu_or_skip!("a_start_that_fails");
    let machine = Machine::new(&qemu);
    let gone = || process::find(&machine.spec.paths, machine.spec.uuid).is_none();

    let mut spec = machine.spec.clone();
    spec.disk.base = machine.folder.path().join("none.raw");
    let err = Vm::start(&qemu, &spec, Vec::new(), None).await.unwrap_err();
    assert_eq!(err.code, Code::Io);
    assert!(err.message.contains("none.raw") && gone());

    // A layer that is no qcow2, whatever it says it is.
    let mut spec = machine.spec.clone();
    spec.disk.layers = vec![spec.disk.base.clone()];
    let err = Vm::start(&qemu, &spec, Vec::new(), None).await.unwrap_err();
    assert_eq!(err.code, Code::QemuFailed);
    assert!(
        err.details.iter().any(|line| line.contains("qcow2")),
        "{err:?}"
    );
    assert!(gone());

    // Two machines on one disk: QEMU's lock holds although it got descriptors only.
    let (vm, _events) = start(&qemu, &machine).await;
    let mut spec = machine.spec.clone();
    spec.uuid = uuid::Uuid::new_v4();
    spec.paths.run = machine.folder.path().join("run2");
    let err = Vm::start(&qemu, &spec, Vec::new(), None).await.unwrap_err();
    assert!(
        err.details.iter().any(|line| line.contains("lock")),
        "{err:?}"
    );
    vm.quit().await.unwrap();

    let none = Qemu {
        program: "/no/such/qemu".into(),
        ..qemu.clone()
    };
    let err = Vm::start(&none, &machine.spec, Vec::new(), None)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::QemuMissing);
    let odd = Qemu {
        program: "/bin/false".into(),
        ..qemu
    };
    let err = Vm::start(&odd, &machine.spec, Vec::new(), None)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::QemuFailed);
    assert!(err.message.contains("code 1"), "{err}");
}

#[tokio::test]
async fn a_start_that_is_cancelled_leaves_no_process() {
    let qemu = qemu_or_skip!("a_start_that_is_cancelled");
    let machine = Machine::new(&qemu);
    for micros in [0, 500, 2_000, 5_000, 10_000, 20_000] {
        let start = Vm::start(&qemu, &machine.spec, Vec::new(), None);
        let started = tokio::time::timeout(Duration::from_micros(micros), start).await;
        if let Ok(started) = started {
            started.unwrap().0.quit().await.unwrap();
        }
        // The blocking part may still be under way; then it undoes itself.
        let mut left = None;
        for _ in 0..40 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            left = process::find(&machine.spec.paths, machine.spec.uuid);
            if left.is_none() {
                break;
            }
        }
        assert_eq!(left, None, "after {micros} µs");
    }
}
