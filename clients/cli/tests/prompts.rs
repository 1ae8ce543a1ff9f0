//! What the name `multipass` asks on a terminal, and what it makes of the answers.

mod support;

use std::fs::File;
use std::io::{Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::snapshots::snapshot_json;
use support::terminal::terminal;
use support::{Daemon, instance};

fn daemon() -> Daemon {
    let daemon = Daemon::start(vec![
        instance("foo", "running"),
        instance("bar", "stopped"),
        instance("nap", "suspended"),
    ]);
    daemon.script.lock().unwrap().snapshots = vec![
        snapshot_json("bar", "one", None),
        snapshot_json("bar", "two", Some("one")),
    ];
    daemon
}

/// Runs a line on a terminal, answers each question, and gives all that was shown.
fn on_terminal(daemon: &Daemon, line: &str, answers: &[(&str, &str)]) -> (i32, String) {
    let (mut master, slave) = terminal();
    let mut child = daemon
        .multipass_command(line)
        .stdin(slave.try_clone().unwrap())
        .stdout(slave)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut shown = String::new();
    for (question, answer) in answers {
        read_until(&mut master, &mut shown, question);
        master.write_all(answer.as_bytes()).unwrap();
        shown.push('|');
    }
    let code = child.wait().unwrap().code().unwrap();
    let mut buffer = [0; 4096];
    // The other side is gone; what it said is still there.
    while let Ok(len @ 1..) = master.read(&mut buffer) {
        shown.push_str(&String::from_utf8_lossy(&buffer[..len]));
    }
    (code, shown.replace('\r', ""))
}

fn read_until(master: &mut File, shown: &mut String, text: &str) {
    let begin = Instant::now();
    let from = shown.len();
    let mut buffer = [0; 4096];
    while !shown[from..].contains(text) {
        assert!(begin.elapsed() < Duration::from_secs(10), "{shown}");
        let len = master.read(&mut buffer).unwrap();
        shown.push_str(&String::from_utf8_lossy(&buffer[..len]));
    }
}

#[test]
fn snapshots_are_purged_only_with_a_yes() {
    let daemon = daemon();
    let question = "Are you sure you want to continue? (Yes/no): ";
    let (code, shown) = on_terminal(&daemon, "delete bar.one", &[(question, "no\n")]);
    assert_eq!(code, 0);
    assert!(shown.ends_with("no\nCancelled.\n"), "{shown}");
    assert!(daemon.calls().iter().all(|call| call.starts_with("GET")));
    let answers = [(question, "what\n"), ("Please answer Yes/no: ", "y\n")];
    let (code, shown) = on_terminal(&daemon, "delete bar.one", &answers);
    assert_eq!(code, 0, "{shown}");
    let calls = daemon.calls();
    assert!(
        calls.contains(&"DELETE /v1/instances/bar/snapshots/one".to_owned()),
        "{calls:?}"
    );
}

#[test]
fn a_restore_offers_a_snapshot_first() {
    let daemon = daemon();
    let question = "Do you want to take a snapshot of bar before discarding its current state? \
                    (Yes/no): ";
    let (code, shown) = on_terminal(&daemon, "restore bar.one", &[(question, "\n")]);
    assert_eq!(code, 0);
    assert!(
        shown.ends_with("Snapshot taken: bar.snapshot1\nSnapshot restored: bar.one\n"),
        "{shown}"
    );
    let bodies = daemon.bodies();
    assert_eq!(bodies[0].1["comment"], "Before restoring one");
    // Else a snapshot with memory, taken as pileus, would come back running.
    assert_eq!(bodies[1].1["disk_only"], true);
    let (code, shown) = on_terminal(&daemon, "restore bar.one", &[(question, "no\n")]);
    assert_eq!(code, 0);
    assert!(!shown.contains("Snapshot taken"), "{shown}");
    assert!(shown.ends_with("Snapshot restored: bar.one\n"), "{shown}");
}

#[test]
fn a_passphrase_is_not_shown() {
    let daemon = daemon();
    let answers = [("Please enter passphrase: ", "open sesame\n")];
    let (code, shown) = on_terminal(&daemon, "authenticate", &answers);
    assert_eq!(code, 0, "{shown}");
    assert!(!shown.contains("sesame"), "{shown}");
    let answers = [
        ("Please enter passphrase: ", "a\n"),
        ("Please re-enter passphrase: ", "b\n"),
    ];
    let (code, _) = on_terminal(&daemon, "set local.passphrase", &answers);
    assert_eq!(code, 1);
    assert!(
        daemon
            .bodies()
            .iter()
            .all(|(call, _)| !call.contains("settings"))
    );
}
