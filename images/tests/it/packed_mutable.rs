//! Images in the making: made, loaded, grown, packed, and what is refused on the way.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use pileus_base::{Code, Reporter, Size};
use pileus_images::Limits;
use pileus_images::packed::digest;
use pileus_images::packed::mutable::{LEAST, MutableImage, Workshop};
use pileus_images::packed::unpack::{Budgets, unpack};
use pileus_images::packed::{DISK, LAYER, MACHINE, Machine, Rule};
use serde_json::json;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::support::{disk, text};

const LIMIT: u64 = 64 << 20;

fn workshop() -> Workshop {
    Workshop {
        limits: Limits {
            virtual_size: LIMIT,
            reserve: 0,
            ..Limits::default()
        },
        ..Workshop::default()
    }
}

fn machine() -> Machine {
    serde_json::from_value(json!({ "version": 1, "memory": 512, "network": "rtl8139" })).unwrap()
}

fn made(folder: &Path) -> MutableImage {
    MutableImage::new_in(workshop(), folder, Size::mib(8), machine()).unwrap()
}

async fn loaded(archive: &Path, folder: &Path) -> pileus_base::Result<MutableImage> {
    MutableImage::from_file_in(workshop(), archive, folder, &Reporter::silent()).await
}

fn write(image: &MutableImage, bytes: &[u8], at: u64) {
    let path = image.disk_file().unwrap();
    let disk = File::options().write(true).open(&path).unwrap();
    disk.write_all_at(bytes, at).unwrap();
    path.release();
}

fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).unwrap().next().is_none()
}

/// As the ancestor packs: with its tools, and a layer that has something to say.
fn ancestors_image(dir: &TempDir, version: u32) -> std::path::PathBuf {
    let folder = dir.path().join("ancestors");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join(DISK), disk()).unwrap();
    let layer = folder.join(LAYER);
    let options = "backing_file=disk.img,backing_fmt=raw,lazy_refcounts=on";
    let run = |program: &str, args: &[&str]| {
        let done = Command::new(program)
            .args(args)
            .current_dir(&folder)
            .output();
        let done = done.unwrap();
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
    };
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", options, LAYER],
    );
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 0x41 1M 64k", text(&layer)],
    );
    let machine = json!({ "version": version, "memory": 256 });
    std::fs::write(folder.join(MACHINE), machine.to_string()).unwrap();
    run("tar", &["-Scf", "image.tar", DISK, LAYER, MACHINE]);
    run(
        "zstd",
        &["-q", "-3", "image.tar", "-fo", "../image.tar.zst"],
    );
    dir.path().join("image.tar.zst")
}

#[tokio::test]
async fn what_is_packed_is_loaded_again() {
    let dir = tempfile::tempdir().unwrap();
    let mut image = made(&dir.path().join("a"));
    assert_eq!((image.format(), image.machine()), ("raw", &machine()));
    assert_eq!(image.size().unwrap(), Size::mib(8));
    write(&image, b"hello", 5 << 20);
    image.provenance.source = Some("a test".to_owned());
    let archive = dir.path().join("image.tar.zst");
    let packed = image.package(&archive, &Reporter::silent()).unwrap();

    let folder = dir.path().join("b");
    let again = loaded(&archive, &folder).await.unwrap();
    assert_eq!(
        (again.machine(), again.size().unwrap()),
        (&machine(), Size::mib(8))
    );
    assert_eq!(again.provenance.source.as_deref(), Some("a test"));
    assert_eq!(again.provenance.source_digest, Some(packed.digest.clone()));
    let file = File::open(again.disk_file().unwrap()).unwrap();
    let found = digest::of_file(&file, 2, &mut |_| Ok(())).unwrap();
    assert_eq!(found, packed.manifest.members.disk.digest);
    // The layer is none of its business any more.
    assert!(!folder.join(LAYER).exists());

    // What the unpacker says of it is what the packer said.
    let out = dir.path().join("c");
    std::fs::create_dir(&out).unwrap();
    let budgets = Budgets::of(&workshop().limits);
    let unpacked = unpack(
        File::open(&archive).unwrap(),
        &out,
        &budgets,
        &Reporter::silent(),
    );
    let unpacked = unpacked.unwrap();
    assert_eq!(
        (unpacked.archive, unpacked.archive_bytes),
        (packed.digest, packed.size)
    );
    let members = packed.manifest.members;
    assert_eq!(
        (unpacked.disk, unpacked.data),
        (members.disk.digest, members.disk.data)
    );
    assert!(unpacked.manifest.is_some());
}

#[tokio::test]
async fn a_layers_data_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let archive = ancestors_image(&dir, 1);
    let mut image = loaded(&archive, &dir.path().join("a")).await.unwrap();
    assert_eq!(image.machine().memory, Some(256));
    let mut want = disk();
    want[1 << 20..(1 << 20) + (64 << 10)].fill(0x41);
    assert!(std::fs::read(&*image.disk_file().unwrap()).unwrap() == want);
    // And it is packed with it.
    let ours = dir.path().join("ours");
    image.package(&ours, &Reporter::silent()).unwrap();
    let again = loaded(&ours, &dir.path().join("b")).await.unwrap();
    assert!(std::fs::read(&*again.disk_file().unwrap()).unwrap() == want);
}

#[tokio::test]
async fn what_is_in_use_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut image = made(&dir.path().join("a"));
    let target = dir.path().join("image.tar.zst");
    let disk = image.disk_file().unwrap();
    assert_eq!(&*disk, dir.path().join("a").join(DISK));
    let in_use =
        |result: Option<pileus_base::Error>| assert_eq!(result.unwrap().code, Code::ImageInUse);
    in_use(image.disk_file().err());
    in_use(image.package(&target, &Reporter::silent()).err());
    in_use(image.resize(Size::mib(9)).err());
    in_use(image.dispose().err());
    assert!(!target.exists() && disk.is_file());
    disk.release();
    // Dropped is released, too.
    drop(image.disk_file().unwrap());
    image.package(&target, &Reporter::silent()).unwrap();

    image.dispose().unwrap();
    assert!(!dir.path().join("a").exists());
    image.dispose().unwrap();
    let wrong =
        |result: Option<pileus_base::Error>| assert_eq!(result.unwrap().code, Code::WrongState);
    wrong(image.disk_file().err());
    wrong(image.size().err());
    wrong(image.package(&target, &Reporter::silent()).err());
    wrong(image.resize(Size::mib(9)).err());
}

#[tokio::test]
async fn one_limit_holds_for_all_ways() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str, size: u64| {
        MutableImage::new_in(workshop(), &dir.path().join(name), Size(size), machine())
    };
    for (size, code) in [
        (0, Code::InvalidSize),
        (LEAST.bytes() - 512, Code::InvalidSize),
        (LEAST.bytes() + 1, Code::InvalidSize),
        (LIMIT + 512, Code::ImageTooLarge),
        (u64::MAX - 511, Code::ImageTooLarge),
    ] {
        assert_eq!(make("a", size).unwrap_err().code, code, "{size}");
        assert!(!dir.path().join("a").exists());
    }
    make("least", LEAST.bytes()).unwrap();
    let mut image = make("a", LIMIT - 512).unwrap();
    assert_eq!(
        image.resize(Size(LIMIT + 512)).unwrap_err().code,
        Code::ImageTooLarge
    );
    assert_eq!(
        image.resize(Size::mib(1)).unwrap_err().code,
        Code::InvalidSize
    );
    image.resize(Size(LIMIT)).unwrap();
    assert_eq!(image.size().unwrap(), Size(LIMIT));
    // One of just this size is packed and loaded.
    write(&image, b"end", LIMIT - 3);
    let archive = dir.path().join("image.tar.zst");
    image.package(&archive, &Reporter::silent()).unwrap();
    let again = loaded(&archive, &dir.path().join("b")).await.unwrap();
    assert_eq!(again.size().unwrap(), Size(LIMIT));
    // A larger one is neither.
    let raw = image.disk_file().unwrap();
    File::options()
        .write(true)
        .open(&raw)
        .unwrap()
        .set_len(LIMIT + 512)
        .unwrap();
    drop(raw);
    let err = image
        .package(&dir.path().join("large"), &Reporter::silent())
        .unwrap_err();
    assert_eq!(err.code, Code::ImageTooLarge);
    let mut small = workshop();
    small.limits.virtual_size = LIMIT - 512;
    let folder = dir.path().join("c");
    let err = MutableImage::from_file_in(small, &archive, &folder, &Reporter::silent()).await;
    assert_eq!(err.unwrap_err().code, Code::ImageTooLarge);
    assert!(!folder.exists() && !dir.path().join("large").exists());
}

#[tokio::test]
async fn a_failure_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let good = ancestors_image(&dir, 1);
    let bytes = std::fs::read(&good).unwrap();
    let cut = dir.path().join("cut");
    std::fs::write(&cut, &bytes[..bytes.len() - 10]).unwrap();
    let here = dir.path().join("here");
    std::fs::create_dir(&here).unwrap();
    let new = dir.path().join("new");
    for folder in [&here, &new] {
        let err = loaded(&cut, folder).await.unwrap_err();
        assert!(Rule::of(&err).is_some(), "{err}");
        assert!(is_empty(&here) && !new.exists());
    }
    let other = tempfile::tempdir().unwrap();
    let bad_machine = ancestors_image(&other, 7);
    let err = loaded(&bad_machine, &here).await.unwrap_err();
    assert_eq!(Rule::of(&err), Some(Rule::Machine));
    assert!(is_empty(&here));
    // A merge that fails.
    let mut without = workshop();
    without.tools.qemu_img = "/none/qemu-img".into();
    let err = MutableImage::from_file_in(without, &good, &here, &Reporter::silent()).await;
    assert_eq!(err.unwrap_err().code, Code::ToolMissing);
    assert!(is_empty(&here));
    let cancel = CancellationToken::new();
    cancel.cancel();
    let report = Reporter::new(|_| (), cancel);
    let err = MutableImage::from_file_in(workshop(), &good, &here, &report).await;
    assert_eq!(err.unwrap_err().code, Code::Cancelled);
    assert!(is_empty(&here));
}

#[tokio::test]
async fn a_future_that_is_dropped_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let archive = ancestors_image(&dir, 1);
    let folder = dir.path().join("a");
    for wait in [0, 1, 3, 10, 30] {
        let work = loaded(&archive, &folder);
        match tokio::time::timeout(Duration::from_millis(wait), work).await {
            Ok(image) => image.unwrap().dispose().unwrap(),
            Err(_) => gone(&folder).await,
        }
    }
    loaded(&archive, &folder).await.unwrap();
}

async fn gone(folder: &Path) {
    for _ in 0..500 {
        if !folder.exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} is still there", folder.display());
}

#[tokio::test]
async fn places_and_files_that_will_not_do() {
    let dir = tempfile::tempdir().unwrap();
    let archive = ancestors_image(&dir, 1);
    let full = dir.path().join("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("precious"), "").unwrap();
    let refused = |result: pileus_base::Result<MutableImage>, code| {
        let err = result.unwrap_err();
        assert_eq!(err.code, code, "{err}");
    };
    refused(loaded(&archive, &full).await, Code::InvalidArgument);
    let size = Size::mib(1);
    refused(
        MutableImage::new(&full, size, machine()),
        Code::InvalidArgument,
    );
    refused(MutableImage::new(&archive, size, machine()), Code::Io);
    assert!(full.join("precious").exists());
    let folder = dir.path().join("a");
    refused(loaded(dir.path(), &folder).await, Code::InvalidArgument);
    refused(loaded(&dir.path().join("none"), &folder).await, Code::Io);
    let pipe = dir.path().join("pipe");
    let made = Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    refused(loaded(&pipe, &folder).await, Code::InvalidArgument);
    assert!(!folder.exists());
    // A disk that became a link to something of the host is not packed.
    let mut image = made_with_link(&folder, &archive);
    let err = image
        .package(&dir.path().join("out"), &Reporter::silent())
        .unwrap_err();
    assert_eq!(err.code, Code::InvalidSize, "{err}");
    assert!(!dir.path().join("out").exists());
}

fn made_with_link(folder: &Path, to: &Path) -> MutableImage {
    let image = made(folder);
    std::fs::remove_file(folder.join(DISK)).unwrap();
    std::os::unix::fs::symlink(to, folder.join(DISK)).unwrap();
    image
}
