//! The fake QEMU under the real driver code: what the daemon's tests may rely on.

use std::path::Path;
use std::time::Duration;

use pileus_base::{Code, Size};
use pileus_images::overlay;
use pileus_instances::guest::agent::AgentLink;
use pileus_instances::guest::handle::Guest;
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::guest::wire::CloudInitState;
use pileus_instances::qemu::{
    Accelerator, Boot, Disk, MachineSpec, Memory, Nic, Paths, Port, PowerState, Qemu, Stream, Vm,
    VmEvent, process,
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
        std::fs::write(&disk.base, vec![0; 1 << 20]).unwrap();
        overlay::create(&disk.layers[0], Size::gib(1), &disk.base).unwrap();
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
            extra_nics: Vec::new(),
            hardware: Default::default(),
            growth: Default::default(),
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
        let (_vm, mut events) = Vm::start(&self.qemu, &self.spec, Vec::new(), None)
            .await
            .unwrap();
        let mut seen = Vec::new();
        while !matches!(seen.last(), Some(VmEvent::Exited(_))) {
            let next = tokio::time::timeout(Duration::from_secs(10), events.recv());
            seen.push(next.await.unwrap().unwrap());
        }
        seen
    }

    async fn start(&self) -> Vm {
        let (vm, _) = Vm::start(&self.qemu, &self.spec, Vec::new(), None)
            .await
            .unwrap();
        vm
    }

    /// A machine that takes up what is in the file, and is let go on.
    async fn go_on_from(&self, file: &Path, stream: Stream) -> Vm {
        let spec = MachineSpec {
            incoming: true,
            ..self.spec.clone()
        };
        let (vm, _) = Vm::start(&self.qemu, &spec, Vec::new(), None)
            .await
            .unwrap();
        let saved = std::fs::File::open(file).unwrap();
        vm.restore_all(saved, stream).await.unwrap();
        assert_eq!(vm.status().await.unwrap(), PowerState::Paused);
        vm.resume().await.unwrap();
        vm
    }

    fn guest(&self) -> Guest {
        let keys = InstanceKeys::generate().unwrap();
        let nobody = std::net::Ipv4Addr::LOCALHOST;
        Guest::connect(&self.spec.paths, self.folder.path(), keys, nobody)
    }

    fn words(&self, words: &str) {
        std::fs::write(self.folder.path().join("fake-qemu.faker"), words).unwrap();
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
    let (vm, _) = Vm::start(&fake.qemu, &fake.spec, Vec::new(), None)
        .await
        .unwrap();
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
    let err = Vm::start(&fake.qemu, &fake.spec, Vec::new(), None)
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
        let (vm, _) = Vm::start(&fake.qemu, &fake.spec, Vec::new(), None)
            .await
            .unwrap();
        let agent = AgentLink::connect(fake.spec.paths.agent());
        let told = agent.wait_cloud_init().await.unwrap();
        assert_eq!(told.state, state);
        assert_eq!(told.errors.len() + told.recoverable.len(), 1);
        vm.quit().await.unwrap();
    }
    let fake = Fake::new("never-boots ignores-powerdown").await;
    let (vm, _) = Vm::start(&fake.qemu, &fake.spec, Vec::new(), None)
        .await
        .unwrap();
    let agent = AgentLink::connect(fake.spec.paths.agent());
    let silent = tokio::time::timeout(Duration::from_millis(300), agent.wait_hello()).await;
    assert!(silent.is_err());
    vm.powerdown().await.unwrap();
    let lives = tokio::time::timeout(Duration::from_millis(200), vm.wait()).await;
    assert!(lives.is_err());
    vm.quit().await.unwrap();
}

const SOON: Duration = Duration::from_secs(10);

async fn boot_id(guest: &Guest) -> String {
    let hello = tokio::time::timeout(SOON, guest.agent().wait_hello());
    hello.await.unwrap().unwrap().boot_id
}

#[tokio::test]
async fn a_suspended_machine_is_the_same_one_when_it_goes_on() {
    let fake = Fake::new("fast").await;
    let file = fake.folder.path().join("memory");
    let vm = fake.start().await;
    let guest = fake.guest();
    let first = boot_id(&guest).await;
    guest.sync(SOON).await.unwrap();

    // Given up: it goes on as if nothing had been, and does what it is asked for.
    fake.words("fast suspend-fails");
    vm.pause().await.unwrap();
    let written = std::fs::File::create(&file).unwrap();
    assert!(vm.save_all(written).await.is_err());
    vm.resume().await.unwrap();
    fake.words("fast rename-fails");
    let name = "other".parse().unwrap();
    let err = guest.rename(&name, SOON).await.unwrap_err();
    assert_eq!(err.code, Code::ExecFailed);
    fake.words("fast");
    guest.rename(&name, SOON).await.unwrap();

    vm.pause().await.unwrap();
    let written = std::fs::File::create(&file).unwrap();
    let stream = vm.save_all(written).await.unwrap();
    vm.quit().await.unwrap();
    drop(guest);
    let before = tokio::time::Instant::now();
    let vm = fake.go_on_from(&file, stream).await;
    let guest = fake.guest();
    assert_eq!(boot_id(&guest).await, first);
    guest.resumed(SOON).await.unwrap();
    let hello = guest.agent().hello().borrow().clone().unwrap();
    assert_eq!(hello.hostname, "other");
    let report = guest.agent().fresh_report(SOON).await.unwrap();
    assert!(report.uptime > before.elapsed().as_secs_f64());
    guest.grow(SOON).await.unwrap();
    guest.wall("going down").await.unwrap();
    assert!(fake.console().contains("wall: going down"));
    vm.quit().await.unwrap();

    // A cut file is none, and neither is one that was told to be bad.
    let whole = std::fs::read(&file).unwrap();
    for (words, bytes) in [
        ("fast", &whole[..whole.len() / 2]),
        ("fast resume-fails", &whole[..]),
    ] {
        fake.words(words);
        std::fs::write(&file, bytes).unwrap();
        let spec = MachineSpec {
            incoming: true,
            ..fake.spec.clone()
        };
        let (vm, _) = Vm::start(&fake.qemu, &spec, Vec::new(), None)
            .await
            .unwrap();
        let saved = std::fs::File::open(&file).unwrap();
        assert!(vm.restore_all(saved, stream).await.is_err(), "{words}");
        vm.kill().await.unwrap();
    }
}

#[tokio::test]
async fn memory_goes_on_with_its_own_disk_only() {
    let mut fake = Fake::new("fast").await;
    let file = fake.folder.path().join("memory");
    let layer = fake.folder.path().join("instances/x/next.qcow2");
    overlay::create_on_layer(&layer, Size::gib(1), &fake.spec.disk.layers[0]).unwrap();
    let vm = fake.start().await;
    let guest = fake.guest();
    let first = boot_id(&guest).await;
    // A snapshot with memory, while it runs.
    let memory = std::fs::File::create(&file).unwrap();
    let (stream, paused) = vm.freeze(&layer, Size::gib(1), memory).await.unwrap();
    assert!(paused < Duration::from_secs(5));
    assert_eq!(vm.layers_added().await.unwrap(), 1);
    vm.resize_disk(Size::gib(2).bytes()).await.unwrap();
    assert_eq!(vm.disk_size().await.unwrap(), Size::gib(2));
    assert_eq!(vm.status().await.unwrap(), PowerState::Running);
    let mut hello = guest.agent().hello();
    vm.reset().await.unwrap();
    let again = hello.wait_for(|h| h.as_ref().is_some_and(|h| h.boot_id != first));
    drop(tokio::time::timeout(SOON, again).await.unwrap());
    vm.quit().await.unwrap();
    drop(guest);

    // Restored: an empty layer above the same frozen one.
    let restored = fake.folder.path().join("instances/x/restored.qcow2");
    let frozen = fake.spec.disk.layers[0].clone();
    overlay::create_on_layer(&restored, Size::gib(1), &frozen).unwrap();
    fake.spec.disk.layers = vec![frozen.clone(), restored];
    let vm = fake.go_on_from(&file, stream).await;
    assert_eq!(boot_id(&fake.guest()).await, first);
    vm.quit().await.unwrap();
    // The layer in which it booted anew is another machine's disk.
    fake.spec.disk.layers = vec![frozen, layer];
    let vm = fake.go_on_from(&file, stream).await;
    tokio::time::timeout(SOON, vm.wait()).await.unwrap();
    assert!(fake.console().contains("memory and disk differ"));
}

#[tokio::test]
async fn what_happens_by_itself_happens_in_time() {
    let story = Fake::new("fast crashes-after-ms=30").await.story().await;
    assert!(
        matches!(&story[..], [VmEvent::Exited(exit)] if exit.signal == Some(6)),
        "{story:?}"
    );
    let story = Fake::new("fast powers-off-after-ms=30").await.story().await;
    assert!(
        matches!(&story[..], [VmEvent::Shutdown { guest: true, .. }, VmEvent::Exited(exit)]
            if exit.code == Some(0)),
        "{story:?}"
    );
    let words = "fast reboots-after-ms=30 powers-off-after-ms=200";
    let story = Fake::new(words).await.story().await;
    assert!(
        matches!(story[0], VmEvent::Reset { guest: true, .. }),
        "{story:?}"
    );
}

/// A property test makes ten thousand steps with it.
#[tokio::test]
async fn a_machine_costs_milliseconds() {
    let fake = Fake::new("fast").await;
    let began = tokio::time::Instant::now();
    const TIMES: u32 = 20;
    for _ in 0..TIMES {
        let vm = fake.start().await;
        let guest = fake.guest();
        boot_id(&guest).await;
        tokio::time::timeout(SOON, guest.agent().wait_cloud_init())
            .await
            .unwrap()
            .unwrap();
        vm.quit().await.unwrap();
    }
    let each = began.elapsed() / TIMES;
    eprintln!("{each:?} from start to end");
    assert!(each < Duration::from_secs(3), "{each:?}");
}
