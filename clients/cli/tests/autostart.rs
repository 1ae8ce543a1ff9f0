//! A user without a daemon gets one: started by the first command, found by all others, detached.
//! The program `pileusd` is played by a script that leads its socket to a daemon of the test.

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use support::{Daemon, Ran, instance};

/// Nobody: root's commands never start a daemon, so the test may not run as root.
const USER: u32 = 65534;

/// A program that another thread's fork still holds open for writing can't be run (ETXTBSY), so
/// these tests, which write programs, don't run beside each other.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Host {
    daemon: Daemon,
    dir: tempfile::TempDir,
    _turn: MutexGuard<'static, ()>,
}

impl Host {
    /// `script` is the body of `pileusd`; `$SOCKET` is the socket of a daemon that answers.
    fn new(script: &str) -> Self {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let daemon = Daemon::start(vec![instance("foo", "running")]);
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| fs::set_permissions(path, fs::Permissions::from_mode(0o777));
        open(dir.path()).unwrap();
        open(daemon.dir.path()).unwrap();
        open(&daemon.socket()).unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        fs::copy(env!("CARGO_BIN_EXE_pileus"), bin.join("pileus")).unwrap();
        let program = bin.join("pileusd");
        fs::write(&program, format!("#!/bin/sh\n{script}")).unwrap();
        for path in [&bin, &program, &bin.join("pileus")] {
            open(path).unwrap();
        }
        Self {
            daemon,
            dir,
            _turn: turn,
        }
    }

    fn storage(&self) -> PathBuf {
        self.dir.path().join("storage")
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(self.dir.path().join("bin/pileus"));
        command
            .args(line.split(' '))
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("HOME", self.dir.path())
            .env("PILEUS_STORAGE", self.storage())
            .env("SOCKET", self.daemon.socket())
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if rustix::process::getuid().is_root() {
            command.uid(USER).gid(USER);
        }
        command
    }

    fn run(&self, line: &str) -> Ran {
        Ran::of(&self.command(line).output().unwrap())
    }

    /// What the script noted of its start.
    fn notes(&self) -> Vec<String> {
        let notes = fs::read_to_string(self.dir.path().join("notes")).unwrap_or_default();
        notes.lines().map(str::to_owned).collect()
    }
}

/// Takes the lock as the daemon does, and answers a while later.
const DAEMON: &str = r#"
echo "$* session $(ps -o sid= -p $$ | tr -d ' ') pid $$" >> "$HOME/notes"
mkdir -p "$PILEUS_STORAGE/run"
mkdir "$PILEUS_STORAGE/lock" || { echo "the storage is in use"; exit 1; }
sleep 0.3
ln -s "$SOCKET" "$PILEUS_STORAGE/run/pileusd.sock"
sleep 1
"#;

#[test]
fn the_first_command_starts_the_daemon_and_the_second_finds_it() {
    let host = Host::new(DAEMON);
    let ran = host.run("list --format csv");
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    assert!(ran.out.contains("foo,Running"), "{}", ran.out);
    let notes = host.notes();
    let [note] = notes.as_slice() else {
        panic!("{notes:?}");
    };
    let storage = host.storage();
    assert!(
        note.starts_with(&format!("--storage {} ", storage.display())),
        "{note}"
    );
    let words: Vec<&str> = note.split(' ').collect();
    assert_eq!(words[3], words[5], "it leads a session of its own: {note}");
    assert_eq!(host.run("list --format csv").code, 0);
    assert_eq!(host.notes().len(), 1);
}

#[test]
fn two_commands_at_once_end_with_one_daemon() {
    let host = Host::new(DAEMON);
    let both = [(); 2].map(|()| host.command("list --format csv").spawn().unwrap());
    for child in both {
        let ran = Ran::of(&child.wait_with_output().unwrap());
        assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    }
}

#[test]
fn a_daemon_that_ends_at_once_shows_its_last_words() {
    let host = Host::new("echo 'QEMU was not found'; exit 3\n");
    let ran = host.run("list");
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    assert!(
        ran.err
            .starts_with("list failed: The daemon ended at once (exit status: 3)\n"),
        "{}",
        ran.err
    );
    assert!(ran.err.contains("\nQEMU was not found\n"), "{}", ran.err);
    let log = host.storage().join("cache/pileusd.log");
    assert!(ran.err.contains(&log.display().to_string()), "{}", ran.err);
}

#[test]
fn an_explicit_socket_or_a_mere_look_starts_nothing() {
    let host = Host::new(DAEMON);
    assert_eq!(host.run("list --socket /nope").code, 2);
    assert_eq!(host.run("version").code, 0);
    let completed = host
        .command("-- pileus stop f")
        .env("COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", "2")
        .output()
        .unwrap();
    assert!(completed.status.success());
    assert!(host.notes().is_empty());
}

#[test]
fn a_socket_that_may_not_be_used_is_told_apart_from_no_daemon() {
    let host = Host::new(DAEMON);
    let socket = host.daemon.socket();
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o000)).unwrap();
    for line in ["list", "exec foo -- ls"] {
        let ran = host.run(&format!("--socket {} {line}", socket.display()));
        assert_eq!(ran.code, 2, "{line}");
        let text = format!(
            "failed: pileus socket access denied\nPlease check that you have read/write \
             permissions to '{}'\n",
            socket.display()
        );
        assert!(ran.err.ends_with(&text), "{}", ran.err);
    }
}
