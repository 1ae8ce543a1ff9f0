//! The store's images when something is wrong: bytes that are no image, clients that go, a daemon that is killed, a full
//! disk, damage. Nothing half made stays, and whose fault it is is told.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pileus_testkit::{Daemon, Need, files_below, need};
use serde_json::{Value, json};

use crate::fake_images::{
    NEEDED, TOOLS, disk, finish, images, last_error, machine, nothing_is_left, packed, path,
    sha256, spawn, stage_is_empty, write,
};
use crate::fake_world::{World, text, wait};

#[test]
fn fake_images_that_are_refused() {
    if !need(&NEEDED) || !need(&TOOLS) {
        return;
    }
    let world = World::new();
    let folder = world.folder().join("p");
    let archive = packed(&folder, &disk(2, 1), &machine());
    let mut cases: Vec<(&str, Vec<u8>)> = vec![
        ("nothing", Vec::new()),
        ("text", b"this is no disk\n".repeat(1000)),
        ("cut", archive[..archive.len() / 2].to_vec()),
        ("short", archive[..10].to_vec()),
        (
            "no machine",
            packed(&folder, &disk(1, 1), &json!({"version": 9})),
        ),
        (
            "bad machine",
            packed(&folder, &disk(1, 1), &json!({"version": 1, "nope": 1})),
        ),
    ];
    for at in [archive.len() / 3, archive.len() / 2, archive.len() - 20] {
        let mut damaged = archive.clone();
        damaged[at] ^= 0x10;
        cases.push(("damaged", damaged));
    }
    for (what, bytes) in &cases {
        let told = world
            .run_with(&["image", "import", "-"], bytes)
            .fails_with(2);
        assert!(told.starts_with("image failed: "), "{what}: {told}");
        let error = last_error(&world);
        assert_eq!(text(&error, "class"), "user", "{what}: {error}");
        nothing_is_left(&world);
        let file = write(&world, "bad", bytes);
        for args in [["image", "pull", &file], ["launch", &file, "--cold"]] {
            world.run(&args).fails_with(2);
            assert_eq!(
                text(&last_error(&world), "class"),
                "user",
                "{what} {args:?}"
            );
        }
        nothing_is_left(&world);
        let found = world.run(&["image", "inspect", &file, "--format", "json"]);
        let told = found.fails_with(2);
        let found: Value = serde_json::from_slice(&found.stdout).unwrap();
        let refused = &found["refused"];
        assert!(told.contains(text(refused, "message")), "{what}: {told}");
        assert!(
            ["bad-image", "image-too-large"].contains(&text(refused, "code")),
            "{what}: {found}"
        );
        nothing_is_left(&world);
    }
    // The rule has a name.
    let mut attack = folder.clone();
    packed(&attack, &disk(1, 1), &machine());
    let script = "rm layer.qcow2
        qemu-img create -q -f qcow2 -b disk.img -F raw -o data_file=data layer.qcow2
        tar -Scf - disk.img layer.qcow2 machine.json | zstd -q > ../attack.tar.zst";
    let made = Command::new("sh")
        .args(["-ec", script])
        .current_dir(&attack)
        .status();
    assert!(made.unwrap().success());
    attack.set_file_name("attack.tar.zst");
    let found = world.run(&[
        "image",
        "inspect",
        &attack.display().to_string(),
        "--format",
        "json",
    ]);
    found.fails_with(2);
    let found: Value = serde_json::from_slice(&found.stdout).unwrap();
    assert_eq!(found["refused"]["rule"], "layer-data-file", "{found}");
    // What is checked is what was asked for.
    let none = format!("--checksum={}", "0".repeat(64));
    world
        .run_with(&["image", "import", "-", &none], &archive)
        .fails_with(2);
    assert_eq!(text(&last_error(&world), "code"), "checksum-mismatch");
    nothing_is_left(&world);
    // A refused one does not stand in the way of a good one.
    world.run_with(&["image", "import", "-"], &archive).ok();
    world.all_is_well();
}

#[test]
fn fake_images_that_come_twice_at_once() {
    if !need(&NEEDED) {
        return;
    }
    let world = World::new();
    let file = write(&world, "big.raw", &disk(24, 7));
    let name = sha256(&fs::read(&file).unwrap());
    let imports: Vec<_> = (0..3)
        .map(|_| spawn(&world, &["image", "import", &file]))
        .collect();
    let pulls: Vec<_> = (0..3)
        .map(|_| spawn(&world, &["image", "pull", &file]))
        .collect();
    for child in imports {
        let came = finish(child, "image import");
        assert_eq!(came.ok(), format!("Imported: {}\n", &name[7..19]));
    }
    for child in pulls {
        let came = finish(child, "image pull");
        assert_eq!(came.ok(), format!("Pulled: {}\n", &name[7..19]));
    }
    assert_eq!(images(&world).len(), 1);
    assert!(stage_is_empty(&world));
    world.all_is_well();
}

/// Whoever goes away ends the work that was done for them.
#[test]
fn fake_images_whose_clients_go() {
    if !need(&NEEDED) {
        return;
    }
    let world = World::new();
    let bytes = disk(24, 3);
    for signal in [Signal::SIGINT, Signal::SIGKILL] {
        for action in ["import", "inspect"] {
            let mut child = spawn(&world, &["image", action, "-"]);
            let mut input = child.stdin.take().unwrap();
            input.write_all(&bytes[..bytes.len() / 2]).unwrap();
            wait("it arrives", || !stage_is_empty(&world));
            kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
            assert!(!child.wait().unwrap().success());
            wait("it is undone", || stage_is_empty(&world));
            world.settle();
            nothing_is_left(&world);
        }
    }
    // One whose input breaks off has not sent an image.
    let mut child = spawn(&world, &["image", "import", "-"]);
    let mut input = child.stdin.take().unwrap();
    input.write_all(&bytes[..1 << 20]).unwrap();
    wait("it arrives", || !stage_is_empty(&world));
    let operations = world.api.get("/v1/operations").unwrap();
    let id = text(&operations[0], "id");
    assert_eq!(text(&operations[0], "kind"), "import-image");
    world
        .api
        .call("DELETE", &format!("/v1/operations/{id}"), None)
        .unwrap();
    drop(input);
    finish(child, "image import").fails_with(2);
    wait("it is undone", || stage_is_empty(&world));
    nothing_is_left(&world);
    // A reader that has seen enough: as every program behind a pipe.
    let file = write(&world, "big.raw", &bytes);
    world.run(&["image", "import", &file, "--tag", "big"]).ok();
    let mut child = spawn(&world, &["image", "export", "big", "-"]);
    let mut out = child.stdout.take().unwrap();
    out.read_exact(&mut [0; 100]).unwrap();
    drop(out);
    assert_eq!(child.wait().unwrap().code(), Some(128 + 13));
    world.settle();
    // One that is told to stop leaves no half a file.
    let out = path(&world, "out.tar.zst");
    let child = spawn(&world, &["image", "export", "big", &out]);
    let files = format!("/proc/{}/fd", child.id());
    let writes = || {
        let open = fs::read_dir(&files).into_iter().flatten().flatten();
        let mut open = open.filter_map(|file| fs::read_link(file.path()).ok());
        // It has no name yet, or `.part` behind it.
        open.any(|file| file.parent() == Some(world.folder()))
    };
    wait("it writes", || writes() || Path::new(&out).exists());
    let _ = kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT);
    let ended = finish(child, "image export");
    assert_eq!(Path::new(&out).exists(), ended.status.success());
    assert!(!Path::new(&format!("{out}.part")).exists());
    world.settle();
    // It can be removed: nobody holds it any more.
    wait("it is let go", || {
        world
            .run(&["image", "rm", "big", "--force"])
            .status
            .success()
    });
    nothing_is_left(&world);
    world.all_is_well();
}

/// A client that stays and sends no more: whatever it began is not held for ever.
#[test]
fn fake_images_whose_clients_fall_silent() {
    if !need(&NEEDED) || !need(&TOOLS) {
        return;
    }
    let there = World::new();
    there.launch("foo");
    there.must("foo", "stop");
    let archive = there.run(&["export", "foo", "-"]).stdout;
    let world = World::new();
    let bytes = disk(24, 3);
    let mut silent = Vec::new();
    for (args, bytes) in [
        (&["image", "import", "-"][..], &bytes),
        (&["image", "inspect", "-"], &bytes),
        (&["import", "-"], &archive),
    ] {
        let mut child = spawn(&world, args);
        let mut input = child.stdin.take().unwrap();
        input.write_all(&bytes[..bytes.len() / 2]).unwrap();
        silent.push((child, input, args));
    }
    let mut recipe = UnixStream::connect(world.socket()).unwrap();
    let head =
        "POST /v1/image-actions/build HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n";
    write!(recipe, "{head}5\r\n{{\"rec\r\n").unwrap();
    // One that has nothing to send yet is no client of the daemon yet.
    let waits = spawn(&world, &["image", "import", "-", "--tag", "late"]);
    // Their operations are known, and can be cancelled like all others.
    let running = || {
        let operations = world.api.get("/v1/operations").unwrap();
        let all = operations.as_array().unwrap().clone();
        all.into_iter().filter(|o| o["state"] == "running").count()
    };
    wait("all three are under way", || running() == 3);
    let since = Instant::now();
    let mut reply = String::new();
    let mut piece = [0; 4096];
    while !reply.contains("\"upload-stalled\"") {
        let len = recipe.read(&mut piece).unwrap();
        assert!(len > 0, "{reply}");
        reply.push_str(&String::from_utf8_lossy(&piece[..len]));
    }
    assert!(reply.starts_with("HTTP/1.1 408 "), "{reply}");
    for (child, input, args) in silent {
        let told = finish(child, "a silent client").fails_with(2);
        assert!(
            told.contains("sent nothing for 60 seconds"),
            "{args:?}: {told}"
        );
        drop(input);
    }
    // Not at once either.
    assert!(since.elapsed() > Duration::from_secs(45), "{since:?}");
    let operations = world.api.get("/v1/operations").unwrap();
    for operation in operations.as_array().unwrap() {
        let (state, error) = (text(operation, "state"), &operation["error"]);
        let said = (state, text(error, "code"), text(error, "class"));
        assert_eq!(said, ("failed", "upload-stalled", "user"), "{operation}");
    }
    wait("all is undone", || stage_is_empty(&world));
    nothing_is_left(&world);
    assert_eq!(world.run(&["list"]).ok(), "No instances found.\n");
    // The one that had nothing comes in time.
    let mut waits = waits;
    waits.stdin.take().unwrap().write_all(&bytes).unwrap();
    finish(waits, "a late client").ok();
    assert_eq!(images(&world)[0]["tags"], json!(["late"]));
    world.all_is_well();
}

/// A reader that stays and reads no more does not hold what somebody wants to end.
#[test]
fn fake_images_whose_readers_fall_silent() {
    if !need(&NEEDED) {
        return;
    }
    let world = World::new();
    let file = write(&world, "big.raw", &disk(24, 3));
    world.run(&["image", "import", &file, "--tag", "big"]).ok();
    let mut reader = UnixStream::connect(world.socket()).unwrap();
    let request = "GET /v1/images/big/export HTTP/1.1\r\nHost: x\r\n\r\n";
    reader.write_all(request.as_bytes()).unwrap();
    let mut came = vec![0; 4096];
    let len = reader.read(&mut came).unwrap();
    came.truncate(len);
    let newest = || world.api.get("/v1/operations").unwrap()[0].clone();
    let id = text(&newest(), "id").to_owned();
    assert_eq!(text(&newest(), "kind"), "export-image");
    let cancel = format!("/v1/operations/{id}");
    world.api.call("DELETE", &cancel, None).unwrap();
    wait("it has ended", || text(&newest(), "state") == "cancelled");
    // Whoever reads on is not told that this was all: that would be a chunk of no bytes.
    let _ = reader.read_to_end(&mut came);
    assert!(!came.ends_with(b"0\r\n\r\n"));
    wait("it is let go", || {
        let args = ["image", "rm", "big", "--force"];
        world.run(&args).status.success()
    });
    nothing_is_left(&world);
    world.all_is_well();
}

/// The daemon is killed at many moments: an image is there as a whole, or not at all, and everything works again.
#[test]
fn fake_images_and_a_daemon_that_is_killed() {
    if !need(&NEEDED) || !need(&TOOLS) {
        return;
    }
    let mut world = World::new();
    let archive = packed(&world.folder().join("p"), &disk(24, 5), &machine());
    let file = write(&world, "web.tar.zst", &archive);
    let digest = sha256(&archive);
    let (mut kept, mut undone) = (0, 0);
    for round in 0..20 {
        let action = ["import", "pull"][round % 2];
        let child = spawn(&world, &["image", action, &file]);
        std::thread::sleep(Duration::from_millis(5 + 20 * round as u64));
        world.crash();
        let said = finish(child, action);
        let all = images(&world);
        match all.as_slice() {
            [] => {
                undone += 1;
                assert_ne!(said.code(), 0, "round {round}");
            }
            [one] => {
                kept += 1;
                assert_eq!(text(one, "digest"), digest);
                world.run(&["image", "verify", "--all"]).ok();
                world.run(&["image", "rm", &digest]).ok();
            }
            _ => panic!("{all:?}"),
        }
        nothing_is_left(&world);
        let left: Vec<_> = files_below(&world.storage().join("data/images"))
            .into_iter()
            .filter(|path| path.components().count() > 1 && !path.starts_with("locks"))
            .collect();
        assert!(left.is_empty(), "round {round}: {left:?}");
    }
    assert!(undone > 0, "kept {kept}, undone {undone}");
    // What was tagged is tagged, and it works as ever.
    world.run(&["image", "import", &file, "--tag", "web"]).ok();
    world.crash();
    assert_eq!(images(&world)[0]["tags"], json!(["web"]));
    world
        .run(&["launch", "web", "--name", "foo", "--cold"])
        .ok_with_words();
    world.all_is_well();
}

#[test]
fn fake_images_without_room() {
    if !need(&NEEDED) || !need(&[Need::Program("mount")]) || !need(&TOOLS) {
        return;
    }
    let small = Daemon::on_small_disk(560 << 20);
    let api = small.api();
    // The default budget wants more than this disk has.
    let archive = packed(&small.folder().join("p"), &disk(80, 5), &machine());
    let file = write(&small, "web.tar.zst", &archive);
    let raw = write(&small, "web.raw", &disk(80, 5));
    let no_space = || {
        let operations = api.get("/v1/operations").unwrap();
        let error = &operations[0]["error"];
        let said = (text(error, "code"), text(error, "class"));
        assert_eq!(said, ("no-space", "host"), "{error}");
    };
    for args in [
        &["image", "import", &file][..],
        &["image", "import", &raw],
        &["image", "pull", &file],
        &["image", "pull", &raw],
        &["image", "inspect", &file],
    ] {
        let told = small.run(args).fails_with(2);
        assert!(
            told.contains("disk space") || told.contains("space"),
            "{args:?}: {told}"
        );
        no_space();
        nothing_is_left(&small);
    }
    // What a file takes is known before it is read, what a stream takes is not.
    fs::File::open(&raw).unwrap().sync_all().unwrap();
    for action in ["import", "inspect"] {
        let told = small.run(&["image", action, &raw]).fails_with(2);
        assert!(told.contains("The image needs 1"), "{action}: {told}");
        let told = small.run_with(&["image", action, "-"], &archive);
        let told = told.fails_with(2);
        assert!(told.contains("have to stay free"), "{action}: {told}");
        no_space();
        nothing_is_left(&small);
    }
    // Without any room not even a small one is looked at.
    let filler = small.storage().join("filler");
    fs::write(&filler, vec![1_u8; 60 << 20]).unwrap();
    for action in ["import", "inspect"] {
        let told = small.run_with(&["image", action, "-"], &disk(1, 1));
        let told = told.fails_with(2);
        assert!(told.contains("The image needs 0"), "{action}: {told}");
        no_space();
        nothing_is_left(&small);
    }
    fs::remove_file(&filler).unwrap();
    // A small one fits still.
    let fits = write(&small, "fits.raw", &disk(2, 5));
    small.run(&["image", "import", &fits, "--tag", "fits"]).ok();
    // The disk that a reader writes to is full: the host's error, and no half a file.
    let here = World::new();
    here.run(&["image", "import", &raw, "--tag", "web"]).ok();
    let full = small
        .storage()
        .join("run/out.tar.zst")
        .display()
        .to_string();
    let mut filler = fs::File::create(small.storage().join("filler")).unwrap();
    let piece = vec![1_u8; 1 << 20];
    while filler.write_all(&piece).is_ok() {}
    let told = here.run(&["image", "export", "web", &full]).fails_with(2);
    assert!(told.contains("No space left"), "{told}");
    assert!(!Path::new(&full).exists() && !Path::new(&format!("{full}.part")).exists());
}

#[test]
fn fake_images_that_are_damaged() {
    if !need(&NEEDED) {
        return;
    }
    let world = World::new();
    let mut names = Vec::new();
    for seed in 1..=3 {
        let file = write(&world, &format!("{seed}.raw"), &disk(2, seed));
        names.push(sha256(&fs::read(&file).unwrap()));
        world.run(&["image", "import", &file]).ok();
    }
    assert_eq!(
        world.run(&["image", "verify", "--all"]).ok(),
        "Verified: 3 images\n"
    );
    let damage = |name: &str| {
        let disk = world
            .storage()
            .join("data/images")
            .join(&name[7..])
            .join("disk.raw");
        let disk = fs::File::options().write(true).open(disk).unwrap();
        disk.write_all_at(b"x", 70_000).unwrap();
    };
    damage(&names[0]);
    let told = world.run(&["image", "verify", &names[0]]).fails_with(2);
    assert!(told.contains("code: bad-image"), "{told}");
    assert_eq!(told.matches("the disk's content has").count(), 1, "{told}");
    // It does not travel as if it were whole.
    let out = path(&world, "out.tar.zst");
    let told = world.run(&["image", "export", &names[0], &out]);
    let told = told.fails_with(2);
    assert!(
        told.contains("is damaged") && told.contains("bad-image"),
        "{told}"
    );
    assert!(!Path::new(&out).exists());
    world.run(&["image", "export", &names[1], &out]).ok();
    assert_eq!(
        world.run(&["image", "verify", &names[1], &names[1]]).ok(),
        "Verified: 1 image\n"
    );
    damage(&names[2]);
    let told = world.run(&["image", "verify", "--all"]).fails_with(2);
    assert!(told.contains("2 images are damaged"), "{told}");
    for bad in [&names[0], &names[2]] {
        assert!(told.contains(&bad[7..19]), "{told}");
        world.run(&["image", "rm", bad]).ok();
    }
    assert_eq!(
        world.run(&["image", "verify", "--all"]).ok(),
        "Verified: 1 image\n"
    );
    // One of which nothing can be read any more goes as well, by its whole name.
    fs::write(
        world
            .storage()
            .join("data/images")
            .join(&names[1][7..])
            .join("image.json"),
        "{",
    )
    .unwrap();
    assert_eq!(world.run(&["image"]).ok(), "No images in the store.\n");
    world.run(&["image", "verify", "--all"]).fails_with(2);
    world.run(&["image", "rm", &names[1]]).ok();
    assert!(
        !world
            .storage()
            .join("data/images")
            .join(&names[1][7..])
            .exists()
    );
}

/// Over the network of the daemon: a launch and a pull of a packed image.
#[test]
fn fake_images_from_an_address() {
    if !need(&NEEDED) || !need(&TOOLS) || !need(&[Need::Program("python3")]) {
        return;
    }
    let world = World::new();
    let folder: PathBuf = world.folder().join("www");
    fs::create_dir(&folder).unwrap();
    let archive = packed(&world.folder().join("p"), &disk(4, 9), &machine());
    fs::write(folder.join("web.tar.zst"), &archive).unwrap();
    fs::write(folder.join("bad.tar.zst"), &archive[..archive.len() / 2]).unwrap();
    let mut server = world.inside(Path::new("python3"));
    let mut server = server
        .args([
            "-m",
            "http.server",
            "8123",
            "--bind",
            "127.0.0.1",
            "--directory",
        ])
        .arg(&folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let url = "http://127.0.0.1:8123/web.tar.zst";
    wait("the server answers", || {
        world.run(&["image", "pull", url]).status.success()
    });
    let digest = sha256(&archive);
    let info = world
        .run(&["image", "info", url, "--format", "json"])
        .json();
    assert_eq!(text(&info, "digest"), digest);
    world
        .run(&["launch", url, "--name", "foo", "--cold"])
        .ok_with_words();
    let checked = format!("--checksum={digest}");
    world
        .run(&["image", "pull", url, &checked, "--refresh"])
        .ok_with_words();
    assert_eq!(images(&world).len(), 1);
    // The user's error, the network's, and no such thing.
    for (name, code, class) in [
        ("bad.tar.zst", "bad-image", "user"),
        ("none.tar.zst", "image-not-found", "user"),
    ] {
        let url = format!("http://127.0.0.1:8123/{name}");
        world.run(&["image", "pull", &url]).fails_with(2);
        let error = last_error(&world);
        assert_eq!(
            (text(&error, "code"), text(&error, "class")),
            (code, class),
            "{error}"
        );
    }
    let _ = server.kill();
    let _ = server.wait();
    let told = world
        .run(&["image", "pull", "http://127.0.0.1:8123/x.tar.zst"])
        .fails_with(2);
    let error = last_error(&world);
    assert_eq!(
        (text(&error, "code"), text(&error, "class")),
        ("fetch-failed", "host"),
        "{told}"
    );
    // What was fetched before serves still.
    let again = world.run(&["image", "pull", url]);
    assert!(
        again.stderr.contains("using the copy of"),
        "{}",
        again.stderr
    );
    assert!(again.status.success());
    assert!(stage_is_empty(&world));
    world.all_is_well();
}
