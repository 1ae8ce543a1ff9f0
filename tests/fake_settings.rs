//! Settings and names of instances: what holds at once, what is pending, what is refused; and a disk's growth
//! that is cut off.

use std::time::Duration;

use pileus_testkit::{Need, need};
use serde_json::json;

use crate::fake_world::{World, refused, text};

const GIB: u64 = 1 << 30;

#[test]
fn fake_settings_hold_now_or_from_the_next_boot_on() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    world.launch("foo");
    let set =
        |world: &World, what: &str, value: &str| world.api.set(&format!("local.foo.{what}"), value);
    set(&world, "cpus", "2").unwrap();
    set(&world, "memory", "1.5G").unwrap();
    let told = world.instance("foo");
    assert_eq!(told["cpus"], 1);
    assert_eq!(told["pending"], json!({"cpus": 2, "memory": 3 * GIB / 2}));
    assert_eq!(world.get_setting("local.foo.cpus"), "2");
    // Back again is pending no more.
    set(&world, "memory", "1G").unwrap();
    assert_eq!(world.instance("foo")["pending"], json!({"cpus": 2}));
    // Neither a reboot by the guest nor the daemon's end is a start.
    world.signal("foo", nix::sys::signal::Signal::SIGUSR2);
    world.wait_reboot("foo");
    world.crash();
    assert_eq!(world.instance("foo")["pending"], json!({"cpus": 2}));
    // A restart takes it, and starts the machine anew for that.
    let before = world.machine("foo");
    world.must("foo", "restart");
    assert_ne!(world.machine("foo"), before);
    assert_eq!(world.instance("foo")["cpus"], 2);
    assert!(world.instance("foo")["pending"].is_null());
    // The suspended one goes on as it was.
    world.must("foo", "suspend");
    set(&world, "cpus", "3").unwrap();
    world.must("foo", "start");
    assert_eq!(world.instance("foo")["cpus"], 2);
    assert_eq!(world.instance("foo")["pending"], json!({"cpus": 3}));
    world.must("foo", "stop");
    world.must("foo", "start");
    assert_eq!(world.instance("foo")["cpus"], 3);
    world.must("foo", "stop");
    set(&world, "cpus", "1").unwrap();
    assert_eq!(world.instance("foo")["cpus"], 1);
    set(&world, "autostart", "never").unwrap();
    set(&world, "on-crash", "restart").unwrap();
    world.crash();
    let told = world.instance("foo");
    assert_eq!(
        (text(&told, "autostart"), text(&told, "on_crash")),
        ("never", "restart")
    );
    for (what, value) in [
        ("cpus", "0"),
        ("cpus", "-1"),
        ("cpus", "many"),
        ("cpus", "100000"),
        ("memory", "511M"),
        ("memory", "1CiB"),
        ("disk", "1G"),
        ("disk", ""),
        ("autostart", "sometimes"),
        ("on-crash", "reboot"),
    ] {
        refused(set(&world, what, value), "invalid-setting");
    }
    refused(world.api.set("local.bar.cpus", "1"), "instance-not-found");
    refused(world.api.set("local.foo.zone", "1"), "setting-not-found");
    world.delete("foo", false).unwrap();
    refused(set(&world, "cpus", "1"), "instance-deleted");
}

#[test]
fn fake_disks_grow() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    world.launch("foo");
    let sizes = |world: &World| {
        let told = world.instance("foo");
        let disks = world.disks();
        let has = disks[text(&told, "id")]["size"].as_u64().unwrap();
        (told["disk"].as_u64().unwrap(), has)
    };
    world.snapshot("foo", "small", false).unwrap();
    world.api.set("local.foo.disk", "6G").unwrap();
    assert_eq!(sizes(&world), (6 * GIB, 6 * GIB));
    world.snapshot("foo", "large", true).unwrap();
    world.must("foo", "stop");
    world.api.set("local.foo.disk", "7G").unwrap();
    assert_eq!(sizes(&world), (7 * GIB, 7 * GIB));
    world.must("foo", "start");
    world.snapshot("foo", "larger", false).unwrap();
    // With a snapshot its size comes back.
    for (name, size) in [("small", 5), ("large", 6), ("larger", 7)] {
        world.restore("foo", name).unwrap();
        assert_eq!(sizes(&world), (size * GIB, size * GIB), "{name}");
    }
    world.all_is_well();
    // Cut off at any moment it is the old size or the new one, and the disk is as it is said to be.
    let mut size = 7;
    for round in 0..16_u64 {
        match round % 2 {
            0 => drop(world.act("foo", "start")),
            _ => world.must("foo", "stop"),
        }
        let wanted = format!("{}G", size + 1);
        std::thread::scope(|scope| {
            let world = &world;
            scope.spawn(move || world.api.set("local.foo.disk", &wanted));
            std::thread::sleep(Duration::from_micros(round * 700));
            world.kill_only();
        });
        world.crash();
        let (told, has) = sizes(&world);
        assert_eq!(told, has, "round {round}");
        assert!(
            told == size * GIB || told == (size + 1) * GIB,
            "round {round}: {told}"
        );
        size = told / GIB;
        world.snapshot("foo", &format!("r{round}"), false).unwrap();
        world.all_is_well();
    }
}

#[test]
fn fake_names() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    world.launch("foo");
    world.launch("bar");
    world.snapshot("foo", "one", true).unwrap();
    refused(world.rename("foo", "bar"), "instance-exists");
    refused(world.rename("foo", "BAR"), "instance-exists");
    refused(world.rename("nobody", "baz"), "instance-not-found");
    assert_eq!(world.told("foo", "hostname"), "foo");
    // A running one knows at once; its snapshots and settings go with it.
    world.rename("foo", "baz").unwrap();
    assert_eq!(world.told("baz", "hostname"), "baz");
    assert_eq!(world.state("foo"), "none");
    assert_eq!(world.api.snapshots("baz").unwrap().len(), 1);
    assert_eq!(world.get_setting("local.baz.one.name"), "one");
    // A guest that does not listen learns it at its next boot.
    world.fakes_do("fast rename-fails");
    world.rename("bar", "foo").unwrap();
    assert_eq!(world.told("foo", "hostname"), "bar");
    world.must("foo", "restart");
    assert_eq!(world.told("foo", "hostname"), "foo");
    world.fakes_do("fast");
    world.crash();
    // One whose memory has another name in it.
    world.restore("baz", "one").unwrap();
    assert_eq!(world.told("baz", "hostname"), "baz");
    world.must("baz", "stop");
    world.rename("baz", "Baz").unwrap();
    world.must("baz", "start");
    assert_eq!(world.told("baz", "hostname"), "Baz");
    // Snapshots have names too.
    let set = |key: &str, value: &str| world.api.set(&format!("local.baz.{key}"), value);
    world.snapshot("baz", "two", false).unwrap();
    refused(set("one.name", "two"), "snapshot-exists");
    refused(set("three.name", "four"), "snapshot-not-found");
    set("one.name", "first").unwrap();
    set("first.comment", "a \"comment\"").unwrap();
    let shown = world.api.get("/v1/instances/baz/snapshots/two").unwrap();
    assert_eq!(text(&shown, "parent"), "first");
    assert_eq!(
        world.get_setting("local.baz.first.comment"),
        "a \"comment\""
    );
    // Two who want one name: one gets it.
    let (a, b) = std::thread::scope(|scope| {
        let world = &world;
        let other = scope.spawn(move || world.rename("foo", "one"));
        (world.rename("baz", "one"), other.join().unwrap())
    });
    assert!(a.is_ok() != b.is_ok(), "{a:?} {b:?}");
    refused(a.and(b), "instance-exists");
    world.all_is_well();
}
