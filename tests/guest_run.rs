//! `pileus run` with real clones: what goes in and out, and that nothing of it is left, whoever is
//! killed.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pileus_base::Layout;
use pileus_testkit::{Daemon, GUEST_IMAGE, Need, Options, Output, files_below, need, wait_until};

const RUN: [&str; 3] = ["run", "--warm", "-q"];

fn run(daemon: &Daemon, options: &[&str], command: &[&str], input: &[u8]) -> Output {
    let words = [&RUN[..], options, &[GUEST_IMAGE, "--"], command].concat();
    daemon.run_with(&words, input)
}

/// A `run` that goes on by itself.
fn begin(daemon: &Daemon, options: &[&str], command: &[&str]) -> Child {
    let words = [&RUN[..], options, &[GUEST_IMAGE, "--"], command].concat();
    daemon
        .command(&words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits until the command has said its first line.
fn first_line(child: &mut Child) -> String {
    let mut line = String::new();
    let mut reader = BufReader::new(child.stdout.as_mut().unwrap());
    reader.read_line(&mut line).unwrap();
    line
}

fn signal(child: &Child, signal: Signal) {
    kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
}

/// What this daemon has in memory; other tests have something there as well.
fn in_memory(daemon: &Daemon) -> Vec<PathBuf> {
    files_below(&Layout::below(&daemon.storage(), 0).memory)
}

/// No instance, machine, file or address of any run.
#[track_caller]
fn nothing_left(daemon: &Daemon, seconds: u64) {
    // One that is being deleted is no longer listed, and its files go last.
    wait_until("the instances and their files are gone", seconds, || {
        let list = daemon.run(&["list"]).ok();
        let left = ["data/instances", "run/i"]
            .iter()
            .any(|folder| !files_below(&daemon.storage().join(folder)).is_empty());
        (list == "No instances found.\n" && daemon.machines().is_empty() && !left).then_some(())
    });
}

#[test]
fn guest_run() {
    if !need(&[Need::Root, Need::Tun, Need::Guest, Need::Program("curl")]) {
        return;
    }
    let daemon = Daemon::start(Options::warm());
    streams_and_codes(&daemon);
    environment_and_folders(&daemon);
    copies(&daemon);
    budgets(&daemon);
    terminal(&daemon);
    nothing_left(&daemon, 30);
    assert_eq!(run(&daemon, &[], &["nonesuch"], b"").code(), 127);
    let unknown = daemon.run(&["run", "nonesuch", "--", "true"]);
    unknown.fails_with(125);
    two_at_once_and_kept(&daemon);
}

fn streams_and_codes(daemon: &Daemon) {
    let input: Vec<u8> = (0..1_u32 << 20).map(|n| ((n * 7) >> 3) as u8).collect();
    let out = run(
        daemon,
        &["--rm"],
        &["sh", "-c", "cat; echo said >&2; exit 7"],
        &input,
    );
    assert_eq!((out.code(), out.stderr.as_str()), (7, "said\n"));
    assert!(out.stdout == input, "{} bytes came back", out.stdout.len());
}

fn environment_and_folders(daemon: &Daemon) {
    let file = daemon.folder().join("variables");
    std::fs::write(&file, "# these\nFROM_FILE=2 3\n").unwrap();
    let file = file.display().to_string();
    let options = [
        "-e",
        "GIVEN=a 'b",
        "--env-file",
        &file,
        "-w",
        "/usr/lib",
        "-n",
        "named",
    ];
    let script = "printf '%s|' \"$GIVEN\" \"$FROM_FILE\" \"$PWD\" \"$(hostname)\"; kill -TERM $$";
    let out = run(daemon, &options, &["sh", "-c", script], b"");
    assert_eq!(
        (out.text().as_str(), out.code()),
        ("a 'b|2 3|/usr/lib|named|", 143)
    );
}

/// Into and out of a guest whose disk is in memory.
fn copies(daemon: &Daemon) {
    let folder = daemon.folder().join("copies");
    let tree = folder.join("tree/below");
    std::fs::create_dir_all(&tree).unwrap();
    std::fs::write(tree.join("data"), [0, 255, 10, 13]).unwrap();
    std::os::unix::fs::symlink("data", tree.join("link")).unwrap();
    let words = ["--tmpfs", "--copy-in", "tree", "--copy-out", "made:here"];
    let script = "cp -a tree made && echo more > made/more && readlink made/below/link";
    let args = [&RUN[..], &words, &[GUEST_IMAGE, "--", "sh", "-c", script]].concat();
    let out = daemon.command(&args).current_dir(&folder).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
    assert_eq!(String::from_utf8_lossy(&out.stdout), "data\n");
    let made = folder.join("here");
    assert_eq!(
        std::fs::read(made.join("below/data")).unwrap(),
        [0, 255, 10, 13]
    );
    assert_eq!(
        std::fs::read_link(made.join("below/link")).unwrap(),
        Path::new("data")
    );
    assert_eq!(
        std::fs::read_to_string(made.join("more")).unwrap(),
        "more\n"
    );
    nothing_left(daemon, 30);
    let left = in_memory(daemon);
    assert!(left.is_empty(), "{left:?}");
}

fn budgets(daemon: &Daemon) {
    let began = Instant::now();
    let late = run(daemon, &["--timeout", "1"], &["sleep", "600"], b"");
    assert_eq!(late.code(), 124, "{}", late.stderr);
    assert!(began.elapsed() < Duration::from_secs(300));
    let much = run(daemon, &["--max-output", "1M"], &["yes"], b"");
    assert_eq!(much.code(), 125, "{}", much.stderr);
    assert!(much.stdout.len() <= 2 << 20, "{}", much.stdout.len());
}

fn terminal(daemon: &Daemon) {
    let size = nix::pty::Winsize {
        ws_row: 44,
        ws_col: 88,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = nix::pty::openpty(&size, None).unwrap();
    let end = |fd: &std::os::fd::OwnedFd| Stdio::from(fd.try_clone().unwrap());
    let mut child = daemon
        .command(
            &[
                &RUN[..],
                &[
                    GUEST_IMAGE,
                    "--",
                    "sh",
                    "-c",
                    "tty; stty size; read x; exit 9",
                ],
            ]
            .concat(),
        )
        .stdin(end(&pty.slave))
        .stdout(end(&pty.slave))
        .stderr(end(&pty.slave))
        .spawn()
        .unwrap();
    drop(pty.slave);
    let mut terminal = std::fs::File::from(pty.master);
    let mut screen = String::new();
    let mut block = [0; 1024];
    while !screen.contains("44 88") {
        match terminal.read(&mut block) {
            Ok(read @ 1..) => screen.push_str(&String::from_utf8_lossy(&block[..read])),
            _ => break,
        }
    }
    assert!(
        screen.contains("/dev/pts/") && screen.contains("44 88"),
        "{screen}"
    );
    terminal.write_all(b"\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

/// One that is kept, beside one that serves a page through a port and ends by Ctrl-C.
fn two_at_once_and_kept(daemon: &Daemon) {
    let script = "mkdir page && cd page && head -c 300000 /dev/zero > zeros && echo ready && \
                  exec python3 -m http.server 8000 --bind 127.0.0.1";
    let mut server = begin(daemon, &["-p", "18080:8000"], &["sh", "-c", script]);
    let kept = daemon.run(&[
        "run",
        "--warm",
        "--keep",
        "-n",
        "kept",
        GUEST_IMAGE,
        "--",
        "hostname",
    ]);
    assert_eq!(kept.ok_with_words(), "kept\n");
    assert!(kept.stderr.contains("Kept: kept"), "{}", kept.stderr);
    assert_eq!(first_line(&mut server), "ready\n");
    let fetch = || {
        let url = "http://127.0.0.1:18080/zeros";
        let mut curl = daemon.inside(Path::new("curl"));
        let curl = curl.args([
            "-sS",
            "-f",
            "--retry",
            "8",
            "--retry-all-errors",
            "-m",
            "30",
            url,
        ]);
        curl.output().unwrap().stdout.len()
    };
    assert_eq!(fetch(), 300_000);
    assert_eq!(fetch(), 300_000);
    signal(&server, Signal::SIGINT);
    // It is the command's own business: this one takes Ctrl-C for a good end.
    assert_eq!(server.wait().unwrap().code(), Some(0));
    wait_until("only the kept one is left", 30, || {
        (daemon.machines().len() == 1).then_some(())
    });
    assert_eq!(daemon.exec("kept", &["hostname"]), "kept\n");
    daemon.run(&["delete", "--purge", "kept"]).ok();
    nothing_left(daemon, 30);
}

#[test]
fn guest_run_whoever_is_killed() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let mut daemon = Daemon::start(Options::warm());
    // The client, with a signal that can't be caught: its lease runs out. The rest goes on meanwhile.
    let mut orphan = begin(
        &daemon,
        &["-n", "orphan"],
        &["sh", "-c", "echo on; sleep 600"],
    );
    assert_eq!(first_line(&mut orphan), "on\n");
    signal(&orphan, Signal::SIGKILL);
    orphan.wait().unwrap();
    let since = Instant::now();

    // Ctrl-C before the command has begun, at several moments.
    for millis in [100, 400, 1500] {
        let mut early = begin(&daemon, &["-n", "early"], &["sh", "-c", "echo too late"]);
        std::thread::sleep(Duration::from_millis(millis));
        signal(&early, Signal::SIGINT);
        let ended = early.wait().unwrap();
        // One that had not come to listen for it is ended by it.
        let by_signal = ended.signal() == Some(Signal::SIGINT as i32);
        let ok = by_signal || ended.code() == Some(130);
        assert!(ok, "{ended} after {millis} ms");
        wait_until("the cancelled launch is undone", 60, || {
            (daemon.state("early") == "none").then_some(())
        });
    }
    // In the command: it goes on to the guest first.
    let trap = "trap 'echo trapped; exit 3' INT; echo on; while :; do sleep 0.1; done";
    let mut trapped = begin(&daemon, &["-n", "trapped"], &["sh", "-c", trap]);
    assert_eq!(first_line(&mut trapped), "on\n");
    signal(&trapped, Signal::SIGINT);
    let out = trapped.wait_with_output().unwrap();
    assert_eq!(
        out.status.code(),
        Some(3),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );

    wait_until("the orphan's lease of 30 s runs out", 60, || {
        (daemon.state("orphan") == "none").then_some(())
    });
    let lived = since.elapsed().as_secs();
    assert!(lived >= 15, "it lived for {lived} s");
    nothing_left(&daemon, 30);

    // The daemon: the machine ends at once, and the next start finds nothing.
    let mut left = begin(
        &daemon,
        &["-n", "left"],
        &["sh", "-c", "echo on; sleep 600"],
    );
    assert_eq!(first_line(&mut left), "on\n");
    let machines = daemon.machines();
    assert_eq!(machines.len(), 1);
    daemon.kill();
    wait_until("the machine ends with the daemon", 30, || {
        daemon.machines().is_empty().then_some(())
    });
    assert_eq!(left.wait().unwrap().code(), Some(125));
    daemon.start_again();
    nothing_left(&daemon, 30);
}
