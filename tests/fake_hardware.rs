//! Hardware that an image or a launch chooses, with machines that are no real ones: what goes before what,
//! what is kept, what is refused, and what is told.

use std::path::{Path, PathBuf};
use std::process::Command;

use pileus_testkit::{Daemon, Need, need};
use serde_json::{Value, json};

use crate::fake_world::{World, refused};
use crate::guests::instance;

/// With everything that is unusual.
fn unusual() -> Value {
    json!({
        "version": 1,
        "uuid": "52bab607-10f1-4049-a0f8-ee4725cb715b",
        "chipset": "pc-i440fx-2.8",
        "cpu": "host",
        "threads": 1,
        "cores": 2,
        "sockets": 2,
        "memory": 640,
        "usb": "piix3-usb-uhci",
        "network": "e1000",
        "mac": "aa:54:1a:30:5c:de",
        "graphics": "qxl-vga",
        "sound": "hda-duplex/intel-hda",
        "keyboard": "usb-kbd",
        "keyboardLayout": "de",
        "mouse": "usb-mouse",
        "tablet": "usb-tablet",
    })
}

fn write(daemon: &Daemon, machine: &Value) -> String {
    let path = daemon.folder().join("machine.json");
    std::fs::write(&path, machine.to_string()).unwrap();
    path.display().to_string()
}

/// The command line of an instance's machine, without what differs from start to start.
fn line(daemon: &Daemon, name: &str) -> String {
    let id = instance(daemon, name)["id"].as_str().unwrap().to_owned();
    let pid = daemon.machine_of(&id).expect("it runs");
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
    let line = String::from_utf8_lossy(&line).replace('\0', " ");
    let words = line.split([',', ' ']).filter(|word| {
        !(word.starts_with("fd=") || word.starts_with("set=") || word.contains("/fd"))
    });
    words.collect::<Vec<_>>().join(" ")
}

#[track_caller]
fn has_all(line: &str, words: &[&str]) {
    for word in words {
        assert!(line.contains(word), "no {word:?} in {line}");
    }
}

const PARTS: &[&str] = &[
    "-machine pc-i440fx-10.0 ",
    "sockets=2 cores=2 threads=1",
    "-device e1000 id=nic0",
    "-device piix3-usb-uhci id=usb",
    "-device usb-tablet",
    "-device VGA id=video",
    "-device intel-hda id=sound",
    "-vnc ",
    "-k de",
];

#[test]
fn fake_hardware_is_kept_for_life() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    let image = format!("file://{}", world.fake_image().display());
    let file = write(&world, &unusual());
    let args = ["launch", &image, "--machine", &file, "--name"];
    let launched = world.run(&[&args[..], &["foo"]].concat());
    assert_eq!(launched.ok_with_words(), "Launched: foo\n");
    let words = &launched.stderr;
    assert!(words.contains("no qxl-vga: the machine has VGA"), "{words}");
    let foo = instance(&world, "foo");
    assert_eq!(foo["mac"], "aa:54:1a:30:5c:de");
    assert_eq!(foo["cpus"], 4);
    assert_eq!(foo["memory"], 640 << 20);
    let first = line(&world, "foo");
    has_all(&first, PARTS);
    has_all(
        &first,
        &["type=1 uuid=52bab607-10f1-4049-a0f8-ee4725cb715b"],
    );

    // Programs are told as people are.
    let told = world.run(&["info", "foo", "--format", "json"]).json();
    let told = &told["info"]["foo"]["hardware"];
    let machine_type = told["machine_type"].as_str().unwrap();
    assert!(machine_type.starts_with("pc-i440fx-"), "{told}");
    let display = told["display"].as_str().unwrap().to_owned();
    // QEMU makes the socket, in the folder that it was given.
    assert!(display.ends_with("/display/vnc.sock"), "{told}");
    assert!(Path::new(&display).parent().unwrap().is_dir(), "{told}");
    let expected = json!({
        "machine_type": machine_type,
        "topology": {"sockets": 2, "cores": 2, "threads": 1},
        "network": "e1000",
        "usb": "piix3-usb-uhci",
        "graphics": "VGA",
        "sound": "hda-duplex/intel-hda",
        "inputs": ["usb-kbd", "usb-mouse", "usb-tablet"],
        "keyboard_layout": "de",
        "uuid": "52bab607-10f1-4049-a0f8-ee4725cb715b",
        "display": display,
    });
    assert_eq!(told, &expected);
    let table = world.run(&["info", "foo"]).ok();
    for word in ["e1000", "VGA", "keyboard layout de", &display] {
        assert!(table.contains(word), "no {word}: {table}");
    }

    // A second one is another one to the network.
    let second = world.run(&[&args[..], &["bar"]].concat());
    assert_eq!(second.ok_with_words(), "Launched: bar\n");
    let words = &second.stderr;
    assert!(
        words.contains("aa:54:1a:30:5c:de is that of instance 'foo'"),
        "{words}"
    );
    assert!(words.contains("UUID 52bab607"), "{words}");
    assert_ne!(instance(&world, "bar")["mac"], foo["mac"]);
    let other = line(&world, "bar");
    has_all(&other, PARTS);
    assert!(!other.contains("-smbios"), "{other}");

    // Whatever happens to it, it stays the same machine.
    world.must("foo", "suspend");
    // What does not run shows nothing.
    assert_eq!(instance(&world, "foo")["hardware"]["display"], Value::Null);
    world.crash();
    world.must("foo", "start");
    has_all(&line(&world, "foo"), PARTS);
    world.must("foo", "stop");
    world.must("foo", "start");
    assert_eq!(line(&world, "foo"), first);
    world.snapshot("foo", "one", true).unwrap();
    world.must("foo", "stop");
    world.restore("foo", "one").unwrap();
    world.must("foo", "start");
    has_all(&line(&world, "foo"), PARTS);
    world.clone_to("foo", "copy").unwrap();
    world.must("copy", "start");
    let copy = line(&world, "copy");
    has_all(&copy, PARTS);
    assert!(!copy.contains("-smbios"), "{copy}");
    assert_ne!(instance(&world, "copy")["mac"], foo["mac"]);

    // Another number of CPUs is another topology.
    world.must("foo", "stop");
    world.api.set("local.foo.cpus", "3").unwrap();
    world.must("foo", "start");
    has_all(&line(&world, "foo"), &["cpus=3 ", "-device e1000"]);
    world.all_is_well();
}

#[test]
fn fake_hardware_that_can_not_be() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let world = World::new();
    let image = format!("file://{}", world.fake_image().display());
    let launch = |more: Value| {
        let mut body = json!({"image": image, "name": "foo", "warm": "never"});
        for (key, value) in more.as_object().unwrap() {
            body[key] = value.clone();
        }
        world.api.run("POST", "/v1/instances", Some(&body))
    };
    for broken in [
        json!({}),
        json!([]),
        json!({"version": -1}),
        json!({"version": 1, "network": "ne2k"}),
        json!({"version": 1, "qemu": "-S"}),
    ] {
        refused(launch(json!({ "machine": broken })), "invalid-argument");
    }
    let large = json!({"version": 1, "memory": 1 << 20});
    refused(launch(json!({ "machine": large })), "no-memory");
    let many = json!({"version": 1, "cores": 255, "threads": 2});
    let told = refused(launch(json!({ "machine": many })), "invalid-argument");
    assert!(told.contains("510 CPUs"), "{told}");
    assert_eq!(world.state("foo"), "none");
    // What the launch itself asks for goes first.
    launch(json!({"machine": large, "memory": 600 << 20})).unwrap();
    assert_eq!(world.instance("foo")["memory"], 600 << 20);
    let file = write(&world, &json!({"version": 1, "mouse": "x", "usb": 1}));
    let words = world
        .run(&["launch", &image, "--machine", &file])
        .fails_with(2);
    for part in ["Invalid machine definition", "machine.mouse", "machine.usb"] {
        assert!(words.contains(part), "{words}");
    }
    world.all_is_well();
}

#[test]
fn fake_hardware_of_its_own_boots() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake_warm();
    let image = format!("file://{}", daemon.fake_image().display());
    let launch = |machine: Value, more: &[&str]| {
        let file = write(&daemon, &machine);
        let args = ["launch", &image, "--name", "foo", "--machine", &file];
        daemon.run(&[&args[..], more].concat())
    };
    let own = json!({"version": 1, "network": "e1000"});
    let words = launch(own.clone(), &["--warm"]).fails_with(2);
    assert!(words.contains("hardware of its own"), "{words}");
    assert_eq!(daemon.state("foo"), "none");
    launch(own, &[]).ok_with_words();
    assert_eq!(daemon.origin("foo"), "cold");
    let info = daemon.run(&["info", "foo"]).ok();
    assert!(info.contains("hardware of its own"), "{info}");
    daemon.run(&["delete", "--purge", "foo"]).ok();
    // What is said may be what is usual.
    let usual = json!({"version": 1, "cores": 1, "memory": 1024, "sound": "none"});
    launch(usual, &[]).ok();
    assert_eq!(daemon.origin("foo"), "warm");
}

#[test]
fn fake_hardware_of_guests_that_say_nothing() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let world = World::with("fast never-boots");
    let image = format!("file://{}", world.fake_image().display());
    let old = write(&world, &json!({"version": 1, "chipset": "pc-i440fx-2.8"}));
    let args = [
        "launch",
        &image,
        "--timeout",
        "2",
        "--machine",
        &old,
        "--name",
    ];
    let launched = world.run(&[&args[..], &["foo"]].concat());
    assert_eq!(launched.ok_with_words(), "Launched: foo\n");
    let words = &launched.stderr;
    assert!(words.contains("gave no sign of life"), "{words}");
    assert_eq!(world.state("foo"), "running");
    assert!(world.machine("foo").is_some());
    // Nobody has to wait.
    let launched = world.run(&[&args[..], &["bar", "--no-wait"]].concat());
    assert_eq!(launched.ok(), "Launching: bar\n");
    world.wait_state("bar", "running");
    world.force_stop("foo").unwrap();
    assert_eq!(world.state("foo"), "stopped");
    // One with the usual machine is expected to speak.
    let usual = world.run(&["launch", &image, "--timeout", "2", "--name", "baz"]);
    usual.fails_with(5);
    assert_eq!(world.state("baz"), "unknown");
}

#[test]
fn fake_hardware_goes_with_an_archive() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let world = World::new();
    let image = format!("file://{}", world.fake_image().display());
    let mut machine = unusual();
    machine["memory"] = json!(64);
    let file = write(&world, &machine);
    let args = ["launch", &image, "--machine", &file, "--name", "foo"];
    world.run(&args).ok_with_words();
    world.must("foo", "stop");
    let archive = world.folder().join("foo.tar.zst").display().to_string();
    world.run(&["export", "foo", &archive]).ok_with_words();
    world
        .run(&["import", &archive, "--name", "copy"])
        .ok_with_words();
    world.must("copy", "start");
    let copy = line(&world, "copy");
    has_all(&copy, PARTS);
    assert!(!copy.contains("-smbios"), "{copy}");
    assert_eq!(instance(&world, "copy")["memory"], 64 << 20);
    world.all_is_well();
}

/// A packed image with this machine, made by the tools of those who made such images first.
fn pack(daemon: &Daemon, machine: &Value) -> Option<PathBuf> {
    if !need(&[
        Need::Program("tar"),
        Need::Program("zstd"),
        Need::Program("qemu-img"),
    ]) {
        return None;
    }
    let folder = daemon.folder().join("pack");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::rename(
        daemon.write_disk("disk.img", 1 << 20, 0),
        folder.join("disk.img"),
    )
    .unwrap();
    std::fs::write(folder.join("machine.json"), machine.to_string()).unwrap();
    let script = "qemu-img create -q -f qcow2 -o backing_file=disk.img,backing_fmt=raw,\
                  lazy_refcounts=on layer.qcow2\n\
                  tar -Scf image.tar disk.img layer.qcow2 machine.json\n\
                  zstd -q -3 image.tar -fo ../image.tar.zst";
    let made = Command::new("sh")
        .args(["-euc", script])
        .current_dir(&folder)
        .status();
    assert!(made.unwrap().success());
    Some(daemon.folder().join("image.tar.zst"))
}

#[test]
fn fake_hardware_of_a_packed_image() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let world = World::new();
    let Some(image) = pack(&world, &unusual()) else {
        return;
    };
    let image = format!("file://{}", image.display());
    let launched = world.run(&["launch", &image, "--name", "foo"]);
    assert_eq!(launched.ok_with_words(), "Launched: foo\n");
    has_all(&line(&world, "foo"), PARTS);
    let foo = instance(&world, "foo");
    assert_eq!(
        (&foo["cpus"], &foo["memory"]),
        (&json!(4), &json!(640 << 20))
    );
    assert_eq!(foo["mac"], "aa:54:1a:30:5c:de");
    // Flags go first, then the launch's own machine, then the image's.
    let own = write(
        &world,
        &json!({"version": 1, "memory": 700, "network": "rtl8139"}),
    );
    let args = [
        "launch",
        &image,
        "--name",
        "bar",
        "--machine",
        &own,
        "-c",
        "1",
    ];
    world.run(&args).ok_with_words();
    let bar = instance(&world, "bar");
    assert_eq!(
        (&bar["cpus"], &bar["memory"]),
        (&json!(1), &json!(700 << 20))
    );
    has_all(
        &line(&world, "bar"),
        &["-device rtl8139 id=nic0", "-device VGA", "cpus=1 "],
    );
    let made = world.run(&["template", "create", &image]);
    let words = made.fails_with(2);
    assert!(words.contains("hardware of its own"), "{words}");
    world.all_is_well();
}
