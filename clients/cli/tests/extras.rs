//! networks, console, top, events, doctor, wait, ssh-config: against a daemon that stands in for the real
//! one, with the host's own ssh.

mod guest;
mod support;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use guest::Daemon;
use pileus_api::{CloudInit, CloudInitStatus, InstanceState};
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, tcgetattr};
use serde_json::{Value, json};
use support::{Ran, instance};

fn daemon() -> Daemon {
    Daemon::start(vec![instance("foo", "running"), instance("bar", "stopped")])
}

fn spawn(daemon: &Daemon, line: &str) -> Child {
    daemon.command(line).stdin(Stdio::piped()).spawn().unwrap()
}

/// A terminal of its own: master and slave.
fn terminal() -> (File, File) {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
    let master = rustix::pty::openpt(flags).unwrap();
    rustix::pty::grantpt(&master).unwrap();
    rustix::pty::unlockpt(&master).unwrap();
    let name = rustix::pty::ptsname(&master, Vec::new()).unwrap();
    let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
    let slave = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
    (File::from(master), File::from(slave))
}

fn on_terminal(daemon: &Daemon, line: &str, slave: &File) -> Child {
    let copy = || slave.try_clone().unwrap();
    let mut command = daemon.command(line);
    command.stdin(copy()).stdout(copy()).stderr(copy());
    command.spawn().unwrap()
}

fn is_raw(terminal: &File) -> bool {
    let modes = tcgetattr(terminal).unwrap().local_modes;
    !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
}

/// Reads until the text has come; returns all that came.
fn read_until(from: &mut impl Read, text: &str) -> String {
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let seen = String::from_utf8_lossy(&all).into_owned();
        if seen.contains(text) {
            return seen;
        }
        match from.read(&mut buffer) {
            Ok(len) if len > 0 => all.extend_from_slice(&buffer[..len]),
            end => panic!("{end:?} before {text:?}: {seen}"),
        }
    }
}

/// Waits until the daemon was asked for this.
fn asked(daemon: &Daemon, call: &str) {
    let begin = Instant::now();
    while !daemon.world.lock().unwrap().calls.iter().any(|c| c == call) {
        assert!(begin.elapsed() < Duration::from_secs(20), "{call}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn networks_are_listed() {
    let daemon = daemon();
    assert_eq!(
        daemon.run("networks"),
        Ran::ok("No network interfaces found.\n")
    );
    daemon.world.lock().unwrap().networks = json!([
        {"name": "eth0", "type": "ethernet", "description": "Ethernet device"},
        {"name": "br0", "type": "bridge", "description": "Network bridge"},
    ]);
    let csv = "Name,Type,Description\nbr0,bridge,\"Network bridge\"\n\
               eth0,ethernet,\"Ethernet device\"\n";
    assert_eq!(daemon.run("networks --format csv"), Ran::ok(csv));
    let output = daemon.named("multipass", "networks --format=json").output();
    let list: Value = serde_json::from_slice(&output.unwrap().stdout).unwrap();
    assert_eq!(list["list"][1]["type"], "ethernet");
}

#[test]
fn the_console_through_pipes() {
    let daemon = daemon();
    let mut child = spawn(&daemon, "console foo");
    let mut stdin = child.stdin.take().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    read_until(&mut stdout, "login:");
    // Nothing is looked for in a pipe: Ctrl-] is a byte.
    stdin.write_all(b"a\x1db\xff").unwrap();
    let mut bytes = Vec::new();
    while !bytes.ends_with(b">") {
        let mut byte = [0];
        stdout.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
    }
    assert!(bytes.ends_with(b"<a\x1db\xff>"), "{bytes:?}");
    // It ends with the machine.
    stdin.write_all(b"off").unwrap();
    assert!(child.wait().unwrap().success());
    // It ends when nobody reads it any more, even if nothing is written.
    let mut child = spawn(&daemon, "console foo");
    let mut stdout = child.stdout.take().unwrap();
    read_until(&mut stdout, "login:");
    drop(child.stdin.take());
    drop(stdout);
    assert_eq!(child.wait().unwrap().code(), Some(141));
    for (name, text) in [
        ("bar", "console failed: instance \"bar\" is not running\n"),
        ("none", "console failed: instance \"none\" does not exist\n"),
    ] {
        let ran = daemon.run(&format!("console {name}"));
        assert_eq!(ran.code, 2);
        assert!(ran.err.starts_with(text), "{ran:?}");
    }
}

#[test]
fn the_console_on_a_terminal_is_left_by_its_key() {
    let daemon = daemon();
    let (mut master, slave) = terminal();
    let before = format!("{:?}", tcgetattr(&slave).unwrap());
    let mut child = on_terminal(&daemon, "console foo", &slave);
    let told = read_until(&mut master, "login:");
    assert!(told.contains("Ctrl-] leaves"), "{told}");
    assert!(is_raw(&slave));
    // Ctrl-C is the guest's.
    master.write_all(b"\x03").unwrap();
    read_until(&mut master, "<\x03>");
    master.write_all(b"\x1d").unwrap();
    read_until(&mut master, "Detached");
    assert!(child.wait().unwrap().success());
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before);
}

fn usage(name: &str, cpu: u64) -> Value {
    json!({"name": name, "cpu_nanoseconds": cpu, "cpus": 1, "memory": 300 << 20,
           "memory_total": 1 << 30, "disk_read": cpu, "disk_written": 0,
           "net_received": 0, "net_sent": 0})
}

#[test]
fn top_shows_rates_once_or_live() {
    let daemon = daemon();
    let samples = vec![
        json!([usage("idle", 5), usage("busy", 0)]),
        json!([usage("idle", 5), usage("busy", 500_000_000)]),
    ];
    daemon.world.lock().unwrap().usage = samples.clone();
    let begin = Instant::now();
    let ran = daemon.run("top --format json");
    assert!(begin.elapsed() > Duration::from_millis(900));
    let top: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(top["top"][0]["name"], "busy");
    let cpu = top["top"][0]["cpu_percent"].as_f64().unwrap();
    // Half a second of work in a second that may have been a long one.
    assert!((10.0..=55.0).contains(&cpu), "{cpu}");
    let ran = daemon.run("top --once");
    assert!(
        ran.out.starts_with("Name ") && !ran.out.contains('\x1b'),
        "{ran:?}"
    );
    assert_eq!(daemon.run("top -n 0").code, 1);

    daemon.world.lock().unwrap().usage = samples;
    let (mut master, slave) = terminal();
    let before = format!("{:?}", tcgetattr(&slave).unwrap());
    let mut child = on_terminal(&daemon, "top", &slave);
    let shown = read_until(&mut master, "idle");
    assert!(
        shown.contains("\x1b[?1049h") && shown.contains("busy"),
        "{shown}"
    );
    master.write_all(b"q").unwrap();
    read_until(&mut master, "\x1b[?1049l");
    assert!(child.wait().unwrap().success());
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before);
    let mut child = on_terminal(&daemon, "top -n 1", &slave);
    read_until(&mut master, "\x1b[?1049l");
    assert!(child.wait().unwrap().success());
}

#[test]
fn events_are_lines() {
    let daemon = daemon();
    let mut child = spawn(&daemon, "events --format json --instance foo");
    let mut stdout = child.stdout.take().unwrap();
    asked(&daemon, "GET /v1/events");
    std::thread::sleep(Duration::from_millis(50));
    daemon.change("bar", |i| i.state = InstanceState::Running);
    daemon.change("foo", |i| i.state = InstanceState::Stopped);
    let line = read_until(&mut stdout, "\n");
    let event: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&event["name"], &event["state"]),
        (&json!("foo"), &json!("stopped"))
    );
    let mut people = spawn(&daemon, "events");
    let mut stdout = people.stdout.take().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    daemon.change("foo", |i| i.deleted = true);
    let line = read_until(&mut stdout, "\n");
    assert!(line.ends_with("instance   foo  deleted\n"), "{line}");
    drop(daemon);
    for mut child in [child, people] {
        assert_eq!(child.wait().unwrap().code(), Some(2));
    }
}

#[test]
fn doctor_works_with_and_without_a_daemon() {
    let daemon = daemon();
    let ran = daemon.run("doctor --format json");
    let told: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{ran:?}");
    assert_eq!(told["host"]["cpus"], 2);
    assert_eq!(told["checks"][0]["name"], "socket");
    assert_eq!(told["checks"][0]["verdict"], "good");
    let check = |verdict: &str| json!({"name": "space", "verdict": verdict, "message": "So much.", "advice": "Make room."});
    daemon.world.lock().unwrap().host["checks"] = json!([check("warning")]);
    let ran = daemon.run("doctor");
    assert_eq!(ran.code, 0);
    assert!(
        ran.out.contains("→ Make room.\n") && ran.out.contains("could be better"),
        "{ran:?}"
    );
    daemon.world.lock().unwrap().host["checks"] = json!([check("bad")]);
    assert_eq!(daemon.run("doctor").code, 2);
    let mut alone = daemon.command("doctor --format json --socket /nowhere/sock");
    let ran = Ran::of(&alone.output().unwrap());
    let told: Value = serde_json::from_str(&ran.out).unwrap();
    assert_eq!(
        (ran.code, &told["checks"][0]["verdict"]),
        (2, &json!("bad"))
    );
    assert_eq!(told["host"], Value::Null);
}

#[test]
fn wait_ends_when_it_is_so() {
    let daemon = daemon();
    for line in [
        "wait foo running",
        "wait bar stopped",
        "wait none deleted",
        "wait foo ip",
    ] {
        assert_eq!(daemon.run(line), Ran::ok(""), "{line}");
    }
    let begin = Instant::now();
    let ran = daemon.run("wait bar running --timeout 1");
    assert_eq!(ran.code, 5, "{ran:?}");
    assert_eq!(ran.err, "Timed out waiting for bar: running.\n");
    assert!(begin.elapsed() < Duration::from_secs(60));
    assert_eq!(daemon.run("wait none running").code, 2);
    assert_eq!(daemon.run("wait foo sunny").code, 1);
    assert_eq!(daemon.run("wait foo running --timeout 0").code, 1);

    // An event ends it, and nothing is asked again and again.
    daemon.world.lock().unwrap().calls.clear();
    let child = spawn(&daemon, "wait bar running --timeout 60");
    asked(&daemon, "GET /v1/instances/bar");
    std::thread::sleep(Duration::from_millis(1500));
    daemon.change("foo", |i| i.state = InstanceState::Stopped);
    daemon.change("bar", |i| i.state = InstanceState::Running);
    assert_eq!(Ran::of(&child.wait_with_output().unwrap()), Ran::ok(""));
    let calls = daemon.world.lock().unwrap().calls.clone();
    let looks = calls.iter().filter(|call| *call == "GET /v1/instances/bar");
    assert_eq!(looks.count(), 2, "{calls:?}");
}

#[test]
fn wait_for_what_no_event_tells() {
    let daemon = daemon();
    let child = spawn(&daemon, "wait foo cloud-init");
    asked(&daemon, "GET /v1/instances/foo");
    let ended = |status, errors| {
        daemon.change("foo", |i| i.cloud_init = Some(CloudInit { status, errors }));
    };
    ended(CloudInitStatus::Done, vec![]);
    assert_eq!(Ran::of(&child.wait_with_output().unwrap()), Ran::ok(""));
    ended(CloudInitStatus::Error, vec!["runcmd failed".into()]);
    let ran = daemon.run("wait foo cloud-init");
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("runcmd failed"), "{ran:?}");
    // A port that opens later.
    let child = spawn(&daemon, "wait foo ssh --timeout 30");
    asked(&daemon, "GET /v1/instances/foo/port?port=22");
    daemon.world.lock().unwrap().sshd = vec!["/bin/cat".into()];
    assert_eq!(Ran::of(&child.wait_with_output().unwrap()), Ran::ok(""));
}

/// Keys of a client and of a host, and a server for both; `None` where this host can't run one.
fn sshd(daemon: &Daemon) -> Option<()> {
    let program = "/usr/sbin/sshd";
    if !Path::new(program).exists() || !rustix::process::getuid().is_root() {
        eprintln!("SKIPPED: ssh's tests need {program} (Debian: openssh-server) and root");
        return None;
    }
    // Where sshd keeps nothing, which must be there.
    fs::create_dir_all("/run/sshd").unwrap();
    let dir = daemon.dir.path();
    for key in ["client", "host_key"] {
        let mut make = Command::new("ssh-keygen");
        make.args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(dir.join(key));
        assert!(make.status().unwrap().success());
    }
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap();
    fs::copy(dir.join("client.pub"), dir.join("authorized")).unwrap();
    let config = format!(
        "HostKey {0}/host_key\nAuthorizedKeysFile {0}/authorized\nStrictModes no\n\
         PermitRootLogin yes\nUsePAM no\nPidFile none\nSubsystem sftp internal-sftp\n",
        dir.display()
    );
    fs::write(dir.join("sshd_config"), config).unwrap();
    let mut world = daemon.world.lock().unwrap();
    world.ssh = json!({"name": "x", "user": "root", "address": "192.0.2.1", "port": 22,
                       "private_key": read("client"), "host_key": read("host_key.pub")});
    let path = dir.join("sshd_config").display().to_string();
    world.sshd = [program, "-i", "-e", "-f", &path].map(str::to_owned).into();
    Some(())
}

/// One of ssh's programs, with our configuration included.
fn with_config(daemon: &Daemon, program: &str) -> Command {
    let main = daemon.dir.path().join("ssh_main");
    let ours = daemon.host("../user/.config/pileus/ssh/config");
    let ours = fs::canonicalize(ours).unwrap();
    fs::write(
        &main,
        format!("Include \"{}\"\nHost *\n  BatchMode yes\n", ours.display()),
    )
    .unwrap();
    let mut command = Command::new(program);
    command
        .env("HOME", daemon.host("../user"))
        .stdin(Stdio::null());
    match program {
        "rsync" => command.arg("-e").arg(format!("ssh -F {}", main.display())),
        _ => command.arg("-F").arg(main),
    };
    command
}

#[test]
fn ssh_scp_and_rsync_reach_an_instance() {
    let daemon = daemon();
    if sshd(&daemon).is_none() {
        return;
    }
    let ran = daemon.run("ssh-config foo");
    assert!(
        ran.out.contains("Host foo foo.pileus\n") && !ran.out.contains("bar"),
        "{ran:?}"
    );
    assert!(!daemon.host("../user/.config/pileus/ssh").exists());
    assert_eq!(daemon.run("ssh-config --write"), Ran::ok(""));
    let run = |program: &str, args: &[&str]| {
        let output = with_config(&daemon, program).args(args).output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{program} {args:?}: {err}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(run("ssh", &["foo.pileus", "echo $((6 * 7))"]), "42\n");
    let file = daemon.host("file");
    fs::write(&file, vec![7; 3_000_000]).unwrap();
    let file = file.display().to_string();
    let target = daemon.home("copy");
    run("scp", &["-q", &file, &format!("foo:{}", target.display())]);
    assert_eq!(fs::metadata(&target).unwrap().len(), 3_000_000);
    if Path::new("/usr/bin/rsync").exists() {
        let target = daemon.home("again");
        run(
            "rsync",
            &["-a", &file, &format!("foo:{}", target.display())],
        );
        assert_eq!(fs::metadata(&target).unwrap().len(), 3_000_000);
    } else {
        eprintln!("SKIPPED: this host has no rsync");
    }
    // Another host key than the one that was pinned ends it.
    let known = daemon.host("../user/.config/pileus/ssh/known_hosts");
    let wrong = fs::read_to_string(daemon.dir.path().join("client.pub")).unwrap();
    let wrong: Vec<&str> = wrong.split(' ').take(2).collect();
    fs::write(&known, format!("foo.pileus {}\n", wrong.join(" "))).unwrap();
    let refused = with_config(&daemon, "ssh").args(["foo", "true"]).output();
    assert!(!refused.unwrap().status.success());
    // Keys of what is gone are removed.
    let key = daemon.host("../user/.config/pileus/ssh/keys/foo");
    assert!(key.exists());
    daemon.world.lock().unwrap().instances.remove(0);
    assert_eq!(daemon.run("ssh-config --write"), Ran::ok(""));
    assert!(!key.exists());
    assert_eq!(daemon.run("ssh-config x --write").code, 1);
    // The proxy tells why it can't.
    let mut proxy = daemon.command("ssh-proxy none 22");
    let ran = Ran::of(&proxy.arg0("pileus").output().unwrap());
    assert!(
        ran.err.contains("instance \"none\" does not exist"),
        "{ran:?}"
    );
}
