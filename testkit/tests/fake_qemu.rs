//! The fake QEMU under the real driver code: what the daemon's tests may rely on.

use std::path::Path;
use std::time::Duration;

use pileus_base::{Code, Size};
use pileus_instances::guest::agent::AgentLink;
use pileus_instances::guest::wire::CloudInitState;
use pileus_instances::qemu::{
    Accelerator, Boot, Disk, MachineSpec, Memory, Nic, Paths, Port, PowerState, Qemu, Vm, VmEvent,
    process,
};

struct Fake {
    folder: tempfile::TempDir,
    qemu: Qemu,
    spec: MachineSpec,
}

impl Fake {
    async fn new(words: &str) -> Self {
        let program = Path::new(env!("CARGO_BIN_EXE_fake-qemu"));
        let qemu = Qemu::find(Some(program), "".as_ref()).await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let own = folder.path().join("instances/x");
        std::fs::create_dir_all(&own).unwrap();
        std::fs::write(folder.path().join("fake-qemu.faker"), words).unwrap();
        let disk = Disk {
            base: own.join("base.raw"),
            layers: vec![own.join("disk.qcow2")],
        };
        std::fs::write(&disk.base, "").unwrap();
        std::fs::write(&disk.layers[0], "").unwrap();
        let spec = MachineSpec {
            name: "faker".parse().unwrap(),
            uuid: uuid::Uuid::new_v4(),
            cpus: 1,
            memory: Size::mib(512),
            machine_type: qemu.machine_type.clone(),
            accelerator: Accelerator::Tcg,
            disk,
            seed: None,
            boot: Boot::Firmware,
            nic: Nic::None,
            ram: Memory::Private,
            incoming: false,
            ends_with_daemon: false,
            in_background: false,
            paths: Paths::of(&folder.path().join("run"), &own),
        };
        Self { folder, qemu, spec }
    }

    /// The events from the start to the end.
    async fn story(&self) -> Vec<VmEvent> {
        let (_vm, mut events) = Vm::start(&self.qemu, &self.spec, None, None).await.unwrap();
        let mut seen = Vec::new();
        while !matches!(seen.last(), Some(VmEvent::Exited(_))) {
            let next = tokio::time::timeout(Duration::from_secs(10), events.recv());
            seen.push(next.await.unwrap().unwrap());
        }
        seen
    }

    fn console(&self) -> String {
        std::fs::read_to_string(&self.spec.paths.console_log).unwrap()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(process) = process::find(&self.spec.paths, self.spec.uuid) {
            let _ = process::kill(process);
        }
        assert!(self.folder.path().exists());
    }
}

#[tokio::test]
async fn a_fake_guest_comes_up_reboots_is_adopted_and_goes_down() {
    let fake = Fake::new("address=10.1.2.3/24").await;
    let (vm, _) = Vm::start(&fake.qemu, &fake.spec, None, None).await.unwrap();
    let agent = AgentLink::connect(fake.spec.paths.agent());
    let first = agent.wait_hello().await.unwrap();
    assert_eq!(first.hostname, "faker");
    let done = agent.wait_cloud_init().await.unwrap();
    assert_eq!(done.state, CloudInitState::Done);
    let report = agent.fresh_report(Duration::from_secs(5)).await.unwrap();
    assert_eq!(report.ipv4().next().unwrap().to_string(), "10.1.2.3");
    assert!(fake.console().contains("faker login"));

    drop(vm);
    let found = process::find(&fake.spec.paths, fake.spec.uuid).unwrap();
    let (vm, mut events) = Vm::adopt(found, &fake.spec.paths).await.unwrap();
    vm.pause().await.unwrap();
    assert_eq!(vm.status().await.unwrap(), PowerState::Paused);
    vm.resume().await.unwrap();
    assert_eq!(vm.status().await.unwrap(), PowerState::Running);
    let tap = std::fs::File::open("/dev/null").unwrap().into();
    let mac = "52:54:00:00:00:01".parse().unwrap();
    vm.plug_nic("nic0", Port::Nic, mac, tap).await.unwrap();
    vm.unplug_nic("nic0").await.unwrap();

    let mut hello = agent.hello();
    vm.reset().await.unwrap();
    let again = hello.wait_for(|h| h.as_ref().is_some_and(|h| h.boot_id != first.boot_id));
    let again = tokio::time::timeout(Duration::from_secs(10), again).await;
    assert!(again.unwrap().is_ok());
    vm.powerdown().await.unwrap();
    let exit = vm.wait().await;
    assert_eq!(exit.code, Some(0));
    let mut shut_down_by_guest = false;
    while let Ok(event) = events.try_recv() {
        shut_down_by_guest |= matches!(event, VmEvent::Shutdown { guest: true, .. });
    }
    assert!(shut_down_by_guest);
}

#[tokio::test]
async fn the_ways_to_fail() {
    let story = Fake::new("panics").await.story().await;
    assert!(story.contains(&VmEvent::Panicked), "{story:?}");
    let story = Fake::new("powers-off boot-ms=1").await.story().await;
    assert!(
        matches!(story[0], VmEvent::Shutdown { guest: true, .. }),
        "{story:?}"
    );
    let story = Fake::new("exits").await.story().await;
    assert!(
        matches!(&story[..], [VmEvent::Exited(exit)] if exit.code == Some(1)),
        "{story:?}"
    );
    let story = Fake::new("crashes").await.story().await;
    assert!(
        matches!(&story[..], [VmEvent::Exited(exit)] if exit.signal == Some(6)),
        "{story:?}"
    );

    let fake = Fake::new("fails-at-start").await;
    let err = Vm::start(&fake.qemu, &fake.spec, None, None)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::QemuFailed);
    assert!(
        err.details.iter().any(|line| line.contains("told to fail")),
        "{err:?}"
    );
}

#[tokio::test]
async fn cloud_inits_ends_and_a_guest_that_does_not_listen() {
    for (words, state) in [
        ("cloud-init-error", CloudInitState::Error),
        ("cloud-init-degraded", CloudInitState::Degraded),
    ] {
        let fake = Fake::new(words).await;
        let (vm, _) = Vm::start(&fake.qemu, &fake.spec, None, None).await.unwrap();
        let agent = AgentLink::connect(fake.spec.paths.agent());
        let told = agent.wait_cloud_init().await.unwrap();
        assert_eq!(told.state, state);
        assert_eq!(told.errors.len() + told.recoverable.len(), 1);
        vm.quit().await.unwrap();
    }
    let fake = Fake::new("never-boots ignores-powerdown").await;
    let (vm, _) = Vm::start(&fake.qemu, &fake.spec, None, None).await.unwrap();
    let agent = AgentLink::connect(fake.spec.paths.agent());
    let silent = tokio::time::timeout(Duration::from_millis(300), agent.wait_hello()).await;
    assert!(silent.is_err());
    vm.powerdown().await.unwrap();
    let lives = tokio::time::timeout(Duration::from_millis(200), vm.wait()).await;
    assert!(lives.is_err());
    vm.quit().await.unwrap();
}
