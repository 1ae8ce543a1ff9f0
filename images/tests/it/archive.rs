//! Archives: readable by every tar, the same bytes for the same content, and nothing else is taken in.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

use pileus_base::{Code, Error, Result, Size};
use pileus_images::archive::extents::Source;
use pileus_images::archive::read::bad;
use pileus_images::archive::{Content, DIGESTS, Input, Reader, Writer, layer, write};
use pileus_images::{ImageInfo, overlay};

use crate::support::*;

fn still(_: u64) -> Result<()> {
    Ok(())
}

/// A file with data in many places; `dense` writes its zeros too.
fn scattered(path: &Path, extents: u64, len: u64, dense: bool) -> File {
    let file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    if dense {
        file.write_all_at(&vec![0; len as usize], 0).unwrap();
    }
    for n in 0..extents {
        let at = n * (len / extents) + n % 3;
        file.write_all_at(format!("piece {n}").as_bytes(), at)
            .unwrap();
    }
    file.set_len(len).unwrap();
    file
}

fn written(files: &[(&str, &File)]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), 1).unwrap();
    writer.bytes("manifest.json", b"{}").unwrap();
    for (name, file) in files {
        let source = Source::whole(file).unwrap();
        writer.file(name, source, &mut still).unwrap();
    }
    writer.finish().unwrap()
}

fn tar_of(archive: &[u8]) -> Vec<u8> {
    let mut tar = Vec::new();
    Input::new(archive).unwrap().read_to_end(&mut tar).unwrap();
    tar
}

fn run(program: &str, args: &[&str], input: &[u8]) -> String {
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feed = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    let _ = feed.join();
    assert!(output.status.success(), "{program} {args:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// All members with their digests, extracted into `to`.
fn read_all(archive: &[u8], to: &Path) -> Result<Vec<(String, String)>> {
    let mut reader = Reader::new(Input::new(archive)?, 1 << 40);
    let mut found = Vec::new();
    while let Some(member) = reader.next_member()? {
        let path = to.join(member.name.replace('/', "_"));
        let digest = reader.extract(&member, File::create_new(path).unwrap(), &mut still)?;
        found.push((member.name, digest.to_string()));
    }
    Ok(found)
}

#[test]
fn gnu_tar_reads_what_we_write_and_we_read_it_too() {
    let dir = tempfile::tempdir().unwrap();
    // More extents than a header has entries, none, a hole at the end, and a length of no whole block.
    let len = (64 << 20) + 77;
    let many = scattered(&dir.path().join("many"), 200, len, false);
    let few = scattered(&dir.path().join("few"), 2, 3 << 20, false);
    let empty = scattered(&dir.path().join("empty"), 0, 0, false);
    let hole = scattered(&dir.path().join("hole"), 0, 1 << 30, false);
    let archive = written(&[
        ("disk.img", &many),
        ("layers/0.qcow2", &few),
        ("empty", &empty),
        ("hole", &hole),
    ]);
    let path = dir.path().join("a.pileus");
    std::fs::write(&path, &archive).unwrap();
    let tar = run("zstd", &["-dqc", path.to_str().unwrap()], b"").into_bytes();
    assert_eq!(tar, tar_of(&archive));
    let list = run("tar", &["-t"], &tar);
    let names = [
        "manifest.json",
        "disk.img",
        "layers/0.qcow2",
        "empty",
        "hole",
        DIGESTS,
    ];
    assert_eq!(list.lines().collect::<Vec<_>>(), names);
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    run("tar", &["-xSC", out.to_str().unwrap()], &tar);
    let own = dir.path().join("own");
    std::fs::create_dir(&own).unwrap();
    let digests = read_all(&archive, &own).unwrap();
    for (name, file) in [
        ("disk.img", "many"),
        ("layers/0.qcow2", "few"),
        ("hole", "hole"),
    ] {
        let want = std::fs::read(dir.path().join(file)).unwrap();
        assert!(std::fs::read(out.join(name)).unwrap() == want, "{name}");
        let ours = own.join(name.replace('/', "_"));
        assert!(std::fs::read(&ours).unwrap() == want, "{name}");
        let (original, ours) = (
            std::fs::metadata(dir.path().join(file)).unwrap(),
            std::fs::metadata(&ours).unwrap(),
        );
        assert!(ours.blocks() <= original.blocks() + 8, "{name}");
    }
    // The digests inside are those that were read, and those that anybody can work out.
    let inside: serde_json::Value =
        serde_json::from_slice(&std::fs::read(own.join(DIGESTS)).unwrap()).unwrap();
    for (name, digest) in digests.iter().filter(|(name, _)| name != DIGESTS) {
        assert_eq!(inside[name], *digest, "{name}");
    }
    assert_eq!(inside["manifest.json"], digest(b"{}").to_string());
    assert_eq!(inside["empty"], digest(b"").to_string());
    let of_hole = write::digest_of(&hole, &mut still).unwrap();
    assert_eq!(inside["hole"], of_hole.to_string());
    assert_eq!(of_hole, digest(&(1_u64 << 30).to_be_bytes()));
}

#[test]
fn the_same_content_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let sparse = scattered(&dir.path().join("a"), 30, 8 << 20, false);
    let dense = scattered(&dir.path().join("b"), 30, 8 << 20, true);
    assert!(dense.metadata().unwrap().blocks() > sparse.metadata().unwrap().blocks() * 2);
    let first = written(&[("disk.img", &sparse)]);
    assert!(first == written(&[("disk.img", &dense)]));
    // However many threads compress.
    let mut writer = Writer::new(Vec::new(), 3).unwrap();
    writer.bytes("manifest.json", b"{}").unwrap();
    let source = Source::whole(&dense).unwrap();
    writer.file("disk.img", source, &mut still).unwrap();
    assert!(first == writer.finish().unwrap());
}

/// The digests of all members.
fn check_all(archive: &[u8]) -> Result<Vec<(String, String)>> {
    let mut reader = Reader::new(Input::new(archive)?, 1 << 40);
    let mut found = Vec::new();
    while let Some(member) = reader.next_member()? {
        let digest = reader.discard(&member, &mut still)?;
        found.push((member.name, digest.to_string()));
    }
    Ok(found)
}

#[test]
fn every_damage_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let file = scattered(&dir.path().join("a"), 9, 1 << 20, false);
    let archive = written(&[("disk.img", &file)]);
    let good = check_all(&archive).unwrap();
    for at in 1..archive.len() {
        let mut damaged = archive.clone();
        damaged[at] ^= 1 << (at % 8);
        // What is still taken is the same to the last byte: a bit that says nothing.
        match check_all(&damaged) {
            Ok(read) => assert_eq!(read, good, "{at}"),
            Err(err) => assert_eq!(err.code, Code::BadArchive, "{at}: {err}"),
        }
        let err = check_all(&archive[..at]).unwrap_err();
        assert_eq!(err.code, Code::BadArchive, "{at}: {err}");
    }
    let mut longer = archive.clone();
    longer.push(0);
    let err = check_all(&longer).unwrap_err();
    assert_eq!(err.code, Code::BadArchive);
}

fn compressed(tar: &[u8]) -> Vec<u8> {
    zstd::stream::encode_all(tar, 1).unwrap()
}

/// Changes a field of the header at `at`, and makes its checksum right again.
fn patch(tar: &mut [u8], at: usize, field: usize, bytes: &[u8]) {
    tar[at + field..][..bytes.len()].copy_from_slice(bytes);
    tar[at + 148..at + 156].fill(b' ');
    let sum: u32 = tar[at..at + 512].iter().map(|byte| u32::from(*byte)).sum();
    tar[at + 148..at + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

#[test]
fn each_rule_of_the_reader_holds() {
    let dir = tempfile::tempdir().unwrap();
    let file = scattered(&dir.path().join("a"), 3, 9 << 20, false);
    let tar = tar_of(&written(&[("disk.img", &file)]));
    // Behind the manifest's header and its one block.
    let disk = 1024;
    let mut cases = 0;
    let mut refused = |what: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut changed = tar.clone();
        change(&mut changed);
        cases += 1;
        let out = dir.path().join(format!("r{cases}"));
        std::fs::create_dir(&out).unwrap();
        let err = read_all(&compressed(&changed), &out).map(drop).unwrap_err();
        assert_eq!(err.code, Code::BadArchive, "{what}: {err}");
        assert!(err.message.contains(what), "{what}: {err}");
    };
    for kind in [b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"L"] {
        refused("is no file", &|tar| patch(tar, 0, 156, kind));
    }
    for kind in [b"x", b"g"] {
        refused("PAX headers", &|tar| patch(tar, 0, 156, kind));
    }
    refused("is a link", &|tar| patch(tar, 0, 157, b"/etc/passwd"));
    refused("damaged", &|tar| tar[3] ^= 1);
    refused("damaged", &|tar| tar[148..156].fill(b'z'));
    for name in [b"\0".as_slice(), b"a b", b"a\nb", b"\xff"] {
        refused("no name", &|tar| patch(tar, 0, 0, name));
    }
    refused("another age", &|tar| {
        patch(tar, 0, 257, b"\0\0\0\0\0\0\0\0")
    });
    refused("no name", &|tar| {
        patch(tar, 0, 257, b"ustar\x0000");
        patch(tar, 0, 345, b"folder");
    });
    refused("a number is none", &|tar| patch(tar, 0, 124, b"zz"));
    refused("makes no sense", &|tar| {
        patch(tar, 0, 124, b"\x80\0\0\0\x7f")
    });
    refused("between its members", &|tar| tar[512 + 100] = 1);
    let entry = |n: usize| 386 + 24 * n;
    refused("a number is none", &|tar| {
        patch(tar, disk, entry(0) + 12, b"z");
    });
    for (n, offset) in [
        (0, b"77777777777\0"),
        (1, b"00000000000\0"),
        (2, b"00044000001\0"),
    ] {
        refused("outside of its file", &|tar| {
            patch(tar, disk, entry(n), offset);
        });
    }
    refused("are not its size", &|tar| {
        patch(tar, disk, entry(0) + 12, b"00000000001\0");
    });
    refused("an extent is empty", &|tar| {
        patch(tar, disk, entry(0) + 12, b"00000000000\0");
    });
    refused("no GNU header", &|tar| {
        patch(tar, disk, 257, b"ustar\x0000")
    });
    refused("behind its end", &|tar| {
        let len = tar.len();
        tar[len - 1] = 1;
    });
    refused("behind its end", &|tar| tar.extend(vec![0; 2 << 20]));
    refused("ends in its middle", &|tar| {
        let end = tar.iter().rposition(|byte| *byte != 0).unwrap();
        tar.truncate(end.next_multiple_of(512));
    });
}

#[test]
fn bombs_stop_at_the_budget() {
    let dir = tempfile::tempdir().unwrap();
    let mut tar = tar_of(&written(&[]));
    // 2^33 bytes of zeros, as a dense member that is small when compressed.
    patch(&mut tar, 0, 124, b"\x80\0\0\0\0\0\0\x02\0\0\0\0");
    let bomb = compressed(&tar[..512]);
    let zeros = compressed(&vec![0; 64 << 20]);
    let mut all = bomb;
    for _ in 0..4 {
        all.extend(&zeros);
    }
    let mut reader = Reader::new(Input::new(all.as_slice()).unwrap(), 100 << 20);
    let member = reader.next_member().unwrap().unwrap();
    let path = dir.path().join("bomb");
    let err = reader
        .extract(&member, File::create_new(&path).unwrap(), &mut still)
        .unwrap_err();
    assert!(err.message.contains("larger than what it says"), "{err}");
    assert!(std::fs::metadata(&path).unwrap().blocks() < 8);
    // One whose frame wants more memory than any archive of ours.
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    encoder.window_log(28).unwrap();
    encoder.include_contentsize(false).unwrap();
    encoder.write_all(&tar).unwrap();
    let err = Reader::new(
        Input::new(encoder.finish().unwrap().as_slice()).unwrap(),
        1 << 30,
    )
    .next_member()
    .unwrap_err();
    assert_eq!(err.code, Code::BadArchive);
    // Small members are small.
    let tar = tar_of(&written(&[]));
    let mut reader = Reader::new(tar.as_slice(), 1 << 20);
    let member = reader.next_member().unwrap().unwrap();
    assert_eq!(reader.bytes(&member, 1).unwrap_err().code, Code::BadArchive);
}

#[test]
fn what_stops_the_work_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = scattered(&dir.path().join("a"), 9, 4 << 20, false);
    let mut writer = Writer::new(Vec::new(), 1).unwrap();
    let source = Source::whole(&file).unwrap();
    let mut stop = |_| Err(Error::new(Code::Cancelled, "enough"));
    let err = writer.file("a", source, &mut stop).unwrap_err();
    assert_eq!(err.code, Code::Cancelled);
    struct Gone;
    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut writer = Writer::new(Gone, 1).unwrap();
    let written = writer.file("a", source, &mut still);
    let err = written.and_then(|_| writer.finish().map(drop)).unwrap_err();
    assert_eq!(err.code, Code::Cancelled);
}

#[test]
fn a_layer_travels_without_names_and_is_given_ours() {
    let dir = tempfile::tempdir().unwrap();
    let (base, path) = (dir.path().join("base.raw"), dir.path().join("layer"));
    std::fs::write(&base, disk()).unwrap();
    overlay::create(&path, Size::mib(8), &base).unwrap();
    qemu_io(&path, &base, "write -P 7 1M 64k");
    let file = File::options().read(true).write(true).open(&path).unwrap();
    let (header, head) = layer::to_travel(&file).unwrap();
    assert_eq!(header.virtual_size, 8 << 20);
    // As it is, it names a file and is refused.
    assert_eq!(
        layer::check(&file, 8 << 20).unwrap_err().code,
        Code::BadArchive
    );
    let mut writer = Writer::new(Vec::new(), 1).unwrap();
    let source = layer::source(&file, &head).unwrap();
    writer.file("layers/0.qcow2", source, &mut still).unwrap();
    let archive = writer.finish().unwrap();
    let needle = base.to_str().unwrap().as_bytes();
    let tar = tar_of(&archive);
    assert!(!tar.windows(needle.len()).any(|window| window == needle));

    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    read_all(&archive, &out).unwrap();
    let came = out.join("layers_0.qcow2");
    let file = File::options().read(true).write(true).open(&came).unwrap();
    layer::check(&file, 8 << 20).unwrap();
    assert!(layer::check(&file, 9 << 20).is_err());
    assert!(layer::check(&file, 7 << 20).is_err());
    layer::settle(&file, &base, "raw").unwrap();
    qemu_img(&["check", "-q", "-f", "qcow2", text(&came)]);
    qemu_img(&["compare", "-q", text(&path), text(&came)]);
    let info = Command::new("qemu-img")
        .args(["info", "--output=json", "-f", "qcow2", text(&came)])
        .output()
        .unwrap();
    let info: serde_json::Value = serde_json::from_slice(&info.stdout).unwrap();
    assert_eq!(info["backing-filename"], text(&base));
    assert_eq!(info["backing-filename-format"], "raw");
    // What the strict parser refuses is refused here.
    file.write_all_at(&[0, 0, 0, 4], 76).unwrap();
    assert!(layer::to_travel(&file).is_err());
    file.write_all_at(b"NOPE", 0).unwrap();
    assert!(layer::to_travel(&file).is_err() && layer::check(&file, 8 << 20).is_err());
    file.set_len(50).unwrap();
    assert!(layer::to_travel(&file).is_err() && layer::check(&file, 8 << 20).is_err());
}

fn qemu_io(path: &Path, base: &Path, command: &str) {
    let image = format!(
        "driver=qcow2,file.driver=file,file.filename={},backing.driver=raw,backing.file.driver=file,\
         backing.file.filename={}",
        path.display(),
        base.display()
    );
    let done = Command::new("qemu-io")
        .args(["--image-opts", &image, "-c", command])
        .output()
        .unwrap();
    assert!(done.status.success());
}

#[tokio::test]
async fn an_image_that_comes_is_known_by_its_content() {
    let world = Fixture::new();
    let reference = world.file("disk.raw", &disk());
    let silent = pileus_base::Reporter::silent();
    let image = world.store.obtain(&reference, None, &silent).await.unwrap();
    let content = image.content(&mut still).unwrap();
    assert_eq!(content.size.bytes(), DISK_SIZE as u64);
    // The second time it is not read.
    let mut never = |_| Err(bad("read again"));
    assert_eq!(image.content(&mut never).unwrap(), content);
    let store = &world.store;
    let found = store.find_content(&content, &mut still).unwrap().unwrap();
    assert_eq!(found.digest(), image.digest());
    let other = Content {
        disk: digest(b"another"),
        ..content.clone()
    };
    assert!(store.find_content(&other, &mut still).unwrap().is_none());
    // One that says to be that image, with another disk, does not take its place.
    let incoming = store.begin_import().unwrap();
    let mut evil = disk();
    evil[5000] ^= 1;
    std::fs::write(incoming.disk(), &evil).unwrap();
    let came = Content {
        disk: write::digest_of(&File::open(incoming.disk()).unwrap(), &mut still).unwrap(),
        ..content
    };
    let info = ImageInfo {
        digest: image.digest().clone(),
        ..image.info().clone()
    };
    let published = store.publish_import(incoming, info, &came).unwrap();
    assert_ne!(published.digest(), image.digest());
    assert_eq!(*published.digest(), came.digest().unwrap());
    assert!(std::fs::read(published.disk()).unwrap() == evil);
    assert!(std::fs::read(image.disk()).unwrap() == disk());
    // One that is given up leaves nothing.
    let given_up = store.begin_import().unwrap();
    let folder = given_up.disk().parent().unwrap().to_owned();
    std::fs::write(given_up.disk(), "x").unwrap();
    drop(given_up);
    assert!(!folder.exists());
    let full = store.check_room(folder.parent().unwrap().parent().unwrap(), 1 << 60);
    assert_eq!(full.unwrap_err().code, Code::NoSpace);
}
