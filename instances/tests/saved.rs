//! Machines that are saved and restored on the real QEMU, without a guest operating system: templates
//! and their clones, forks, layers put on a running disk, and machines that end with their parent.

// Shared with `qemu.rs`, and not all is used here.
#[allow(dead_code)]
#[path = "support/machine.rs"]
mod machine;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use machine::{BANNER, Machine, event, start};
use pileus_base::{Code, Digest, Size, files, process::ProcessId};
use pileus_instances::machine::Shape;
use pileus_instances::qemu::{
    Confinement, MachineSpec, Memory, Nic, Paths, Port, PowerState, Qemu, Stream, Vm, VmEvent,
    process,
};
use pileus_instances::template::{Folder, TemplateKey};
use pileus_qmp::commands::QueryVmGenerationId;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

macro_rules! qemu_or_skip {
    ($test:literal) => {
        match machine::qemu($test).await {
            Some(qemu) => qemu,
            None => return,
        }
    };
}

const MAC: &str = "52:54:00:00:00:01";

/// A user for each machine, as the daemon gives them; none if we are not root.
fn user(number: u32) -> Option<Confinement> {
    let who = || Confinement {
        uid: 0x7000_0100 + number,
        gid: 0x7000_0100 + number,
        groups: vec![],
    };
    rustix::process::geteuid().is_root().then(who)
}

fn new_file(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .unwrap()
}

/// A layer on top of a qcow2 file.
fn layer_on(path: &Path, below: &Path) {
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
        .args([below, path])
        .status()
        .unwrap();
    assert!(made.success());
    files::set_mode(path, 0o600).unwrap();
}

/// What the header of a qcow2 file says.
fn size_of(layer: &Path) -> Size {
    let head = std::fs::read(layer).unwrap();
    Size(u64::from_be_bytes(head[24..32].try_into().unwrap()))
}

fn sum(path: &Path) -> Vec<u8> {
    use sha2::Digest as _;
    sha2::Sha256::digest(std::fs::read(path).unwrap()).to_vec()
}

/// The machine is the one that was saved and not one that booted: the guest's code is in memory, and
/// it reads `x`, but it never greeted.
async fn lives_on_and_ends(spec: &MachineSpec, vm: &Vm) {
    let console = std::fs::read_to_string(&spec.paths.console_log).unwrap_or_default();
    assert!(!console.contains(BANNER), "the machine booted");
    let mut events = vm.subscribe();
    let mut wire = UnixStream::connect(spec.paths.console()).await.unwrap();
    wire.write_all(b"x").await.unwrap();
    let down = event(&mut events, |e| matches!(e, VmEvent::Shutdown { .. })).await;
    assert!(matches!(down, VmEvent::Shutdown { guest: true, .. }));
    tokio::time::timeout(Duration::from_secs(10), vm.wait())
        .await
        .unwrap();
}

/// A template of the test machine.
struct Template {
    machine: Machine,
    folder: Folder,
    key: TemplateKey,
}

impl Template {
    async fn make(qemu: &Qemu) -> Self {
        let mut machine = Machine::new(qemu);
        let own = |name| machine.folder.path().join(name);
        let folder = Folder::new(machine.folder.path(), own("ram"), own("disk.qcow2"));
        files::set_mode(&folder.disk(), 0o600).unwrap();
        new_file(&folder.ram())
            .set_len(machine.spec.ram_bytes())
            .unwrap();
        machine.spec.ram = Memory::Shared(folder.ram());
        machine.spec.ends_with_daemon = true;
        let (vm, _events) = Vm::start(qemu, &machine.spec, Vec::new(), user(0))
            .await
            .unwrap();
        machine.greeted(1).await;
        let err = vm.save_devices(new_file(&own("early"))).await.unwrap_err();
        assert_eq!(err.code, Code::Internal, "saved while it ran");
        vm.pause().await.unwrap();
        vm.save_devices(new_file(&folder.state())).await.unwrap();
        vm.quit().await.unwrap();
        let image = Digest::from_bytes([7; 32]);
        let spec = &machine.spec;
        let key = TemplateKey::new(
            image,
            Shape {
                cpus: spec.cpus,
                memory: spec.memory,
            },
            Size::mib(1),
            qemu,
            spec.accelerator,
            spec.growth,
        );
        folder.finish(&key, "2026-11-22T00:00:00Z").unwrap();
        Self {
            machine,
            folder,
            key,
        }
    }

    fn clone_spec(&self, number: u32) -> MachineSpec {
        let own = self.machine.folder.path().join(format!("clone{number}"));
        std::fs::create_dir(&own).unwrap();
        let mut spec = self.machine.spec.clone();
        layer_on(&own.join("disk.qcow2"), &self.folder.disk());
        spec.disk.layers.push(own.join("disk.qcow2"));
        spec.uuid = uuid::Uuid::new_v4();
        spec.ram = Memory::CopyOnWrite(self.folder.ram());
        spec.incoming = true;
        spec.paths = Paths::of(&own.join("run"), &own);
        spec
    }

    async fn start(&self, qemu: &Qemu, number: u32) -> (MachineSpec, Vm) {
        let spec = self.clone_spec(number);
        let ready = self.folder.open_checked(&self.key).unwrap();
        let (vm, _) = Vm::start(qemu, &spec, Vec::new(), user(number))
            .await
            .unwrap();
        vm.restore(ready.state).await.unwrap();
        assert_eq!(vm.status().await.unwrap(), PowerState::Paused);
        (spec, vm)
    }
}

async fn generation(vm: &Vm) -> String {
    vm.client().run(&QueryVmGenerationId {}).await.unwrap().guid
}

async fn macs(vm: &Vm) -> Vec<String> {
    let nics = vm.client().execute("query-rx-filter", Value::Null).await;
    let nics = nics.unwrap();
    let macs = nics.as_array().unwrap().iter();
    macs.map(|nic| nic["main-mac"].as_str().unwrap().to_owned())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_clones_of_a_template_at_once() {
    let qemu = qemu_or_skip!("three_clones_of_a_template_at_once");
    let template = Template::make(&qemu).await;
    let ram = template.folder.ram();
    let before = (sum(&ram), sum(&template.folder.disk()));
    let (one, two, three) = tokio::join!(
        template.start(&qemu, 1),
        template.start(&qemu, 2),
        template.start(&qemu, 3)
    );
    let clones = [one, two, three];

    // Nobody but us may read the memory, and nobody has it on loan any more.
    let meta = ram.metadata().unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert_eq!(meta.uid(), rustix::process::geteuid().as_raw());

    let mut seen = std::collections::HashSet::new();
    for (number, (spec, vm)) in clones.iter().enumerate() {
        assert!(seen.insert(generation(vm).await), "the same generation");
        vm.resize_disk(64 << 20).await.unwrap();
        assert_eq!(vm.disk_size().await.unwrap(), Size::mib(64));
        let err = vm.resize_disk(1 << 20).await.unwrap_err();
        assert_eq!(err.code, Code::DiskTooSmall);
        vm.resume().await.unwrap();
        assert_eq!(vm.status().await.unwrap(), PowerState::Running);
        match machine::tap_in_own_namespace("t1") {
            Err(err) => eprintln!("SKIPPED: the NIC of a clone: {err}"),
            Ok(tap) => {
                let mac = format!("52:54:00:00:00:1{number}");
                let plugged = vm.plug_nic("nic0", Port::Nic, mac.parse().unwrap(), tap);
                plugged.await.unwrap();
                assert_eq!(macs(vm).await, [mac]);
            }
        }
        lives_on_and_ends(spec, vm).await;
    }
    assert!(before == (sum(&ram), sum(&template.folder.disk())));
    template.folder.open_checked(&template.key).unwrap();
}

#[tokio::test]
async fn a_state_that_is_damaged_is_refused_with_qemus_words() {
    let qemu = qemu_or_skip!("a_state_that_is_damaged");
    let template = Template::make(&qemu).await;
    let mut state = std::fs::read(template.folder.state()).unwrap();
    let half = state.len() / 2;
    state.truncate(half);
    std::fs::write(template.folder.state(), &state).unwrap();
    let err = template.folder.open_checked(&template.key).unwrap_err();
    assert_eq!(err.code, Code::NoTemplate);
    // What QEMU does with it, if it got so far.
    let spec = template.clone_spec(1);
    let (vm, _) = Vm::start(&qemu, &spec, Vec::new(), user(1)).await.unwrap();
    let state = File::open(template.folder.state()).unwrap();
    let err = vm.restore(state).await.unwrap_err();
    assert_eq!(err.code, Code::QemuFailed);
    assert!(!err.details.is_empty(), "{err:?}");
    vm.kill().await.unwrap();
}

#[tokio::test]
async fn memory_of_the_wrong_length_or_behind_a_link() {
    let qemu = qemu_or_skip!("memory_of_the_wrong_length");
    let mut machine = Machine::new(&qemu);
    let ram = machine.folder.path().join("ram");
    new_file(&ram).set_len(1 << 20).unwrap();
    machine.spec.ram = Memory::CopyOnWrite(ram.clone());
    let err = Vm::start(&qemu, &machine.spec, Vec::new(), user(1))
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::QemuFailed);
    assert!(
        err.details.iter().any(|line| line.contains("ram")),
        "{err:?}"
    );
    assert_eq!(
        ram.metadata().unwrap().uid(),
        rustix::process::geteuid().as_raw()
    );
    let link = machine.folder.path().join("link");
    std::os::unix::fs::symlink(&ram, &link).unwrap();
    machine.spec.ram = Memory::CopyOnWrite(link);
    let err = Vm::start(&qemu, &machine.spec, Vec::new(), None)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::Io);
}

/// Writes 64 KiB of `byte` to the disk, as the guest would.
async fn write(vm: &Vm, byte: u8, at: u64) {
    let device = "/machine/peripheral/vda/virtio-backend";
    let line = format!("qemu-io -d {device} \"write -P {byte} {at} 64k\"");
    let said = vm
        .client()
        .execute("human-monitor-command", json!({"command-line": line}))
        .await
        .unwrap();
    assert_eq!(said, json!(""), "the write failed");
}

/// How many descriptors a process has that it could write the file with.
fn writers(pid: i32, file: &Path) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let can_write = |number: &std::ffi::OsStr| {
        let info = format!("/proc/{pid}/fdinfo/{}", number.to_string_lossy());
        let info = std::fs::read_to_string(info).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        flags.is_some_and(|octal| !octal.trim().ends_with('0'))
    };
    fds.filter_map(Result::ok)
        .filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|link| link == file))
        .filter(|fd| can_write(&fd.file_name()))
        .count()
}

/// Whether a layer holds 64 KiB of `byte`.
fn holds(layer: &Path, byte: u8) -> bool {
    let bytes = std::fs::read(layer).unwrap();
    bytes
        .chunks_exact(1 << 16)
        .any(|cluster| cluster.iter().all(|b| *b == byte))
}

#[tokio::test]
async fn layers_are_put_on_a_running_disk_also_by_the_next_daemon() {
    let qemu = qemu_or_skip!("layers_are_put_on_a_running_disk");
    let machine = Machine::new(&qemu);
    let layers: Vec<PathBuf> = (0..3)
        .map(|n| match n {
            0 => machine.spec.disk.layers[0].clone(),
            n => machine.folder.path().join(format!("layer{n}.qcow2")),
        })
        .collect();
    for pair in layers.windows(2) {
        layer_on(&pair[1], &pair[0]);
    }
    let size = size_of(&layers[0]);
    let (vm, _events) = Vm::start(&qemu, &machine.spec, Vec::new(), user(1))
        .await
        .unwrap();
    machine.greeted(1).await;
    write(&vm, 0xa0, 0x40000).await;
    vm.snapshot_disk(&layers[1], size).await.unwrap();
    write(&vm, 0xa1, 0x50000).await;
    let vm = {
        let process = vm.process();
        drop(vm);
        Vm::adopt(process, &machine.spec.paths).await.unwrap().0
    };
    // A layer of another size is no layer of this disk, and leaves nothing behind.
    let odd = machine.folder.path().join("odd.qcow2");
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .args([odd.as_os_str(), "7M".as_ref()])
        .status();
    assert!(made.unwrap().success());
    let err = vm.snapshot_disk(&odd, size).await.unwrap_err();
    assert!(err.message.contains("7340032"), "{err}");
    let err = vm
        .snapshot_disk(&machine.spec.disk.base, size)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::Internal, "{err:?}");

    vm.pause().await.unwrap();
    vm.snapshot_disk(&layers[2], size).await.unwrap();
    vm.resume().await.unwrap();
    write(&vm, 0xa2, 0x60000).await;
    vm.resize_disk(8 << 20).await.unwrap();
    assert_eq!(vm.disk_size().await.unwrap(), Size::mib(8));

    // Those below are open for reading only, so that others can stand on them.
    let nodes = vm
        .client()
        .execute("query-named-block-nodes", json!({"flat": true}))
        .await
        .unwrap();
    for (node, read_only) in [("disk", true), ("disk1", true), ("disk2", false)] {
        let nodes = nodes.as_array().unwrap();
        for name in [node.to_owned(), format!("{node}-file")] {
            let found = nodes.iter().find(|n| n["node-name"] == name.as_str());
            assert_eq!(found.unwrap()["ro"], read_only, "{name}");
        }
    }
    for layer in &layers[..2] {
        assert_eq!(writers(vm.process().pid, layer), 0, "{layer:?}");
    }
    assert!(writers(vm.process().pid, &layers[2]) > 0);
    vm.quit().await.unwrap();
    for (byte, home) in [(0xa0, 0), (0xa1, 1), (0xa2, 2)] {
        for (n, layer) in layers.iter().enumerate() {
            assert_eq!(holds(layer, byte), n == home, "{byte:x} in layer {n}");
        }
    }
}

/// The daemon ends while the machine runs and is being saved. At the end of the save QEMU would halt it, and nobody
/// would let it go on.
#[tokio::test]
async fn a_save_that_nobody_waits_for_is_given_up() {
    let qemu = qemu_or_skip!("a_save_that_nobody_waits_for_is_given_up");
    let machine = Machine::new(&qemu);
    let (vm, _events) = Vm::start(&qemu, &machine.spec, Vec::new(), None)
        .await
        .unwrap();
    machine.greeted(1).await;
    let file = machine.folder.path().join("save");
    let uri = format!("file:{}", file.display());
    let pause = json!([{"capability": "pause-before-switchover", "state": true}]);
    for (command, arguments) in [
        ("migrate-set-capabilities", json!({"capabilities": pause})),
        ("migrate-set-parameters", json!({"max-bandwidth": 1000})),
        ("migrate", json!({"uri": uri})),
    ] {
        vm.client().execute(command, arguments).await.unwrap();
    }
    let status = async |vm: &Vm| {
        let now = vm.client().execute("query-migrate", json!({})).await;
        now.unwrap()["status"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let until = Instant::now() + Duration::from_secs(30);
    while status(&vm).await != "active" {
        assert!(Instant::now() < until, "{}", status(&vm).await);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(vm.status().await.unwrap(), PowerState::Running);
    let process = vm.process();
    drop(vm);
    let (vm, _events) = Vm::adopt(process, &machine.spec.paths).await.unwrap();
    vm.wake().await.unwrap();
    assert_eq!(status(&vm).await, "cancelled");
    assert_eq!(vm.status().await.unwrap(), PowerState::Running);
    vm.quit().await.unwrap();
}

#[tokio::test]
async fn a_running_machine_is_forked() {
    let qemu = qemu_or_skip!("a_running_machine_is_forked");
    let tap = match machine::tap_in_own_namespace("t1") {
        Ok(tap) => tap,
        Err(err) => return eprintln!("SKIPPED: a_running_machine_is_forked: no tap: {err}"),
    };
    let mut machine = Machine::new(&qemu);
    machine.spec.nic = Nic::Tap(MAC.parse().unwrap());
    let (vm, _events) = Vm::start(&qemu, &machine.spec, vec![tap], user(1))
        .await
        .unwrap();
    machine.greeted(1).await;
    let own = |name: &str| machine.folder.path().join(name);
    let (old, new) = (machine.spec.disk.layers[0].clone(), own("new.qcow2"));
    layer_on(&new, &old);

    // A fault on the way leaves the machine running on the disk that it had.
    let bad = vm
        .freeze(&own("none"), Size(1), new_file(&own("vain")))
        .await;
    assert_eq!(bad.unwrap_err().code, Code::Io);
    assert_eq!(vm.status().await.unwrap(), PowerState::Running);
    assert_eq!(vm.layers_added().await.unwrap(), 0);

    let (stream, halted) = vm
        .freeze(&new, size_of(&new), new_file(&own("all")))
        .await
        .unwrap();
    assert!(halted < Duration::from_secs(5), "{halted:?}");
    assert_eq!(stream == Stream::Mapped, qemu.version >= (9, 0, 0));
    assert_eq!(vm.layers_added().await.unwrap(), 1);
    assert_eq!(vm.status().await.unwrap(), PowerState::Running);
    write(&vm, 0xb0, 0x40000).await;

    let folder = own("fork");
    std::fs::create_dir(&folder).unwrap();
    let mut spec = machine.spec.clone();
    spec.uuid = uuid::Uuid::new_v4();
    spec.paths = Paths::of(&folder.join("run"), &folder);
    spec.nic = Nic::Disconnected(MAC.parse().unwrap());
    spec.incoming = true;
    layer_on(&folder.join("disk.qcow2"), &old);
    spec.disk.layers.push(folder.join("disk.qcow2"));
    let (fork, _) = Vm::start(&qemu, &spec, Vec::new(), user(2)).await.unwrap();
    let saved = File::open(own("all")).unwrap();
    fork.restore_all(saved, stream).await.unwrap();
    assert_eq!(macs(&fork).await, [MAC]);
    assert_ne!(generation(&fork).await, generation(&vm).await);
    fork.resume().await.unwrap();
    write(&fork, 0xb1, 0x40000).await;
    lives_on_and_ends(&spec, &fork).await;
    assert!(!holds(&spec.disk.layers[1], 0xb0) && !holds(&old, 0xb0));

    // The first one goes on, can be saved again, and ends when told to.
    vm.pause().await.unwrap();
    vm.save_all(new_file(&own("again"))).await.unwrap();
    vm.resume().await.unwrap();
    let mut events = vm.subscribe();
    let mut wire = UnixStream::connect(machine.spec.paths.console()).await;
    wire.as_mut().unwrap().write_all(b"x").await.unwrap();
    event(&mut events, |e| matches!(e, VmEvent::Shutdown { .. })).await;
    vm.wait().await;
}

/// Runs in a process of its own, started by the test below: starts two machines that end with it,
/// says so, and hangs.
#[tokio::test]
#[ignore = "only started by the next test"]
async fn parent_whose_machines_end_with_it() {
    let folder = std::env::var_os("PILEUS_TEST_FOLDER").unwrap();
    let folder = Path::new(&folder);
    let path = std::env::var_os("PATH").unwrap();
    let qemu = Qemu::find(None, &path).await.unwrap();
    let mut started = Vec::new();
    let mut held = Vec::new();
    for (number, who) in [None, user(1)].into_iter().enumerate() {
        let own = folder.join(number.to_string());
        std::fs::create_dir(&own).unwrap();
        let mut spec = machine::make(&own, &qemu);
        spec.ends_with_daemon = true;
        let (vm, _events) = Vm::start(&qemu, &spec, Vec::new(), who).await.unwrap();
        started.push((spec, vm.process()));
        held.push(vm);
    }
    // The thread that served the start has long ended by then, if it is one that ends.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let text = serde_json::to_vec(&started).unwrap();
    files::write_atomic(&folder.join("started"), &text, 0o600).unwrap();
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn a_machine_that_belongs_to_nobody_ends_with_its_parent() {
    let _ = qemu_or_skip!("a_machine_that_belongs_to_nobody");
    let folder = tempfile::tempdir().unwrap();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "parent_whose_machines_end_with_it", "--ignored"])
        .env("PILEUS_TEST_FOLDER", folder.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let file = folder.path().join("started");
    let until = Instant::now() + Duration::from_secs(30);
    while !file.exists() && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let text = std::fs::read(&file);
    let started: Vec<(MachineSpec, ProcessId)> = match &text {
        Ok(text) => serde_json::from_slice(text).unwrap(),
        Err(_) => Vec::new(),
    };
    let lived = started.iter().all(|(_, process)| process.is_alive());
    parent.kill().unwrap();
    parent.wait().unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    let alive = || started.iter().filter(|(_, p)| p.is_alive()).count();
    while alive() > 0 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let left = alive();
    for (_, process) in &started {
        process::kill(*process).unwrap();
    }
    assert_eq!(started.len(), 2, "the parent did not start its machines");
    assert!(lived, "they ended before their parent");
    assert_eq!(left, 0, "machines outlived their parent");
}

/// A pool of threads that come and go must not take the machine with them.
#[test]
fn a_machine_that_ends_with_the_daemon_outlives_the_thread_that_asked_for_it() {
    let runtime = || {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .thread_keep_alive(Duration::from_millis(1))
            .build()
            .unwrap()
    };
    let first = runtime();
    let Some(qemu) = first.block_on(machine::qemu("a_machine_outlives_the_thread")) else {
        return;
    };
    let mut machine = Machine::new(&qemu);
    machine.spec.ends_with_daemon = true;
    let (vm, _) = first.block_on(start(&qemu, &machine));
    let process = vm.process();
    drop(vm);
    drop(first);
    std::thread::sleep(Duration::from_millis(100));
    assert!(process.is_alive(), "it ended with a thread");
    let second = runtime();
    second.block_on(async {
        let (vm, _) = Vm::adopt(process, &machine.spec.paths).await.unwrap();
        vm.quit().await.unwrap();
    });
}

async fn timed<T>(work: impl Future<Output = T>) -> (T, f64) {
    let begun = Instant::now();
    let done = work.await;
    (done, begun.elapsed().as_secs_f64() * 1000.0)
}

fn median(mut of: Vec<f64>) -> String {
    of.sort_by(f64::total_cmp);
    format!("{:.1} ms (worst {:.1})", of[of.len() / 2], of[of.len() - 1])
}

/// `cargo test -p pileus-instances --test saved figures -- --ignored --nocapture`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "prints figures, proves nothing"]
async fn figures() {
    let qemu = qemu_or_skip!("figures");
    let template = Template::make(&qemu).await;
    for (what, who) in [("our own user", None), ("a user of its own", user(1))] {
        for incoming in [false, true] {
            let (mut starts, mut restores, mut saves) = (vec![], vec![], vec![]);
            for _ in 0..10 {
                let mut spec = template.clone_spec(0);
                let folder = spec.paths.console_log.parent().unwrap().to_owned();
                spec.incoming = incoming;
                let (started, ms) = timed(Vm::start(&qemu, &spec, Vec::new(), who.clone())).await;
                starts.push(ms);
                let vm = started.unwrap().0;
                if incoming {
                    let ready = template.folder.open_checked(&template.key).unwrap();
                    restores.push(timed(vm.restore(ready.state)).await.1);
                    let state = new_file(&folder.join("state"));
                    saves.push(timed(vm.save_devices(state)).await.1);
                }
                vm.quit().await.unwrap();
                std::fs::remove_dir_all(folder).unwrap();
            }
            println!("{what}: start to greeting {}", median(starts));
            if incoming {
                let (restores, saves) = (median(restores), median(saves));
                println!("{what}: restore {restores}, save {saves}");
            }
        }
    }
    let checks = (0..10).map(|_| {
        let begun = Instant::now();
        template.folder.open_checked(&template.key).unwrap();
        begun.elapsed().as_secs_f64() * 1000.0
    });
    println!("open_checked {}", median(checks.collect()));
    for touched in [256_u64, 1024] {
        fork_figures(&qemu, touched).await;
    }
}

/// A guest that has touched its memory is made by giving it a file that is full.
async fn fork_figures(qemu: &Qemu, touched: u64) {
    let mut machine = Machine::new(qemu);
    let own = |name: &str| machine.folder.path().join(name);
    machine.spec.memory = Size::gib(2);
    let ram = own("ram");
    let mut file = new_file(&ram);
    let mut noise = std::fs::File::open("/dev/urandom").unwrap();
    std::io::copy(
        &mut std::io::Read::take(&mut noise, touched << 20),
        &mut file,
    )
    .unwrap();
    file.set_len(machine.spec.ram_bytes()).unwrap();
    machine.spec.ram = Memory::CopyOnWrite(ram);
    let (vm, _) = start(qemu, &machine).await;
    let layer = own("new.qcow2");
    layer_on(&layer, &machine.spec.disk.layers[0]);
    let (frozen, freeze) = timed(vm.freeze(&layer, size_of(&layer), new_file(&own("live")))).await;
    let (_, halted) = frozen.unwrap();
    vm.pause().await.unwrap();
    let next = own("next.qcow2");
    layer_on(&next, &layer);
    let (_, snapshot) = timed(vm.snapshot_disk(&next, size_of(&next))).await;
    let all = own("all");
    let (stream, save) = timed(vm.save_all(new_file(&all))).await;
    let (_, resume) = timed(vm.resume()).await;
    vm.quit().await.unwrap();
    let mut spec = machine.spec.clone();
    spec.ram = Memory::Private;
    spec.incoming = true;
    spec.disk.layers.extend([layer, next]);
    let (vm, _) = Vm::start(qemu, &spec, Vec::new(), None).await.unwrap();
    let saved = File::open(&all).unwrap();
    let (restored, restore) = timed(vm.restore_all(saved, stream.unwrap())).await;
    restored.unwrap();
    vm.quit().await.unwrap();
    println!("{touched} MiB touched, running: {freeze:.0} ms, of which halted {halted:?}");
    println!(
        "{touched} MiB touched, halted: snapshot {snapshot:.1} ms, save {save:.0} ms, resume \
         {resume:.1} ms, restore {restore:.0} ms; file {} MiB",
        files::allocated(&all) >> 20
    );
}
