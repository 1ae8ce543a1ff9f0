//! One real guest, a warm clone, and all that is done with one from launch to purge. What only a boot
//! shows is in `guest_boot.rs`.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use pileus_testkit::{Daemon, Need, Options, need, wait_until};
use sha2::{Digest, Sha256};

#[test]
fn guest_life() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let mut daemon = Daemon::start(Options::warm());
    let launched = daemon.run(&["launch", "--warm", "--name", "foo"]);
    assert_eq!(launched.ok_with_words(), "Launched: foo\n");
    guest_is_as_scripts_expect(&daemon);
    exec_is_binary_clean(&daemon);
    exec_codes_and_folders(&daemon);
    shell_in_a_terminal(&daemon);
    list_and_info(&daemon);
    daemon_comes_and_goes(&mut daemon);
    trash(&daemon);
}

fn guest_is_as_scripts_expect(daemon: &Daemon) {
    let exec = |words: &[&str]| daemon.run(&[&["exec", "foo", "--"], words].concat()).ok();
    assert_eq!(exec(&["id", "-un"]), "ubuntu\n");
    assert_eq!(exec(&["id", "-u"]), "1000\n");
    assert_eq!(exec(&["hostname"]), "foo\n");
    assert_eq!(exec(&["sudo", "-n", "id", "-u"]), "0\n");
    assert_eq!(exec(&["nproc"]), "1\n");
    assert!(exec(&["cloud-init", "status"]).contains("done"));
    // The root file system has grown with the disk of 5 GiB.
    let kib: u64 = exec(&["df", "--output=size", "/"])
        .lines()
        .last()
        .and_then(|line| line.trim().parse().ok())
        .unwrap();
    assert!(kib > 4 << 20, "/ has {kib} KiB");
    // Its address is the one that we gave, and the name server answers.
    let address = daemon.field("foo", "/ipv4/0");
    let shown = exec(&["ip", "-4", "-o", "address", "show", "scope", "global"]);
    assert!(
        shown.contains(address.as_str().unwrap()),
        "{address} {shown}"
    );
    let resolved = exec(&["getent", "ahostsv4", "foo.pileus"]);
    assert!(resolved.contains("foo"), "{resolved}");
}

fn exec_is_binary_clean(daemon: &Daemon) {
    let mut input = vec![0_u8; 20 << 20];
    let mut seed = 1_u32;
    for byte in &mut input {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (seed >> 24) as u8;
    }
    let through = daemon.run_with(&["exec", "foo", "--", "cat"], &input);
    through.ok_with_words();
    assert_eq!(Sha256::digest(&through.stdout), Sha256::digest(&input));
    // The two streams stay apart.
    let both = daemon.run(&["exec", "foo", "--", "sh", "-c", "echo out; echo err >&2"]);
    assert_eq!(
        (both.text().as_str(), both.stderr.as_str()),
        ("out\n", "err\n")
    );
    // The input's end reaches the command, and a command that reads nothing doesn't hang.
    let count = daemon.run_with(&["exec", "foo", "wc", "-c"], b"12345");
    assert_eq!(count.ok().trim(), "5");
    daemon
        .run_with(&["exec", "foo", "true"], &vec![0; 1 << 20])
        .ok();
}

fn exec_codes_and_folders(daemon: &Daemon) {
    let exec = |words: &[&str]| daemon.run(&[&["exec", "foo"], words].concat());
    assert_eq!(exec(&["--", "exit", "33"]).code(), 33);
    assert_eq!(exec(&["--", "nonesuch"]).code(), 127);
    assert_eq!(exec(&["-d", "/usr/lib", "--", "pwd"]).ok(), "/usr/lib\n");
    assert_eq!(
        exec(&["-d", "/usr/lib", "--", "sudo", "pwd"]).ok(),
        "/usr/lib\n"
    );
    assert_ne!(exec(&["-d", "/nonesuch", "--", "pwd"]).code(), 0);
    // Words arrive as they were given.
    let odd = "a b'c\"d$HOME`x`\\";
    assert_eq!(exec(&["--", "printf", "%s", odd]).ok(), odd);
    // A command that is killed, and one whose client is.
    assert_ne!(exec(&["--", "sh", "-c", "kill -9 $$"]).code(), 0);
    let mut client = daemon
        .command(&["exec", "foo", "--", "sleep", "4321"])
        .spawn()
        .unwrap();
    let running = ["--", "pgrep", "-fx", "sleep 4321"];
    wait_until("the command runs", 20, || {
        (exec(&running).code() == 0).then_some(())
    });
    client.kill().unwrap();
    client.wait().unwrap();
    wait_until("the command was hung up", 20, || {
        (exec(&running).code() == 1).then_some(())
    });
}

/// A login shell in a terminal, as a person would use it.
fn shell_in_a_terminal(daemon: &Daemon) {
    // Without a terminal the lines of standard input run.
    let piped = daemon.run_with(&["shell", "foo"], b"echo $((6*7))\nexit 5\n");
    assert!(piped.text().contains("42"), "{piped:?}");
    assert_eq!(piped.code(), 5);

    let size = nix::pty::Winsize {
        ws_row: 33,
        ws_col: 99,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let pty = nix::pty::openpty(&size, None).unwrap();
    let end = |fd: &std::os::fd::OwnedFd| std::process::Stdio::from(fd.try_clone().unwrap());
    let mut child = daemon
        .command(&["shell", "foo"])
        .stdin(end(&pty.slave))
        .stdout(end(&pty.slave))
        .stderr(end(&pty.slave))
        .spawn()
        .unwrap();
    drop(pty.slave);
    let mut terminal = std::fs::File::from(pty.master);
    let mut reader = terminal.try_clone().unwrap();
    let (pieces, heard) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut block = [0; 4096];
        while let Ok(read @ 1..) = reader.read(&mut block) {
            if pieces.send(block[..read].to_vec()).is_err() {
                return;
            }
        }
    });
    let mut screen = String::new();
    let mut wait_for = |words: &str| {
        let until = Instant::now() + Duration::from_secs(90);
        let end = loop {
            if let Some(at) = screen.find(words) {
                break at + words.len();
            }
            let left = until.saturating_duration_since(Instant::now());
            match heard.recv_timeout(left) {
                Ok(piece) => screen.push_str(&String::from_utf8_lossy(&piece)),
                Err(_) => panic!("{words:?} did not appear:\n{screen}"),
            }
        };
        // What came with it is for the next one.
        screen.drain(..end);
    };
    wait_for("ubuntu@foo");
    terminal
        .write_all(b"stty size; echo done-$((1+1))\n")
        .unwrap();
    wait_for("33 99");
    wait_for("done-2");
    // Ctrl-C goes to the guest's program, not to the client.
    terminal.write_all(b"sleep 999\n").unwrap();
    std::thread::sleep(Duration::from_millis(500));
    terminal.write_all(b"\x03").unwrap();
    terminal.write_all(b"echo still-$((2+2))\n").unwrap();
    wait_for("still-4");
    terminal.write_all(b"exit 9\n").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(9));
}

fn list_and_info(daemon: &Daemon) {
    let list = daemon.run(&["list", "--format", "csv"]).ok();
    assert!(
        list.starts_with("Name,State,IPv4,IPv6,Release,AllIPv4\nfoo,Running,"),
        "{list}"
    );
    assert_eq!(daemon.field("foo", "/cpu_count"), "1");
    assert!(daemon.field("foo", "/memory/total").as_u64().unwrap() > 900 << 20);
    let release = daemon.field("foo", "/release");
    assert!(release.as_str().unwrap().contains("Debian"), "{release}");
    let info = daemon.run(&["info", "foo"]).ok();
    for phase in ["restoring", "identifying"] {
        assert!(info.contains(phase), "{info}");
    }
    let images = daemon.run(&["images"]).ok();
    assert!(images.contains("foo"), "{images}");
    // The image is in use: it stays.
    daemon.run(&["images", "prune"]).ok();
    assert!(daemon.run(&["images"]).ok().contains("foo"));
}

/// The guest neither notices that the daemon goes, nor that another one comes.
fn daemon_comes_and_goes(daemon: &mut Daemon) {
    let boot_id = |daemon: &Daemon| {
        let id = ["exec", "foo", "cat", "/proc/sys/kernel/random/boot_id"];
        daemon.run(&id).ok()
    };
    let before = boot_id(daemon);
    for round in 0..3 {
        // A session that is open when the daemon dies must not stand in the next one's way.
        let mut open = daemon
            .command(&["exec", "foo", "--", "sleep", "999"])
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(300));
        if round == 0 {
            daemon.stop();
        } else {
            daemon.kill();
        }
        open.wait().unwrap();
        daemon.start_again();
        wait_until("the guest is adopted", 20, || {
            (daemon.state("foo") == "Running").then_some(())
        });
        assert_eq!(boot_id(daemon), before);
    }
}

fn trash(daemon: &Daemon) {
    daemon.run(&["delete", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Deleted");
    assert!(daemon.machines().is_empty());
    daemon.run(&["recover", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Stopped");
    daemon.run(&["delete", "--purge", "foo"]).ok();
    assert_eq!(daemon.run(&["list"]).ok(), "No instances found.\n");
    let pruned = daemon.run(&["images", "prune"]);
    assert_eq!(pruned.code(), 0, "{pruned:?}");
}
