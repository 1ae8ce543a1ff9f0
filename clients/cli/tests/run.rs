//! `pileus run` against a daemon that plays the guest: whatever way it ends, the instance is deleted,
//! and nothing but the command's own output is on standard output.

mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use pileus_api::{Code, ErrorBody, OperationEvent, Phase, PhaseTime, Size, Warm};
use pileus_base::Error;
use rustix::process::{Pid, Signal};
use support::{Daemon, Ran};

const DELETED: &str = "DELETE /v1/instances/calm-cod?purge=true";

fn daemon() -> Daemon {
    Daemon::start(vec![])
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

fn called(daemon: &Daemon, what: &str) -> bool {
    let script = daemon.script.lock().unwrap();
    script.calls.iter().any(|call| call.contains(what))
}

fn until(what: impl Fn() -> bool) {
    let begin = Instant::now();
    while !what() {
        assert!(begin.elapsed() < Duration::from_secs(20), "it did not come");
        std::thread::sleep(Duration::from_millis(5));
    }
}

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
fn the_whole_way_takes_four_calls() {
    let daemon = daemon();
    let ran = daemon.run("run debian-13 -- both");
    assert_eq!((ran.code, ran.err.as_str()), (0, "err\n"));
    let calls = daemon.calls();
    assert_eq!(calls.len(), 4, "{calls:?}");
    assert_eq!(calls[0], "POST /v1/instances");
    assert!(calls[1].ends_with("/events"));
    assert_eq!(calls[2], "GET /v1/instances/calm-cod/exec");
    assert_eq!(calls[3], DELETED);
    let script = daemon.script.lock().unwrap();
    let launch = &script.launches[0];
    assert_eq!(launch.lease, Some(30));
    assert_eq!((launch.warm, launch.disk_in_memory), (None, false));
    assert!(script.leases.is_empty());
}

#[test]
fn options_reach_the_daemon_and_the_command() {
    let daemon = daemon();
    let line = "run --name web -c2 -m 1.5G -d6G --warm --tmpfs --launch-timeout 60 -w /srv \
                -e A=1 -e TERM -e NOT_THERE -T debian-13 -- request";
    let ran = daemon.run(line);
    let request: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
    let expected = serde_json::json!({
        "command": ["request"], "env": {"A": "1", "TERM": "xterm"}, "working_directory": "/srv"
    });
    assert_eq!(request, expected);
    let script = daemon.script.lock().unwrap();
    let launch = &script.launches[0];
    assert_eq!(launch.name.as_ref().unwrap().as_str(), "web");
    assert_eq!((launch.cpus, launch.timeout), (Some(2), Some(60)));
    assert_eq!(launch.memory, Some(Size::mib(1536)));
    assert_eq!(launch.disk, Some(Size::gib(6)));
    assert_eq!(
        (launch.warm, launch.disk_in_memory),
        (Some(Warm::Require), true)
    );
    assert!(
        script
            .calls
            .iter()
            .any(|c| c == "DELETE /v1/instances/web?purge=true")
    );
}

#[test]
fn exit_codes_are_the_commands_own_or_125() {
    let daemon = daemon();
    for (line, code) in [
        ("run x -- exit 0", 0),
        ("run x exit 33", 33),
        ("run x -- exit 255", 255),
        ("run x -- unknown", 127),
        ("run x -- broken", 125),
    ] {
        assert_eq!(daemon.run(line).code, code, "{line}");
        assert!(called(&daemon, "DELETE /v1/instances/calm-cod"), "{line}");
        daemon.calls();
    }
    // Nothing is begun that can't work.
    for (line, text) in [
        ("run", "error: the following required"),
        ("run --nope x", "error: unexpected argument"),
        ("run -c 0 x", "Error: invalid CPU count"),
        ("run --timeout x y", "error: 'x' is not a duration"),
        ("run -p 80 x", "error: '80' is not [ADDRESS:]"),
        ("run -e 1=x y", "error: '1' is not the name"),
        ("run --env-file /nope y", "error: /nope can't be read"),
        ("run --mount a:b x", "error: folders can't be shared"),
        ("run --copy-in /nope x", "error: /nope can't be copied"),
        ("run --copy-out / x", "/ has no name of its own"),
        ("run --max-output x y", "x is not a valid memory size"),
    ] {
        let ran = daemon.run(line);
        assert_eq!((ran.code, ran.out.as_str()), (125, ""), "{line}");
        let err = ran.err.replace("run failed: ", "");
        assert!(err.starts_with(text), "{line}: {}", ran.err);
        assert!(daemon.calls().is_empty(), "{line}");
    }
    assert_eq!(daemon.run("run --help").code, 0);
    let ran = daemon.run("run --socket /nope x");
    assert_eq!(ran.code, 125);
}

#[test]
fn standard_input_and_great_outputs_pass() {
    let daemon = daemon();
    let mut child = spawn(&daemon, "run x -- cat");
    let bytes: Vec<u8> = (0..=255).cycle().take(300_000).collect();
    let mut stdin = child.stdin.take().unwrap();
    let sent = bytes.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&sent).unwrap());
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    assert!(output.status.success() && output.stdout == bytes);
    // Without a command it is the shell.
    assert_eq!(daemon.run("run x"), Ran::ok(""));
}

#[test]
fn a_failed_launch_leaves_nothing() {
    let daemon = daemon();
    let err = Error::new(Code::NoTemplate, "There is no template that fits");
    daemon.script.lock().unwrap().end = Some(ErrorBody::from(err));
    let ran = daemon.run("run --warm x -- exit 0");
    assert_eq!((ran.code, ran.out.as_str()), (125, ""));
    assert!(
        ran.err
            .starts_with("run failed: There is no template that fits\ncode: no-template"),
        "{}",
        ran.err
    );
    assert!(
        ran.err.contains("hint: pileus template create"),
        "{}",
        ran.err
    );
    assert!(called(&daemon, DELETED));
    assert!(!called(&daemon, "/exec"));
}

#[test]
fn ctrl_c_while_launching_cancels_and_deletes() {
    let daemon = daemon();
    daemon.script.lock().unwrap().hang = true;
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143), (Signal::HUP, 129)] {
        let child = spawn(&daemon, "run x -- exit 0");
        until(|| called(&daemon, "/events"));
        kill(&child, signal);
        let ran = Ran::of(&child.wait_with_output().unwrap());
        assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{}", ran.err);
        let calls = daemon.calls();
        assert!(
            calls
                .iter()
                .any(|c| c.starts_with("DELETE /v1/operations/")),
            "{calls:?}"
        );
        assert!(calls.iter().any(|c| c == DELETED), "{calls:?}");
    }
    // The second one does not wait for a daemon that does not heed the first.
    daemon.script.lock().unwrap().deaf = true;
    let child = spawn(&daemon, "run x -- exit 0");
    until(|| called(&daemon, "/events"));
    kill(&child, Signal::INT);
    until(|| called(&daemon, "DELETE /v1/operations/"));
    kill(&child, Signal::INT);
    let ran = Ran::of(&child.wait_with_output().unwrap());
    assert_eq!(ran.code, 130);
}

#[test]
fn the_launchs_own_time_out_deletes_as_well() {
    let daemon = daemon();
    daemon.script.lock().unwrap().hang = true;
    let ran = daemon.run("run --launch-timeout 1 x -- exit 0");
    assert_eq!(ran.code, 125);
    assert!(ran.err.starts_with("Timed out waiting"), "{}", ran.err);
    assert!(!ran.err.contains("goes on"), "{}", ran.err);
    assert!(called(&daemon, "DELETE /v1/operations/"));
    assert!(called(&daemon, DELETED));
}

#[test]
fn signals_go_to_the_command_and_the_end_deletes() {
    let daemon = daemon();
    let mut child = spawn(&daemon, "run x -- tell");
    let mut stdout = child.stdout.take().unwrap();
    read_until(&mut stdout, "ready");
    for (signal, name) in [(Signal::INT, "INT"), (Signal::TERM, "TERM")] {
        kill(&child, signal);
        let told = format!("{{\"type\":\"signal\",\"signal\":\"{name}\"}}");
        read_until(&mut stdout, &told);
    }
    assert_eq!(child.wait().unwrap().code(), Some(128 + 15));
    assert!(called(&daemon, DELETED));
}

#[test]
fn a_closed_pipe_deletes_quietly() {
    let daemon = daemon();
    let mut child = spawn(&daemon, "run x -- zeros 100");
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 1000]).unwrap();
    drop(stdout);
    let ran = Ran::of(&child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.err.as_str()), (141, ""));
    assert!(called(&daemon, DELETED));
}

#[test]
fn the_lease_is_renewed_while_the_command_runs() {
    let daemon = daemon();
    let mut child = spawn(&daemon, "run x -- cat");
    until(|| !daemon.script.lock().unwrap().leases.is_empty());
    assert_eq!(daemon.script.lock().unwrap().leases, [30]);
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_command_that_takes_too_long_is_ended() {
    let daemon = daemon();
    let begin = Instant::now();
    let ran = daemon.run("run --timeout 0.3 x -- tell");
    assert_eq!(ran.code, 124);
    assert!(ran.out.contains(r#""signal":"TERM""#), "{}", ran.out);
    assert_eq!(ran.err, "run: the time for the command was over\n");
    assert!(begin.elapsed() < Duration::from_secs(60));
    assert!(called(&daemon, DELETED));
    // One that heeds nothing.
    let begin = Instant::now();
    let child = spawn(&daemon, "run --timeout 100ms x -- cat");
    let ran = Ran::of(&{
        let mut child = child;
        let stdin = child.stdin.take();
        let output = child.wait_with_output().unwrap();
        drop(stdin);
        output
    });
    assert_eq!(ran.code, 124);
    assert!(begin.elapsed() > Duration::from_secs(9));
}

#[test]
fn a_command_that_says_too_much_is_killed() {
    let daemon = daemon();
    let ran = daemon.run("run --max-output 1M x -- zeros 100");
    assert_eq!((ran.code, ran.out.len()), (125, 1 << 20));
    assert!(ran.err.contains("--max-output"), "{}", ran.err);
    assert!(called(&daemon, DELETED));
    let ran = daemon.run("run --max-output 1M x -- zeros 1");
    assert_eq!((ran.code, ran.out.len()), (0, 1 << 20));
}

#[test]
fn keep_keeps_and_says_the_name_on_standard_error() {
    let daemon = daemon();
    let ran = daemon.run("run --keep x -- exit 3");
    assert_eq!((ran.code, ran.out.as_str()), (3, ""));
    assert_eq!(ran.err, "Kept: calm-cod\n");
    assert_eq!(daemon.script.lock().unwrap().leases, [0]);
    assert!(!called(&daemon, "DELETE"));
}

#[test]
fn what_can_not_be_deleted_is_told_and_the_code_stays() {
    let daemon = daemon();
    daemon.script.lock().unwrap().undeletable = true;
    let ran = daemon.run("run x -- exit 4");
    assert_eq!(ran.code, 4);
    assert!(
        ran.err
            .starts_with("warning: calm-cod could not be deleted"),
        "{}",
        ran.err
    );
}

#[test]
fn warnings_and_times_are_for_those_who_ask() {
    let daemon = daemon();
    {
        let mut script = daemon.script.lock().unwrap();
        script.warnings = vec!["booted cold: no template".into()];
        script.events = vec![OperationEvent::Phase {
            phase: Phase::Restoring,
        }];
        script.phases = vec![PhaseTime {
            phase: Phase::Restoring,
            milliseconds: 15,
        }];
    }
    assert_eq!(daemon.run("run x -- exit 0"), Ran::ok(""));
    let ran = daemon.run("run -v x -- exit 0");
    assert_eq!((ran.code, ran.out.as_str()), (0, ""));
    assert!(
        ran.err.contains("warning: booted cold: no template\n"),
        "{}",
        ran.err
    );
    for line in [
        "restoring            0.015s\n",
        "\ncommand  ",
        "\ndeleting  ",
        "\ncalm-cod  ",
    ] {
        assert!(ran.err.contains(line), "{line:?}: {}", ran.err);
    }
}

#[test]
fn ports_of_the_guest_are_reached_and_end_by_direction() {
    let daemon = daemon();
    // The guest's port, which is one of this host here: reads to the end, then answers.
    let guest = TcpListener::bind("127.0.0.1:0").unwrap();
    let guest_port = guest.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in guest.incoming() {
            let mut stream = stream.unwrap();
            std::thread::spawn(move || {
                let mut all = Vec::new();
                stream.read_to_end(&mut all).unwrap();
                all.reverse();
                stream.write_all(&all).unwrap();
            });
        }
    });
    let mut child = spawn(&daemon, &format!("run -p 0:{guest_port} -p 0:1 x -- cat"));
    let mut stderr = child.stderr.take().unwrap();
    let told = read_until(&mut stderr, "Port 1 of the guest is at 127.0.0.1:");
    let told = if told.ends_with('\n') {
        told
    } else {
        told + &read_until(&mut stderr, "\n")
    };
    let address = |port: u16| {
        let start = format!("Port {port} of the guest is at ");
        let line = told.lines().find(|line| line.starts_with(&start)).unwrap();
        line[start.len()..].to_owned()
    };
    // Several at once, each with an end of its own.
    let clients: Vec<_> = (0..10_u8)
        .map(|n| {
            let address = address(guest_port);
            std::thread::spawn(move || {
                let mut stream = TcpStream::connect(address).unwrap();
                let mut sent = vec![n; 500_000];
                sent[0] = 255;
                stream.write_all(&sent).unwrap();
                stream.shutdown(Shutdown::Write).unwrap();
                let mut got = Vec::new();
                stream.read_to_end(&mut got).unwrap();
                sent.reverse();
                assert!(got == sent);
            })
        })
        .collect();
    for client in clients {
        client.join().unwrap();
    }
    // Nothing listens there: the connection is cut.
    let mut refused = TcpStream::connect(address(1)).unwrap();
    assert!(matches!(refused.read(&mut [0; 10]), Ok(0) | Err(_)));
    drop(child.stdin.take());
    assert!(child.wait().unwrap().success());

    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    daemon.calls();
    let ran = daemon.run(&format!("run -p {port}:80 x -- exit 0"));
    assert_eq!(ran.code, 125);
    assert!(
        ran.err.contains(&format!("Listening on 127.0.0.1:{port}")),
        "{}",
        ran.err
    );
    assert!(daemon.calls().is_empty(), "nothing was launched");
}

/// Runs with real commands in the folder that stands for the guest's home, from a folder `here`.
fn copy(daemon: &Daemon, args: &[&str], script: &str) -> Ran {
    let here = daemon.dir.path().join("here");
    fs::create_dir_all(&here).unwrap();
    let mut command = daemon.command("run");
    command
        .args(args)
        .args(["x", "--", "sh", "-c", script])
        .current_dir(here);
    Ran::of(&command.output().unwrap())
}

#[test]
fn files_and_folders_are_copied_in_and_out() {
    let daemon = daemon();
    let here = daemon.dir.path().join("here");
    let home = daemon.dir.path().join("home");
    fs::create_dir_all(here.join("src/deep")).unwrap();
    fs::write(here.join("src/deep/a"), vec![9; 1_000_000]).unwrap();
    fs::write(here.join("one"), "1").unwrap();
    std::os::unix::fs::symlink("deep/a", here.join("src/link")).unwrap();

    let args = [
        "--copy-in",
        "src",
        "--copy-in",
        "one:sub/two",
        "--copy-in",
        "one:new/",
    ];
    let args = [
        &args[..],
        &["--copy-out", "out", "--copy-out", "sub/two:back"],
    ]
    .concat();
    let ran = copy(
        &daemon,
        &args,
        "mkdir out && cp -a src/. out && cat sub/two new/one",
    );
    assert_eq!(ran, Ran::ok("11"));
    assert_eq!(fs::read(here.join("out/deep/a")).unwrap().len(), 1_000_000);
    let link = fs::read_link(here.join("out/link")).unwrap();
    assert_eq!(link.to_str(), Some("deep/a"));
    assert_eq!(fs::read_to_string(here.join("back")).unwrap(), "1");

    // The content of this folder, into a working directory that is made for it.
    let args = ["-w", "work", "--copy-in", ".", "--copy-out", "out:again/"];
    let ran = copy(&daemon, &args, "ls; exit 3");
    assert_eq!(
        (ran.code, ran.out.as_str()),
        (3, "back\none\nout\nsrc\n"),
        "{}",
        ran.err
    );
    assert!(here.join("again/out/deep/a").exists());
    assert!(home.join("work/one").exists());
}

#[test]
fn what_is_missing_is_an_error_unless_the_command_failed() {
    let daemon = daemon();
    let ran = copy(&daemon, &["--copy-out", "none"], "exit 0");
    assert_eq!(ran.code, 125);
    assert!(
        ran.err.contains("none does not exist in the guest"),
        "{}",
        ran.err
    );
    let ran = copy(&daemon, &["--copy-out", "none"], "exit 9");
    assert_eq!(ran.code, 9);
    assert_eq!(ran.err, "warning: none does not exist in the guest\n");
    let ran = copy(
        &daemon,
        &["--copy-out", "big", "--max-copy", "100K"],
        "head -c 300000 /dev/zero > big",
    );
    assert_eq!(ran.code, 125);
    assert!(ran.err.contains("larger than 100.0KiB"), "{}", ran.err);
    assert!(!daemon.dir.path().join("here/big").exists());
    // What the guest's tar says is shown.
    fs::write(daemon.dir.path().join("here/f"), "").unwrap();
    let ran = copy(&daemon, &["--copy-in", "f:/proc/nope/f"], "exit 0");
    assert_eq!(ran.code, 125);
    assert!(ran.err.contains("f could not be copied in"), "{}", ran.err);
    let calls = daemon.calls();
    assert_eq!(calls.iter().filter(|c| *c == DELETED).count(), 4);
}

#[test]
fn a_guest_can_not_write_outside_of_the_target() {
    let daemon = daemon();
    let outside = daemon.dir.path().join("outside");
    fs::write(&outside, "mine").unwrap();
    for script in [
        "mkdir d && ln -s ../../outside d/l",
        "mkdir -p d && ln -sf /etc/passwd d/l",
        "mkdir -p d && rm -f d/l && mkfifo d/l",
    ] {
        let ran = copy(&daemon, &["--copy-out", "d"], script);
        assert_eq!(ran.code, 125, "{script}");
        assert!(
            ran.err.contains("archive was refused"),
            "{script}: {}",
            ran.err
        );
    }
    assert_eq!(fs::read_to_string(outside).unwrap(), "mine");
}
