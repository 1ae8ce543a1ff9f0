//! Commands against a daemon that plays by a script: what is asked, what is shown, the exit code.

mod support;

use std::io::Write;
use std::process::Stdio;
use std::time::{Duration, Instant};

use pileus_api::{Code, ErrorBody, OperationEvent, Phase, Progress, Size};
use pileus_base::Error;
use support::{Daemon, Ran, instance};

fn daemon() -> Daemon {
    Daemon::start(vec![instance("foo", "running"), instance("bar", "stopped")])
}

#[test]
fn list_shows_what_the_daemon_has() {
    let daemon = daemon();
    let ran = daemon.run("list");
    let table = "\
Name                    State             IPv4             Image
bar                     Stopped           --               Debian 13
foo                     Running           10.1.2.3         Debian 13
";
    assert_eq!(ran, Ran::ok(table));
    assert_eq!(daemon.run("ls --format table"), Ran::ok(table));
    let json = daemon.run("list --format=json");
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["list"][1]["ipv4"][0], "10.1.2.3");
}

#[test]
fn launch_prints_the_name_and_nothing_else() {
    let daemon = daemon();
    {
        let mut script = daemon.script.lock().unwrap();
        let progress = Progress {
            done: 1,
            total: Some(2),
        };
        script.events = vec![
            OperationEvent::Phase {
                phase: Phase::RetrievingImage,
            },
            OperationEvent::Progress { progress },
            OperationEvent::Log {
                line: "hello".into(),
            },
            OperationEvent::Phase {
                phase: Phase::Booting,
            },
        ];
    }
    assert_eq!(daemon.run("launch"), Ran::ok("Launched: calm-cod\n"));
    let line = "launch debian-13 -n web -c2 --mem 1.5G -d5G --timeout 60 --cloud-init -";
    let mut child = daemon
        .command(line)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let data = b"#cloud-config\n\xff\x00";
    child.stdin.take().unwrap().write_all(data).unwrap();
    let ran = Ran::of(&child.wait_with_output().unwrap());
    assert_eq!(ran, Ran::ok("Launched: web\n"));
    let script = daemon.script.lock().unwrap();
    let request = &script.launches[1];
    assert_eq!(request.image.as_deref(), Some("debian-13"));
    assert_eq!(request.cpus, Some(2));
    assert_eq!(request.memory, Some(Size::mib(1536)));
    assert_eq!(request.disk, Some(Size::gib(5)));
    assert_eq!(request.timeout, Some(60));
    assert_eq!(request.timezone.as_deref(), Some("Europe/Berlin"));
    assert_eq!(request.user_data.as_ref().unwrap().0, data);
}

#[test]
fn launch_warnings_go_to_standard_error() {
    let daemon = daemon();
    daemon.script.lock().unwrap().warnings = vec!["slow here".into()];
    let ran = daemon.run("launch");
    assert_eq!(ran.code, 0);
    assert_eq!(ran.out, "Launched: calm-cod\n");
    assert_eq!(ran.err, "warning: slow here\n");
}

#[test]
fn a_failed_launch_tells_code_phase_details_and_hint() {
    let daemon = daemon();
    let err = Error::new(Code::BootTimeout, "No sign of life within 300 s")
        .detail("[  OK  ] \x1b[31mpanic\x1b[0m")
        .advise("Look at the console.");
    daemon.script.lock().unwrap().end = Some(ErrorBody::from(err));
    let ran = daemon.run("launch -n web");
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    assert_eq!(
        ran.err,
        "launch failed: No sign of life within 300 s\ncode: boot-timeout; phase: booting\n\
         [  OK  ] panic\nhint: Look at the console.\n"
    );
}

#[test]
fn ctrl_c_cancels_a_launch() {
    let daemon = daemon();
    daemon.script.lock().unwrap().hang = true;
    let child = daemon
        .command("launch")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until(|| {
        daemon
            .script
            .lock()
            .unwrap()
            .calls
            .iter()
            .any(|c| c.ends_with("/events"))
    });
    kill(&child, rustix::process::Signal::INT);
    let ran = Ran::of(&child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.out.as_str()), (130, ""));
    assert!(
        ran.err.contains("launch failed: The launch was cancelled"),
        "{}",
        ran.err
    );
    let calls = daemon.calls();
    assert!(
        calls
            .iter()
            .any(|call| call.starts_with("DELETE /v1/operations/"))
    );
}

#[test]
fn a_second_ctrl_c_does_not_wait() {
    let daemon = daemon();
    {
        let mut script = daemon.script.lock().unwrap();
        script.hang = true;
        script.deaf = true;
    }
    let child = daemon
        .command("launch")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let called = |what: &str| {
        let script = daemon.script.lock().unwrap();
        script.calls.iter().any(|call| call.contains(what))
    };
    until(|| called("/events"));
    kill(&child, rustix::process::Signal::INT);
    until(|| called("DELETE"));
    kill(&child, rustix::process::Signal::INT);
    let ran = Ran::of(&child.wait_with_output().unwrap());
    assert_eq!(ran.code, 130);
    assert!(ran.err.contains("Left while cancelling"), "{}", ran.err);
}

#[test]
fn the_clients_own_timeout_has_its_exit_code() {
    let daemon = daemon();
    daemon.script.lock().unwrap().hang = true;
    let begin = Instant::now();
    let ran = daemon.run("launch --timeout 1");
    assert_eq!(ran.code, 5);
    assert!(
        ran.err
            .starts_with("Timed out waiting for instance launch.\n")
    );
    assert!(begin.elapsed() < Duration::from_secs(60));
    let calls = daemon.calls();
    assert!(
        !calls.iter().any(|call| call.starts_with("DELETE")),
        "the work goes on"
    );
    let ran = daemon.run("start bar --timeout 1");
    assert_eq!(ran.code, 5);
}

#[test]
fn missing_instances_have_the_known_texts() {
    let daemon = daemon();
    let missing = "The following errors occurred:\ninstance \"x\" does not exist\n";
    for command in ["info", "stop", "restart", "delete", "recover"] {
        let ran = daemon.run(&format!("{command} foo x"));
        assert_eq!(ran.code, 2, "{command}");
        assert_eq!(ran.out, "");
        assert_eq!(ran.err, format!("{command} failed: {missing}"));
    }
    let ran = daemon.run("start x");
    assert_eq!(ran.code, 2);
    assert_eq!(
        ran.err,
        "start failed: instance(s) missing\nInstance 'x' does not exist.\n"
    );
    for line in ["exec x -- ls", "shell x", "logs .."] {
        let ran = daemon.run(line);
        assert_eq!(ran.code, 2, "{line} {}", ran.err);
        assert!(ran.err.contains(" failed: instance \""), "{}", ran.err);
    }
    // Nothing was done to the one that exists.
    assert!(daemon.calls().iter().all(|call| call.starts_with("GET")));
}

#[test]
fn usage_errors() {
    let daemon = daemon();
    for (line, text) in [
        ("delete", "Name argument or --all is required\n"),
        (
            "start --all foo",
            "Cannot specify name(s) when --all option set\n",
        ),
        (
            "start foo --timeout 0",
            "error: --timeout value has to be a positive integer\n",
        ),
        (
            "launch -c 0",
            "Error: invalid CPU count '0', need a positive integer value.\n",
        ),
        (
            "launch --cloud-init /nope",
            "Could not load cloud-init configuration: /nope: ",
        ),
        ("nope", "error: unrecognized subcommand 'nope'"),
        ("help nope", "Error: Unknown Command: 'nope'\n"),
        ("list --format xml", "error: invalid value 'xml'"),
    ] {
        let ran = daemon.run(line);
        assert_eq!((ran.code, ran.out.as_str()), (1, ""), "{line}");
        assert!(ran.err.starts_with(text), "{line}: {}", ran.err);
    }
    let help = daemon.run("");
    assert_eq!(help.code, 2);
    assert!(
        help.out.contains("\n  list           List all"),
        "{}",
        help.out
    );
    assert_eq!(daemon.run("--help").code, 0);
    assert_eq!(daemon.run("help launch").code, 0);
    assert!(daemon.calls().is_empty());
}

#[test]
fn several_instances_are_worked_on_each() {
    let daemon = daemon();
    assert_eq!(daemon.run("stop --all --force"), Ran::ok(""));
    // The stopped one needs no stopping.
    let calls = daemon.calls();
    let posts: Vec<_> = calls.iter().filter(|c| c.starts_with("POST")).collect();
    assert_eq!(posts, ["POST /v1/instances/foo/stop"]);
    assert_eq!(daemon.run("delete foo bar -p"), Ran::ok(""));
    let calls = daemon.calls();
    for name in ["foo", "bar"] {
        let call = format!("DELETE /v1/instances/{name}?purge=true");
        assert!(calls.contains(&call), "{calls:?}");
    }
    let err = Error::new(Code::ShutdownTimeout, "It did not shut down");
    daemon.script.lock().unwrap().end = Some(ErrorBody::from(err));
    let ran = daemon.run("delete foo bar");
    assert_eq!(ran.code, 2);
    assert_eq!(
        ran.err,
        "delete failed: The following errors occurred:\nfoo: It did not shut down\n\
         bar: It did not shut down\nhint: pileus stop --force cuts the power.\n"
    );
}

#[test]
fn purge_and_recover_say_nothing() {
    let daemon = daemon();
    assert_eq!(daemon.run("purge"), Ran::ok(""));
    daemon.script.lock().unwrap().instances[1].deleted = true;
    assert_eq!(daemon.run("recover foo bar"), Ran::ok(""));
    let calls = daemon.calls();
    let posts: Vec<_> = calls.iter().filter(|c| c.starts_with("POST")).collect();
    assert_eq!(posts, ["POST /v1/purge", "POST /v1/instances/bar/recover"]);
}

#[test]
fn version_needs_no_daemon() {
    let daemon = daemon();
    let own = env!("CARGO_PKG_VERSION");
    let both = format!("pileus      {own}\npileusd     9.8.7\n");
    assert_eq!(daemon.run("version"), Ran::ok(&both));
    let one = format!("pileus      {own}\n");
    assert_eq!(daemon.run("version --socket /nope"), Ran::ok(&one));
    assert_eq!(daemon.run("wait-ready --timeout 5"), Ran::ok(""));
    let ran = daemon.run("wait-ready --timeout 1 --socket /nope");
    assert_eq!(ran.code, 5);
}

#[test]
fn without_a_daemon_the_socket_is_named() {
    let daemon = daemon();
    let ran = daemon.run("list --socket /nope/sock");
    assert_eq!(ran.code, 2);
    assert_eq!(
        ran.err,
        "list failed: cannot connect to the pileus socket\n\
         Please ensure pileusd is running and '/nope/sock' is accessible\n"
    );
}

#[test]
fn the_console_log_is_exact_in_a_pipe() {
    let daemon = daemon();
    let log = b"[\x1b[32m OK \x1b[0m]\xff\n".to_vec();
    daemon.script.lock().unwrap().log = log.clone();
    let output = daemon.command("logs foo -n 5").output().unwrap();
    assert_eq!(output.stdout, log);
    let calls = daemon.calls();
    assert_eq!(calls, ["GET /v1/instances/foo/log?follow=false&tail=5"]);
}

#[test]
fn names_are_completed_by_the_daemon_and_silence_is_no_error() {
    let daemon = daemon();
    let complete = |socket: &str| {
        let output = daemon
            .command("-- pileus stop f")
            .env("COMPLETE", "bash")
            .env("_CLAP_COMPLETE_INDEX", "2")
            .env("_CLAP_COMPLETE_COMP_TYPE", "9")
            .env("_CLAP_COMPLETE_SPACE", "false")
            .env("_CLAP_IFS", "\n")
            .env("PILEUS_SOCKET", socket)
            .output()
            .unwrap();
        Ran::of(&output)
    };
    let ran = complete(daemon.socket().to_str().unwrap());
    assert_eq!((ran.code, ran.out.trim()), (0, "foo"), "{}", ran.err);
    let ran = complete("/nope");
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    let ran = daemon.run("completions bash");
    assert_eq!(ran, Ran::ok("source <(COMPLETE=bash pileus)\n"));
}

fn kill(child: &std::process::Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
}

fn until(condition: impl Fn() -> bool) {
    let begin = Instant::now();
    while !condition() {
        assert!(begin.elapsed() < Duration::from_secs(10), "it never came");
        std::thread::sleep(Duration::from_millis(5));
    }
}
