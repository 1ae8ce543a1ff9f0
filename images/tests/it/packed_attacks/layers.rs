//! layer.qcow2: all that qemu-img can be made to write and that an archive must not have, the same by hand, and layers
//! with data, which are merged.

use std::path::Path;
use std::process::Command;

use pileus_base::{Code, Reporter};
use pileus_images::Tools;
use pileus_images::packed::unpack::{Layer, take_in};
use pileus_images::packed::{Rule, digest};

use super::tar::Tar;
use super::{Attack, DISK_SIZE, MACHINE, attack, budgets, disk, layer, names, taken, try_it, zst};
use crate::support::{qemu_img, text};

const CLUSTER: u64 = 64 << 10;

/// Makes a layer in `dir` as the ancestor did, with other options; `size` if it is not that of the disk.
fn make(dir: &Path, options: &[&str], size: &[u64]) {
    let disk = std::fs::File::create(dir.join("disk.img")).unwrap();
    disk.set_len(size.first().map_or(DISK_SIZE as u64, |size| *size))
        .unwrap();
    let layer = dir.join("layer.qcow2");
    let mut args = vec!["create", "-q", "-f", "qcow2", "-b", "disk.img", "-F", "raw"];
    args.extend(options);
    args.push(text(&layer));
    qemu_img(&args);
}

pub fn made(options: &[&str], size: &[u64]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), options, size);
    std::fs::read(dir.path().join("layer.qcow2")).unwrap()
}

/// One that a program changes before it is packed.
fn changed(options: &[&str], program: &str, args: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), options, &[]);
    run(dir.path(), program, args);
    std::fs::read(dir.path().join("layer.qcow2")).unwrap()
}

fn run(dir: &Path, program: &str, args: &[&str]) {
    let done = Command::new(program)
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

/// The good one with other bytes.
fn with(at: usize, bytes: &[u8]) -> Vec<u8> {
    let mut layer = layer();
    layer[at..at + bytes.len()].copy_from_slice(bytes);
    layer
}

fn tar(layer: &[u8]) -> Tar {
    Tar::default()
        .file("disk.img", &disk())
        .file("layer.qcow2", layer)
        .file("machine.json", MACHINE)
}

/// One that stands on another name, or on none of a format.
fn on(name: &[&str]) -> Vec<u8> {
    sized("3M", name)
}

fn sized(size: &str, name: &[&str]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.qcow2");
    let mut args = vec!["create", "-q", "-u", "-f", "qcow2"];
    args.extend(name);
    args.extend([text(&path), size]);
    qemu_img(&args);
    std::fs::read(&path).unwrap()
}

/// One with an L2 table that has this entry, at the end of the file.
fn with_entry(entry: u64) -> Vec<u8> {
    let mut layer = layer();
    layer.resize(layer.len().next_multiple_of(CLUSTER as usize), 0);
    let table = layer.len() as u64;
    layer.resize(layer.len() + CLUSTER as usize, 0);
    layer[table as usize..][..8].copy_from_slice(&entry.to_be_bytes());
    let l1 = u64::from_be_bytes(layer[40..48].try_into().unwrap()) as usize;
    layer[l1..l1 + 8].copy_from_slice(&(table | 1 << 63).to_be_bytes());
    layer
}

fn with_l1(entry: u64) -> Vec<u8> {
    let l1 = u64::from_be_bytes(layer()[40..48].try_into().unwrap()) as usize;
    with(l1, &entry.to_be_bytes())
}

pub fn attacks() -> Vec<Attack> {
    let mut all = by_programs();
    all.extend(by_hand());
    all
}

fn by_programs() -> Vec<Attack> {
    let secret = tempfile::tempdir().unwrap();
    let host = secret.path().join("host-secret.raw");
    std::fs::write(&host, vec![b'S'; DISK_SIZE]).unwrap();
    let data_file = format!("data_file={}", text(&host));
    let luks = [
        "--object",
        "secret,id=s,data=x",
        "-o",
        "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
    ];
    let cases = [
        (
            Rule::LayerDataFile,
            "a data file of the host",
            made(&["-o", &data_file], &[]),
        ),
        (Rule::LayerEncrypted, "LUKS", made(&luks, &[])),
        (
            Rule::LayerSnapshots,
            "a snapshot",
            changed(&[], "qemu-img", &["snapshot", "-c", "s", "layer.qcow2"]),
        ),
        (
            Rule::LayerBitmaps,
            "a bitmap",
            changed(&[], "qemu-img", &["bitmap", "--add", "layer.qcow2", "b"]),
        ),
        (
            Rule::LayerSize,
            "40 GiB",
            sized("40G", &["-b", "disk.img", "-F", "raw"]),
        ),
        (Rule::LayerSize, "1 MiB", made(&[], &[1 << 20])),
        (Rule::LayerBacking, "none", on(&[])),
        (
            Rule::LayerBacking,
            "an absolute path",
            on(&["-b", "/etc/passwd", "-F", "raw"]),
        ),
        (
            Rule::LayerBacking,
            "./disk.img",
            on(&["-b", "./disk.img", "-F", "raw"]),
        ),
        (
            Rule::LayerBacking,
            "../disk.img",
            on(&["-b", "../disk.img", "-F", "raw"]),
        ),
        (
            Rule::LayerBacking,
            "json",
            on(&[
                "-b",
                "json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}",
                "-F",
                "raw",
            ]),
        ),
        (
            Rule::LayerBackingFormat,
            "qcow2",
            on(&["-b", "disk.img", "-F", "qcow2"]),
        ),
        (
            Rule::LayerBackingFormat,
            "host_device",
            on(&["-b", "disk.img", "-F", "host_device"]),
        ),
        (
            Rule::LayerCompressed,
            "compressed data",
            changed(&[], "qemu-io", &["-c", "write -c 0 64k", "layer.qcow2"]),
        ),
        (
            Rule::LayerCompressed,
            "zstd",
            changed(
                &["-o", "compression_type=zstd"],
                "qemu-io",
                &["-c", "write -c 0 64k", "layer.qcow2"],
            ),
        ),
        (Rule::LayerNotQcow2, "a raw disk", disk()),
        (Rule::LayerNotQcow2, "a text", b"qcow2".to_vec()),
        (Rule::LayerNotQcow2, "empty", Vec::new()),
    ];
    cases
        .into_iter()
        .map(|(rule, what, layer)| attack(rule, what, tar(&layer)))
        .collect()
}

fn by_hand() -> Vec<Attack> {
    let (good, len) = (layer(), layer().len() as u64);
    let name = usize::try_from(u64::from_be_bytes(good[8..16].try_into().unwrap())).unwrap();
    let with_nul = {
        let mut layer = with(16, &[0, 0, 0, 16]);
        layer[name..name + 16].copy_from_slice(b"disk.img\0/../../");
        layer
    };
    // Its format is the first extension, or behind the names of features.
    let format = good
        .windows(4)
        .position(|four| four == [0xe2, 0x79, 0x2a, 0xca])
        .unwrap();
    let no_room = with(8, &(2_u64 << 20).to_be_bytes());
    let be = |value: u64| value.to_be_bytes();
    let cases = [
        (Rule::LayerNotQcow2, "half a header", good[..50].to_vec()),
        (Rule::LayerVersion, "version 1", with(4, &[0, 0, 0, 1])),
        (Rule::LayerVersion, "version 4", with(4, &[0, 0, 0, 4])),
        (Rule::LayerBacking, "a NUL within the name", with_nul),
        (
            Rule::LayerBacking,
            "a name outside of the header's cluster",
            no_room,
        ),
        (
            Rule::LayerBacking,
            "a name within the header",
            with(8, &be(24)),
        ),
        (
            Rule::LayerBackingFormat,
            "no format",
            with(format, &[0, 0, 0, 0]),
        ),
        (Rule::LayerBackingFormat, "RAW", with(format + 8, b"RAW")),
        (
            Rule::LayerExtension,
            "one that nobody knows",
            with(format, &[1, 2, 3, 4]),
        ),
        (
            Rule::LayerDataFile,
            "the name of a data file",
            with(format, b"DATA"),
        ),
        (Rule::LayerDataFile, "raw external data", with(88, &be(2))),
        (Rule::LayerDataFile, "the bit alone", with(72, &be(4))),
        (Rule::LayerBitmaps, "the bit alone", with(88, &be(1))),
        (Rule::LayerEncrypted, "AES", with(32, &[0, 0, 0, 1])),
        (
            Rule::LayerSnapshots,
            "the number alone",
            with(60, &[0, 0, 0, 9]),
        ),
        (Rule::LayerDirty, "dirty", with(72, &be(1))),
        (Rule::LayerCorrupt, "corrupt", with(72, &be(2))),
        (
            Rule::LayerFeature,
            "an incompatible feature",
            with(72, &be(1 << 40)),
        ),
        (Rule::LayerFeature, "a compatible feature", with(80, &be(2))),
        (
            Rule::LayerFeature,
            "a feature that clears itself",
            with(88, &be(1 << 9)),
        ),
        (Rule::LayerHeader, "tiny clusters", with(20, &[0, 0, 0, 8])),
        (Rule::LayerHeader, "huge clusters", with(20, &[0, 0, 0, 22])),
        (Rule::LayerHeader, "a long header", with(100, &[0, 1, 0, 0])),
        (Rule::LayerHeader, "wide refcounts", with(96, &[0, 0, 0, 7])),
        (Rule::LayerSize, "no size", with(24, &be(0))),
        (
            Rule::LayerSize,
            "one sector more",
            with(24, &be(DISK_SIZE as u64 + 512)),
        ),
        (
            Rule::LayerTables,
            "an L1 table outside",
            with(40, &be(1 << 30)),
        ),
        (
            Rule::LayerTables,
            "an L1 table within the header",
            with(40, &be(0)),
        ),
        (Rule::LayerTables, "a huge L1 table", with(36, &[0xff; 4])),
        (Rule::LayerTables, "no L1 table", with(36, &[0; 4])),
        (
            Rule::LayerTables,
            "a refcount table outside",
            with(48, &be(1 << 30)),
        ),
        (
            Rule::LayerTables,
            "a huge refcount table",
            with(56, &[0xff; 4]),
        ),
        (
            Rule::LayerTables,
            "an L2 table outside",
            with_l1(len.next_multiple_of(CLUSTER)),
        ),
        (
            Rule::LayerTables,
            "an L2 table between clusters",
            with_l1(512),
        ),
        (
            Rule::LayerTables,
            "an L2 table at the end of all",
            with_l1(0x00ff_ffff_ffff_0000),
        ),
        (
            Rule::LayerTables,
            "unknown bits in the L1 table",
            with_l1(CLUSTER | 1),
        ),
        (
            Rule::LayerTables,
            "a cluster outside",
            with_entry(1 << 30 | 1 << 63),
        ),
        (
            Rule::LayerTables,
            "a cluster between clusters",
            with_entry(CLUSTER + 512),
        ),
        (
            Rule::LayerTables,
            "unknown bits of a cluster",
            with_entry(CLUSTER | 1 << 58),
        ),
        (
            Rule::LayerCompressed,
            "a compressed cluster",
            with_entry(1 << 62 | 70_000),
        ),
    ];
    let mut all: Vec<_> = cases
        .into_iter()
        .map(|(rule, what, layer)| attack(rule, what, tar(&layer)))
        .collect();
    // Many names for one cluster: far more data than the archive has.
    let mut many = with_entry(CLUSTER);
    let table = many.len() - CLUSTER as usize;
    many[table..]
        .chunks_exact_mut(8)
        .for_each(|entry| entry.copy_from_slice(&be(CLUSTER)));
    all.push(attack(
        Rule::DataTooLarge,
        "one cluster for all of the disk",
        tar(&many),
    ));
    all
}

#[test]
fn empty_layers_of_many_kinds_are_thrown_away() {
    for options in [
        &["-o", "compat=0.10"][..],
        &["-o", "extended_l2=on,compression_type=zstd"],
        &["-o", "cluster_size=2M"],
        &["-o", "cluster_size=512,refcount_bits=64"],
        &["-o", "lazy_refcounts=on"],
    ] {
        taken(&zst(&tar(&made(options, &[])).end()), &disk());
    }
    // An L2 table without a cluster says nothing either.
    taken(&zst(&tar(&with_entry(0)).end()), &disk());
}

/// A disk, a layer on it that a program filled, and what a guest sees of both.
fn filled(options: &[&str], writes: &[&str]) -> (Vec<u8>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    make(dir.path(), options, &[]);
    std::fs::write(dir.path().join("disk.img"), disk()).unwrap();
    let mut args: Vec<_> = writes.iter().flat_map(|write| ["-c", write]).collect();
    args.push("layer.qcow2");
    run(dir.path(), "qemu-io", &args);
    run(
        dir.path(),
        "qemu-img",
        &["convert", "-O", "raw", "layer.qcow2", "whole.raw"],
    );
    let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap();
    (read("layer.qcow2"), read("whole.raw"))
}

#[tokio::test]
async fn what_a_layer_has_comes_into_the_disk() {
    let writes = [
        "write -P 0x41 1M 100k",
        "write -P 0x42 3000k 10k",
        "write -z 0 64k",
    ];
    for options in [
        &["-o", "compat=0.10"][..],
        &["-o", "lazy_refcounts=on"],
        &["-o", "extended_l2=on"],
        &["-o", "cluster_size=4k"],
    ] {
        let (layer, whole) = filled(options, &writes);
        let archive = zst(&tar(&layer).end());
        let (dir, got) = try_it(&archive, &budgets());
        assert_eq!(got.unwrap().layer, Layer::Data);
        assert_eq!(names(dir.path()), ["disk.img", "layer.qcow2"]);
        let dir = tempfile::tempdir().unwrap();
        let report = Reporter::silent();
        let input = std::io::Cursor::new(archive);
        let got = take_in(
            input,
            dir.path(),
            &budgets(),
            &Tools::default(),
            "test",
            &report,
        )
        .await
        .unwrap();
        assert_eq!(
            (got.layer, names(dir.path())),
            (Layer::Empty, vec!["disk.img".to_owned()])
        );
        let path = dir.path().join("disk.img");
        assert!(
            std::fs::read(&path).unwrap() == whole,
            "{options:?}: another disk"
        );
        let file = std::fs::File::open(&path).unwrap();
        assert_eq!(
            got.disk,
            digest::of_file(&file, 1, &mut |_| Ok(())).unwrap()
        );
        let data = whole
            .chunks(4096)
            .filter(|block| block.iter().any(|byte| *byte != 0))
            .count();
        assert_eq!(got.data, data as u64 * 4096);
    }
}

#[tokio::test]
async fn what_the_layer_names_is_never_opened() {
    // A name that passes, and a file by it outside of the folder, where a program that heeds names would look.
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk.img"), vec![b'S'; DISK_SIZE]).unwrap();
    let inner = dir.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    let (layer, whole) = filled(&[], &["write -P 0x41 1M 64k"]);
    let input = std::io::Cursor::new(zst(&tar(&layer).end()));
    take_in(
        input,
        &inner,
        &budgets(),
        &Tools::default(),
        "test",
        &Reporter::silent(),
    )
    .await
    .unwrap();
    assert!(std::fs::read(inner.join("disk.img")).unwrap() == whole);
    assert!(std::fs::read(dir.path().join("disk.img")).unwrap() == vec![b'S'; DISK_SIZE]);
}

/// A disk that says of itself that it is a qcow2 file on a file of the host, which a program that guesses would believe.
#[tokio::test]
async fn a_disk_that_is_itself_a_qcow2_file_is_raw_bytes() {
    let mut disguised = sized("3M", &["-b", "/etc/passwd", "-F", "raw"]);
    disguised.resize(DISK_SIZE, 0);
    let archive = |layer: &[u8]| {
        let tar = Tar::default().file("disk.img", &disguised);
        zst(&tar
            .file("layer.qcow2", layer)
            .file("machine.json", MACHINE)
            .end())
    };
    taken(&archive(&layer()), &disguised);
    let (layer, _) = filled(&[], &["write -P 0x41 2M 64k"]);
    let dir = tempfile::tempdir().unwrap();
    let input = std::io::Cursor::new(archive(&layer));
    take_in(
        input,
        dir.path(),
        &budgets(),
        &Tools::default(),
        "test",
        &Reporter::silent(),
    )
    .await
    .unwrap();
    disguised[2 << 20..][..64 << 10].fill(0x41);
    assert!(std::fs::read(dir.path().join("disk.img")).unwrap() == disguised);
}

#[tokio::test]
async fn nothing_is_left_of_a_merge_that_failed() {
    let (layer, _) = filled(&[], &["write -P 0x41 1M 64k"]);
    let archive = zst(&tar(&layer).end());
    let missing = Tools {
        qemu_img: "/nonexistent/qemu-img".into(),
        ..Tools::default()
    };
    let failing = Tools {
        qemu_img: "false".into(),
        ..Tools::default()
    };
    for (tools, code) in [(missing, Code::ToolMissing), (failing, Code::ToolFailed)] {
        let dir = tempfile::tempdir().unwrap();
        let input = std::io::Cursor::new(archive.clone());
        let got = take_in(
            input,
            dir.path(),
            &budgets(),
            &tools,
            "test",
            &Reporter::silent(),
        )
        .await;
        assert_eq!(got.unwrap_err().code, code);
        assert_eq!(names(dir.path()), [""; 0]);
    }
}
