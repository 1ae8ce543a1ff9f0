//! Real guests on hardware that an image chose: the old chipset, a display, sound, USB, cards of old. Our
//! channel does not depend on any of it. And one whose hardware grows while it runs.

use std::io::Read;
use std::os::unix::net::UnixStream;

use pileus_testkit::{Daemon, GUEST_IMAGE, Need, OLDER_GUEST_IMAGE, Options, Output, need};
use serde_json::{Value, json};

use crate::guests::instance;

const MAC: &str = "aa:54:1a:30:5c:de";
const UUID: &str = "52bab607-10f1-4049-a0f8-ee4725cb715b";

fn launch(daemon: &Daemon, name: &str, machine: &Value) -> Output {
    let file = daemon.folder().join(format!("{name}.json"));
    std::fs::write(&file, machine.to_string()).unwrap();
    let file = file.display().to_string();
    daemon.run(&["launch", GUEST_IMAGE, "--name", name, "--machine", &file])
}

/// `vendor:device` of everything on PCI.
fn devices(daemon: &Daemon, name: &str) -> Vec<String> {
    let look = "for d in /sys/bus/pci/devices/*; do echo $(cat $d/vendor $d/device); done";
    let found = daemon.script(name, look).replace("0x", "");
    found.lines().map(|line| line.replace(' ', ":")).collect()
}

/// The guest sees what was chosen for it.
fn sees_its_hardware(daemon: &Daemon) {
    let exec = |words: &[&str]| daemon.exec("foo", words);
    assert_eq!(exec(&["nproc"]), "2\n");
    let memory = exec(&["awk", "/MemTotal/ {print int($2 / 1024)}", "/proc/meminfo"]);
    let memory: u32 = memory.trim().parse().unwrap();
    assert!((560..=700).contains(&memory), "{memory} MiB of memory");
    assert!(
        exec(&["sh", "-c", "cat /sys/class/net/*/address"]).contains(MAC),
        "no card has its address"
    );
    let dmi = |what: &str| exec(&["sudo", "cat", &format!("/sys/class/dmi/id/{what}")]);
    assert_eq!(dmi("product_uuid"), format!("{UUID}\n"));
    assert!(
        dmi("product_name").contains("i440FX"),
        "{}",
        dmi("product_name")
    );
    let devices = devices(daemon, "foo");
    for (what, id) in [
        ("the old chipset", "8086:1237"),
        ("VGA", "1234:1111"),
        ("USB", "8086:7020"),
        ("sound", "8086:2668"),
    ] {
        assert!(
            devices.iter().any(|found| found == id),
            "no {what}: {devices:?}"
        );
    }
    // What is ours is there as well: the disk, the seed, the ports, randomness.
    let ours = devices.iter().filter(|found| found.starts_with("1af4:"));
    assert!(ours.count() >= 5, "{devices:?}");
    let through = daemon.run_with(&["exec", "foo", "--", "cat"], b"through the channel");
    assert_eq!(through.ok(), "through the channel");
}

fn shows_its_display(daemon: &Daemon) {
    let id = instance(daemon, "foo")["id"].as_str().unwrap().to_owned();
    let run = daemon.storage().join("run/i");
    let folders = std::fs::read_dir(&run).unwrap().flatten();
    let own = folders
        .map(|entry| entry.path())
        .find(|path| id.starts_with(path.file_name().unwrap().to_str().unwrap()))
        .unwrap_or_else(|| panic!("no folder of {id} in {}", run.display()));
    let mut display = UnixStream::connect(own.join("display/vnc.sock")).unwrap();
    let mut hello = [0; 12];
    display.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"RFB 003.008\n");
}

#[test]
fn guest_hardware_of_old() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let daemon = Daemon::start(Options::real());
    let machine = json!({
        "version": 1,
        "uuid": UUID,
        "chipset": "pc-i440fx-2.8",
        "cpu": "host",
        "cores": 2,
        "memory": 700,
        "mac": MAC,
        "usb": "piix3-usb-uhci",
        "graphics": "VGA",
        "sound": "hda-duplex/intel-hda",
        "keyboard": "usb-kbd",
        "mouse": "usb-mouse",
        "tablet": "usb-tablet",
        "keyboardLayout": "nl-be",
    });
    let launched = launch(&daemon, "foo", &machine);
    assert_eq!(launched.ok_with_words(), "Launched: foo\n");
    assert_eq!(daemon.origin("foo"), "cold");
    assert_ne!(daemon.field("foo", "/ipv4/0"), Value::Null);
    sees_its_hardware(&daemon);
    shows_its_display(&daemon);
    // What it knew it knows again, on the same machine.
    daemon.script("foo", "echo here > /dev/shm/mark");
    daemon.run(&["suspend", "foo"]).ok_with_words();
    daemon.run(&["start", "foo"]).ok_with_words();
    assert_eq!(daemon.exec("foo", &["cat", "/dev/shm/mark"]), "here\n");
    sees_its_hardware(&daemon);
    // Its first card goes and comes again, as it does on any machine.
    daemon
        .run(&["fork", "foo", "--name", "bar"])
        .ok_with_words();
    assert_eq!(daemon.exec("bar", &["cat", "/dev/shm/mark"]), "here\n");
    assert_ne!(daemon.field("bar", "/ipv4/0"), Value::Null);
    assert_eq!(daemon.exec("bar", &["hostname"]), "bar\n");
}

#[test]
fn guest_hardware_that_its_kernel_has_no_driver_for() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let daemon = Daemon::start(Options::real());
    let machine = json!({
        "version": 1,
        "chipset": "pc-i440fx-2.8",
        "network": "e1000",
        "mac": MAC,
        "graphics": "virtio-vga",
        "usb": "nec-usb-xhci",
        "sound": "AC97",
        "tablet": "usb-tablet",
    });
    // A cloud's kernel has no driver for such a card: cloud-init misses it, and the launch says so. The
    // channel needs no card.
    let words = launch(&daemon, "foo", &machine).fails_with(2);
    assert!(
        words.contains("Not all expected physical devices"),
        "{words}"
    );
    assert_eq!(daemon.state("foo"), "Running");
    assert_eq!(instance(&daemon, "foo")["mac"], MAC);
    let devices = devices(&daemon, "foo");
    for (what, id) in [
        ("e1000", "8086:100e"),
        ("virtio-vga", "1af4:1050"),
        ("xHCI", "1033:0194"),
        ("AC97", "8086:2415"),
    ] {
        assert!(
            devices.iter().any(|found| found == id),
            "no {what}: {devices:?}"
        );
    }
    assert_eq!(daemon.exec("foo", &["hostname"]), "foo\n");
}

/// How many processors it works with, and what it has of memory, in MiB.
fn shape(daemon: &Daemon) -> (String, u64) {
    let memory = daemon.script("foo", "awk '/MemTotal/ {print $2}' /proc/meminfo");
    let kib: u64 = memory.trim().parse().unwrap();
    let cpus = daemon.exec("foo", &["nproc"]);
    (cpus.trim().to_owned(), kib / 1024)
}

#[test]
fn guest_hardware_that_comes_later() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let host = std::thread::available_parallelism().unwrap().get();
    if host < 2 {
        // A machine has no more places for processors than its host has processors.
        eprintln!("SKIPPED: this test needs two processors");
        return;
    }
    let daemon = Daemon::start(Options::older());
    daemon
        .run(&["launch", OLDER_GUEST_IMAGE, "-n", "foo", "-c", "1"])
        .ok_with_words();
    let set = |setting: &str| daemon.run(&["set", &format!("local.foo.{setting}")]).ok();
    let boot = daemon.script("foo", "cat /proc/sys/kernel/random/boot_id");
    let (one, small) = shape(&daemon);
    assert_eq!(one, "1");

    set("cpus=2");
    set("memory=1280M");
    let (two, large) = shape(&daemon);
    assert_eq!(two, "2");
    assert!((200..=256).contains(&(large - small)), "{small}, {large}");
    assert_eq!(daemon.exec("foo", &["taskset", "-c", "1", "nproc"]), "1\n");
    assert_eq!(daemon.field("foo", "/pending"), Value::Null);

    // It has them still after its memory was saved, with a snapshot too.
    daemon
        .run(&["snapshot", "foo", "--name", "large", "--with-memory"])
        .ok();
    daemon.run(&["suspend", "foo"]).ok_with_words();
    daemon.run(&["start", "foo"]).ok_with_words();
    assert_eq!(shape(&daemon), (two.clone(), large));
    assert_eq!(
        daemon.script("foo", "cat /proc/sys/kernel/random/boot_id"),
        boot
    );

    // Memory goes back at once; a processor stays until the next boot, and that is told.
    set("memory=1G");
    set("cpus=1");
    assert_eq!(shape(&daemon).0, "2");
    assert!(shape(&daemon).1 < large);
    assert_eq!(daemon.field("foo", "/pending/cpus"), 1);
    daemon.run(&["restart", "foo"]).ok_with_words();
    assert_eq!(shape(&daemon), (one, small));
    daemon
        .run(&["restore", "--destructive", "foo.large"])
        .ok_with_words();
    assert_eq!(shape(&daemon), (two, large));
}
