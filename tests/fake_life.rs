//! The whole life of instances, with machines that boot in milliseconds.

use std::sync::atomic::{AtomicBool, Ordering};

use pileus_testkit::{Daemon, Need, need};
use serde_json::{Value, json};

#[test]
fn fake_from_launch_to_purge() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    assert_eq!(daemon.run(&["list"]).ok(), "No instances found.\n");
    assert_eq!(daemon.launch_fake("foo").ok(), "Launched: foo\n");
    assert_eq!(daemon.state("foo"), "Running");
    // A name is taken in whatever case.
    let again = daemon.launch_fake("FOO").fails_with(2);
    assert!(again.contains("instance \"foo\" already exists"), "{again}");

    daemon.run(&["stop", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Stopped");
    daemon.run(&["stop", "foo"]).ok();
    let refused = daemon.run(&["restart", "foo"]).fails_with(2);
    assert!(refused.contains("is not running"), "{refused}");
    daemon.run(&["start", "foo"]).ok();
    daemon.run(&["restart", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Running");

    daemon.run(&["delete", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Deleted");
    let deleted = daemon.run(&["start", "foo"]).fails_with(2);
    assert!(deleted.contains("is deleted"), "{deleted}");
    daemon.run(&["recover", "foo"]).ok();
    daemon.run(&["start", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Running");
    daemon.run(&["delete", "foo"]).ok();
    daemon.run(&["purge"]).ok();
    assert_eq!(daemon.run(&["list"]).ok(), "No instances found.\n");
    assert!(daemon.machines().is_empty());
    let left = pileus_testkit::files_below(&daemon.storage().join("data/instances"));
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn fake_many_at_once() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    let names: Vec<String> = (0..6).map(|n| format!("m{n}")).collect();
    std::thread::scope(|scope| {
        for name in &names {
            let daemon = &daemon;
            scope.spawn(move || daemon.launch_fake(name).ok());
        }
    });
    let list = daemon.run(&["list", "--format", "csv"]).ok();
    assert_eq!(list.lines().count(), 7, "{list}");
    assert_eq!(daemon.machines().len(), 6);
    // Several names in one call, and all.
    daemon.run(&["stop", "m0", "m1"]).ok();
    assert_eq!(daemon.state("m0"), "Stopped");
    daemon.run(&["stop", "--all"]).ok();
    assert!(daemon.machines().is_empty());
    let mixed = daemon.run(&["start", "m0", "nobody"]).fails_with(2);
    assert!(mixed.contains("nobody"), "{mixed}");
    daemon.run(&["delete", "--all", "--purge"]).ok();
    assert_eq!(daemon.run(&["list"]).ok(), "No instances found.\n");
}

#[test]
fn fake_two_daemons_on_one_storage() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    let second = daemon
        .inside(&pileus_testkit::program("pileusd"))
        .arg("--storage")
        .arg(daemon.storage())
        .output()
        .unwrap();
    assert!(!second.status.success());
    let words = String::from_utf8_lossy(&second.stderr);
    assert!(
        words.contains("Another pileusd uses the storage"),
        "{words}"
    );
    // The first one is none the worse for it.
    daemon.launch_fake("foo").ok();
}

#[test]
fn fake_guest_side_ends_and_reboots() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    daemon.launch_fake("foo").ok();
    let pid = daemon.machines()[0];
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
    pileus_testkit::wait_until("the crash is noticed", 10, || {
        (daemon.state("foo") == "Stopped").then_some(())
    });
    let info = daemon.run(&["info", "foo"]).ok();
    assert!(info.contains("ended unexpectedly"), "{info}");
    daemon.run(&["start", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Running");
}

/// All clones of a fork have the memory of one moment, so they stand on the disk of that moment, whatever becomes
/// of their source while they are made.
#[test]
fn fake_forks_beside_snapshots() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    daemon.launch_fake("foo").ok();
    let done = AtomicBool::new(false);
    let taken = std::thread::scope(|scope| {
        let snapshots = scope.spawn(|| {
            let mut taken = 0;
            // A disk has a bounded number of layers.
            while taken < 100 && !done.load(Ordering::Relaxed) {
                let snapshot = daemon.api().act("foo", "snapshots", &json!({}));
                snapshot.unwrap();
                taken += 1;
            }
            taken
        });
        for _ in 0..3 {
            daemon.run(&["fork", "foo", "--count", "6"]).ok_with_words();
        }
        done.store(true, Ordering::Relaxed);
        snapshots.join().unwrap()
    });
    assert!(taken > 3, "{taken} snapshots beside three forks");
    let database = daemon.storage().join("data/pileus.db");
    let database = rusqlite::Connection::open(database).unwrap();
    let layers = |name: String| -> Value {
        let query = "SELECT spec FROM instances WHERE name = ?1";
        let spec: String = database.query_row(query, [name], |row| row.get(0)).unwrap();
        serde_json::from_str::<Value>(&spec).unwrap()["layers"].clone()
    };
    for round in 0..3 {
        let of = |n: u32| layers(format!("foo-fork{}", round * 6 + n));
        for n in 2..=6 {
            assert_eq!(of(n), of(1), "fork {round}, clone {n}");
        }
    }
}
