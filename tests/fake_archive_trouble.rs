//! Archives of instances, and what gets in their way: full disks, deletions, clients that go, daemons that are killed.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pileus_testkit::{Daemon, Need, files_below, need};

use crate::fake_archive::{heavy, noise, nothing_is_left, path};
use crate::fake_world::{World, refused, text, wait};

#[test]
fn fake_no_room_for_what_comes() {
    if !need(&[Need::Root, Need::Tun, Need::Program("mount")]) {
        return;
    }
    let here = heavy(60);
    here.launch("foo");
    here.must("foo", "stop");
    let archive = here.run(&["export", "foo", "-"]).stdout;
    let small = Daemon::on_small_disk(540 << 20);
    let told = small.run_with(&["import", "-"], &archive).fails_with(2);
    assert!(
        told.contains("needs") && told.contains("disk space"),
        "{told}"
    );
    assert_eq!(small.run(&["list"]).ok(), "No instances found.\n");
    for folder in ["instances", "layers", "images/stage"] {
        let left = files_below(&small.storage().join("data").join(folder));
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
    // A reader's own disk is full: the host's error, and no half a file.
    let full = small.storage().join("run/foo.pileus").display().to_string();
    let mut filler = fs::File::create(small.storage().join("filler")).unwrap();
    while filler.write_all(&noise(1 << 20)).is_ok() {}
    let told = here.run(&["export", "foo", &full]).fails_with(2);
    assert!(told.contains("No space left"), "{told}");
    assert!(!Path::new(&full).exists() && !Path::new(&format!("{full}.part")).exists());
    here.all_is_well();
}

/// The instance is deleted for good while its archive is on the way: that is whole all the same.
#[test]
fn fake_deleted_while_it_is_exported() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let here = heavy(40);
    here.launch("foo");
    let mut export = here
        .command(&["export", "foo", "-"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = export.stdout.take().unwrap();
    let mut archive = vec![0; 1 << 20];
    out.read_exact(&mut archive).unwrap();
    // Nobody reads on now; the instance is free.
    here.must("foo", "restart");
    here.snapshot("foo", "one", false).unwrap();
    here.delete("foo", true).unwrap();
    out.read_to_end(&mut archive).unwrap();
    assert!(export.wait().unwrap().success());
    here.all_is_well();
    assert_eq!(
        here.run_with(&["import", "-"], &archive).ok(),
        "Imported: foo\n"
    );
    here.must("foo", "start");
    here.all_is_well();
}

/// Whoever goes away ends the work on the other side.
#[test]
fn fake_clients_that_go() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let here = heavy(40);
    here.launch("foo");
    let archive = here.run(&["export", "foo", "-"]).stdout;
    // A reader that has seen enough: as every program behind a pipe.
    let mut export = here.command(&["export", "foo", "-"]);
    let mut export = export
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut out = export.stdout.take().unwrap();
    out.read_exact(&mut [0; 100]).unwrap();
    drop(out);
    assert_eq!(export.wait().unwrap().code(), Some(128 + 13));
    here.all_is_well();
    // One that is killed.
    let file = path(&here, "foo.pileus");
    let exports = || {
        let all = here.api.get("/v1/operations").unwrap();
        let all = all.as_array().into_iter().flatten();
        all.filter(|operation| operation["kind"] == "export")
            .count()
    };
    let before = exports();
    let mut export = here
        .command(&["export", "foo", &file])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    // What it writes has no name before it is complete.
    wait("it has begun", || exports() > before);
    kill(Pid::from_raw(export.id().cast_signed()), Signal::SIGINT).unwrap();
    let ended = export.wait().unwrap();
    if ended.code() != Some(0) {
        assert_eq!(ended.code(), Some(128 + 2));
        assert!(!Path::new(&file).exists());
    }
    here.all_is_well();
    // A sender that stops in the middle, and is killed.
    let there = World::new();
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        let mut import = there
            .command(&["import", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut input = import.stdin.take().unwrap();
        input.write_all(&archive[..archive.len() / 2]).unwrap();
        wait("it arrives", || there.state("foo") == "creating");
        kill(Pid::from_raw(import.id().cast_signed()), signal).unwrap();
        assert!(!import.wait().unwrap().success());
        wait("it is undone", || there.state("foo") == "none");
        nothing_is_left(&there);
    }
    // One that is cancelled by somebody else, and by its own operation.
    let mut import = there
        .command(&["import", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = import.stdin.take().unwrap();
    input.write_all(&archive[..archive.len() / 2]).unwrap();
    wait("it arrives", || there.state("foo") == "creating");
    let operations = there.api.get("/v1/operations").unwrap();
    let id = text(&operations[0], "id");
    there
        .api
        .call("DELETE", &format!("/v1/operations/{id}"), None)
        .unwrap();
    assert!(!import.wait().unwrap().success());
    nothing_is_left(&there);
    // A large archive that is refused at its beginning: the sender gets to read why.
    let mut wrong = archive.clone();
    wrong[100] ^= 1;
    let told = there.run_with(&["import", "-"], &wrong).fails_with(2);
    assert!(told.contains("archive is refused"), "{told}");
    refused(there.api.instance("foo"), "instance-not-found");
}

/// The daemon is killed at many moments of either. The instance that is exported stays as it is; the one that comes is
/// there as a whole, or not at all.
#[test]
fn fake_daemon_killed_while_it_archives() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut here = heavy(24);
    here.launch("foo");
    let archive = path(&here, "whole");
    here.run(&["export", "foo", &archive]).ok();
    let wrote = here.marks("foo");
    for round in 0..6 {
        let file = path(&here, &format!("cut{round}"));
        let mut export = here
            .command(&["export", "foo", &file])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(10 + 60 * round));
        here.crash();
        let whole = export.wait().unwrap().success();
        assert_eq!(Path::new(&file).exists(), whole, "round {round}");
        assert!(!Path::new(&format!("{file}.part")).exists());
        assert_eq!(here.state("foo"), "running");
        assert_eq!(here.marks("foo")[..wrote.len()], wrote);
        here.all_is_well();
    }
    here.run(&["export", "foo", &archive, "--force"]).ok();

    let mut there = World::new();
    let (mut kept, mut undone) = (0, 0);
    for round in 0..14 {
        let mut import = there
            .command(&["import", &archive])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(10 + 80 * round));
        there.crash();
        import.wait().unwrap();
        match there.state("foo").as_str() {
            "stopped" => {
                kept += 1;
                there.must("foo", "start");
                assert_eq!(there.marks("foo")[..wrote.len()], wrote);
                there.delete("foo", true).unwrap();
            }
            "none" => undone += 1,
            state => panic!("round {round}: it is {state}"),
        }
        nothing_is_left(&there);
    }
    assert!(undone > 0, "kept {kept}, undone {undone}");
    there.run(&["import", &archive]).ok();
    there.all_is_well();
}
