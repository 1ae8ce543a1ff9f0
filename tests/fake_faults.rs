//! Guests that misbehave in a launch, and a daemon that is killed at any moment of one.

use std::time::Duration;

use pileus_testkit::{Daemon, Need, files_below, need, wait_until};

#[test]
fn fake_guests_that_fail() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    let image = format!("file://{}", daemon.fake_image().display());
    for (behaviour, words, state) in [
        ("panics", "panicked", "Stopped"),
        ("powers-off", "shut itself down", "Stopped"),
        ("crashes", "ended while it booted", "Stopped"),
        ("never-boots", "no sign of life within 2 s", "Unknown"),
        ("cloud-init-hangs", "did not end within 2 s", "Running"),
        ("cloud-init-error", "cloud-init failed", "Running"),
    ] {
        daemon.fakes_do(behaviour);
        let args = ["launch", &image, "--name", "foo", "--timeout", "2"];
        let output = daemon.run(&args);
        // The CLI's own bound is the same as the daemon's: either may speak first.
        assert_ne!(output.code(), 0, "{behaviour}");
        if output.code() != 5 {
            assert!(
                output.stderr.contains(words),
                "{behaviour}: {}",
                output.stderr
            );
        }
        wait_until(behaviour, 10, || {
            (daemon.state("foo") == state).then_some(())
        });
        daemon.run(&["delete", "--purge", "foo"]).ok();
    }
    // QEMU itself does not start: nothing is kept.
    daemon.fakes_do("fails-at-start");
    let failed = daemon.launch_fake("foo").fails_with(2);
    assert!(failed.contains("QEMU"), "{failed}");
    assert_eq!(daemon.run(&["list"]).ok(), "No instances found.\n");
    // Warnings of cloud-init are told, and are no error.
    daemon.fakes_do("cloud-init-degraded");
    let degraded = daemon.launch_fake("foo");
    assert_eq!(degraded.ok_with_words(), "Launched: foo\n");
    assert!(
        degraded.stderr.contains("cloud-init"),
        "{}",
        degraded.stderr
    );
    // A guest that ignores the power button.
    daemon.run(&["delete", "--purge", "foo"]).ok();
    daemon.fakes_do("ignores-powerdown");
    daemon.launch_fake("foo").ok();
    daemon.run(&["stop", "--force", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Stopped");
}

/// An instance whose files can't be removed is not lost from sight, and goes when they can.
#[test]
fn fake_deletion_that_fails() {
    if !need(&[Need::Root, Need::Tun, Need::Program("chattr")]) {
        return;
    }
    let daemon = Daemon::fake();
    daemon.launch_fake("foo").ok();
    daemon.run(&["stop", "foo"]).ok();
    let instances = daemon.storage().join("data/instances");
    let folder = std::fs::read_dir(&instances).unwrap().next().unwrap();
    let stays = folder.unwrap().path().join("stays");
    std::fs::write(&stays, "").unwrap();
    let chattr = |how: &str| {
        let mut command = std::process::Command::new("chattr");
        command.arg(how).arg(&stays).status().unwrap().success()
    };
    if !chattr("+i") {
        eprintln!("SKIPPED: this file system has no files that can't be removed");
        return;
    }
    let failed = daemon.run(&["delete", "--purge", "foo"]);
    let state = daemon.state("foo");
    assert!(chattr("-i"));
    let told = failed.fails_with(2);
    assert!(told.contains("Removing"), "{told}");
    assert_eq!(state, "Stopped");
    daemon.run(&["delete", "--purge", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "none");
    assert_eq!(files_below(&instances), Vec::<std::path::PathBuf>::new());
}

/// The daemon is killed after each of many short times in a launch. The next one must find the
/// instance whole or not at all, and be able to launch again.
#[test]
fn fake_daemon_killed_at_any_moment_of_a_launch() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut daemon = Daemon::fake();
    daemon.fakes_do("boot-ms=150 cloud-init-ms=100");
    let (mut kept, mut undone) = (0, 0);
    for round in 0..24 {
        let name = format!("r{round}");
        let image = format!("file://{}", daemon.fake_image().display());
        // Another content each time, so that the import takes part.
        daemon.write_disk("fake.raw", 1 << 20, round as u8);
        let mut launch = daemon
            .command(&["launch", &image, "--name", &name])
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(10 + round * 20));
        daemon.kill();
        daemon.start_again();
        // The client that waited hears how it ended.
        launch.wait().unwrap();
        let state = wait_until("the instance is whole or gone", 20, || {
            let state = daemon.state(&name);
            (state == "none" || state == "Running").then_some(state)
        });
        if state == "Running" {
            kept += 1;
            daemon.run(&["stop", &name]).ok();
            daemon.run(&["start", &name]).ok();
        } else {
            undone += 1;
            daemon.launch_fake(&name).ok();
        }
        daemon.run(&["delete", "--purge", &name]).ok();
        assert!(daemon.machines().is_empty(), "round {round}");
        let left = files_below(&daemon.storage().join("data/instances"));
        assert!(left.is_empty(), "round {round}: {left:?}");
    }
    // Both ends were met, or the times above need another look.
    assert!(kept > 0 && undone > 0, "kept {kept}, undone {undone}");
}

#[test]
fn fake_machines_outlive_the_daemon() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut daemon = Daemon::fake();
    daemon.launch_fake("foo").ok();
    daemon.launch_fake("bar").ok();
    daemon.run(&["stop", "bar"]).ok();
    let before = daemon.machines();
    for clean in [true, false] {
        if clean {
            daemon.stop();
        } else {
            daemon.kill();
        }
        assert_eq!(daemon.machines(), before, "clean: {clean}");
        daemon.start_again();
        wait_until("the machine is adopted", 10, || {
            (daemon.state("foo") == "Running").then_some(())
        });
        assert_eq!(daemon.state("bar"), "Stopped");
    }
    // One that ends while nobody looks is told so.
    daemon.kill();
    for pid in &before {
        let pid = nix::unistd::Pid::from_raw(*pid);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    daemon.start_again();
    wait_until("the loss is noticed", 10, || {
        (daemon.state("foo") == "Stopped").then_some(())
    });
    let info = daemon.run(&["info", "foo"]).ok();
    assert!(info.contains("ended while no daemon ran"), "{info}");
    daemon.run(&["start", "foo", "bar"]).ok();
}

/// An instance whose image is still on its way can't be deleted under its launch's hands.
#[test]
fn fake_delete_while_the_image_comes() {
    if !need(&[Need::Root, Need::Tun, Need::Program("python3")]) {
        return;
    }
    let daemon = Daemon::fake();
    let script = "import socket,time; s=socket.socket(); s.bind(('127.0.0.1',8099)); s.listen(); time.sleep(60)";
    let mut silent_host = daemon
        .namespace()
        .command("python3")
        .args(["-c", script])
        .spawn()
        .unwrap();
    let mut launch = daemon
        .command(&["launch", "http://127.0.0.1:8099/disk.img", "--name", "foo"])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the launch is known", 10, || {
        (daemon.state("foo") != "none").then_some(())
    });
    let refused = daemon.run(&["delete", "--purge", "foo"]).fails_with(2);
    assert!(refused.contains("is being prepared"), "{refused}");
    let pid = nix::unistd::Pid::from_raw(launch.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    assert!(!launch.wait().unwrap().success());
    assert_eq!(daemon.run(&["list"]).ok(), "No instances found.\n");
    silent_host.kill().unwrap();
    silent_host.wait().unwrap();
}

/// Ctrl-C in a launch takes everything back.
#[test]
fn fake_cancelled_launch() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    daemon.fakes_do("never-boots");
    let image = format!("file://{}", daemon.fake_image().display());
    let mut launch = daemon
        .command(&["launch", &image, "--name", "foo"])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_until("the machine runs", 10, || {
        (!daemon.machines().is_empty()).then_some(())
    });
    let pid = nix::unistd::Pid::from_raw(launch.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
    let status = launch.wait().unwrap();
    assert!(!status.success());
    assert_eq!(daemon.run(&["list"]).ok(), "No instances found.\n");
    assert!(daemon.machines().is_empty());
}
