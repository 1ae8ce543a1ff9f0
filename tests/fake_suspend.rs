//! Suspend and resume: what a guest knew it knows again; whatever is killed meanwhile, there is a machine
//! that runs or one that is saved, and never a broken one.

use std::time::Duration;

use nix::sys::signal::Signal;
use pileus_testkit::{Need, need};

use crate::fake_world::{World, refused, text, wait};

#[test]
fn fake_suspend_and_resume() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    world.launch("foo");
    let boot = world.told("foo", "boot-id");
    let before = world.marks("foo");
    world.must("foo", "suspend");
    assert_eq!(world.state("foo"), "suspended");
    assert!(world.machines().is_empty());
    let told = world.instance("foo");
    assert_eq!(text(&told["suspended"], "machine_type"), "pc-q35-10.0");
    // Once more is nothing to do.
    world.must("foo", "suspend");
    for what in ["stop", "restart"] {
        refused(world.act("foo", what), "wrong-state");
    }
    refused(world.rename("foo", "bar"), "wrong-state");
    refused(world.api.set("local.foo.disk", "6G"), "wrong-state");
    refused(world.api.told_by("foo", "disk"), "wrong-state");
    world.all_is_well();
    // The daemon may change meanwhile.
    world.crash();
    assert_eq!(world.state("foo"), "suspended");
    world.must("foo", "start");
    assert_eq!(world.state("foo"), "running");
    assert_eq!(world.told("foo", "boot-id"), boot, "it went on");
    let after = world.marks("foo");
    assert_eq!(after[..before.len()], before);
    assert!(after[before.len()].starts_with("on "), "{after:?}");
    assert!(world.instance("foo")["suspended"].is_null());
    world.all_is_well();
    // Its memory is given up, its disk stays.
    world.must("foo", "suspend");
    world.force_stop("foo").unwrap();
    assert_eq!(world.state("foo"), "stopped");
    world.all_is_well();
    world.must("foo", "start");
    assert_ne!(world.told("foo", "boot-id"), boot);
    assert_eq!(world.marks("foo")[..after.len()], after);
    // A stopped one has nothing to suspend.
    world.must("foo", "stop");
    world.must("foo", "suspend");
    assert_eq!(world.state("foo"), "stopped");
    // In the trash and back.
    world.must("foo", "start");
    let boot = world.told("foo", "boot-id");
    world.must("foo", "suspend");
    world.delete("foo", false).unwrap();
    let recover = world.api.call("POST", "/v1/instances/foo/recover", None);
    recover.unwrap();
    world.must("foo", "start");
    assert_eq!(world.told("foo", "boot-id"), boot);
    world.must("foo", "suspend");
    world.delete("foo", true).unwrap();
    world.all_is_well();
}

#[test]
fn fake_suspends_that_fail() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let world = World::new();
    world.launch("foo");
    let boot = world.told("foo", "boot-id");
    world.fakes_do("fast suspend-fails");
    refused(world.act("foo", "suspend"), "qemu-failed");
    assert_eq!(world.state("foo"), "running");
    assert_eq!(world.told("foo", "boot-id"), boot);
    let error = world.instance("foo")["last_error"].clone();
    assert_eq!(text(&error, "code"), "qemu-failed");
    world.all_is_well();
    // As a snapshot with memory: nothing of it stays.
    refused(world.snapshot("foo", "one", true), "qemu-failed");
    assert_eq!(world.told("foo", "boot-id"), boot);
    assert!(world.api.snapshots("foo").unwrap().is_empty());
    world.all_is_well();

    world.fakes_do("fast resume-fails");
    world.must("foo", "suspend");
    refused(world.act("foo", "start"), "cant-resume");
    assert_eq!(world.state("foo"), "suspended");
    assert!(world.machines().is_empty());
    world.all_is_well();
    // QEMU itself does not start.
    world.fakes_do("fast fails-at-start");
    refused(world.act("foo", "start"), "cant-resume");
    assert_eq!(world.state("foo"), "suspended");
    world.fakes_do("fast");
    world.must("foo", "start");
    assert_eq!(world.told("foo", "boot-id"), boot);
    world.all_is_well();
}

/// Cancelled, forced, killed while it is written.
#[test]
fn fake_suspend_is_broken_off() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let world = World::new();
    world.launch("foo");
    let boot = world.told("foo", "boot-id");
    world.fakes_do("fast suspend-ms=3000");
    let begun = world.api.begin("POST", "/v1/instances/foo/suspend", None);
    let begun = begun.unwrap();
    world.wait_state("foo", "suspending");
    let cancel = format!("/v1/operations/{}", text(&begun, "id"));
    world.api.call("DELETE", &cancel, None).unwrap();
    refused(world.api.wait(&begun), "cancelled");
    assert_eq!(world.state("foo"), "running");
    assert_eq!(world.told("foo", "boot-id"), boot);
    world.all_is_well();
    // The power is cut.
    let begun = world.api.begin("POST", "/v1/instances/foo/suspend", None);
    world.wait_state("foo", "suspending");
    world.force_stop("foo").unwrap();
    world.api.wait(&begun.unwrap()).unwrap_err();
    assert_eq!(world.state("foo"), "stopped");
    world.all_is_well();
    // QEMU is killed.
    world.must("foo", "start");
    let begun = world.api.begin("POST", "/v1/instances/foo/suspend", None);
    world.wait_state("foo", "suspending");
    world.signal("foo", Signal::SIGKILL);
    world.api.wait(&begun.unwrap()).unwrap_err();
    world.wait_state("foo", "stopped");
    world.all_is_well();
    // Deleted.
    world.must("foo", "start");
    let begun = world.api.begin("POST", "/v1/instances/foo/suspend", None);
    world.wait_state("foo", "suspending");
    world.delete("foo", true).unwrap();
    let _ = world.api.wait(&begun.unwrap());
    assert_eq!(world.state("foo"), "none");
    world.all_is_well();
}

/// The daemon, or QEMU, is killed after each of many short times in a suspend and in a resume.
#[test]
fn fake_killed_at_any_moment_of_suspend_and_resume() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::with("fast suspend-ms=30 resume-ms=60");
    world.launch("foo");
    let mut ends = std::collections::BTreeMap::<String, u32>::new();
    for round in 0..60_u64 {
        if world.state("foo") == "stopped" {
            world.must("foo", "start");
        }
        let running = world.state("foo") == "running";
        let boot = match running {
            true => world.told("foo", "boot-id"),
            false => String::new(),
        };
        let what = if running { "suspend" } else { "start" };
        let body = (what == "start").then(|| serde_json::json!({}));
        let path = format!("/v1/instances/foo/{what}");
        world.api.begin("POST", &path, body.as_ref()).unwrap();
        std::thread::sleep(Duration::from_millis(round * 7 % 110));
        let kill_qemu = round % 4 == 3;
        if kill_qemu {
            world.try_signal("foo", Signal::SIGKILL).unwrap();
        } else {
            world.crash();
        }
        world.all_is_well();
        let state = world.state("foo");
        *ends.entry(format!("{what}: {state}")).or_default() += 1;
        if !kill_qemu {
            assert_ne!(state, "stopped", "round {round}: {what}");
        }
        if state == "running" && running && !kill_qemu {
            assert_eq!(world.told("foo", "boot-id"), boot, "round {round}");
        }
        assert!(
            !world.instance("foo")["last_error"]
                .to_string()
                .contains("panic")
        );
    }
    // All ends were met, or the times above need another look.
    for end in [
        "suspend: running",
        "suspend: suspended",
        "start: running",
        "start: suspended",
    ] {
        assert!(ends.contains_key(end), "{ends:?}");
    }
    wait("it runs", || {
        world.state("foo") == "running" || world.act("foo", "start").is_ok()
    });
}
