//! Snapshots, clones, names and settings of real guests that run, and what happens to them by themselves:
//! restarts after crashes and after the host's, shutdowns with a delay.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::pty::{OpenptyResult, openpty};
use pileus_testkit::{Daemon, Need, Options, need, wait_until};
use serde_json::{Value, json};

use crate::guests::{Marks, folder, instance, kill_machine, machine, settles};

const NEEDS: [Need; 4] = [Need::Root, Need::Tun, Need::Guest, Need::Program("python3")];
/// What `verify-unique` compares at least, for guests that booted.
const ITEMS: usize = 11;

fn start() -> Daemon {
    let daemon = Daemon::start(Options::warm());
    daemon
        .run(&["launch", "--warm", "--name", "foo"])
        .ok_with_words();
    daemon
}

/// A file of random bytes, written through to the disk; its checksum.
fn write(daemon: &Daemon, name: &str, file: &str) -> String {
    let script = format!(
        "head -c 3M /dev/urandom > /var/tmp/{file}; sync; sha256sum < /var/tmp/{file} | cut -c1-64"
    );
    daemon.script(name, &script)
}

/// The checksums of these files; `-` for one that is not there.
fn read(daemon: &Daemon, name: &str, files: &[&str]) -> String {
    let files = files.join(" ");
    let script = format!(
        "cd /var/tmp; for f in {files}; do [ -e $f ] && sha256sum < $f | cut -c1-64 || echo -; done"
    );
    daemon.script(name, &script)
}

/// Snapshots of an instance that runs and writes; their tree; back to each of them; some are deleted.
#[test]
fn guest_snapshots() {
    if !need(&NEEDS) {
        return;
    }
    let mut daemon = start();
    // Writes a number to the disk, and then says which is there.
    let writer = "i=0; while :; do i=$((i+1)); echo $i > /var/tmp/n.new; mv /var/tmp/n.new /var/tmp/n; \
                  sync /var/tmp/n /var/tmp; echo $i > /dev/shm/synced.new; mv /dev/shm/synced.new /dev/shm/synced; done";
    daemon.script(
        "foo",
        &format!("setsid -f sh -c '{writer}' > /dev/null 2>&1 < /dev/null; sleep 0.5"),
    );
    let number = |file: &str| -> u64 {
        let text = daemon.exec("foo", &["cat", file]);
        text.trim()
            .parse()
            .unwrap_or_else(|_| panic!("{file}: {text:?}"))
    };
    let a = write(&daemon, "foo", "a");
    let synced = number("/dev/shm/synced");
    let halted = take(
        &daemon,
        "foo",
        &json!({ "name": "one", "comment": "first\nand more" }),
    );
    let marks = Marks::leave(&daemon, "foo", 16);
    let b = write(&daemon, "foo", "b");
    take(
        &daemon,
        "foo",
        &json!({ "name": "two", "with_memory": true }),
    );
    let seen = number("/dev/shm/synced");
    let c = write(&daemon, "foo", "c");
    let again = take(&daemon, "foo", &json!({}));
    eprintln!("halted for {halted} and {again} ms");
    assert!(halted <= 1000 && again <= 1000, "{halted} {again} ms");
    assert_eq!(parents(&daemon), "one< snapshot3<two two<one");

    // Back in the middle of its life: it is that very run.
    let restored = daemon.run(&["restore", "-d", "foo.two"]).ok();
    assert_eq!(restored, "Snapshot restored: foo.two\n");
    assert_eq!(daemon.state("foo"), "Running");
    marks.hold(&daemon, "foo");
    assert_eq!(read(&daemon, "foo", &["a", "b", "c"]), format!("{a}{b}-\n"));
    // In this order: it goes on writing.
    let written = number("/var/tmp/n");
    let now = number("/dev/shm/synced");
    assert!(now > synced && now + 2 >= written, "{now} {synced} {seen}");
    let d = write(&daemon, "foo", "d");
    daemon.run(&["snapshot", "foo", "-n", "four"]).ok();
    assert_eq!(parents(&daemon), "four<two one< snapshot3<two two<one");
    // Its memory twice more: nothing of it was used up.
    daemon.run(&["restore", "-d", "foo.two"]).ok();
    marks.hold(&daemon, "foo");
    assert_eq!(read(&daemon, "foo", &["b", "d"]), format!("{b}-\n"));

    // In the middle: what stands on it keeps what it had.
    daemon.run(&["delete", "--purge", "foo.two"]).ok();
    assert_eq!(parents(&daemon), "four<one one< snapshot3<one");
    let memories = folder(&daemon, "foo").join("snapshots");
    let left = std::fs::read_dir(memories).map_or(0, Iterator::count);
    assert_eq!(left, 0, "the memory of a deleted snapshot is left");
    let missing = daemon.run(&["restore", "-d", "foo.two"]).fails_with(2);
    assert!(missing.contains("No such snapshot: foo.two"), "{missing}");
    marks.hold(&daemon, "foo");
    daemon.run(&["set", "local.foo.one.name=uno"]).ok();
    daemon
        .run(&["set", "local.foo.uno.comment=said later"])
        .ok();
    assert_eq!(
        daemon.run(&["get", "local.foo.uno.comment"]).ok(),
        "said later\n"
    );

    // Disks only: they are looked at through clones that never ran with that memory.
    daemon.run(&["stop", "--force", "foo"]).ok();
    daemon.run(&["restore", "-d", "foo.four"]).ok();
    assert_eq!(daemon.state("foo"), "Stopped");
    daemon.run(&["snapshot", "foo", "-n", "stopped"]).ok();
    daemon.run(&["start", "foo"]).ok();
    let files = ["a", "b", "c", "d"];
    assert_eq!(read(&daemon, "foo", &files), format!("{a}{b}-\n{d}"));
    let e = write(&daemon, "foo", "e");
    // A running one goes back to its disk, and boots there; its numbers are what was synced.
    daemon.run(&["restore", "-d", "foo.snapshot3"]).ok();
    assert_eq!(daemon.state("foo"), "Running");
    assert_eq!(
        read(&daemon, "foo", &["a", "b", "c", "e"]),
        format!("{a}{b}{c}-\n")
    );
    let number: u64 = daemon
        .exec("foo", &["cat", "/var/tmp/n"])
        .trim()
        .parse()
        .unwrap();
    assert!(number >= seen, "{number}, but {seen} was synced");
    assert_ne!(e, a);
    assert_eq!(parents(&daemon), "four<uno snapshot3<uno stopped<four uno<");
    merged(&mut daemon, &format!("{a}{b}{c}"));
    daemon.run(&["delete", "--purge", "foo"]).ok();
    let layers = layers(&daemon);
    assert_eq!(
        layers.len(),
        1,
        "only the template's layer stays: {layers:?}"
    );
}

fn layers(daemon: &Daemon) -> Vec<PathBuf> {
    pileus_testkit::files_below(&daemon.storage().join("data/layers"))
}

/// Layers that were there for snapshots which are gone become one, and a guest on it finds what it wrote.
fn merged(daemon: &mut Daemon, files: &str) {
    let numbers = 1..=9;
    for n in numbers.clone() {
        let script = format!("echo {n} > /var/tmp/last; echo {n} > /var/tmp/n{n}; sync");
        daemon.script("foo", &script);
        daemon
            .run(&["snapshot", "foo", "-n", &format!("n{n}")])
            .ok();
    }
    let snapshots: Vec<_> = numbers.clone().map(|n| format!("foo.n{n}")).collect();
    let gone: Vec<_> = snapshots[..8].iter().map(String::as_str).collect();
    daemon
        .run(&[&["delete", "--purge"], &gone[..]].concat())
        .ok();
    daemon.run(&["stop", "foo"]).ok();
    let before = layers(daemon).len();
    // It looks for what can be merged when it starts, and then now and again.
    daemon.stop();
    daemon.start_again();
    wait_until("layers are merged", 60, || {
        (layers(daemon).len() + 7 <= before).then_some(())
    });
    daemon.run(&["start", "foo"]).ok();
    assert_eq!(read(daemon, "foo", &["a", "b", "c"]), files);
    let all = daemon.script("foo", "cat /var/tmp/last /var/tmp/n?");
    assert_eq!(all, "9\n1\n2\n3\n4\n5\n6\n7\n8\n9\n");
    daemon.run(&["restore", "-d", "foo.n9"]).ok();
    let last = daemon.exec("foo", &["cat", "/var/tmp/last"]);
    assert_eq!(last, "9\n");
}

/// Takes a snapshot; how many milliseconds the guest stood still.
fn take(daemon: &Daemon, name: &str, request: &Value) -> u64 {
    let done = daemon.api().act(name, "snapshots", request).unwrap();
    let phases = done["phases"].as_array().unwrap();
    let halted = phases.iter().find(|phase| phase["phase"] == "halted");
    halted.unwrap_or_else(|| panic!("{done}"))["milliseconds"]
        .as_u64()
        .unwrap()
}

/// `CHILD<PARENT` of all snapshots, by name.
fn parents(daemon: &Daemon) -> String {
    let list = daemon
        .run(&["list", "--snapshots", "--format", "json"])
        .json();
    let mut all: Vec<String> = list["info"]["foo"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(name, snapshot)| format!("{name}<{}", snapshot["parent"].as_str().unwrap()))
        .collect();
    all.sort();
    all.join(" ")
}

/// Clones of a running, a stopped and a snapshotted one; what else is changed while one runs; what comes
/// by itself. They boot at the same time.
#[test]
fn guest_clones_and_settings() {
    if !need(&NEEDS) {
        return;
    }
    let mut daemon = start();
    let a = write(&daemon, "foo", "a");
    daemon.run(&["snapshot", "foo", "-n", "early"]).ok();
    let b = write(&daemon, "foo", "b");
    let cloned = daemon.run(&["clone", "foo"]).ok();
    assert_eq!(cloned, "Cloned from foo to foo-clone1.\n");
    daemon.run(&["clone", "foo.early", "-n", "early"]).ok();
    daemon.run(&["clone", "foo-clone1", "-n", "third"]).ok();
    for name in ["foo-clone1", "early", "third"] {
        assert_eq!(daemon.state(name), "Stopped");
    }
    write(&daemon, "foo", "c");
    grown(&daemon);
    renamed(&daemon);
    let names = ["foo-clone1", "early", "third"];
    std::thread::scope(|scope| {
        for name in &names[..2] {
            let daemon = &daemon;
            scope.spawn(move || daemon.run(&["start", name]).ok());
        }
    });
    daemon.run(&["start", "third"]).ok();
    let files = ["a", "b", "c"];
    assert_eq!(read(&daemon, "foo-clone1", &files), format!("{a}{b}-\n"));
    assert_eq!(read(&daemon, "early", &files), format!("{a}-\n-\n"));
    assert_eq!(read(&daemon, "third", &files), format!("{a}{b}-\n"));
    unique(&daemon, &["web", "foo-clone1", "early", "third"]);
    // The disk that was grown while it was stopped.
    assert!(root_kib(&daemon, "early") > 6 << 20);
    for name in names {
        assert_eq!(daemon.exec(name, &["hostname"]), format!("{name}\n"));
        assert_eq!(
            daemon.exec(name, &["cloud-init", "status"]).trim(),
            "status: done"
        );
        pinned(&daemon, name);
    }
    by_themselves(&mut daemon);
}

fn root_kib(daemon: &Daemon, name: &str) -> u64 {
    let shown = daemon.exec(name, &["df", "--output=size", "/"]);
    shown.lines().last().unwrap().trim().parse().unwrap()
}

/// A disk grows under a guest that runs, and under one that does not.
fn grown(daemon: &Daemon) {
    assert!(root_kib(daemon, "foo") < 5 << 20);
    daemon.run(&["set", "local.foo.disk=7G"]).ok();
    wait_until("the root file system grows", 20, || {
        (root_kib(daemon, "foo") > 6 << 20).then_some(())
    });
    let refused = daemon.run(&["set", "local.foo.disk=6G"]).fails_with(2);
    assert!(refused.contains("Disk can only be expanded"), "{refused}");
    daemon.run(&["set", "local.early.disk=7G"]).ok();
}

/// Another name, while it runs: in the guest, for its neighbours, and after its next boot, at which the
/// number of its processors and its memory change too.
fn renamed(daemon: &Daemon) {
    daemon.run(&["rename", "foo", "web"]).ok();
    assert_eq!(daemon.state("foo"), "none");
    let named = |name: &str| {
        let resolved = ["exec", "web", "--", "getent", "ahostsv4", name];
        daemon.run(&resolved).code() == 0
    };
    wait_until("its name is known", 20, || {
        named("web.pileus").then_some(())
    });
    assert!(!named("foo.pileus"), "its former name is still known");
    assert_eq!(daemon.exec("web", &["hostname"]), "web\n");
    daemon.run(&["set", "local.web.cpus=2"]).ok();
    daemon.run(&["set", "local.web.memory=1280M"]).ok();
    // Memory is taken at once. New processors aren't by this kernel: it does not see that TCG is no real
    // hardware, and takes none there.
    assert_eq!(instance(daemon, "web")["pending"], json!({"cpus": 2}));
    assert_eq!(daemon.exec("web", &["nproc"]), "1\n");
    let memory = || {
        let total = daemon.exec("web", &["awk", "/MemTotal/ {print $2}", "/proc/meminfo"]);
        total.trim().parse::<u64>().unwrap() >> 10
    };
    assert!(memory() > 1100, "{} MiB", memory());
    daemon.run(&["set", "local.web.memory=1536M"]).ok();
    daemon.run(&["suspend", "web"]).ok();
    daemon.run(&["start", "web"]).ok();
    assert!(memory() > 1350, "{} MiB", memory());
    daemon.run(&["set", "local.web.memory=1280M"]).ok();
    assert!((1100..1350).contains(&memory()), "{} MiB", memory());
    daemon.run(&["restart", "web"]).ok();
    assert_eq!(daemon.exec("web", &["nproc"]), "2\n");
    assert!((1100..1350).contains(&memory()), "{} MiB", memory());
    assert_eq!(instance(daemon, "web")["pending"], Value::Null);
    assert_eq!(daemon.exec("web", &["hostname"]), "web\n");
    assert_eq!(daemon.exec("web", &["cat", "/etc/hostname"]), "web\n");
    assert!(root_kib(daemon, "web") > 6 << 20);
}

#[track_caller]
fn unique(daemon: &Daemon, names: &[&str]) {
    let verified = daemon.run(&[&["verify-unique"], names].concat());
    assert_eq!(verified.code(), 0, "{}", verified.text());
    assert!(
        verified.text().lines().count() > ITEMS,
        "{}",
        verified.text()
    );
}

/// An SSH client finds the host key that the API tells.
fn pinned(daemon: &Daemon, name: &str) {
    let ssh = daemon.get(&format!("/v1/instances/{name}/ssh"));
    let key = ssh["host_key"].as_str().unwrap();
    let core: Vec<&str> = key.split_whitespace().take(2).collect();
    let there = daemon.exec(name, &["cat", "/etc/ssh/ssh_host_ed25519_key.pub"]);
    assert!(there.contains(&core.join(" ")), "{name}: {key} {there}");
}

/// Crashes of a kernel and of a machine; a shutdown with a delay that the daemon's end does not undo; the
/// host's restart.
fn by_themselves(daemon: &mut Daemon) {
    for name in ["foo-clone1", "early"] {
        daemon
            .run(&["set", &format!("local.{name}.on-crash=restart")])
            .ok();
    }
    let before = ["foo-clone1", "early"].map(|name| boot_id(daemon, name));
    let mut screen = Screen::login(daemon, "third");
    daemon.run(&["stop", "third", "--time", "1"]).ok();
    let asked = Instant::now();
    screen.shows("going down for poweroff in 1 minute");
    daemon.kill();
    daemon.start_again();
    assert_ne!(instance(daemon, "third")["shutdown_at"], Value::Null);
    kill_machine(machine(daemon, "foo-clone1").unwrap());
    let panic = "echo 1 > /proc/sys/kernel/sysrq; nohup sh -c 'sleep 1; echo c > /proc/sysrq-trigger' > /dev/null 2>&1 &";
    daemon.script("early", panic);
    for (name, before) in ["foo-clone1", "early"].into_iter().zip(before) {
        wait_until("it is started again", 150, || {
            let machine = instance(daemon, name);
            let booted = machine["report"]["uptime_seconds"].is_u64();
            (booted && daemon.state(name) == "Running" && boot_id(daemon, name) != before)
                .then_some(())
        });
    }
    settles(daemon, "third", &["Stopped"], 120);
    let took = asked.elapsed().as_secs();
    assert!(took >= 50, "it was shut down after {took} s");
    assert_eq!(instance(daemon, "third")["last_error"], Value::Null);

    // The host starts again: what is wanted then goes on, what is not stays.
    daemon.run(&["set", "local.early.autostart=never"]).ok();
    daemon.run(&["set", "local.web.autostart=always"]).ok();
    let marks = Marks::leave(daemon, "web", 4);
    daemon.run(&["suspend", "web"]).ok();
    daemon.run(&["stop", "--force", "foo-clone1"]).ok();
    daemon.kill();
    for pid in daemon.machines() {
        kill_machine(pid);
    }
    wait_until("the machines have ended", 10, || {
        daemon.machines().is_empty().then_some(())
    });
    let database = daemon.storage().join("data/pileus.db");
    let change = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); \
                  db.execute(\"update settings set value = 'another' where key = 'host.boot-id'\"); \
                  assert db.total_changes == 1; db.commit()";
    let changed = Command::new("python3")
        .args(["-c", change])
        .arg(database)
        .status();
    assert!(changed.is_ok_and(|status| status.success()));
    daemon.start_again();
    settles(daemon, "web", &["Running"], 60);
    marks.hold(daemon, "web");
    for name in ["early", "third", "foo-clone1"] {
        assert_eq!(daemon.state(name), "Stopped", "{name}");
    }
}

fn boot_id(daemon: &Daemon, name: &str) -> String {
    let out = daemon.run(&["exec", name, "--", "cat", "/proc/sys/kernel/random/boot_id"]);
    out.text()
}

/// Somebody who is logged in.
struct Screen {
    pieces: mpsc::Receiver<Vec<u8>>,
    text: String,
    _input: std::fs::File,
}

impl Screen {
    fn login(daemon: &Daemon, name: &str) -> Self {
        let OpenptyResult { master, slave } = openpty(None, None).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        let mut shell = daemon.command(&["shell", name]);
        shell.stdin(end()).stdout(end()).stderr(end());
        let mut shell = shell.spawn().unwrap();
        drop(slave);
        let input = std::fs::File::from(master);
        let mut output = input.try_clone().unwrap();
        let (sender, pieces) = mpsc::channel();
        std::thread::spawn(move || {
            let mut block = [0; 4096];
            while let Ok(read @ 1..) = output.read(&mut block) {
                if sender.send(block[..read].to_vec()).is_err() {
                    break;
                }
            }
            let _ = shell.kill();
            let _ = shell.wait();
        });
        let mut screen = Self {
            pieces,
            text: String::new(),
            _input: input,
        };
        screen.shows(&format!("ubuntu@{name}"));
        screen
    }

    fn shows(&mut self, words: &str) {
        let until = Instant::now() + Duration::from_secs(90);
        while !self.text.contains(words) {
            let left = until.saturating_duration_since(Instant::now());
            match self.pieces.recv_timeout(left) {
                Ok(piece) => self.text.push_str(&String::from_utf8_lossy(&piece)),
                Err(_) => panic!("{words:?} did not appear:\n{}", self.text),
            }
        }
    }
}
