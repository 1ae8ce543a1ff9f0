//! Warm launches and the making of templates with machines that are no real ones: what is damaged, cut
//! off or changed behind the daemon's back must end in a cold launch and one line that says why.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Stdio;
use std::time::Duration;

use pileus_testkit::{Daemon, Need, Options, Output, Planted, files_below, need, wait_until};

fn copy_over(path: &std::path::Path) {
    let other = path.with_extension("other");
    fs::copy(path, &other).unwrap();
    fs::set_permissions(&other, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(&other, path).unwrap();
}

fn write_byte(path: &std::path::Path) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_at(b"X", 3).unwrap();
}

fn cut(path: &std::path::Path, bytes: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.set_len(bytes).unwrap();
}

/// The launch must have booted, and have said why in just one line.
#[track_caller]
fn booted_because(daemon: &Daemon, what: &str, launched: &Output, words: &str) {
    assert_eq!(launched.code(), 0, "{what}: {}", launched.stderr);
    assert_eq!(daemon.origin("foo"), "cold", "{what}");
    let lines: Vec<&str> = launched.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "{what}: {}", launched.stderr);
    assert!(lines[0].contains("Booting instead"), "{what}: {lines:?}");
    assert!(lines[0].contains(words), "{what}: {lines:?}");
    let info = daemon.run(&["info", "foo"]).ok();
    assert!(info.contains(words), "{what}: {info}");
}

#[test]
fn fake_damaged_templates() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut daemon = Daemon::fake_warm();
    assert_eq!(daemon.launch_fake("foo").ok(), "Launched: foo\n");
    assert_eq!(daemon.origin("foo"), "warm");
    daemon.run(&["delete", "--purge", "foo"]).ok();

    type Damage = fn(&Planted);
    let damages: [(&str, Damage, &str); 12] = [
        ("memory cut", |t| cut(&t.ram, 1 << 20), "another length"),
        ("memory longer", |t| cut(&t.ram, 2 << 30), "another length"),
        ("memory written", |t| write_byte(&t.ram), "was written to"),
        ("memory exchanged", |t| copy_over(&t.ram), "was replaced"),
        (
            "memory gone",
            |t| fs::remove_file(&t.ram).unwrap(),
            "is not there",
        ),
        (
            "memory open to others",
            |t| fs::set_permissions(&t.ram, fs::Permissions::from_mode(0o644)).unwrap(),
            "mode 644",
        ),
        (
            "memory with a second name",
            |t| fs::hard_link(&t.ram, t.folder.join("copy")).unwrap(),
            "second name",
        ),
        (
            "state written",
            |t| write_byte(&t.state),
            "not what was saved",
        ),
        ("state cut", |t| cut(&t.state, 5), "another length"),
        (
            "state gone",
            |t| fs::remove_file(&t.state).unwrap(),
            "is not there",
        ),
        ("disk written", |t| write_byte(&t.layer), "was written to"),
        (
            "manifest",
            |t| fs::write(t.manifest(), "{").unwrap(),
            "damaged",
        ),
    ];
    for (what, damage, words) in damages {
        damage(daemon.template());
        let refused = daemon.run(&["launch", "--warm", &image(&daemon), "--name", "bar"]);
        let refusal = refused.fails_with(2);
        assert!(refusal.contains(words), "{what}: {refusal}");
        assert_eq!(daemon.state("bar"), "none", "{what}");
        // Once more as everybody does it, before the damaged template is cleared away.
        let launched = daemon.launch_fake("foo");
        booted_because(&daemon, what, &launched, words);
        wait_until("the damaged template is no longer listed", 20, || {
            let list = daemon.run(&["template", "list"]).ok();
            (!list.contains(&daemon.template().id)).then_some(())
        });
        daemon.run(&["delete", "--purge", "foo"]).ok();
        wait_until("its files are gone", 20, || {
            daemon.templates_and_layers().is_empty().then_some(())
        });
        daemon.stop();
        daemon.plant_fake_template();
        daemon.start_again();
    }
    // Found so at the start: swept.
    daemon.stop();
    fs::write(daemon.template().manifest(), "[]").unwrap();
    daemon.start_again();
    let left = daemon.templates_and_layers();
    assert!(left.is_empty(), "{left:?}");
    daemon.launch_fake("foo").ok();
}

fn image(daemon: &Daemon) -> String {
    format!("file://{}", daemon.fake_image().display())
}

/// The template is fine, and the machine that is restored from it is not.
#[test]
fn fake_clones_that_fail() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake_warm();
    for (behaviour, words) in [
        ("restore-fails", "error while loading state"),
        ("identify-fails", "told to be nobody"),
    ] {
        daemon.fakes_do(behaviour);
        let refused = daemon.run(&["launch", "--warm", &image(&daemon), "--name", "foo"]);
        assert!(refused.fails_with(2).contains(words), "{behaviour}");
        assert_eq!(daemon.state("foo"), "none", "{behaviour}");
        assert!(daemon.machines().is_empty(), "{behaviour}");
        let launched = daemon.launch_fake("foo");
        booted_because(&daemon, behaviour, &launched, words);
        daemon.run(&["restart", "foo"]).ok();
        daemon.run(&["delete", "--purge", "foo"]).ok();
        // It may have been bad luck: the template stays, and serves the next one.
        daemon.fakes_do("");
        daemon.launch_fake("foo").ok();
        assert_eq!(daemon.origin("foo"), "warm", "{behaviour}");
        daemon.run(&["delete", "--purge", "foo"]).ok();
    }
    let left = files_below(&daemon.storage().join("data/instances"));
    assert!(left.is_empty(), "{left:?}");
}

/// A clone that is stopped and started boots, on its template's layer, which stays as long as it does.
#[test]
fn fake_clones_and_their_templates() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut daemon = Daemon::fake_warm();
    let layer = daemon.template().layer.clone();
    let id = daemon.template().id.clone();
    daemon.launch_fake("foo").ok();
    daemon.launch_fake("bar").ok();
    daemon.run(&["stop", "bar"]).ok();
    let gone = daemon.run(&["template", "delete", &id[..6]]).ok();
    assert!(gone.contains(&id), "{gone}");
    assert_eq!(daemon.run(&["template", "info", &id]).code(), 2);
    assert!(layer.exists(), "the layer of living clones is gone");
    daemon.run(&["restart", "foo"]).ok();
    daemon.run(&["start", "bar"]).ok();
    daemon.run(&["delete", "--purge", "foo"]).ok();
    assert!(layer.exists(), "the layer of a living clone is gone");
    daemon.kill();
    daemon.start_again();
    assert!(layer.exists(), "the sweep took a living clone's layer");
    wait_until("the clone is adopted", 10, || {
        (daemon.state("bar") == "Running").then_some(())
    });
    daemon.run(&["delete", "bar"]).ok();
    assert!(layer.exists(), "the layer of a clone in the trash is gone");
    daemon.run(&["purge"]).ok();
    assert!(daemon.templates_and_layers().is_empty());

    // Another build of QEMU: the template is no good for it, and goes.
    daemon.stop();
    daemon.plant_fake_template();
    daemon.exchange_fake_qemu();
    daemon.start_again();
    let required = daemon.run(&["launch", "--warm", &image(&daemon), "--name", "foo"]);
    let refusal = required.fails_with(2);
    assert!(refusal.contains("there is no template"), "{refusal}");
    assert_eq!(daemon.launch_fake("foo").ok(), "Launched: foo\n");
    assert_eq!(daemon.origin("foo"), "cold");
    daemon.run(&["template", "prune"]).ok();
    assert!(daemon.templates_and_layers().is_empty());
}

#[test]
fn fake_shapes_that_do_not_fit() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake_warm();
    let image = image(&daemon);
    for shape in [["-c", "2"], ["-m", "2G"], ["-m", "512M"]] {
        let args = ["launch", &image, "--name", "foo", shape[0], shape[1]];
        // Nobody expected a template of that shape: nothing to warn of.
        daemon.run(&args).ok();
        assert_eq!(daemon.origin("foo"), "cold", "{shape:?}");
        let required = daemon.run(&[&args[..], &["--warm"]].concat());
        assert_eq!(required.code(), 2, "{shape:?}");
        daemon.run(&["delete", "--purge", "foo"]).ok();
    }
    // A disk may be larger than the template's, not smaller.
    let small = daemon.run(&["launch", &image, "--name", "foo", "-d", "3G"]);
    booted_because(&daemon, "a small disk", &small, "disk is larger");
    daemon.run(&["delete", "--purge", "foo"]).ok();
    daemon
        .run(&["launch", &image, "--name", "foo", "-d", "8G", "--warm"])
        .ok();
    assert_eq!(daemon.origin("foo"), "warm");
    daemon.run(&["delete", "--purge", "foo"]).ok();
    daemon
        .run(&["launch", &image, "--name", "foo", "--cold"])
        .ok();
    assert_eq!(daemon.origin("foo"), "cold");
}

#[test]
fn fake_settings_of_warm_launches() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut daemon = Daemon::fake_warm();
    let get = |daemon: &Daemon, key: &str| daemon.run(&["get", key]).ok();
    assert_eq!(get(&daemon, "local.warm"), "manual\n");
    daemon.run(&["set", "local.warm=off"]).ok();
    daemon.launch_fake("foo").ok();
    assert_eq!(daemon.origin("foo"), "cold");
    let refused = daemon.run(&["launch", "--warm", &image(&daemon)]);
    let refusal = refused.fails_with(2);
    assert!(refusal.contains("local.warm is off"), "{refusal}");
    // It outlives the daemon, whatever that one's own default is.
    daemon.kill();
    daemon.start_again();
    assert_eq!(get(&daemon, "local.warm"), "off\n");
    daemon.run(&["set", "local.warm", "manual"]).ok();
    daemon.launch_fake("bar").ok();
    assert_eq!(daemon.origin("bar"), "warm");
    for bad in ["local.warm=yes", "local.warm-pool=99", "local.nonesuch=1"] {
        assert_eq!(daemon.run(&["set", bad]).code(), 2, "{bad}");
    }
    let keys = daemon.run(&["get", "--keys"]).ok();
    assert!(keys.lines().any(|key| key == "local.warm-budget"), "{keys}");
    // A budget that is too small for what there is: the template goes at once.
    daemon.run(&["delete", "--purge", "bar"]).ok();
    daemon.run(&["set", "local.warm-budget=1K"]).ok();
    wait_until("the template gives way", 10, || {
        daemon.templates_and_layers().is_empty().then_some(())
    });
}

#[test]
fn fake_template_creation() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut daemon = Daemon::start(Options {
        warm: "manual",
        ..Options::fake()
    });
    daemon.write_fake_image();
    let image = image(&daemon);
    let create = ["template", "create", &image, "--timeout", "2"];
    for (behaviour, words) in [
        ("panics", "panicked"),
        ("crashes", "ended"),
        ("fails-at-start", "told to fail"),
        ("never-boots", "no sign of life within 2 s"),
        ("cloud-init-hangs", "did not end its set-up"),
        ("cloud-init-error", "cloud-init failed"),
        ("quiesce-fails", "told not to be quiet"),
        ("save-fails", "told not to be saved"),
    ] {
        daemon.fakes_do(behaviour);
        let failed = daemon.run(&create);
        assert_ne!(failed.code(), 0, "{behaviour}");
        assert!(
            failed.stderr.contains(words),
            "{behaviour}: {}",
            failed.stderr
        );
        assert!(daemon.machines().is_empty(), "{behaviour}");
        let left = daemon.templates_and_layers();
        assert!(left.is_empty(), "{behaviour}: {left:?}");
    }
    daemon.fakes_do("");
    let ready = daemon.run(&create).ok();
    let id = ready.trim().strip_prefix("Ready: ").unwrap().to_owned();
    assert!(daemon.machines().is_empty());
    let list = daemon.run(&["template", "list", "--format", "json"]).ok();
    assert!(list.contains(&id), "{list}");
    // Only what it takes is kept, and nobody else may read it.
    let folder = daemon.storage().join("data/templates").join(&id);
    let files: Vec<String> = files_below(&folder)
        .iter()
        .map(|path| path.display().to_string())
        .collect();
    assert_eq!(files, ["ram", "state", "template.json"]);
    for file in files {
        let mode = fs::metadata(folder.join(&file)).unwrap().permissions();
        assert_eq!(mode.mode() & 0o777, 0o600, "{file}");
    }
    // A second time there is nothing to do; a launch takes it.
    assert_eq!(daemon.run(&create).ok(), ready);
    daemon.launch_fake("foo").ok();
    assert_eq!(daemon.origin("foo"), "warm");
    daemon.run(&["delete", "--purge", "foo"]).ok();
    daemon.run(&["template", "prune", "--all"]).ok();
    assert!(daemon.templates_and_layers().is_empty());

    // By itself after the second launch of a shape.
    daemon.run(&["set", "local.warm=auto"]).ok();
    for name in ["a", "b"] {
        daemon.launch_fake(name).ok();
    }
    wait_until("a template is made by itself", 30, || {
        let list = daemon.run(&["template", "list"]).ok();
        list.contains(&id).then_some(())
    });
    wait_until("the next launch is warm", 20, || {
        daemon.launch_fake("c").ok_with_words();
        let warm = daemon.origin("c") == "warm";
        daemon.run(&["delete", "--purge", "c"]).ok();
        warm.then_some(())
    });
    daemon.stop();
}

/// The daemon is killed while it makes a template: its machine ends, and the next start is clean.
#[test]
fn fake_daemon_killed_at_any_moment_of_a_templates_making() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut daemon = Daemon::start(Options {
        warm: "manual",
        ..Options::fake()
    });
    daemon.write_fake_image();
    daemon.fakes_do("boot-ms=100 cloud-init-ms=60 quiesce-ms=60 save-ms=60");
    let (mut made, mut undone) = (0, 0);
    for round in 0..16 {
        let mut create = daemon
            .command(&["template", "create", &image(&daemon)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(20 + round * 40));
        let machines = daemon.machines();
        daemon.kill();
        wait_until("the template's machine ends with the daemon", 5, || {
            let alive = |pid: &i32| fs::metadata(format!("/proc/{pid}/fd/0")).is_ok();
            (!machines.iter().any(alive)).then_some(())
        });
        daemon.start_again();
        create.wait().unwrap();
        let left = daemon.templates_and_layers();
        match left.len() {
            0 => undone += 1,
            4 => made += 1,
            _ => panic!("round {round}: {left:?}"),
        }
        assert!(daemon.machines().is_empty(), "round {round}");
        let run = files_below(&daemon.storage().join("run/i"));
        assert!(run.is_empty(), "round {round}: {run:?}");
        daemon.run(&["template", "prune", "--all"]).ok_with_words();
    }
    assert!(made > 0 && undone > 0, "made {made}, undone {undone}");
}

/// As in `fake_faults.rs`, of a warm launch.
#[test]
fn fake_daemon_killed_at_any_moment_of_a_warm_launch() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut daemon = Daemon::fake_warm();
    daemon.fakes_do("restore-ms=80 identify-ms=120");
    let (mut kept, mut undone) = (0, 0);
    for round in 0..16 {
        let name = format!("r{round}");
        let mut launch = daemon
            .command(&["launch", "--warm", &image(&daemon), "--name", &name])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(20 + round * 30));
        daemon.kill();
        daemon.start_again();
        launch.wait().unwrap();
        let state = wait_until("the instance is whole or gone", 20, || {
            let state = daemon.state(&name);
            (state == "none" || state == "Running").then_some(state)
        });
        if state == "Running" {
            kept += 1;
            assert_eq!(daemon.origin(&name), "warm");
            daemon.run(&["delete", "--purge", &name]).ok();
        } else {
            undone += 1;
        }
        wait_until("its machine is gone", 10, || {
            daemon.machines().is_empty().then_some(())
        });
        let left = files_below(&daemon.storage().join("data/instances"));
        assert!(left.is_empty(), "round {round}: {left:?}");
        // Killed while a QEMU of its own user had the memory on loan: the template is none the worse.
        daemon.launch_fake("again").ok();
        assert_eq!(daemon.origin("again"), "warm", "round {round}");
        daemon.run(&["delete", "--purge", "again"]).ok();
    }
    assert!(kept > 0 && undone > 0, "kept {kept}, undone {undone}");
}

#[test]
fn fake_no_room_for_templates_and_no_memory() {
    if !need(&[Need::Root, Need::Tun, Need::Program("mount")]) {
        return;
    }
    let daemon = Daemon::on_small_disk(700 << 20);
    let full = daemon.run(&["template", "create", &image(&daemon)]);
    let refusal = full.fails_with(2);
    assert!(refusal.contains("are free"), "{refusal}");
    assert!(daemon.templates_and_layers().is_empty());
    drop(daemon);

    let daemon = Daemon::start(Options {
        own_meminfo: true,
        ..Options::fake()
    });
    daemon.write_fake_image();
    daemon.set_free_memory(500 << 20);
    let refused = daemon.launch_fake("foo").fails_with(2);
    assert!(refused.contains("500.0MiB of free memory"), "{refused}");
    assert_eq!(daemon.run(&["list"]).ok(), "No instances found.\n");
    let refused = daemon.run(&["template", "create", &image(&daemon)]);
    assert!(refused.fails_with(2).contains("free memory"));
    daemon.set_free_memory(2 << 30);
    daemon.launch_fake("foo").ok();
    daemon.set_free_memory(100 << 20);
    daemon.run(&["stop", "foo"]).ok();
    let refused = daemon.run(&["start", "foo"]).fails_with(2);
    assert!(refused.contains("free memory"), "{refused}");
    assert_eq!(daemon.state("foo"), "Stopped");
}
