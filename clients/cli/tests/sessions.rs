//! exec and shell against a daemon that plays the guest: streams, exit codes, signals, terminals.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use support::terminal::terminal;
use support::{Daemon, Ran, instance};

fn daemon() -> Daemon {
    Daemon::start(vec![instance("foo", "running"), instance("bar", "stopped")])
}

fn spawn(daemon: &Daemon, line: &str) -> Child {
    daemon
        .command(line)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn kill(child: &Child, signal: Signal) {
    rustix::process::kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn the_commands_exit_code_is_returned() {
    let daemon = daemon();
    for (line, code) in [
        ("exec foo -- exit 0", 0),
        ("exec foo exit 33", 33),
        ("exec foo -- exit 255", 255),
        ("exec foo -- exit 258", 2),
        ("exec foo -- unknown", 127),
    ] {
        let ran = daemon.run(line);
        assert_eq!((ran.code, ran.err.as_str()), (code, ""), "{line}");
    }
    let ran = daemon.run("exec foo -- broken");
    assert_eq!(ran.code, 255);
    assert!(
        ran.err.starts_with("exec failed: The guest is gone\n"),
        "{}",
        ran.err
    );
}

#[test]
fn streams_are_apart_and_binary_clean() {
    let daemon = daemon();
    let output = daemon.command("exec foo -- both").output().unwrap();
    assert_eq!(output.stdout, b"out\x00\xff\n");
    assert_eq!(output.stderr, b"err\n");
    let ran = daemon.run("exec foo -d /srv -- request");
    let request: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let expected = serde_json::json!({
        "command": ["request"], "env": {}, "working_directory": "/srv"
    });
    assert_eq!(request, expected);
}

#[test]
fn input_ends_where_it_ends() {
    let daemon = daemon();
    for line in ["exec foo -- cat", "shell foo"] {
        let mut child = spawn(&daemon, line);
        let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
        let mut stdin = child.stdin.take().unwrap();
        let sent = bytes.clone();
        let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
        let output = child.wait_with_output().unwrap();
        writer.join().unwrap();
        assert!(output.status.success());
        assert!(output.stdout == bytes, "{line}");
    }
    // No input at all is an end as well.
    assert_eq!(daemon.run("exec foo -- count"), Ran::ok("0"));
}

#[test]
fn a_hundred_mebibytes_each_way_in_bounded_memory() {
    let daemon = daemon();
    let mut child = spawn(&daemon, "exec foo -- zeros 100");
    let mut stdout = child.stdout.take().unwrap();
    // A reader that does not read: the client must wait, not collect.
    std::thread::sleep(Duration::from_millis(300));
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let resident = status.lines().find(|l| l.starts_with("VmRSS")).unwrap();
    let kib: u64 = resident.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!(kib < 64 << 10, "{resident}");
    let read = std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    assert_eq!(read, 100 << 20);
    assert!(child.wait().unwrap().success());

    let mut child = spawn(&daemon, "exec foo -- count");
    let mut stdin = child.stdin.take().unwrap();
    let piece = vec![7; 1 << 20];
    for _ in 0..100 {
        stdin.write_all(&piece).unwrap();
    }
    drop(stdin);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.stdout, (100 << 20).to_string().as_bytes());
}

#[test]
fn a_closed_pipe_ends_quietly() {
    let daemon = daemon();
    let mut child = spawn(&daemon, "exec foo -- zeros 100");
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 1000]).unwrap();
    drop(stdout);
    let ran = Ran::of(&child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.err.as_str()), (141, ""));
}

#[test]
fn a_stopped_instance_is_started_first() {
    let daemon = daemon();
    let ran = daemon.run("exec bar -- exit 3");
    assert_eq!((ran.code, ran.err.as_str()), (3, ""));
    let calls = daemon.calls();
    assert!(
        calls.contains(&"POST /v1/instances/bar/start".to_owned()),
        "{calls:?}"
    );
    daemon.script.lock().unwrap().instances[1].state = pileus_api::InstanceState::Stopped;
    daemon.script.lock().unwrap().instances[1].deleted = true;
    let ran = daemon.run("exec bar -- exit 3");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err
            .starts_with("exec failed: instance \"bar\" is deleted\n")
    );
}

#[test]
fn signals_go_to_the_command() {
    let daemon = daemon();
    let mut child = spawn(&daemon, "exec foo -- tell");
    let mut stdout = child.stdout.take().unwrap();
    read_until(&mut stdout, "ready");
    for (signal, name) in [
        (Signal::INT, "INT"),
        (Signal::HUP, "HUP"),
        (Signal::TERM, "TERM"),
    ] {
        kill(&child, signal);
        let told = format!("{{\"type\":\"signal\",\"signal\":\"{name}\"}}");
        read_until(&mut stdout, &told);
    }
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
}

fn resize(terminal: &File, cols: u16, rows: u16) {
    let size = Winsize {
        ws_col: cols,
        ws_row: rows,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).unwrap();
}

fn on_terminal(daemon: &Daemon, line: &str, slave: &File) -> Child {
    daemon
        .command(line)
        .stdin(slave.try_clone().unwrap())
        .stdout(slave.try_clone().unwrap())
        .stderr(slave.try_clone().unwrap())
        .spawn()
        .unwrap()
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

#[test]
fn a_terminal_is_raw_while_the_command_runs_and_only_then() {
    let daemon = daemon();
    let (mut master, slave) = terminal();
    resize(&slave, 132, 43);
    let before = format!("{:?}", tcgetattr(&slave).unwrap());

    // The request tells of the terminal.
    let mut child = on_terminal(&daemon, "exec foo -- request", &slave);
    let request = read_until(&mut master, "}}");
    assert!(
        request.contains(r#""tty":{"term":"xterm","cols":132,"rows":43}"#),
        "{request}"
    );
    assert!(child.wait().unwrap().success());
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before);

    // Keys go through as bytes, sizes follow, and the end restores all.
    let mut child = on_terminal(&daemon, "exec foo -- tell", &slave);
    read_until(&mut master, "ready");
    assert!(is_raw(&slave));
    master.write_all(b"\x03").unwrap();
    read_until(&mut master, r#"bytes b"\x03""#);
    resize(&slave, 100, 30);
    kill(&child, Signal::WINCH);
    read_until(&mut master, r#"{"type":"resize","cols":100,"rows":30}"#);
    master.write_all(b"q").unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before);
}

#[test]
fn a_signal_or_a_lost_daemon_leaves_the_terminal_as_it_was() {
    let daemon = daemon();
    let (mut master, slave) = terminal();
    let before = format!("{:?}", tcgetattr(&slave).unwrap());
    let mut child = on_terminal(&daemon, "shell foo", &slave);
    let begin = Instant::now();
    while !is_raw(&slave) {
        assert!(begin.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(5));
    }
    kill(&child, Signal::TERM);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before);

    let mut child = on_terminal(&daemon, "exec foo -- tell", &slave);
    read_until(&mut master, "ready");
    drop(daemon);
    assert_eq!(child.wait().unwrap().code(), Some(255));
    assert_eq!(format!("{:?}", tcgetattr(&slave).unwrap()), before);
}

#[test]
fn on_a_terminal_a_launch_shows_its_phases_on_standard_error_only() {
    use pileus_api::{OperationEvent, Phase};
    let daemon = daemon();
    let phase = Phase::Booting;
    daemon.script.lock().unwrap().events = vec![OperationEvent::Phase { phase }; 60];
    let (mut master, slave) = terminal();
    let output = daemon
        .command("launch -n web")
        .stderr(slave.try_clone().unwrap())
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"Launched: web\n");
    let shown = read_until(&mut master, "Waiting for web to boot");
    assert!(!shown.contains("Launched"), "{shown}");
}
