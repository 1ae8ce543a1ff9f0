//! transfer, through the program, with OpenSSH's own file server in the place of the guest's.

mod guest;
mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use guest::{Daemon, has_sftp_server};
use rustix::process::{Pid, Signal};
use support::{Ran, instance};

fn daemon() -> Option<Daemon> {
    let instances = vec![instance("foo", "running"), instance("bar", "stopped")];
    has_sftp_server().then(|| Daemon::start(instances))
}

fn failed(code: i32, err: &str) -> Ran {
    Ran {
        code,
        out: String::new(),
        err: err.to_owned(),
    }
}

#[test]
fn files_and_folders_both_ways() {
    let Some(daemon) = daemon() else { return };
    fs::create_dir_all(daemon.host("tree/in")).unwrap();
    fs::write(daemon.host("tree/in/a"), "A").unwrap();
    fs::write(daemon.host("b"), "B").unwrap();
    fs::set_permissions(daemon.host("b"), fs::Permissions::from_mode(0o751)).unwrap();
    for line in [
        "transfer b foo:",
        "copy-files --recursive tree foo:copy",
        "transfer foo:b c",
        "transfer -rp foo:copy foo:b new/folder",
    ] {
        assert_eq!(daemon.run(line), Ran::ok(""), "{line}");
    }
    assert_eq!(fs::read_to_string(daemon.home("copy/in/a")).unwrap(), "A");
    assert_eq!(
        fs::read_to_string(daemon.host("new/folder/copy/in/a")).unwrap(),
        "A"
    );
    for path in [daemon.host("c"), daemon.home("b")] {
        assert_eq!(
            fs::metadata(path).unwrap().permissions().mode() & 0o777,
            0o751
        );
    }
}

#[test]
fn what_does_not_work_is_told() {
    let Some(daemon) = daemon() else { return };
    fs::create_dir(daemon.host("dir")).unwrap();
    fs::create_dir(daemon.home("dir")).unwrap();
    fs::write(daemon.host("b"), "B").unwrap();
    let text = "omitting local directory \"dir\": recursive mode not specified\n";
    let ran = daemon.run("transfer dir b foo:");
    assert_eq!(ran, failed(2, &format!("transfer: {text}")));
    // What could be copied was.
    assert_eq!(fs::read_to_string(daemon.home("b")).unwrap(), "B");
    let ran = Ran::of(
        &daemon
            .named("multipass", "transfer dir foo:")
            .output()
            .unwrap(),
    );
    assert_eq!(ran, failed(2, &format!("[error] [sftp] {text}")));
    let ran = daemon.run("transfer foo:dir foo:none .");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err
            .contains("omitting remote directory \"dir\": recursive mode"),
        "{ran:?}"
    );
    assert!(
        ran.err
            .contains("cannot open remote file \"none\": No such file"),
        "{ran:?}"
    );
    let ran = daemon.run("transfer foo:dir foo:none b");
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    assert!(
        ran.err
            .starts_with("transfer failed: Target \"b\" is not a directory\n"),
        "{ran:?}"
    );
    assert_eq!(
        daemon.run("transfer b"),
        failed(1, "Not enough arguments given\n")
    );
    // Nothing is started.
    let ran = daemon.run("transfer b bar:");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err
            .starts_with("transfer failed: instance \"bar\" is not running\n"),
        "{ran:?}"
    );
    let ran = daemon.run("transfer none:x .");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err
            .starts_with("transfer failed: instance \"none\" does not exist\n"),
        "{ran:?}"
    );
    let calls = &daemon.world.lock().unwrap().calls;
    assert!(
        !calls.iter().any(|call| call.contains("start")),
        "{calls:?}"
    );
}

#[test]
fn a_hundred_mebibytes_through_the_standard_streams() {
    let Some(daemon) = daemon() else { return };
    let piece: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
    let mut child = daemon
        .command("transfer - foo:big")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    let mut stdin = child.stdin.take().unwrap();
    for _ in 0..100 {
        stdin.write_all(&piece).unwrap();
    }
    drop(stdin);
    assert_eq!(Ran::of(&child.wait_with_output().unwrap()), Ran::ok(""));
    let up = begin.elapsed();
    assert_eq!(fs::metadata(daemon.home("big")).unwrap().len(), 100 << 20);
    let begin = Instant::now();
    let mut child = daemon.command("transfer foo:big -").spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut buffer = vec![0; 1 << 20];
    for _ in 0..100 {
        stdout.read_exact(&mut buffer).unwrap();
        assert!(buffer == piece);
    }
    assert_eq!(stdout.read(&mut buffer).unwrap(), 0);
    assert!(child.wait().unwrap().success());
    eprintln!("100 MiB: up {up:?}, down {:?}", begin.elapsed());
}

#[test]
fn an_interrupted_transfer_leaves_nothing_half() {
    let Some(daemon) = daemon() else { return };
    let mut child = daemon
        .command("transfer - foo:out")
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&[7; 500_000]).unwrap();
    let names = || {
        let entries = fs::read_dir(daemon.home("")).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.collect::<Vec<_>>()
    };
    let begin = Instant::now();
    while names().is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(5));
    }
    // Not under its name before it is whole.
    assert!(names()[0].starts_with(".pileus-transfer"), "{:?}", names());
    rustix::process::kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let ran = Ran::of(&child.wait_with_output().unwrap());
    assert_eq!(ran.code, 130, "{ran:?}");
    assert!(ran.err.contains("the transfer is not complete"), "{ran:?}");
    assert!(names().is_empty(), "{:?}", names());
}

#[test]
fn a_reader_that_is_gone_ends_it_quietly() {
    let Some(daemon) = daemon() else { return };
    fs::write(daemon.home("big"), vec![0; 4 << 20]).unwrap();
    let mut child = daemon.command("transfer foo:big -").spawn().unwrap();
    child
        .stdout
        .take()
        .unwrap()
        .read_exact(&mut [0; 100])
        .unwrap();
    let ran = Ran::of(&child.wait_with_output().unwrap());
    assert_eq!((ran.code, ran.err.as_str()), (141, ""));
}

#[test]
fn a_tree_of_many_folders_needs_few_files_open() {
    let Some(daemon) = daemon() else { return };
    for i in 0..300 {
        let folder = daemon.host(&format!("tree/{}/{i}/deep", i % 7));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("file"), i.to_string()).unwrap();
        // Folders that can't be written to, in folders that can't either.
        for folder in [&folder, folder.parent().unwrap()] {
            fs::set_permissions(folder, fs::Permissions::from_mode(0o500)).unwrap();
        }
    }
    let run = |line: &str| {
        let mut command = daemon.command("");
        let program = command.get_program().to_owned();
        let line = format!("ulimit -n 100; exec \"$0\" {line}");
        let mut limited = std::process::Command::new("/bin/sh");
        limited
            .arg("-c")
            .arg(line)
            .arg(program)
            .current_dir(daemon.host(""));
        limited
            .env_clear()
            .envs(command.get_envs().filter_map(|(k, v)| Some((k, v?))));
        command = limited;
        Ran::of(&command.output().unwrap())
    };
    assert_eq!(run("transfer -r tree foo:tree"), Ran::ok(""));
    assert_eq!(run("transfer -r foo:tree back"), Ran::ok(""));
    for i in 0..300 {
        let folder = daemon.host(&format!("back/{}/{i}", i % 7));
        let mode = |path: &std::path::Path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&folder) & 0o777, 0o500, "{i}");
        assert_eq!(mode(&folder.join("deep")) & 0o777, 0o500, "{i}");
        assert_eq!(
            fs::read_to_string(folder.join("deep/file")).unwrap(),
            i.to_string()
        );
    }
    // So that an ordinary user can remove all this again.
    let mut open = std::process::Command::new("chmod");
    open.args(["-R", "u+w"])
        .arg(daemon.dir.path())
        .status()
        .unwrap();
}
