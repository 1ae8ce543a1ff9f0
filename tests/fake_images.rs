//! The store's images over the command line: brought, shown, tagged, checked, shared and removed; whatever breaks off
//! on the way leaves nothing, and what is used stays.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pileus_testkit::{Daemon, Need, Output, files_below, need};
use serde_json::{Value, json};
use sha2::Digest;

use crate::fake_world::{World, text, wait};

const NEEDED: [Need; 2] = [Need::Root, Need::Tun];
const TOOLS: [Need; 3] = [
    Need::Program("qemu-img"),
    Need::Program("tar"),
    Need::Program("zstd"),
];

/// Bytes that don't compress.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64 ^ seed;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A disk with so many MiB of noise in front of as many of nothing.
fn disk(mib: usize, seed: u64) -> Vec<u8> {
    let mut disk = noise(mib << 20, seed);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.resize(mib << 21, 0);
    disk
}

fn write(world: &Daemon, name: &str, bytes: &[u8]) -> String {
    let path = world.folder().join(name);
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

fn path(world: &Daemon, name: &str) -> String {
    world.folder().join(name).display().to_string()
}

fn sha256(bytes: &[u8]) -> String {
    let hex = sha2::Sha256::digest(bytes);
    let hex: String = hex.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// `image.tar.zst` as the ancestor's tools make it.
fn packed(folder: &Path, disk: &[u8], machine: &Value) -> Vec<u8> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("disk.img"), disk).unwrap();
    fs::write(folder.join("machine.json"), machine.to_string()).unwrap();
    let script = "qemu-img create -q -f qcow2 -b disk.img -F raw layer.qcow2
        tar -Scf - disk.img layer.qcow2 machine.json | zstd -q";
    let output = Command::new("sh")
        .args(["-ec", script])
        .current_dir(folder)
        .output()
        .unwrap();
    assert!(output.status.success(), "{:?}", output.stderr);
    output.stdout
}

/// A machine that is unlike what an instance gets without one.
fn machine() -> Value {
    json!({"version": 1, "uuid": "52bab607-10f4-4412-b5e8-e9c8a4b4f2bc", "memory": 640})
}

fn images(world: &Daemon) -> Vec<Value> {
    let images = world.run(&["image", "list", "--format", "json"]).json();
    images["images"].as_array().cloned().unwrap_or_default()
}

fn stage_is_empty(world: &Daemon) -> bool {
    files_below(&world.storage().join("data/images/stage")).is_empty()
}

/// The store holds nothing, and nothing half made.
#[track_caller]
fn nothing_is_left(world: &Daemon) {
    assert_eq!(world.run(&["image"]).ok(), "No images in the store.\n");
    let stage = files_below(&world.storage().join("data/images/stage"));
    assert!(stage.is_empty(), "{stage:?}");
}

/// The code of a failure, as the daemon tells it.
fn last_error(world: &World) -> Value {
    let operations = world.api.get("/v1/operations").unwrap();
    operations[0]["error"].clone()
}

fn spawn(world: &Daemon, args: &[&str]) -> Child {
    world
        .command(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(child: Child, what: &str) -> Output {
    let output = child.wait_with_output().unwrap();
    Output {
        what: what.to_owned(),
        status: output.status,
        stdout: output.stdout,
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

#[test]
fn fake_images_from_pull_to_remove() {
    if !need(&NEEDED) {
        return;
    }
    let world = World::new();
    nothing_is_left(&world);
    let source = format!("file://{}", world.fake_image().display());
    let digest = sha256(&fs::read(world.fake_image()).unwrap());
    let short = &digest[7..19];
    assert_eq!(
        world.run(&["image", "pull", &source]).ok(),
        format!("Pulled: {short}\n")
    );
    // It is there; and a path that looks like one is taken for one.
    let again = world
        .command(&["images", "pull", "./fake.raw", "--format", "json"])
        .current_dir(world.folder())
        .output()
        .unwrap();
    let again: Value = serde_json::from_slice(&again.stdout).unwrap();
    assert_eq!(
        (text(&again, "digest"), text(&again, "source")),
        (&*digest, &*source)
    );
    let all = images(&world);
    assert_eq!(all.len(), 1);
    assert_eq!(
        (&all[0]["tags"], &all[0]["used_by"]),
        (&json!([]), &json!([]))
    );
    assert_eq!(all[0]["virtual_size"], 1 << 20);
    // Every name leads to it.
    assert_eq!(world.run(&["image", "tag", &digest[..15], "mine"]).ok(), "");
    for name in [&*digest, short, &short.to_uppercase(), &source, "mine"] {
        let info = world
            .run(&["image", "info", name, "--format", "json"])
            .json();
        assert_eq!(text(&info, "digest"), digest, "{name}");
        assert_eq!(info["tags"], json!(["mine"]), "{name}");
    }
    let table = world.run(&["image", "info", "mine"]).ok();
    assert!(table.contains("Tags:           mine\n"), "{table}");
    let csv = world.run(&["image", "list", "--format", "csv"]).ok();
    assert!(
        csv.lines().next().unwrap().ends_with(",Used by,Tags"),
        "{csv}"
    );
    assert!(csv.trim_end().ends_with(",mine"), "{csv}");
    // The tag launches it, and what uses it is told and kept.
    world
        .run(&["launch", "mine", "--name", "foo", "--cold"])
        .ok_with_words();
    assert_eq!(images(&world)[0]["used_by"], json!(["foo"]));
    for args in [["mine", "--force"], [short, "-f"]] {
        let told = world
            .run(&["image", "remove", args[0], args[1]])
            .fails_with(2);
        assert!(told.contains("is used by instance 'foo'"), "{told}");
        assert!(told.contains("hint: "), "{told}");
    }
    assert_eq!(
        world.run(&["image", "prune"]).ok(),
        "No unused images found.\n"
    );
    world.must("foo", "stop");
    world.delete("foo", true).unwrap();
    // A tag keeps it from all but a person's force.
    assert_eq!(
        world.run(&["image", "prune", "--all-unused"]).ok(),
        "No unused images found.\n"
    );
    let told = world.run(&["image", "rm", short]).fails_with(2);
    assert!(told.contains("has the tag mine"), "{told}");
    world.run(&["image", "tag", short, "also"]).ok();
    world.run(&["image", "untag", "mine"]).ok();
    world.run(&["image", "tag", "--remove", "also"]).ok();
    assert_eq!(world.run(&["image", "rm", short]).ok(), "");
    nothing_is_left(&world);
    world.run(&["image", "pull", &source]).ok();
    world.run(&["image", "tag", short, "mine"]).ok();
    assert_eq!(world.run(&["image", "rm", "mine", "--force"]).ok(), "");
    nothing_is_left(&world);
    world.all_is_well();
}

#[test]
fn fake_images_that_are_not_there() {
    if !need(&NEEDED) {
        return;
    }
    let world = World::new();
    let source = format!("file://{}", world.fake_image().display());
    world.run(&["image", "pull", &source]).ok();
    let digest = text(&images(&world)[0], "digest").to_owned();
    let none = "0".repeat(64);
    for name in [
        "nope",
        "a/b",
        "..",
        ".",
        "%2e%2e",
        "prune",
        "http://h/x",
        "0000",
        &none,
        "é",
        "a b",
        "x\u{1b}[1m",
    ] {
        for action in ["info", "rm", "verify"] {
            let told = world.run(&["image", action, name]).fails_with(2);
            assert!(told.contains("here is no image"), "{action} {name}: {told}");
            assert!(!told.contains('\u{1b}'));
        }
        let file = path(&world, "out.tar.zst");
        let told = world.run(&["image", "export", name, &file]).fails_with(2);
        assert!(told.contains("here is no image"), "export {name}: {told}");
        assert!(!Path::new(&file).exists() && !Path::new(&format!("{file}.part")).exists());
        let told = world.run(&["image", "tag", name, "web"]).fails_with(2);
        assert!(told.contains("here is no image"), "tag {name}: {told}");
    }
    // What can't be a tag.
    for tag in [
        "",
        "a b",
        "a/b",
        "build:x",
        "-x",
        "..",
        "abcdefabcdef",
        "sha256:abcd",
        "é",
    ] {
        let told = world.run(&["image", "tag", "--", &digest, tag]);
        assert_ne!(told.code(), 0, "{tag:?}");
        let told = world.run(&[
            "image",
            "import",
            &path(&world, "fake.raw"),
            &format!("--tag={tag}"),
        ]);
        assert_ne!(told.code(), 0, "{tag:?}");
    }
    assert_eq!(images(&world)[0]["tags"], json!([]));
    let told = world.run(&["image", "untag", "nope"]).fails_with(2);
    assert!(told.contains("There is no tag nope"), "{told}");
    // Ages, sizes, checksums, and too little said.
    for args in [
        ["prune", "--older-than", "30"],
        ["prune", "--older-than", "soon"],
        ["prune", "--older-than", "-1d"],
    ] {
        let told = world.run(&[&["image"], &args[..]].concat());
        assert_ne!(told.code(), 0, "{args:?}");
    }
    let told = world
        .run(&["image", "prune", "--older-than", "soon"])
        .fails_with(2);
    assert!(
        told.contains("\"soon\" is no age") && told.contains("30d"),
        "{told}"
    );
    world
        .run(&["image", "prune", "--keep-bytes", "much"])
        .fails_with(1);
    world.run(&["image", "verify"]).fails_with(1);
    world.run(&["image", "verify", "a", "--all"]).fails_with(1);
    let told = world
        .run(&["image", "pull", &source, "--checksum", "sha256:00"])
        .fails_with(2);
    assert!(told.contains("not a SHA-256 digest"), "{told}");
    let told = world
        .run(&["image", "pull", &source, "--checksum", &none])
        .fails_with(2);
    assert!(told.contains("checksum"), "{told}");
    assert_eq!(text(&last_error(&world), "code"), "checksum-mismatch");
    let told = world
        .run(&["image", "pull", "file:///no/such/file"])
        .fails_with(2);
    assert!(told.contains("image"), "{told}");
    let told = world
        .run(&["image", "import", "/no/such/file"])
        .fails_with(2);
    assert!(told.contains("No such file"), "{told}");
    let told = world.run(&["image", "import", "/tmp"]).fails_with(1);
    assert!(told.contains("is a folder"), "{told}");
    // The API takes no more than it knows.
    for (method, path, body) in [
        ("POST", "/v1/images", json!({"image": "x", "nope": 1})),
        ("POST", "/v1/image-actions/verify", json!({})),
        ("POST", "/v1/image-actions/prune?nope=1", json!({})),
        ("PUT", "/v1/image-tags/web", json!({})),
        ("DELETE", "/v1/images/x?force=maybe", json!({})),
    ] {
        let refusal = world.api.call(method, path, Some(&body)).unwrap_err();
        assert_eq!(refusal.code, "invalid-argument", "{method} {path}");
    }
    assert!(stage_is_empty(&world));
    assert_eq!(images(&world).len(), 1);
    world.all_is_well();
}

#[test]
fn fake_images_travel() {
    if !need(&NEEDED) || !need(&TOOLS) {
        return;
    }
    let here = World::new();
    let disk = disk(6, 1);
    let archive = packed(&here.folder().join("p"), &disk, &machine());
    let file = write(&here, "web.tar.zst", &archive);
    let digest = sha256(&archive);
    // Judged, and not kept.
    let found = here
        .run(&["image", "inspect", &file, "--format", "json"])
        .json();
    assert_eq!(text(&found, "kind"), "packed");
    assert_eq!(text(&found, "digest"), digest);
    assert_eq!(found["size"], archive.len());
    assert_eq!(found["virtual_size"], disk.len());
    assert_eq!(found["machine"]["memory"], 640);
    assert_eq!(
        (&found["stored"], &found["refused"]),
        (&json!(false), &Value::Null)
    );
    nothing_is_left(&here);
    let checked = format!("--checksum={digest}");
    assert_eq!(
        here.run(&["image", "import", &file, "--tag", "web", &checked])
            .ok(),
        format!("Imported: {} (web)\n", &digest[7..19])
    );
    let info = here
        .run(&["image", "info", "web", "--format", "json"])
        .json();
    assert_eq!(text(&info, "digest"), digest);
    assert_eq!(info["disk_digest"], found["disk_digest"]);
    assert_eq!(info["machine"], found["machine"]);
    let again = here
        .run_with(&["image", "inspect", "-", "--format", "json"], &archive)
        .json();
    assert_eq!(again["stored"], true);
    // Written as a file and into a pipe: the same bytes, which every tool reads.
    let out = path(&here, "out.tar.zst");
    assert_eq!(
        here.run(&["image", "export", "web", &out]).ok(),
        "Exported: web\n"
    );
    let bytes = fs::read(&out).unwrap();
    let piped = here.run(&["image", "export", &digest, "-"]);
    assert!(
        piped.status.success() && piped.stderr.is_empty(),
        "{}",
        piped.stderr
    );
    assert!(piped.stdout == bytes);
    let told = here.run(&["image", "export", "web", &out]).fails_with(1);
    assert!(told.contains("is there already"), "{told}");
    here.run(&["image", "export", "web", &out, "--force"]).ok();
    let tools = here.folder().join("tools");
    fs::create_dir(&tools).unwrap();
    let unpacked = Command::new("sh")
        .args([
            "-ec",
            &format!("zstd -dqc {out} | tar -xSC {}", tools.display()),
        ])
        .status();
    assert!(unpacked.unwrap().success());
    assert!(fs::read(tools.join("disk.img")).unwrap() == disk);
    // On to another storage, through the daemon's own reading and through a pipe.
    let there = World::new();
    let came = there.run_with(&["image", "import", "-"], &bytes);
    let name = sha256(&bytes);
    assert_eq!(came.ok(), format!("Imported: {}\n", &name[7..19]));
    assert!(
        fs::read(
            there
                .storage()
                .join("data/images")
                .join(&name[7..])
                .join("disk.raw")
        )
        .unwrap()
            == disk
    );
    let url = format!("file://{out}");
    there
        .run(&["launch", &url, "--name", "foo", "--cold"])
        .ok_with_words();
    assert_eq!(images(&there).len(), 1);
    assert_eq!(images(&there)[0]["used_by"], json!(["foo"]));
    let said = there
        .run(&["image", "info", &name, "--format", "json"])
        .json();
    assert_eq!(said["machine"], found["machine"]);
    assert_eq!(said["disk_digest"], found["disk_digest"]);
    assert_eq!(
        there.run(&["image", "verify", &name]).ok(),
        "Verified: 1 image\n"
    );
    there.all_is_well();
    // An ordinary disk that came as a download is as good.
    let raw = write(&here, "plain.raw", &disk);
    let found = here
        .run(&["image", "inspect", &raw, "--format", "json"])
        .json();
    assert_eq!(text(&found, "kind"), "raw");
    assert_eq!(found["disk_digest"], info["disk_digest"]);
    here.run(&["image", "import", &raw, "--tag", "plain"]).ok();
    let bytes = here.run(&["image", "export", "plain", "-"]).stdout;
    let found = there
        .run_with(&["image", "inspect", "-", "--format", "json"], &bytes)
        .json();
    assert_eq!(found["disk_digest"], info["disk_digest"]);
    here.all_is_well();
}

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
    wait("it writes", || {
        Path::new(&format!("{out}.part")).exists() || Path::new(&out).exists()
    });
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
        let operations = api.get("/v1/operations").unwrap();
        let error = &operations[0]["error"];
        assert_eq!(
            (text(error, "code"), text(error, "class")),
            ("no-space", "host"),
            "{args:?}: {error}"
        );
        nothing_is_left(&small);
    }
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
    while filler.write_all(&noise(1 << 20, 1)).is_ok() {}
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
    assert!(
        told.contains("damaged") && told.contains("code: bad-image"),
        "{told}"
    );
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

/// Images that were brought one after the other, the first the longest ago.
fn three(world: &World) -> Vec<String> {
    (1..=3)
        .map(|seed| {
            let bytes = disk(2, seed);
            let file = write(world, &format!("{seed}.raw"), &bytes);
            world.run(&["image", "import", &file]).ok();
            std::thread::sleep(Duration::from_millis(20));
            sha256(&bytes)
        })
        .collect()
}

fn there(world: &World) -> Vec<String> {
    let mut all: Vec<_> = images(world)
        .iter()
        .map(|image| text(image, "digest").to_owned())
        .collect();
    all.sort();
    all
}

fn sorted(names: &[&String]) -> Vec<String> {
    let mut names: Vec<_> = names.iter().map(|&name| name.clone()).collect();
    names.sort();
    names
}

#[test]
fn fake_images_that_are_pruned() {
    if !need(&NEEDED) {
        return;
    }
    let world = World::new();
    let names = three(&world);
    let would = world
        .run(&["image", "prune", "--dry-run", "--format", "json"])
        .json();
    assert_eq!(would["dry_run"], true);
    assert_eq!(would["removed"].as_array().map(Vec::len), Some(3));
    assert_eq!(there(&world).len(), 3);
    assert_eq!(
        world.run(&["image", "prune", "--older-than", "1h"]).ok(),
        "No unused images found.\n"
    );
    // Two of them fit.
    let told = world
        .run(&["image", "prune", "--keep-bytes", "5M", "-n"])
        .ok();
    assert!(
        told.starts_with(&format!("Would remove {} (", &names[0][7..19])),
        "{told}"
    );
    let told = world.run(&["image", "prune", "--keep-bytes", "5M"]).ok();
    assert!(
        told.starts_with(&format!("Removed {} (", &names[0][7..19])),
        "{told}"
    );
    assert_eq!(there(&world), sorted(&[&names[1], &names[2]]));
    // One with a tag stays, whatever there is room for.
    world.run(&["image", "tag", &names[1], "keep"]).ok();
    std::thread::sleep(Duration::from_millis(1100));
    let told = world.run(&["image", "prune", "--older-than", "1s"]).ok();
    assert!(told.contains(&names[2][7..19]), "{told}");
    assert_eq!(there(&world), sorted(&[&names[1]]));
    assert_eq!(
        world.run(&["image", "prune", "--keep-bytes", "0"]).ok(),
        "No unused images found.\n"
    );
    world.run(&["image", "untag", "keep"]).ok();
    world.run(&["image", "prune"]).ok();
    nothing_is_left(&world);
}

#[test]
fn fake_images_within_a_budget() {
    if !need(&NEEDED) {
        return;
    }
    let mut world = World::new();
    for (key, value) in [
        ("max-size", "none"),
        ("max-age", "none"),
        ("min-free", "1.0GiB"),
    ] {
        let key = format!("local.images.{key}");
        assert_eq!(world.run(&["get", &key]).ok(), format!("{value}\n"));
        for bad in ["-1", "much", "1 x"] {
            let told = world.run(&["set", &format!("{key}={bad}")]).fails_with(2);
            assert!(told.contains("Invalid setting"), "{key}: {told}");
        }
    }
    let keys = world.run(&["get", "--keys"]).ok();
    assert!(keys.contains("local.images.max-size\n"), "{keys}");
    let names = three(&world);
    world.launch("foo");
    let used = text(
        &images(&world)
            .into_iter()
            .find(|i| i["used_by"] == json!(["foo"]))
            .unwrap(),
        "digest",
    )
    .to_owned();
    world.run(&["image", "tag", &names[0], "keep"]).ok();
    // From the moment that it is set: the least recently used goes first, what is used or tagged never.
    world.run(&["set", "local.images.max-size=6M"]).ok();
    wait("it is kept", || {
        there(&world) == sorted(&[&names[0], &names[2], &used])
    });
    // It holds for what comes next, and for the next daemon.
    world.crash();
    assert_eq!(
        world.run(&["get", "local.images.max-size"]).ok(),
        "6.0MiB\n"
    );
    let file = write(&world, "4.raw", &disk(2, 4));
    world.run(&["image", "import", &file]).ok();
    let fourth = sha256(&disk(2, 4));
    world.run(&["set", "local.images.max-size=5M"]).ok();
    wait("it is kept", || {
        there(&world) == sorted(&[&names[0], &fourth, &used])
    });
    world.run(&["set", "local.images.max-size=none"]).ok();
    // By age.
    std::thread::sleep(Duration::from_millis(1100));
    world.run(&["set", "local.images.max-age=1s"]).ok();
    wait("it is kept", || {
        there(&world) == sorted(&[&names[0], &used])
    });
    assert_eq!(world.run(&["get", "local.images.max-age"]).ok(), "1s\n");
    // What an instance stood on goes after it.
    world.must("foo", "stop");
    world.all_is_well();
    std::thread::sleep(Duration::from_millis(1100));
    world.delete("foo", true).unwrap();
    wait("it goes", || there(&world) == sorted(&[&names[0]]));
    world.all_is_well();
}

/// Who watches hears of it.
#[test]
fn fake_images_are_told_of() {
    if !need(&NEEDED) {
        return;
    }
    let world = World::new();
    let mut watcher = spawn(&world, &["events", "--format", "json"]);
    let out = watcher.stdout.take().unwrap();
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in std::io::BufRead::lines(std::io::BufReader::new(out)).map_while(Result::ok) {
            let _ = sender.send(line);
        }
    });
    // It listens when it hears the first thing.
    let source = format!("file://{}", world.fake_image().display());
    let heard = |what: &str, act: &dyn Fn()| {
        while lines.try_recv().is_ok() {}
        act();
        let until = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            match lines.recv_timeout(Duration::from_secs(2)) {
                Ok(line) if line.contains("\"images\"") => return,
                Ok(_) => {}
                Err(_) if std::time::Instant::now() < until => act(),
                Err(err) => panic!("{what}: {err}"),
            }
        }
    };
    heard("pull", &|| {
        drop(world.run(&["image", "pull", &source]).ok())
    });
    let digest = text(&images(&world)[0], "digest").to_owned();
    heard("tag", &|| {
        drop(world.run(&["image", "tag", &digest, "web"]).ok())
    });
    heard("untag", &|| drop(world.run(&["image", "untag", "web"])));
    heard("remove", &|| drop(world.run(&["image", "rm", &digest])));
    let _ = watcher.kill();
    let _ = watcher.wait();
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
