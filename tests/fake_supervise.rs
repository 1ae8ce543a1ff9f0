//! What the daemon does to instances by itself: delayed shutdowns, starts after the host's, other tries after a
//! crash; and what it tells of guests that end by themselves.

use nix::sys::signal::Signal;
use pileus_testkit::{Need, need};
use serde_json::json;

use crate::fake_world::{World, refused, text, wait};

#[test]
fn fake_delayed_shutdowns() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    world.launch("foo");
    let stop = |world: &World, body| world.api.act("foo", "stop", &body);
    let log = |world: &World| {
        let id = text(&world.instance("foo"), "id").to_owned();
        let log = world.storage().join("data/instances").join(id);
        std::fs::read_to_string(log.join("console.log")).unwrap()
    };
    stop(&world, json!({"delay_minutes": 10})).unwrap();
    assert_eq!(world.state("foo"), "running");
    assert!(!world.instance("foo")["shutdown_at"].is_null());
    wait("its users are told", || {
        log(&world).contains("in 10 minutes")
    });
    stop(&world, json!({"cancel": true})).unwrap();
    assert!(world.instance("foo")["shutdown_at"].is_null());
    assert!(log(&world).contains("cancelled"));
    // Nothing to take back is no error.
    stop(&world, json!({"cancel": true})).unwrap();
    for bad in [
        json!({"delay_minutes": 1, "cancel": true}),
        json!({"delay_minutes": 1, "force": true}),
        json!({"cancel": true, "force": true}),
        json!({"delay_minutes": 1_000_000}),
    ] {
        refused(stop(&world, bad), "invalid-argument");
    }
    // It holds over the daemon's end, and what takes it back does so too.
    stop(&world, json!({"delay_minutes": 10})).unwrap();
    world.crash();
    assert!(!world.instance("foo")["shutdown_at"].is_null());
    world.must("foo", "start");
    assert!(world.instance("foo")["shutdown_at"].is_null());
    stop(&world, json!({"delay_minutes": 10})).unwrap();
    world.must("foo", "suspend");
    assert!(world.instance("foo")["shutdown_at"].is_null());
    refused(stop(&world, json!({"delay_minutes": 10})), "wrong-state");
    world.must("foo", "start");
    // Its time comes while no daemon runs.
    stop(&world, json!({"delay_minutes": 10})).unwrap();
    world.kill();
    world.sql("UPDATE instances SET shutdown_at = '2020-01-01T00:00:00Z'");
    world.start_again();
    world.wait_state("foo", "stopped");
    assert!(world.instance("foo")["shutdown_at"].is_null());
    // A stopped one is stopped already.
    stop(&world, json!({"delay_minutes": 10})).unwrap();
    assert!(world.instance("foo")["shutdown_at"].is_null());
    world.all_is_well();
}

/// As a host that went down and came up again: all machines are gone, and the boot is another one.
fn restart_host(world: &mut World) {
    world.kill();
    for pid in world.machines() {
        let pid = nix::unistd::Pid::from_raw(pid);
        nix::sys::signal::kill(pid, Signal::SIGKILL).unwrap();
    }
    wait("all machines are gone", || world.machines().is_empty());
    world.sql("UPDATE settings SET value = 'another' WHERE key = 'host.boot-id'");
    world.start_again();
}

#[test]
fn fake_after_the_hosts_start() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    for name in ["ran", "stopped", "always", "never", "asleep", "gone"] {
        world.launch(name);
    }
    world.must("stopped", "stop");
    world.must("always", "stop");
    world.api.set("local.always.autostart", "always").unwrap();
    world.api.set("local.never.autostart", "never").unwrap();
    let boot = world.told("asleep", "boot-id");
    world.must("asleep", "suspend");
    world.delete("gone", false).unwrap();
    restart_host(&mut world);
    world.wait_state("ran", "running");
    world.wait_state("always", "running");
    world.all_is_well();
    for (name, state) in [
        ("stopped", "stopped"),
        ("never", "stopped"),
        ("asleep", "suspended"),
    ] {
        assert_eq!(world.state(name), state, "{name}");
    }
    assert_eq!(world.instance("gone")["deleted"], true);
    let why = world.instance("never")["last_error"].clone();
    assert!(text(&why, "message").contains("the host"), "{why}");
    world.must("asleep", "start");
    assert_eq!(world.told("asleep", "boot-id"), boot);
    // A daemon's start alone is no host's start: who was stopped then stays so.
    world.must("ran", "stop");
    world.must("always", "stop");
    world.crash();
    assert_eq!(world.state("ran"), "stopped");
    assert_eq!(world.state("always"), "stopped");
    // The daemon is killed at once after the host's start: the next one starts them.
    world.must("ran", "start");
    restart_host(&mut world);
    world.crash();
    world.wait_state("ran", "running");
    world.all_is_well();
}

#[test]
fn fake_crashes_are_told_and_tried_again() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let world = World::new();
    world.launch("foo");
    world.signal("foo", Signal::SIGKILL);
    world.wait_state("foo", "stopped");
    let why = world.instance("foo")["last_error"].clone();
    assert_eq!(text(&why, "code"), "guest-stopped");
    assert!(text(&why, "message").contains("signal 9"), "{why}");
    assert!(
        why["details"].to_string().contains("login:"),
        "the console's tail: {why}"
    );
    // Once more, by the daemon itself; three times at most.
    world.api.set("local.foo.on-crash", "restart").unwrap();
    world.must("foo", "start");
    for round in 0..4 {
        let before = world.machine("foo");
        world.signal("foo", Signal::SIGKILL);
        if round == 3 {
            world.wait_state("foo", "stopped");
            break;
        }
        wait("it is started again", || {
            let now = world.machine("foo");
            world.state("foo") == "running" && now.is_some() && now != before
        });
    }
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(world.state("foo"), "stopped");
    world.all_is_well();
    // Who powers off on purpose stays off, and tells of no error.
    world.launch("bar");
    world.api.set("local.bar.on-crash", "restart").unwrap();
    world.signal("bar", Signal::SIGUSR1);
    world.wait_state("bar", "stopped");
    std::thread::sleep(std::time::Duration::from_millis(1500));
    assert_eq!(world.state("bar"), "stopped");
    assert!(world.instance("bar")["last_error"].is_null());
    world.must("bar", "start");
    let (boot, pid) = (world.told("bar", "boot-id"), world.machine("bar"));
    world.signal("bar", Signal::SIGUSR2);
    world.wait_reboot("bar");
    assert_ne!(world.told("bar", "boot-id"), boot);
    assert_eq!(world.machine("bar"), pid, "a reboot is no start");
    world.all_is_well();
    // By itself, sooner or later.
    for (words, code) in [
        ("fast crashes-after-ms=60", "\"guest-stopped\""),
        ("fast powers-off-after-ms=60", "null"),
    ] {
        world.fakes_do(words);
        world.launch("baz");
        world.wait_state("baz", "stopped");
        let told = world.instance("baz");
        assert_eq!(told["last_error"]["code"].to_string(), code, "{words}");
        world.delete("baz", true).unwrap();
    }
    world.all_is_well();
}
