//! Suspend and resume of real guests: what is in memory stays, whoever is killed meanwhile.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use pileus_testkit::{Daemon, Need, Options, need, wait_until};

use crate::guests::{
    Marks, allocated, clock_ahead, folder, instance, kill_machine, machine, settles,
};

const NEEDS: [Need; 3] = [Need::Root, Need::Tun, Need::Guest];

#[test]
fn guest_suspend() {
    if !need(&NEEDS) {
        return;
    }
    let mut daemon = Daemon::start(Options::warm());
    daemon
        .run(&["launch", "--warm", "--name", "foo"])
        .ok_with_words();
    let marks = Marks::leave(&daemon, "foo", 48);
    daemon.script("foo", "echo on disk > /var/tmp/file; sync");
    there_and_back(&daemon, &marks);
    daemons_between(&mut daemon, &marks);
    trash(&daemon, &marks);
    given_up(&daemon);
    // The same once more with a machine that booted itself.
    let marks = Marks::leave(&daemon, "foo", 16);
    there_and_back(&daemon, &marks);
}

/// Bytes of memory that a guest's machine has touched, those that it shares with its template included.
fn touched(daemon: &Daemon, pid: i32) -> u64 {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut ram = false;
    let (mut own, mut template) = (0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-') {
            let at = |text| u64::from_str_radix(text, 16);
            if let (Ok(from), Ok(to)) = (at(from), at(to)) {
                ram = to - from >= 1 << 30;
                if ram && line.contains("/ram") {
                    template = allocated(&daemon.template().ram);
                }
            }
        } else if ram && first == "Anonymous:" {
            let kib: u64 = words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
            own += kib << 10;
        }
    }
    own + template
}

fn there_and_back(daemon: &Daemon, marks: &Marks) {
    let address = daemon.field("foo", "/ipv4/0");
    let mut open = daemon
        .command(&["exec", "foo", "--", "sleep", "9999"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = machine(daemon, "foo").unwrap();
    let touched = touched(daemon, pid);
    let began = Instant::now();
    assert_eq!(daemon.run(&["suspend", "foo"]).ok(), "");
    let suspend = began.elapsed();
    assert_eq!(daemon.state("foo"), "Suspended");
    assert!(daemon.machines().is_empty());
    let file = folder(daemon, "foo").join("suspended.memory");
    let bytes = allocated(&file);
    assert!(
        bytes > 48 << 20 && bytes <= touched / 10 * 11,
        "{bytes} bytes for {touched} that were touched"
    );
    // The session ended with the machine, and its client knows why.
    let until = Instant::now() + Duration::from_secs(30);
    while open.try_wait().unwrap().is_none() {
        assert!(Instant::now() < until, "the open session hangs");
        std::thread::sleep(Duration::from_millis(50));
    }
    let ended = open.wait_with_output().unwrap();
    let words = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(
        matches!(ended.status.code(), Some(2 | 255)) && !words.is_empty(),
        "{} {words}",
        ended.status
    );
    // What a suspended one can't, and what is as it should be already.
    daemon.run(&["suspend", "foo"]).ok();
    let refused = daemon.run(&["stop", "foo"]).fails_with(2);
    assert!(refused.contains("suspended"), "{refused}");
    let refused = daemon.run(&["restart", "foo"]).fails_with(2);
    assert!(refused.contains("is not running"), "{refused}");
    std::thread::sleep(Duration::from_secs(2));

    let began = Instant::now();
    assert_eq!(daemon.run(&["start", "foo"]).ok(), "");
    let resume = began.elapsed();
    let ahead = clock_ahead(daemon, "foo");
    assert!(ahead.abs() < 1.0, "its clock is {ahead} s ahead");
    marks.hold(daemon, "foo");
    assert!(!file.exists());
    assert_eq!(daemon.field("foo", "/ipv4/0"), address);
    reaches_out(daemon);
    eprintln!(
        "suspended in {suspend:.2?}, resumed in {resume:.2?}, {} MiB for {} MiB",
        bytes >> 20,
        touched >> 20
    );
    let bound = Duration::from_secs(60);
    assert!(suspend < bound && resume < bound, "{suspend:?} {resume:?}");
}

/// The guest's network goes on: its gateway answers, and gives names.
fn reaches_out(daemon: &Daemon) {
    // A connection through its card, to the daemon's name server.
    let script = "import socket, subprocess; \
                  gateway = subprocess.check_output(['ip', '-4', 'route', 'show', 'default']).split()[2]; \
                  socket.create_connection((gateway.decode(), 53), 5); \
                  print(socket.gethostbyname('foo.pileus'))";
    let address = daemon.field("foo", "/ipv4/0");
    let mut last = None;
    let until = Instant::now() + Duration::from_secs(30);
    while Instant::now() < until {
        let out = daemon.run(&["exec", "foo", "--", "python3", "-c", script]);
        if address == out.text().trim() {
            return;
        }
        last = Some(out);
    }
    panic!("the network does not go on: {last:?}");
}

/// A suspended instance does not mind what becomes of the daemon.
fn daemons_between(daemon: &mut Daemon, marks: &Marks) {
    for clean in [true, false] {
        daemon.run(&["suspend", "foo"]).ok();
        match clean {
            true => daemon.stop(),
            false => daemon.kill(),
        }
        daemon.start_again();
        assert_eq!(daemon.state("foo"), "Suspended");
        let suspended = &instance(daemon, "foo")["suspended"];
        assert!(suspended["bytes"].as_u64() > Some(48 << 20), "{suspended}");
        // A command starts it; so does a shell.
        match clean {
            true => marks.hold(daemon, "foo"),
            false => {
                let shell = daemon.run_with(&["shell", "foo"], b"cat /dev/shm/data | sha256sum\n");
                assert_eq!(shell.code(), 0, "{shell:?}");
                marks.hold(daemon, "foo");
            }
        }
    }
}

fn trash(daemon: &Daemon, marks: &Marks) {
    daemon.run(&["suspend", "foo"]).ok();
    daemon.run(&["delete", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Deleted");
    daemon.run(&["recover", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Suspended");
    daemon.run(&["start", "foo"]).ok();
    marks.hold(daemon, "foo");
}

/// The power is cut: the memory is gone, the disk is there.
fn given_up(daemon: &Daemon) {
    let boot_id = ["cat", "/proc/sys/kernel/random/boot_id"];
    let before = daemon.exec("foo", &boot_id);
    daemon.run(&["suspend", "foo"]).ok();
    let file = folder(daemon, "foo").join("suspended.memory");
    assert!(file.exists());
    daemon.run(&["stop", "--force", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Stopped");
    assert!(!file.exists());
    daemon.run(&["start", "foo"]).ok();
    assert_ne!(daemon.exec("foo", &boot_id), before);
    assert_eq!(daemon.exec("foo", &["cat", "/var/tmp/file"]), "on disk\n");
}

/// Those that did not come from a launch alone: a fork, and a clone that stood by.
#[test]
fn guest_suspend_of_forks_and_standby_clones() {
    if !need(&NEEDS) {
        return;
    }
    let daemon = Daemon::start(Options::warm());
    daemon.run(&["set", "local.warm-pool=1"]).ok();
    // The first launch tells what is to stand by.
    daemon
        .run(&["launch", "--warm", "--name", "first"])
        .ok_with_words();
    wait_until("a clone stands by", 90, || {
        let log = daemon.log();
        log.contains("a clone stands by").then_some(())
    });
    daemon.run(&["delete", "--purge", "first"]).ok();
    daemon
        .run(&["launch", "--warm", "--name", "stood"])
        .ok_with_words();
    daemon.run(&["set", "local.warm-pool=0"]).ok();
    wait_until("no other one stands by", 60, || {
        (daemon.machines().len() == 1).then_some(())
    });
    let stood = Marks::leave(&daemon, "stood", 8);
    daemon
        .run(&["fork", "stood", "--name", "fork"])
        .ok_with_words();
    let fork = Marks::read(&daemon, "fork");
    fork.hold(&daemon, "fork");
    let names = [("stood", &stood), ("fork", &fork)];
    daemon.run(&["suspend", "stood", "fork"]).ok();
    assert!(daemon.machines().is_empty());
    daemon.run(&["start", "--all"]).ok();
    for (name, marks) in names {
        marks.hold(&daemon, name);
        assert_eq!(daemon.exec(name, &["hostname"]), format!("{name}\n"));
    }
    let verified = daemon.run(&["verify-unique", "stood", "fork"]);
    assert_eq!(verified.code(), 0, "{}", verified.text());
    // A fork of one that was resumed, and its suspend.
    daemon
        .run(&["fork", "stood", "--name", "again"])
        .ok_with_words();
    daemon.run(&["delete", "--purge", "stood", "fork"]).ok();
    let again = Marks::read(&daemon, "again");
    daemon.run(&["suspend", "again"]).ok();
    daemon.run(&["start", "again"]).ok();
    again.hold(&daemon, "again");
}

/// Milliseconds after a suspend or a resume began at which somebody is killed.
const MOMENTS: [u64; 4] = [20, 120, 300, 700];

#[test]
fn guest_suspend_whoever_is_killed() {
    if !need(&NEEDS) {
        return;
    }
    let mut daemon = Daemon::start(Options::warm());
    daemon
        .run(&["launch", "--warm", "--name", "foo"])
        .ok_with_words();
    let marks = Marks::leave(&daemon, "foo", 32);
    // To come back to, if a memory is lost as it must be.
    daemon
        .run(&["snapshot", "foo", "--with-memory", "--name", "safe"])
        .ok();
    let mut seen = Vec::new();
    for millis in MOMENTS {
        for what in ["suspend", "start"] {
            let state = the_daemon(&mut daemon, what, millis);
            seen.push(format!("{what} {millis} ms: {state}"));
            let wanted = match what {
                "suspend" => "suspend",
                _ => "start",
            };
            // Whatever it was: it can be brought there, and nothing is lost.
            daemon.run(&[wanted, "foo"]).ok();
            if what == "start" {
                marks.hold(&daemon, "foo");
            }
        }
    }
    for millis in MOMENTS {
        let state = the_machine(&daemon, millis);
        seen.push(format!("QEMU {millis} ms: {state}"));
        if state == "Stopped" {
            daemon.run(&["restore", "-d", "foo.safe"]).ok();
        }
        daemon.run(&["start", "foo"]).ok();
        marks.hold(&daemon, "foo");
    }
    eprintln!("{}", seen.join("\n"));
    let memory = folder(&daemon, "foo").join("suspended.memory");
    assert!(!memory.exists(), "a file is left");
}

/// Kills the daemon so long after `what` began; the state that another one finds.
fn the_daemon(daemon: &mut Daemon, what: &str, millis: u64) -> String {
    let mut client = daemon
        .command(&[what, "foo"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(millis));
    daemon.kill();
    client.wait().unwrap();
    daemon.start_again();
    let state = settles(daemon, "foo", &["Running", "Suspended"], 30);
    let machines = daemon.machines().len();
    let expected = usize::from(state == "Running");
    assert_eq!(machines, expected, "{what}, {millis} ms: {state}");
    state
}

/// Kills the machine so long after a suspend began; what came of the instance.
fn the_machine(daemon: &Daemon, millis: u64) -> String {
    let pid = machine(daemon, "foo").unwrap();
    let mut client = daemon
        .command(&["suspend", "foo"])
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    std::thread::sleep(Duration::from_millis(millis));
    kill_machine(pid);
    let ended = client.wait().unwrap();
    let state = settles(daemon, "foo", &["Stopped", "Suspended"], 30);
    assert_eq!(ended.success(), state == "Suspended", "{millis} ms");
    assert!(daemon.machines().is_empty());
    state
}
