//! Making images, with the stand-in for QEMU: what comes of it, what can't work, and that nothing is left whatever
//! breaks it off. What needs a real guest (steps, clean-up) is in `guest_image_making.rs`.

use std::fs;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pileus_testkit::{Need, files_below, need, wait_until};
use serde_json::{Value, json};

use crate::fake_world::{World, refused, text};

const NEEDS: [Need; 5] = [
    Need::Root,
    Need::Tun,
    Need::Program("qemu-img"),
    Need::Program("zstd"),
    Need::Program("tar"),
];

fn path(world: &World, name: &str) -> String {
    world.folder().join(name).display().to_string()
}

fn write(world: &World, name: &str, content: &str) -> String {
    fs::write(world.folder().join(name), content).unwrap();
    path(world, name)
}

fn images(world: &World) -> Vec<Value> {
    let all = world.api.get("/v1/images").unwrap();
    all.as_array().unwrap().clone()
}

fn names(world: &World) -> Vec<String> {
    let all = world.api.instances().unwrap();
    all.iter().map(|i| text(i, "name").to_owned()).collect()
}

/// Of what was made nothing is left but the instances and images of before.
#[track_caller]
fn nothing_is_left(world: &World, instances: &[&str], images_before: usize) {
    assert_eq!(names(world), instances);
    assert_eq!(images(world).len(), images_before, "{:?}", images(world));
    let stages = files_below(&world.storage().join("data/images/stage"));
    assert!(stages.is_empty(), "{stages:?}");
    world.all_is_well();
}

fn members(archive: &str) -> String {
    let script = format!("zstd -dqc {archive} | tar -t | sort | tr '\\n' ' '");
    let out = Command::new("sh").args(["-c", &script]).output().unwrap();
    String::from_utf8(out.stdout).unwrap().trim().to_owned()
}

/// The bytes of a member.
fn member(archive: &str, name: &str) -> Vec<u8> {
    let script = format!("zstd -dqc {archive} | tar -xO {name}");
    Command::new("sh")
        .args(["-c", &script])
        .output()
        .unwrap()
        .stdout
}

#[test]
fn fake_pack_as_it_is() {
    if !need(&NEEDS) {
        return;
    }
    let here = World::new();
    here.launch("foo");
    here.snapshot("foo", "one", false).unwrap();
    here.must("foo", "stop");
    let before = images(&here).len();
    let file = path(&here, "foo.tar.zst");
    let packed = here.run(&["image", "pack", "foo", &file, "--keep-identity"]);
    assert_eq!(packed.ok(), format!("Packed: foo into {file}\n"));
    assert_eq!(
        members(&file),
        "disk.img layer.qcow2 machine.json manifest.json"
    );
    // The guest wrote no cluster: the disk is the image's, made longer.
    let disk = member(&file, "disk.img");
    let image = fs::read(here.fake_image()).unwrap();
    assert_eq!(
        disk.len() as u64,
        here.instance("foo")["disk"].as_u64().unwrap()
    );
    assert!(disk.starts_with(&image) && disk[image.len()..].iter().all(|b| *b == 0));
    let machine: Value = serde_json::from_slice(&member(&file, "machine.json")).unwrap();
    assert_eq!(machine, json!({ "version": 1 }));
    let manifest: Value = serde_json::from_slice(&member(&file, "manifest.json")).unwrap();
    assert_eq!(manifest["provenance"]["title"], "foo");
    nothing_is_left(&here, &["foo"], before);
    // One that is there stays; the same content gives the same bytes.
    let again = here.run(&["image", "pack", "foo", &file, "--keep-identity"]);
    assert!(again.fails_with(1).contains("is there already"));
    let snapshot = path(&here, "one.tar.zst");
    here.run(&[
        "image",
        "pack",
        "foo.one",
        &snapshot,
        "--keep-identity",
        "--title",
        "foo",
    ])
    .ok();
    assert!(member(&snapshot, "disk.img") == disk);

    // With a tag it stays in the store, and the tag launches it.
    let out = here.run(&[
        "image",
        "pack",
        "foo",
        "-",
        "--keep-identity",
        "--tag",
        "mine",
        "--with-machine",
        "--title",
        "My own",
    ]);
    assert_eq!(out.code(), 0, "{}", out.stderr);
    let there = World::new();
    let other = path(&there, "x.tar.zst");
    fs::write(&other, &out.stdout).unwrap();
    let machine: Value = serde_json::from_slice(&member(&other, "machine.json")).unwrap();
    assert_eq!(machine["memory"], 1024);
    let tagged = images(&here);
    let tagged = tagged.iter().find(|image| image["tags"] == json!(["mine"]));
    assert_eq!(text(tagged.unwrap(), "source"), "instance foo");
    here.run(&["launch", "mine", "--name", "bar"])
        .ok_with_words();
    assert_eq!(here.state("bar"), "running");
    // It travels.
    there
        .run(&["launch", &other, "--name", "foo"])
        .ok_with_words();
    assert_eq!(there.state("foo"), "running");
    here.all_is_well();
    there.all_is_well();

    // A running one is packed too, and goes on; a tag that another image has changes hands.
    here.must("foo", "start");
    let boots = here.marks("foo").len();
    let file = path(&here, "running.tar.zst");
    let packed = here.run(&[
        "image",
        "pack",
        "foo",
        &file,
        "--keep-identity",
        "-t",
        "mine",
    ]);
    packed.ok_with_words();
    assert!(
        packed.stderr.contains("after a power cut"),
        "{}",
        packed.stderr
    );
    assert_eq!(here.state("foo"), "running");
    assert_eq!(here.marks("foo").len(), boots);
    here.all_is_well();
}

#[test]
fn fake_requests_of_images_that_can_not_be_made() {
    if !need(&NEEDS) {
        return;
    }
    let world = World::new();
    world.launch("foo");
    let before = images(&world).len();
    let pack = |name: &str, body: Value| {
        let path = format!("/v1/instances/{name}/pack");
        world.api.call("POST", &path, Some(&body))
    };
    for (name, body, code) in [
        ("nobody", json!({}), "instance-not-found"),
        ("foo", json!({ "snapshot": "none" }), "snapshot-not-found"),
        ("foo", json!({ "tag": "a b" }), "invalid-argument"),
        ("foo", json!({ "tag": "build:x" }), "invalid-argument"),
        ("foo", json!({ "title": "a\nb" }), "invalid-argument"),
        ("foo", json!({ "what": 1 }), "invalid-argument"),
    ] {
        refused(pack(name, body), code);
    }
    let build = |body: &Value| {
        world
            .api
            .call("POST", "/v1/image-actions/build", Some(body))
    };
    for (recipe, code) in [
        (json!({}), "invalid-argument"),
        (json!({ "recipe": { "from": "a b c" } }), "invalid-argument"),
        (
            json!({ "recipe": { "from": "a", "cpus": 0 } }),
            "invalid-argument",
        ),
        (
            json!({ "recipe": { "from": "a", "memory": 1 } }),
            "invalid-size",
        ),
        (
            json!({ "recipe": { "from": "a" }, "tag": "-" }),
            "invalid-argument",
        ),
        (
            json!({ "recipe": { "from": "a" }, "copies": [1_u64 << 40] }),
            "invalid-argument",
        ),
        (
            json!({ "recipe": { "from": { "iso": "/none.iso" } } }),
            "image-not-found",
        ),
        (
            json!({ "recipe": { "from": { "kernel": "/none" } } }),
            "image-not-found",
        ),
    ] {
        let said = refused(build(&recipe), code);
        assert!(!said.is_empty(), "{recipe}");
    }
    // What the command itself sees.
    let out = path(&world, "out.tar.zst");
    for (recipe, word) in [
        ("", "recipe"),
        ("from: a\nwhat: b\n", "line 2"),
        (
            "from: a\nsteps: [{copy: {from: nothing-here, to: /x}}]\n",
            "nothing-here",
        ),
        ("from: a\nuser-data: {file: nothing-here}\n", "nothing-here"),
        ("from: a\nsteps: [{name: both}]\n", "either `run` or `copy`"),
    ] {
        let recipe = write(&world, "recipe.yaml", recipe);
        let told = world.run(&["image", "build", &recipe, &out]);
        assert!(told.code() == 1 || told.code() == 2, "{}", told.stderr);
        assert!(told.stderr.contains(word), "{word}: {}", told.stderr);
    }
    assert!(!Path::new(&out).exists() && !Path::new(&format!("{out}.part")).exists());
    // A guest that does not come up can't be cleaned up.
    world.must("foo", "stop");
    world.fakes_do("never-boots");
    let told = world.run(&["image", "pack", "foo", &out, "--timeout", "1"]);
    let told = told.fails_with(2);
    assert!(
        told.contains("--keep-identity") && told.contains("boot-timeout"),
        "{told}"
    );
    let recipe = format!("from: file://{}\n", world.fake_image().display());
    let recipe = write(&world, "recipe.yaml", &recipe);
    world.fakes_do("panics");
    let told = world.run(&["image", "build", &recipe, &out]).fails_with(2);
    assert!(told.contains("panicked"), "{told}");
    world.fakes_do("fast");
    nothing_is_left(&world, &["foo"], before);
}

/// An empty disk, a kernel, and a machine that powers itself off.
#[test]
fn fake_installations() {
    if !need(&NEEDS) {
        return;
    }
    let world = World::new();
    let before = images(&world).len();
    write(&world, "vmlinuz", "a kernel");
    let iso = vec![7_u8; 4096];
    fs::write(world.folder().join("a.iso"), iso).unwrap();
    let kernel = "from: {kernel: vmlinuz, cmdline: console=ttyS0}\ndisk: 8M\ntitle: New\nos: Own\n";
    let cd = "from: {iso: a.iso}\ndisk: 8M\nmachine: {memory: 256}\n";
    for (name, recipe) in [("kernel", kernel), ("cd", cd)] {
        world.fakes_do("powers-off-after-ms=50");
        let recipe = write(&world, "recipe.yaml", recipe);
        let file = path(&world, name);
        world
            .run(&["image", "build", &recipe, &file])
            .ok_with_words();
        let disk = member(&file, "disk.img");
        assert!(disk.len() == 8 << 20 && disk.iter().all(|byte| *byte == 0));
        nothing_is_left(&world, &[], before);
    }
    let manifest: Value =
        serde_json::from_slice(&member(&path(&world, "kernel"), "manifest.json")).unwrap();
    assert_eq!(manifest["provenance"]["os"], "Own");
    // It says by which recipe it was built, to whoever looks, and still when it went through a store.
    let recipe = text(&manifest["provenance"], "recipe").to_owned();
    assert!(recipe.starts_with("sha256:"), "{manifest}");
    let built = path(&world, "kernel");
    let seen = world.run(&["image", "inspect", &built, "--format", "json"]);
    assert_eq!(seen.json()["manifest"]["provenance"]["recipe"], *recipe);
    let seen = world.run(&["image", "inspect", &built]).ok();
    assert!(
        seen.contains(&format!("provenance.recipe: {recipe}")),
        "{seen}"
    );
    world.run(&["image", "import", &built, "--tag", "own"]).ok();
    let exported = path(&world, "exported");
    world.run(&["image", "export", "own", &exported]).ok();
    let again: Value = serde_json::from_slice(&member(&exported, "manifest.json")).unwrap();
    assert_eq!(again["provenance"]["recipe"], *recipe);
    world.run(&["image", "rm", "own", "--force"]).ok();
    // The same recipe makes the same bytes, wherever it lies; another one says so.
    fs::create_dir(world.folder().join("elsewhere")).unwrap();
    write(&world, "elsewhere/vmlinuz", "a kernel");
    world.fakes_do("powers-off-after-ms=50");
    for (more, same) in [("", true), ("timeout: 600\n", false)] {
        let moved = write(&world, "elsewhere/recipe.yaml", &format!("{kernel}{more}"));
        world
            .run(&["image", "build", &moved, &exported, "--force"])
            .ok_with_words();
        assert_eq!(
            fs::read(&exported).unwrap() == fs::read(&built).unwrap(),
            same
        );
        let said: Value = serde_json::from_slice(&member(&exported, "manifest.json")).unwrap();
        assert_eq!(said["provenance"]["recipe"] == *recipe, same);
    }
    nothing_is_left(&world, &[], before);
    let machine: Value =
        serde_json::from_slice(&member(&path(&world, "cd"), "machine.json")).unwrap();
    assert_eq!(machine["memory"], 256);
    for (words, more, told) in [
        ("panics", "", "panicked"),
        ("crashes-after-ms=50", "", "ended"),
        ("reboots-after-ms=50", "", "rebooted"),
        ("fast", "timeout: 1\n", "power its machine off within 1 s"),
        ("fails-at-start", "", "qemu-failed"),
    ] {
        world.fakes_do(words);
        let recipe = write(&world, "recipe.yaml", &format!("{kernel}{more}"));
        let file = path(&world, "none");
        let said = world.run(&["image", "build", &recipe, &file]).fails_with(2);
        assert!(said.contains(told), "{words}: {said}");
        assert!(!Path::new(&file).exists());
        nothing_is_left(&world, &[], before);
    }
    // A kernel that is an empty file.
    write(&world, "vmlinuz", "");
    let recipe = write(&world, "recipe.yaml", kernel);
    let said = world.run(&["image", "build", &recipe, "-"]).fails_with(2);
    assert!(said.contains("bad-image"), "{said}");
    nothing_is_left(&world, &[], before);
}

/// Begins to make an image in a machine that never comes up, and waits until that machine runs.
fn begin(world: &World, args: &[&str], machine: &str) -> Child {
    let mut command = world.command(args);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let child = command.spawn().unwrap();
    wait_until("its machine runs", 20, || {
        let all = world.api.instances().ok()?;
        let found = all.iter().find(|i| text(i, "name").starts_with(machine))?;
        world.machine_of(text(found, "id"))
    });
    child
}

impl World {
    fn has_unnamed_files(&self) -> bool {
        let mut file = fs::File::options();
        file.write(true).custom_flags(OFlag::O_TMPFILE.bits());
        let has = file.open(self.folder()).is_ok();
        if !has {
            eprintln!(
                "SKIPPED: what a killed client leaves; this file system has no unnamed files"
            );
        }
        has
    }
}

/// Whoever ends it, and whenever: nothing is left of it.
#[test]
fn fake_image_making_that_is_broken_off() {
    if !need(&NEEDS) {
        return;
    }
    let mut world = World::new();
    world.launch("foo");
    world.must("foo", "stop");
    let before = images(&world).len();
    world.fakes_do("never-boots");
    let file = path(&world, "out");
    write(&world, "vmlinuz", "a kernel");
    let kernel = write(&world, "kernel.yaml", "from: {kernel: vmlinuz}\ndisk: 8M\n");
    let image = format!("from: file://{}\n", world.fake_image().display());
    let image = write(&world, "image.yaml", &image);
    let works = [
        (vec!["image", "pack", "foo", &file], "pack-"),
        (vec!["image", "build", &image, &file], "build-"),
        (vec!["image", "build", &kernel, &file], "build-"),
    ];
    for (args, machine) in &works {
        for signal in [Signal::SIGINT, Signal::SIGKILL] {
            let mut child = begin(&world, args, machine);
            kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
            child.wait().unwrap();
            wait_until("its machine is gone", 20, || {
                (names(&world) == ["foo"]).then_some(())
            });
            world.settle();
            nothing_is_left(&world, &["foo"], before);
            assert!(!Path::new(&file).exists());
            // Not even of one that is killed, where the file system has files without names.
            if signal == Signal::SIGINT || world.has_unnamed_files() {
                assert!(!Path::new(&format!("{file}.part")).exists());
            }
        }
        // By its operation.
        let mut child = begin(&world, args, machine);
        let all = world.api.get("/v1/operations").unwrap();
        let running = all
            .as_array()
            .unwrap()
            .iter()
            .find(|o| o["state"] == "running");
        let id = text(running.unwrap(), "id").to_owned();
        let cancel = format!("/v1/operations/{id}");
        world.api.call("DELETE", &cancel, None).unwrap();
        assert_ne!(child.wait().unwrap().code(), Some(0));
        world.settle();
        nothing_is_left(&world, &["foo"], before);
        // A power cut of the daemon.
        let mut child = begin(&world, args, machine);
        world.crash();
        child.wait().unwrap();
        world.taken_up();
        nothing_is_left(&world, &["foo"], before);
    }
}

/// A daemon that is killed while it flattens, publishes or sends; at whatever moment.
#[test]
fn fake_images_that_were_not_sent_are_swept() {
    if !need(&NEEDS) {
        return;
    }
    let mut world = World::new();
    world.launch("foo");
    world.must("foo", "stop");
    let before = images(&world).len();
    let file = path(&world, "out");
    for milliseconds in [0, 20, 40, 60, 80, 120, 160, 240] {
        let args = ["image", "pack", "foo", &file, "--keep-identity", "-f"];
        let mut command = world.command(&args);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let mut child = command.spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(milliseconds));
        world.crash();
        child.wait().unwrap();
        world.taken_up();
        wait_until("what was made is gone", 20, || {
            (images(&world).len() == before).then_some(())
        });
        nothing_is_left(&world, &["foo"], before);
    }
}
