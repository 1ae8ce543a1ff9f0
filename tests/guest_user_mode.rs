//! The same daemon for an ordinary user: no root, a namespace of its own, a real guest.

use std::process::Command;

use pileus_testkit::{Daemon, Namespace, Need, Options, need};

const USER: &str = "pileus-test";

/// An ordinary user with subordinate ids, as `adduser` makes one.
fn ensure_user() {
    let exists = Command::new("id")
        .arg(USER)
        .output()
        .unwrap()
        .status
        .success();
    if !exists {
        let made = Command::new("useradd")
            .args(["--create-home", "--shell", "/bin/sh", USER])
            .status();
        assert!(made.unwrap().success());
    }
    for file in ["/etc/subuid", "/etc/subgid"] {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        if !text
            .lines()
            .any(|line| line.starts_with(&format!("{USER}:")))
        {
            std::fs::write(file, format!("{text}{USER}:1000000:65536\n")).unwrap();
        }
    }
}

/// From the guest through NAT and pasta to a server that is not in the user's namespace.
fn reaches_the_outside(daemon: &Daemon) {
    let page = daemon.folder().join("page");
    std::fs::create_dir(&page).unwrap();
    std::fs::write(page.join("hello"), vec![b'x'; 300_000]).unwrap();
    let mut server = daemon
        .namespace()
        .command("python3")
        .args([
            "-m",
            "http.server",
            "8080",
            "--bind",
            Namespace::OUTSIDE,
            "--directory",
        ])
        .arg(&page)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let url = format!("http://{}:8080/hello", Namespace::OUTSIDE);
    let fetch = [
        "exec",
        "foo",
        "--",
        "curl",
        "-sS",
        "--retry",
        "5",
        "--retry-connrefused",
        "-m",
        "20",
        &url,
    ];
    let fetched = daemon.run(&fetch);
    server.kill().unwrap();
    server.wait().unwrap();
    assert_eq!(fetched.ok().len(), 300_000);
}

#[test]
fn guest_user_mode() {
    let needs = [
        Need::Root,
        Need::Tun,
        Need::Guest,
        Need::Program("pasta"),
        Need::Program("newuidmap"),
        Need::Program("setpriv"),
    ];
    if !need(&needs) {
        return;
    }
    ensure_user();
    // Every distribution lets all users open it; these machines don't.
    let opened = Command::new("chmod")
        .args(["0666", "/dev/net/tun"])
        .status();
    assert!(opened.unwrap().success());
    let mut daemon = Daemon::start(Options {
        user: Some(USER.into()),
        ..Options::warm()
    });
    let mode = daemon.run(&["version", "--format", "json"]);
    mode.ok();
    assert_eq!(
        daemon.run(&["launch", "--name", "foo"]).ok_with_words(),
        "Launched: foo\n"
    );
    let exec = |daemon: &Daemon, words: &[&str]| {
        daemon.run(&[&["exec", "foo", "--"], words].concat()).ok()
    };
    assert_eq!(exec(&daemon, &["id", "-un"]), "ubuntu\n");
    let address = daemon.field("foo", "/ipv4/0");
    let shown = exec(
        &daemon,
        &["ip", "-4", "-o", "address", "show", "scope", "global"],
    );
    assert!(
        shown.contains(address.as_str().unwrap()),
        "{address} {shown}"
    );
    reaches_the_outside(&daemon);
    // Nothing of it runs as root, and nothing shows outside the user's namespace.
    for pid in daemon.machines() {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let uid = status.lines().find(|l| l.starts_with("Uid:")).unwrap();
        assert!(!uid.split_whitespace().any(|field| field == "0"), "{uid}");
    }
    let links = daemon
        .namespace()
        .command("ip")
        .arg("link")
        .output()
        .unwrap();
    let links = String::from_utf8_lossy(&links.stdout).into_owned();
    assert!(!links.contains("pileus0"), "{links}");
    // A new daemon finds its way back into the namespace.
    let before = daemon.pid();
    daemon.kill();
    daemon.start_again();
    assert_ne!(daemon.pid(), before);
    pileus_testkit::wait_until("the guest is adopted", 20, || {
        (daemon.state("foo") == "Running").then_some(())
    });
    let starts = daemon.log().matches("ready socket=").count();
    assert_eq!(starts, 2, "it is the old daemon");
    assert_eq!(exec(&daemon, &["hostname"]), "foo\n");
    daemon.run(&["delete", "--purge", "foo"]).ok();
    daemon.stop();
}
