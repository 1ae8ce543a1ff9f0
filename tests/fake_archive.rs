//! Export and import: an instance with its snapshots travels to another storage; whatever breaks off on the way,
//! on either side, leaves nothing there and harms nothing here.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use pileus_testkit::{Need, files_below, need};
use serde_json::{Value, json};
use sha2::Digest;

use crate::fake_world::{World, text};

pub fn path(world: &World, name: &str) -> String {
    world.folder().join(name).display().to_string()
}

/// Bytes that don't compress.
pub fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes
}

/// A world whose image has so many MiB that take time to write and read.
pub fn heavy(mib: usize) -> World {
    let world = World::new();
    let mut disk = noise(mib << 20);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    fs::write(world.fake_image(), disk).unwrap();
    world
}

/// Nothing of an import is left.
#[track_caller]
pub fn nothing_is_left(world: &World) {
    assert_eq!(world.run(&["list"]).ok(), "No instances found.\n");
    world.all_is_well();
    let stages = files_below(&world.storage().join("data/images/stage"));
    assert!(stages.is_empty(), "{stages:?}");
}

/// Who reads what is told of changes.
struct Watch(Child, BufReader<ChildStdout>);

impl Watch {
    fn begin(world: &World) -> Self {
        let mut child = world
            .command(&["events", "--format", "json"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        // It listens when it hears of something.
        let mut line = String::new();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    let _ = world.run(&["image", "verify", "--all"]);
                }
            });
            lines.read_line(&mut line).unwrap();
            over.store(true, Ordering::Relaxed);
        });
        world.settle();
        Self(child, lines)
    }

    /// The kinds of events up to the end of an import.
    fn end(mut self) -> Vec<String> {
        let mut kinds = Vec::new();
        loop {
            let mut line = String::new();
            assert!(self.1.read_line(&mut line).unwrap() > 0, "{kinds:?}");
            let event: Value = serde_json::from_str(&line).unwrap();
            kinds.push(text(&event, "type").to_owned());
            let operation = &event["operation"];
            if operation["kind"] == "import" && operation["state"] != "running" {
                break;
            }
        }
        self.0.kill().unwrap();
        self.0.wait().unwrap();
        kinds
    }
}

/// Snapshots that are no mere line: `two` and `three` were both taken on `one`.
fn snapshot_tree(world: &World) {
    world.launch("foo");
    world.snapshot("foo", "one", false).unwrap();
    world.must("foo", "restart");
    world.snapshot("foo", "two", true).unwrap();
    world.restore("foo", "one").unwrap();
    world.snapshot("foo", "three", false).unwrap();
    world.must("foo", "restart");
}

#[test]
fn fake_an_instance_travels() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let here = World::new();
    snapshot_tree(&here);
    let file = path(&here, "foo.pileus");
    let wrote = here.marks("foo");
    let exported = here.run(&["export", "foo", &file]);
    assert_eq!(exported.ok_with_words(), "Exported: foo\n");
    let warned = "warning: The memory of snapshot two is not exported";
    assert!(exported.stderr.contains(warned), "{}", exported.stderr);
    assert_eq!(here.state("foo"), "running");
    assert_eq!(here.marks("foo"), wrote);
    here.all_is_well();
    // One that is there stays.
    let kept = fs::read(&file).unwrap();
    let again = here.run(&["export", "foo", &file]).fails_with(1);
    assert!(again.contains("is there already"), "{again}");
    assert!(fs::read(&file).unwrap() == kept);
    assert!(!Path::new(&format!("{file}.part")).exists());
    here.run(&["export", "foo", &file, "--force"])
        .ok_with_words();
    assert!(!Path::new(&format!("{file}.part")).exists());

    let there = World::new();
    let watch = Watch::begin(&there);
    assert_eq!(there.run(&["import", &file]).ok(), "Imported: foo\n");
    // The image came with it, as images come otherwise: it is told, and what its disk holds is known.
    let told = watch.end();
    assert_eq!(
        told.iter().filter(|t| *t == "images").count(),
        1,
        "{told:?}"
    );
    let digest = text(&there.instance("foo")["image"], "digest").to_owned();
    let details = there.api.get(&format!("/v1/images/{digest}")).unwrap();
    let same = here.run(&[
        "image",
        "inspect",
        &here.fake_image().display().to_string(),
        "--format",
        "json",
    ]);
    assert_eq!(details["disk_digest"], same.json()["disk_digest"]);
    assert!(details["disk_digest"].is_string(), "{details}");
    assert_eq!(
        there.run(&["image", "verify", &digest]).ok(),
        "Verified: 1 image\n"
    );
    assert_eq!(there.state("foo"), "stopped");
    there.all_is_well();
    let (old, new) = (here.instance("foo"), there.instance("foo"));
    for same in ["cpus", "memory", "disk", "snapshots", "on_crash"] {
        assert_eq!(old[same], new[same], "{same}");
    }
    for own in ["id", "mac"] {
        assert_ne!(old[own], new[own], "{own}");
    }
    assert_eq!(text(&new["origin"], "kind"), "import");
    let shown = |world: &World| -> Vec<Value> {
        let mut all = world.api.snapshots("foo").unwrap();
        for snapshot in &mut all {
            for differs in ["id", "created_at", "size", "with_memory"] {
                snapshot.as_object_mut().unwrap().remove(differs);
            }
        }
        all
    };
    assert_eq!(shown(&here), shown(&there));
    // Its guest has what the other one wrote, and becomes somebody else.
    there.must("foo", "start");
    let marks = there.marks("foo");
    assert_eq!(marks[..wrote.len()], wrote);
    assert!(marks.len() > wrote.len());
    // So it does when it goes back to what came with it.
    let id = text(&new, "id").to_owned();
    for (snapshot, boots) in [("one", 1), ("two", 2)] {
        there.must("foo", "stop");
        there.restore("foo", snapshot).unwrap();
        assert_eq!(there.disks()[&id]["identify"], true);
        there.must("foo", "start");
        assert_eq!(there.disks()[&id]["identify"], false);
        assert!(there.marks("foo").len() > boots, "{snapshot}");
    }
    there.snapshot("foo", "own", false).unwrap();
    there.must("foo", "stop");
    there.restore("foo", "own").unwrap();
    assert_eq!(there.disks()[&id]["identify"], false);
    there.delete_snapshot("foo", "two").unwrap();
    there.all_is_well();
    // The name is taken, in whatever case; another one is not.
    let taken = there.run(&["import", &file]).fails_with(2);
    assert!(taken.contains("instance \"foo\" already exists"), "{taken}");
    assert_eq!(
        there.run(&["import", &file, "--name", "bar"]).ok(),
        "Imported: bar\n"
    );
    // The image that came with the first one serves the second one.
    let images = there.api.get("/v1/images").unwrap();
    assert_eq!(images.as_array().map(Vec::len), Some(1));
    // Back where it came from, the image is there already.
    let watch = Watch::begin(&here);
    assert_eq!(
        here.run(&["import", &file, "--name", "back"]).ok(),
        "Imported: back\n"
    );
    let told = watch.end();
    assert!(!told.contains(&"images".to_owned()), "{told:?}");
    assert_eq!(
        here.instance("back")["image"],
        here.instance("foo")["image"]
    );
    here.must("back", "start");
    here.all_is_well();
    // Both end as others do.
    there.delete("foo", true).unwrap();
    there.delete("bar", true).unwrap();
    nothing_is_left(&there);
}

#[test]
fn fake_through_a_pipe_and_on() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let here = World::new();
    here.launch("foo");
    here.must("foo", "stop");
    let bytes = here.run(&["export", "foo", "-"]);
    assert!(
        bytes.status.success() && bytes.stderr.is_empty(),
        "{}",
        bytes.stderr
    );
    // The same instance, the same bytes.
    assert!(here.run(&["export", "foo", "-"]).stdout == bytes.stdout);
    let there = World::new();
    let came = there.run_with(&["import", "-", "--name", "bar"], &bytes.stdout);
    assert_eq!(came.ok(), "Imported: bar\n");
    there.must("bar", "start");
    // What was imported can be exported.
    there.must("bar", "suspend");
    let again = there.run(&["export", "bar", "-"]);
    assert!(
        again.stderr.contains("saved memory is not exported"),
        "{}",
        again.stderr
    );
    assert_eq!(there.state("bar"), "suspended");
    let back = here.run_with(&["import", "-"], &again.stdout);
    assert_eq!(back.ok(), "Imported: bar\n");
    here.must("bar", "start");
    assert_eq!(
        here.api.get("/v1/images").unwrap().as_array().map(Vec::len),
        Some(1)
    );
    // What can't be exported says why.
    for (name, words) in [("nobody", "does not exist"), ("../x", "does not exist")] {
        let told = here.run(&["export", name, "-"]).fails_with(2);
        assert!(told.contains(words), "{told}");
    }
    here.delete("foo", false).unwrap();
    let told = here
        .run(&["export", "foo", &path(&here, "x")])
        .fails_with(2);
    assert!(told.contains("is deleted"), "{told}");
    assert!(!here.folder().join("x").exists() && !here.folder().join("x.part").exists());
    let told = here.run(&["import", &path(&here, "none")]).fails_with(2);
    assert!(told.contains("No such file"), "{told}");
    let told = here
        .run_with(&["import", "-", "-n", "a b"], b"")
        .fails_with(2);
    assert!(told.contains("a b"), "{told}");
    here.all_is_well();
    there.all_is_well();
}

/// Unpacks an archive with the usual tools, to be changed and packed again.
struct Opened {
    folder: PathBuf,
    members: Vec<String>,
}

impl Opened {
    fn new(archive: &[u8], folder: &Path) -> Self {
        let _ = fs::remove_dir_all(folder);
        fs::create_dir_all(folder).unwrap();
        let script = format!("zstd -dqc | tar -xvSC {}", folder.display());
        let members = shell(&script, archive);
        let members = String::from_utf8(members).unwrap();
        Self {
            folder: folder.to_owned(),
            members: members.lines().map(str::to_owned).collect(),
        }
    }

    fn path(&self, member: &str) -> PathBuf {
        self.folder.join(member)
    }

    fn manifest(&self, change: impl FnOnce(&mut Value)) {
        self.json("manifest.json", change);
    }

    fn json(&self, member: &str, change: impl FnOnce(&mut Value)) {
        let path = self.path(member);
        let mut value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        fs::write(path, serde_json::to_vec(&value).unwrap()).unwrap();
    }

    fn digest(&self, member: &str) -> String {
        let bytes = fs::read(self.path(member)).unwrap();
        let hex: String = sha2::Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        format!("sha256:{hex}")
    }

    /// Makes manifest and digests right again, as far as an attacker can.
    fn sign(&self) {
        let disk = self.digest("disk.img");
        let sizes: Vec<_> = (0..)
            .map(|n| self.path(&format!("layers/{n}.qcow2")))
            .map_while(|path| Some(path.metadata().ok()?.len()))
            .collect();
        self.manifest(|manifest| {
            manifest["image"]["disk"] = disk.into();
            for (layer, size) in manifest["layers"]
                .as_array_mut()
                .unwrap()
                .iter_mut()
                .zip(sizes)
            {
                layer["bytes"] = size.into();
            }
        });
        let members = self.members.iter().filter(|m| *m != "digests.json");
        let digests: serde_json::Map<_, _> = members
            .filter(|member| self.path(member).is_file())
            .map(|member| (member.clone(), self.digest(member).into()))
            .collect();
        let text = serde_json::to_vec(&digests).unwrap();
        fs::write(self.path("digests.json"), text).unwrap();
    }

    fn pack(&self, members: &[String]) -> Vec<u8> {
        let script = format!(
            "tar --format=gnu -cC {} --owner=7 --no-recursion --hard-dereference -- {} | zstd -q",
            self.folder.display(),
            members.join(" ")
        );
        shell(&script, b"")
    }
}

fn shell(script: &str, input: &[u8]) -> Vec<u8> {
    let mut child = Command::new("sh")
        .args(["-ec", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feed = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    let _ = feed.join();
    assert!(output.status.success(), "{script}");
    output.stdout
}

fn qemu_img(args: &[&str]) {
    let status = Command::new("qemu-img")
        .args(args)
        .stdout(Stdio::null())
        .status();
    if !status.as_ref().unwrap().success() {
        let _ = Command::new("cp")
            .args([args[args.len() - 1], "/tmp/w/H6/q/bad"])
            .status();
    }
    assert!(status.unwrap().success(), "qemu-img {args:?}");
}

#[test]
fn fake_archives_that_are_refused() {
    let tools = ["zstd", "tar", "qemu-img"].map(Need::Program);
    if !need(&[Need::Root, Need::Tun]) || !need(&tools) {
        return;
    }
    let here = World::new();
    snapshot_tree(&here);
    let archive = here.run(&["export", "foo", "-"]).stdout;
    let there = World::new();
    let folder = there.folder().join("opened");
    let mut cases = 0;
    let mut case = |words: &str, change: &dyn Fn(&mut Opened)| {
        let mut opened = Opened::new(&archive, &folder);
        opened.sign();
        change(&mut opened);
        let archive = opened.pack(&opened.members);
        let told = there.run_with(&["import", "-"], &archive).fails_with(2);
        assert!(told.contains(words), "{words}: {told}");
        nothing_is_left(&there);
        cases += 1;
    };
    // Its members, and their order.
    case("begin with a manifest", &|opened| {
        opened.members.rotate_left(1)
    });
    case("stands where", &|opened| opened.members.swap(1, 2));
    case("it has no digests.json", &|opened| {
        drop(opened.members.pop())
    });
    case("stands where", &|opened| drop(opened.members.remove(2)));
    case("too many", &|opened| {
        let first = opened.members[0].clone();
        opened.members.push(first);
    });
    case("too many", &|opened| {
        fs::write(opened.path("extra"), "x").unwrap();
        opened.members.push("extra".into());
    });
    case("stands where", &|opened| {
        let again = opened.members[2].clone();
        opened.members.insert(2, again);
    });
    case("is no file", &|opened| {
        fs::remove_file(opened.path("disk.img")).unwrap();
        fs::create_dir(opened.path("disk.img")).unwrap();
    });
    case("is a link", &|opened| {
        fs::remove_file(opened.path("disk.img")).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", opened.path("disk.img")).unwrap();
    });
    // What the members say of each other.
    case("another size", &|opened| {
        opened.manifest(|m| m["layers"][0]["bytes"] = json!(5));
    });
    case("is not what the manifest says", &|opened| {
        opened.manifest(|m| m["image"]["disk"] = opened.digest("manifest.json").into());
    });
    case("not those that were written", &|opened| {
        opened.json("digests.json", |all| {
            all["layers/0.qcow2"] = all["layers/1.qcow2"].clone();
        });
    });
    case("not those that were written", &|opened| {
        opened.json("digests.json", |all| {
            all["more"] = all["layers/1.qcow2"].clone();
        });
    });
    case("manifest.json", &|opened| {
        fs::write(opened.path("manifest.json"), "{").unwrap()
    });
    // Layers that reach for files of the host, or are not what they are said to be.
    let rebase = |opened: &mut Opened, args: &[&str]| {
        let layer = opened.path("layers/1.qcow2");
        let layer = layer.to_str().unwrap();
        qemu_img(&[args, &[layer]].concat());
        opened.sign();
    };
    case("refers to a backing file", &|opened| {
        rebase(
            opened,
            &[
                "rebase",
                "-u",
                "-f",
                "qcow2",
                "-F",
                "raw",
                "-b",
                "/etc/passwd",
            ],
        );
    });
    case("external data file", &|opened| {
        let (layer, data) = (opened.path("layers/1.qcow2"), opened.path("data"));
        fs::remove_file(&layer).unwrap();
        let options = format!("data_file={}", data.display());
        let layer = layer.to_str().unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, layer, "5G"]);
        opened.sign();
    });
    case("what the manifest says of it", &|opened| {
        let layer = opened.path("layers/1.qcow2");
        fs::remove_file(&layer).unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", layer.to_str().unwrap(), "4G"]);
        opened.sign();
    });
    case("internal snapshots", &|opened| {
        // What the stand-in for QEMU writes is no qcow2 to QEMU's own tools.
        let layer = opened.path("layers/1.qcow2");
        fs::remove_file(&layer).unwrap();
        qemu_img(&["create", "-q", "-f", "qcow2", layer.to_str().unwrap(), "5G"]);
        rebase(opened, &["snapshot", "-c", "inner"]);
    });
    case("not a qcow2 file", &|opened| {
        fs::write(opened.path("layers/1.qcow2"), noise(4096)).unwrap();
        opened.sign();
    });
    assert!(cases > 15);
    // Damaged on the way, cut off, not an archive at all.
    for at in [
        0,
        5,
        archive.len() / 3,
        archive.len() / 2,
        archive.len() - 3,
    ] {
        let mut damaged = archive.clone();
        damaged[at] ^= 0x10;
        for bytes in [damaged.as_slice(), &archive[..at]] {
            let told = there.run_with(&["import", "-"], bytes).fails_with(2);
            assert!(told.contains("archive is refused"), "{at}: {told}");
            nothing_is_left(&there);
        }
    }
    // Packed by somebody else's tools, it is as good.
    let opened = Opened::new(&archive, &folder);
    opened.sign();
    let packed = opened.pack(&opened.members);
    assert_eq!(
        there.run_with(&["import", "-"], &packed).ok(),
        "Imported: foo\n"
    );
    there.must("foo", "start");
    assert_eq!(there.marks("foo")[..2], here.marks("foo")[..2]);
    there.all_is_well();
}
