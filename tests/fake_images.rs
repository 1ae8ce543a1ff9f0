//! The store's images over the command line: brought, shown, tagged, shared, pruned and removed. What goes wrong with them
//! stands in `fake_images_trouble.rs`.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pileus_testkit::{Daemon, Need, Output, files_below, need};
use serde_json::{Value, json};
use sha2::Digest;

use crate::fake_world::{World, text, wait};

pub const NEEDED: [Need; 2] = [Need::Root, Need::Tun];
pub const TOOLS: [Need; 3] = [
    Need::Program("qemu-img"),
    Need::Program("tar"),
    Need::Program("zstd"),
];

/// Bytes that don't compress.
pub fn noise(len: usize, seed: u64) -> Vec<u8> {
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
pub fn disk(mib: usize, seed: u64) -> Vec<u8> {
    let mut disk = noise(mib << 20, seed);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk.resize(mib << 21, 0);
    disk
}

pub fn write(world: &Daemon, name: &str, bytes: &[u8]) -> String {
    let path = world.folder().join(name);
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

pub fn path(world: &Daemon, name: &str) -> String {
    world.folder().join(name).display().to_string()
}

pub fn sha256(bytes: &[u8]) -> String {
    let hex = sha2::Sha256::digest(bytes);
    let hex: String = hex.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// `image.tar.zst` as the ancestor's tools make it.
pub fn packed(folder: &Path, disk: &[u8], machine: &Value) -> Vec<u8> {
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
pub fn machine() -> Value {
    json!({"version": 1, "uuid": "52bab607-10f4-4412-b5e8-e9c8a4b4f2bc", "memory": 640})
}

pub fn images(world: &Daemon) -> Vec<Value> {
    let images = world.run(&["image", "list", "--format", "json"]).json();
    images["images"].as_array().cloned().unwrap_or_default()
}

pub fn stage_is_empty(world: &Daemon) -> bool {
    files_below(&world.storage().join("data/images/stage")).is_empty()
}

/// The store holds nothing, and nothing half made.
#[track_caller]
pub fn nothing_is_left(world: &Daemon) {
    assert_eq!(world.run(&["image"]).ok(), "No images in the store.\n");
    let stage = files_below(&world.storage().join("data/images/stage"));
    assert!(stage.is_empty(), "{stage:?}");
}

/// The code of a failure, as the daemon tells it.
pub fn last_error(world: &World) -> Value {
    let operations = world.api.get("/v1/operations").unwrap();
    operations[0]["error"].clone()
}

pub fn spawn(world: &Daemon, args: &[&str]) -> Child {
    world
        .command(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

pub fn finish(child: Child, what: &str) -> Output {
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
    // The shell completes it.
    let completes = |args: &[&str], word: &str| {
        let last = args.len().to_string();
        let mut command = world.command(&[&["--", "pileus"], args].concat());
        command
            .env("COMPLETE", "bash")
            .env("_CLAP_COMPLETE_INDEX", last);
        command
            .env("_CLAP_COMPLETE_COMP_TYPE", "9")
            .env("_CLAP_IFS", "\n");
        command.env("_CLAP_COMPLETE_SPACE", "false");
        let told = command.output().unwrap().stdout;
        String::from_utf8_lossy(&told)
            .lines()
            .any(|line| line == word)
    };
    for (args, word) in [
        (["image", "info", "mi"], "mine"),
        (["image", "export", ""], short),
        (["image", "untag", ""], "mine"),
        (["image", "ver", ""], "verify"),
    ] {
        // It waits for no more than a moment, which a busy machine may not have.
        let args = if word == "verify" {
            &args[..2]
        } else {
            &args[..]
        };
        wait("it is completed", || completes(args, word));
    }
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
    // Programs are told what was done.
    let json = |args: &[&str]| world.run(&[args, &["--format", "json"]].concat()).json();
    let tagged = json(&["image", "tag", short, "also"]);
    assert_eq!(tagged["tags"], json!(["also", "mine"]));
    assert_eq!(json(&["image", "verify", "mine"]), json!({"verified": 1}));
    let untagged = json(&["image", "untag", "mine"]);
    assert_eq!(untagged, json!({"untagged": ["mine"]}));
    let csv = world.run(&["image", "tag", "--remove", "also", "--format", "csv"]);
    assert_eq!(csv.ok(), "Untagged\nalso\n");
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
    let count = std::cell::Cell::new(0);
    heard("launch", &|| {
        count.set(count.get() + 1);
        let (file, name) = (format!("{}.raw", count.get()), format!("m{}", count.get()));
        let file = write(&world, &file, &disk(1, count.get()));
        world
            .run(&["launch", &file, "--name", &name, "--cold"])
            .ok_with_words();
    });
    let _ = watcher.kill();
    let _ = watcher.wait();
}
