//! Snapshots, restores and clones: what a guest wrote before is there again and what it wrote after is not;
//! whatever is killed meanwhile, no snapshot that was acknowledged is lost and nothing is left over.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pileus_testkit::{Need, Refusal, need, wait_until};
use serde_json::{Value, json};

use crate::fake_world::{World, refused, text};

fn names(world: &World, of: &str) -> Vec<String> {
    let all = world.api.snapshots(of).unwrap();
    all.iter().map(|s| text(s, "name").to_owned()).collect()
}

fn snapshot(world: &World, of: &str, name: &str) -> Value {
    let path = format!("/v1/instances/{of}/snapshots/{name}");
    world.api.get(&path).unwrap()
}

#[test]
fn fake_a_tree_of_snapshots() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    world.launch("foo");
    world.snapshot("foo", "one", false).unwrap();
    let one = world.marks("foo");
    // It writes more: a reboot leaves its mark.
    world.must("foo", "restart");
    world.snapshot("foo", "two", true).unwrap();
    let (two, boot) = (world.marks("foo"), world.told("foo", "boot-id"));
    assert!(two.len() > one.len());
    world.must("foo", "stop");
    world.snapshot("foo", "three", false).unwrap();
    refused(world.snapshot("foo", "THREE", false), "snapshot-exists");
    refused(world.snapshot("foo", "four", true), "wrong-state");
    refused(world.snapshot("foo", "-", false), "invalid-argument");
    refused(world.snapshot("bar", "one", false), "instance-not-found");
    world.crash();
    assert_eq!(names(&world, "foo"), ["one", "two", "three"]);
    let shown = snapshot(&world, "foo", "two");
    assert_eq!(text(&shown, "parent"), "one");
    assert_eq!(shown["children"], json!(["three"]));
    assert_eq!(text(&shown, "comment"), "of two");
    assert_eq!(
        (&shown["with_memory"], &shown["head"]),
        (&json!(true), &json!(false))
    );
    assert_eq!(snapshot(&world, "foo", "three")["head"], true);

    // With its memory it goes on at that very moment.
    world.restore("foo", "two").unwrap();
    assert_eq!(world.state("foo"), "running");
    assert_eq!(world.told("foo", "boot-id"), boot);
    assert_eq!(world.marks("foo")[..two.len()], two);
    // As often as one likes.
    world.restore("foo", "two").unwrap();
    assert_eq!(world.told("foo", "boot-id"), boot);
    // Without, a running one boots.
    world.restore("foo", "one").unwrap();
    assert_eq!(world.state("foo"), "running");
    let now = world.marks("foo");
    assert_eq!((now.len(), &now[..one.len()]), (one.len() + 1, &one[..]));
    // A stopped one stays so.
    world.must("foo", "stop");
    world.restore("foo", "three").unwrap();
    assert_eq!(world.state("foo"), "stopped");
    world.all_is_well();
    // Only the disk of one with memory.
    let body = json!({"disk_only": true});
    let what = "snapshots/two/restore";
    world.api.act("foo", what, &body).unwrap();
    assert_eq!(world.state("foo"), "stopped");
    world.must("foo", "start");
    assert_ne!(world.told("foo", "boot-id"), boot);
    refused(world.restore("foo", "nine"), "snapshot-not-found");
    // The middle one goes; its children get its parent.
    world.delete_snapshot("foo", "two").unwrap();
    refused(world.delete_snapshot("foo", "two"), "snapshot-not-found");
    assert_eq!(names(&world, "foo"), ["one", "three"]);
    let shown = snapshot(&world, "foo", "three");
    assert_eq!(text(&shown, "parent"), "one");
    assert_eq!(snapshot(&world, "foo", "one")["head"], true);
    world.all_is_well();
    // Of one that is suspended, with what is saved.
    let boot = world.told("foo", "boot-id");
    world.must("foo", "suspend");
    world.snapshot("foo", "five", true).unwrap();
    world.force_stop("foo").unwrap();
    world.all_is_well();
    world.restore("foo", "five").unwrap();
    assert_eq!(world.told("foo", "boot-id"), boot);
    // In the trash nothing is done to it.
    world.delete("foo", false).unwrap();
    refused(world.snapshot("foo", "six", false), "instance-deleted");
    refused(world.restore("foo", "one"), "instance-deleted");
    refused(world.delete_snapshot("foo", "one"), "instance-deleted");
    refused(world.clone_to("foo", "bar"), "instance-deleted");
    world.delete("foo", true).unwrap();
    world.all_is_well();
}

#[test]
fn fake_clones_stand_for_themselves() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    world.launch("foo");
    world.snapshot("foo", "one", true).unwrap();
    let one = world.marks("foo");
    world.must("foo", "restart");
    let now = world.marks("foo");
    // Of a running one, of a snapshot, of a stopped one; numbered if nobody names them.
    world.clone_to("foo", "bar").unwrap();
    let of_snapshot = json!({"snapshot": "one"});
    world.api.act("foo", "clone", &of_snapshot).unwrap();
    assert_eq!(world.state("foo"), "running");
    assert_eq!(world.state("bar"), "stopped");
    let told = world.instance("foo-clone2");
    assert_eq!(text(&told["origin"], "snapshot"), "one");
    assert_eq!(told["snapshots"], 0);
    refused(world.clone_to("foo", "bar"), "instance-exists");
    refused(world.clone_to("nobody", "baz"), "instance-not-found");
    let none = json!({"snapshot": "none"});
    refused(world.api.act("foo", "clone", &none), "snapshot-not-found");
    // The source may go.
    let id = world.told("foo", "machine-id");
    world.delete("foo", true).unwrap();
    world.all_is_well();
    world.crash();
    world.must("bar", "start");
    world.must("foo-clone2", "start");
    assert_eq!(world.marks("bar")[..now.len()], now);
    assert_eq!(world.marks("foo-clone2")[..one.len()], one);
    assert_eq!(world.marks("foo-clone2").len(), one.len() + 2);
    let ids = [
        id,
        world.told("bar", "machine-id"),
        world.told("foo-clone2", "machine-id"),
    ];
    assert!(
        ids[0] != ids[1] && ids[1] != ids[2] && ids[0] != ids[2],
        "{ids:?}"
    );
    assert_eq!(world.told("bar", "hostname"), "bar");
    // Once is enough.
    world.must("bar", "restart");
    world.must("bar", "stop");
    world.must("bar", "start");
    assert_eq!(world.told("bar", "machine-id"), ids[1]);
    world.all_is_well();
}

/// A clone's first boot is cut off: whoever takes it up gives it its identity.
#[test]
fn fake_a_clone_is_somebody_before_it_runs() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    world.launch("foo");
    for round in 0..12_u64 {
        world.clone_to("foo", "bar").unwrap();
        world.fakes_do("fast boot-ms=20 identify-ms=20");
        let _ = world
            .api
            .begin("POST", "/v1/instances/bar/start", Some(&json!({})));
        std::thread::sleep(Duration::from_millis(round * 8));
        world.crash();
        if world.state("bar") == "running" {
            let ids = (
                world.told("foo", "machine-id"),
                world.told("bar", "machine-id"),
            );
            assert_ne!(ids.0, ids.1, "round {round}");
            assert_eq!(world.told("bar", "hostname"), "bar");
        }
        world.delete("bar", true).unwrap();
    }
    // One that does not become anybody is not told to run.
    world.clone_to("foo", "bar").unwrap();
    world.fakes_do("fast identify-fails");
    world.act("bar", "start").unwrap_err();
    assert_ne!(world.state("bar"), "running");
    world.fakes_do("fast");
    world.force_stop("bar").unwrap();
    world.must("bar", "start");
    assert_ne!(
        world.told("foo", "machine-id"),
        world.told("bar", "machine-id")
    );
    world.all_is_well();
}

type Act = fn(&World) -> Result<Value, Refusal>;

/// The daemon, or QEMU, is killed after each of many short times in each of these.
#[test]
fn fake_killed_at_any_moment_of_snapshots() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::with("fast suspend-ms=20 resume-ms=10 boot-ms=10");
    world.launch("foo");
    world.snapshot("foo", "kept", false).unwrap();
    let kept = world.marks("foo");
    let acts: [(&str, Act); 8] = [
        ("snapshot", |w| w.snapshot("foo", "new", false)),
        ("snapshot with memory", |w| w.snapshot("foo", "new", true)),
        ("restore", |w| w.restore("foo", "kept")),
        ("clone", |w| w.clone_to("foo", "bar")),
        ("delete a snapshot", |w| w.delete_snapshot("foo", "old")),
        ("restore with memory", |w| w.restore("foo", "old")),
        ("rename", |w| w.rename("foo", "bar")),
        ("grow", |w| w.api.set("local.foo.disk", "6GiB")),
    ];
    for (what, act) in acts {
        for round in 0..6_u64 {
            let context = format!("{what}, round {round}");
            world.snapshot("foo", "old", true).unwrap();
            let kill_qemu = round == 5;
            let done = std::thread::scope(|scope| {
                let world = &world;
                let acting = scope.spawn(move || act(world));
                std::thread::sleep(Duration::from_millis(round * 6));
                match kill_qemu {
                    true => drop(world.try_signal("foo", Signal::SIGKILL)),
                    false => world.kill_only(),
                }
                acting.join().unwrap()
            });
            if !kill_qemu {
                world.crash();
            }
            if let Err(why) = world.try_all_is_well() {
                panic!("{context}: {why}");
            }
            // Whatever became of it: what was there before is there.
            let renamed = what == "rename" && world.state("foo") == "none";
            let name = if renamed { "bar" } else { "foo" };
            let found = names(&world, name);
            assert!(found.contains(&"kept".to_owned()), "{context}: {found:?}");
            let gone_by_wish = what == "delete a snapshot";
            assert!(
                gone_by_wish || found.contains(&"old".to_owned()),
                "{context}: {found:?}"
            );
            let is_there = match what {
                "snapshot" | "snapshot with memory" => found.contains(&"new".to_owned()),
                "clone" => world.state("bar") == "stopped",
                "rename" => renamed,
                "delete a snapshot" => !found.contains(&"old".to_owned()),
                _ => true,
            };
            assert!(is_there || done.is_err(), "{context}: it was acknowledged");
            // And it works.
            if renamed {
                world.rename("bar", "foo").unwrap();
            }
            world.restore("foo", "kept").unwrap();
            if world.state("foo") == "stopped" {
                world.must("foo", "start");
            }
            assert_eq!(world.marks("foo")[..kept.len()], kept, "{context}");
            assert_eq!(world.told("foo", "hostname"), "foo", "{context}");
            for left in ["new", "old"] {
                let _ = world.delete_snapshot("foo", left);
            }
            let _ = world.delete("bar", true);
            if let Err(why) = world.try_all_is_well() {
                panic!("{context}, afterwards: {why}");
            }
        }
    }
}

/// QEMU does not take the layer that was to be on top of its disk, and the disk below grows.
#[test]
fn fake_a_disk_grows_below_a_freeze_that_failed() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut world = World::new();
    for (name, what) in [("foo", "stop"), ("bar", "suspend"), ("baz", "snapshot")] {
        world.launch(name);
        world.fakes_do("fast freeze-fails");
        refused(world.snapshot(name, "one", false), "qemu-failed");
        world.fakes_do("fast");
        let size = format!("local.{name}.disk");
        world.api.set(&size, "7GiB").unwrap();
        let before = world.marks(name);
        match what {
            "snapshot" => drop(world.snapshot(name, "two", true).unwrap()),
            _ => world.must(name, what),
        }
        if name == "bar" {
            world.crash();
        }
        world.must(name, "start");
        world.must(name, "restart");
        assert_eq!(world.marks(name)[..before.len()], before, "{what}");
        assert_eq!(world.instance(name)["disk"], 7_u64 << 30, "{what}");
        world.must(name, "stop");
        let told: Vec<_> = world.disks().into_values().collect();
        assert!(told.iter().all(|disk| disk["size"] == 7_u64 << 30));
        world.crash();
        assert_eq!(world.instance(name)["disk"], 7_u64 << 30, "{what}");
        world.must(name, "start");
        world.all_is_well();
    }
}

/// Layers that deleted snapshots left are merged at the daemon's start, which is killed at many moments of it; now
/// and then the instance is started or deleted meanwhile.
#[test]
fn fake_killed_at_any_moment_of_a_merge() {
    if !need(&[Need::Root, Need::Tun, Need::Program("qemu-img")]) {
        return;
    }
    let mut world = World::merging("fast");
    let pile = |world: &World| {
        let before = || world.must("foo", "restart");
        world.pile_up("foo", before).unwrap();
    };
    world.launch("foo");
    world.snapshot("foo", "kept", true).unwrap();
    pile(&world);
    world.must("foo", "stop");
    // How long one takes that nobody disturbs.
    let before = (world.disks(), world.layers("foo"));
    world.stop();
    world.start_again();
    let began = Instant::now();
    let merged = |world: &World| {
        wait_until("the layers are merged", 120, || {
            (world.layers("foo") <= 3).then_some(())
        });
    };
    merged(&world);
    let whole = began.elapsed();
    assert_eq!(world.disks(), before.0);
    assert!(world.layers("foo") + 8 <= before.1);
    world.all_is_well();

    for round in 1..=10_u32 {
        let state = if round % 2 == 0 { "stop" } else { "suspend" };
        let context = format!("round {round}, {state}, a merge takes {whole:?}");
        world.must("foo", "start");
        pile(&world);
        if round % 3 == 0 {
            world.snapshot("foo", "top", true).unwrap();
        }
        world.must("foo", state);
        let before = world.disks();
        world.stop();
        world.start_again();
        std::thread::sleep(whole * round / 9);
        match round {
            5 => world.must("foo", "start"),
            7 => world.restore("foo", "kept").map(drop).unwrap(),
            _ => {
                world.kill();
                // No daemon is there that could have mended anything.
                assert_eq!(world.disks(), before, "{context}");
                world.start_again();
                merged(&world);
                assert_eq!(world.disks(), before, "{context}");
            }
        }
        if let Err(why) = world.try_all_is_well() {
            panic!("{context}: {why}");
        }
        // Whatever is there now, a machine finds all of it.
        let of = |world: &World| {
            let id = text(&world.instance("foo"), "id").to_owned();
            let disks = world.disks();
            let wrote = disks[&id]["wrote"].as_array().cloned();
            wrote.unwrap_or_default().len()
        };
        let wrote = of(&world);
        world.must("foo", "start");
        assert!(of(&world) >= wrote, "{context}");
        assert_eq!(
            world.told("foo", "marks"),
            of(&world).to_string(),
            "{context}"
        );
        let _ = world.delete_snapshot("foo", "top");
    }
    assert!(world.merges() > 3, "{} merges", world.merges());
    let cut_off = world.log().matches("nobody stands on is removed").count();
    assert!(cut_off > 2, "{cut_off} merges were cut off");

    // Deleted for good meanwhile: no layer is left, without any start of the daemon.
    for round in 1..=4 {
        let name = format!("gone{round}");
        world.launch(&name);
        let before = || world.must(&name, "restart");
        world.pile_up(&name, before).unwrap();
        world.must(&name, "stop");
        world.stop();
        world.start_again();
        std::thread::sleep(whole * (6 + round) / 10);
        world.delete(&name, true).unwrap();
        world.all_is_well();
    }
}

/// Requests about one instance wait for each other, and those by force don't.
#[test]
fn fake_requests_take_turns() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let world = World::with("fast suspend-ms=400");
    world.launch("foo");
    let begin = |what: &str, body: Value| {
        let path = format!("/v1/instances/foo/{what}");
        world.api.begin("POST", &path, Some(&body)).unwrap()
    };
    let all: Vec<_> = (0..4)
        .map(|n| {
            begin(
                "snapshots",
                json!({"name": format!("s{n}"), "with_memory": true}),
            )
        })
        .collect();
    let last = begin("stop", json!({}));
    let queued = text(&last, "id").to_owned();
    let now = world.api.get(&format!("/v1/operations/{queued}")).unwrap();
    assert_eq!(text(&now, "state"), "running");
    for one in all.iter().chain([&last]) {
        world.api.wait(one).unwrap();
    }
    assert_eq!(names(&world, "foo"), ["s0", "s1", "s2", "s3"]);
    assert_eq!(text(&snapshot(&world, "foo", "s3"), "parent"), "s2");
    assert_eq!(world.state("foo"), "stopped");
    world.all_is_well();
    // By force: what is under way is broken off, what waits sees a stopped one.
    world.must("foo", "start");
    let first = begin("snapshots", json!({"name": "s4", "with_memory": true}));
    let waits = begin("snapshots", json!({"name": "s5", "with_memory": true}));
    let began = std::time::Instant::now();
    world.force_stop("foo").unwrap();
    assert!(
        began.elapsed() < Duration::from_secs(30),
        "{:?}",
        began.elapsed()
    );
    let _ = (world.api.wait(&first), world.api.wait(&waits));
    world.wait_state("foo", "stopped");
    world.all_is_well();
    // Deleted for good while others wait.
    world.must("foo", "start");
    let first = begin("snapshots", json!({"name": "s6", "with_memory": true}));
    let waits: Vec<_> = ["restart", "suspend"]
        .map(|what| {
            world.api.begin(
                "POST",
                &format!("/v1/instances/foo/{what}"),
                Some(&json!({})),
            )
        })
        .into_iter()
        .flatten()
        .collect();
    world.delete("foo", true).unwrap();
    let _ = world.api.wait(&first);
    for one in waits {
        let _ = world.api.wait(&one);
    }
    assert_eq!(world.state("foo"), "none");
    world.all_is_well();
}
