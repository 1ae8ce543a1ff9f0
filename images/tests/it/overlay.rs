//! Overlays: thin, quick, sound by qemu-img's judgement.

use std::time::{Duration, Instant};

use pileus_base::{Code, Size};
use pileus_images::overlay;

use crate::support::*;

#[test]
fn an_overlay_is_thin_quick_and_sound() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, disk()).unwrap();
    for (name, size) in [
        ("same", Size(DISK_SIZE as u64)),
        ("5g", Size::gib(5)),
        ("odd", Size(Size::gib(1).bytes() + 1)),
        ("1t", Size::gib(1024)),
    ] {
        let path = dir.path().join(name);
        // The best of a few: this machine may be busy.
        let tries = (0..5).map(|_| {
            let _ = std::fs::remove_file(&path);
            let begin = Instant::now();
            overlay::create(&path, size, &base).unwrap();
            begin.elapsed()
        });
        let took = tries.min().unwrap();
        eprintln!(
            "{name}: {took:?}, {} bytes",
            std::fs::metadata(&path).unwrap().len()
        );
        // Far above the usual 1 ms.
        assert!(took < Duration::from_millis(200), "{name}: {took:?}");
        assert!(
            std::fs::metadata(&path).unwrap().len() <= 300 << 10,
            "{name}"
        );
        qemu_img(&["check", "-q", "-f", "qcow2", text(&path)]);
        let out = std::process::Command::new("qemu-img")
            .args(["info", "--output=json", "-f", "qcow2", text(&path)])
            .output()
            .unwrap();
        let info: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
        assert_eq!(info["virtual-size"], size.round_up(512).bytes());
        assert_eq!(info["cluster-size"], 65536);
        assert_eq!(info["backing-filename"], text(&base));
        assert_eq!(info["backing-filename-format"], "raw");
        assert_eq!(info["format-specific"]["data"]["compat"], "1.1");
    }
}

#[test]
fn the_guest_sees_the_base_and_zeros_behind_it() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, disk()).unwrap();
    let (path, out) = (dir.path().join("o"), dir.path().join("out.raw"));
    overlay::create(&path, Size::mib(8), &base).unwrap();
    qemu_img(&[
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        text(&path),
        text(&out),
    ]);
    let mut want = disk();
    want.resize(8 << 20, 0);
    assert!(std::fs::read(&out).unwrap() == want);
}

#[test]
fn an_empty_overlay_is_told_from_one_that_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, disk()).unwrap();
    let path = dir.path().join("o");
    overlay::create(&path, Size::mib(8), &base).unwrap();
    assert!(overlay::is_empty(&path).unwrap());
    assert_eq!(overlay::size(&path).unwrap(), Size::mib(8));
    let write = format!("write -P 7 {} 512", 7 << 20);
    let done = std::process::Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", &write, text(&path)])
        .output()
        .unwrap();
    assert!(done.status.success(), "{done:?}");
    assert!(!overlay::is_empty(&path).unwrap());
    // A raw disk is none, and too short a file neither.
    assert!(overlay::is_empty(&base).is_err());
    assert!(overlay::size(&base).is_err());
    std::fs::write(&path, "QFI").unwrap();
    assert!(overlay::is_empty(&path).is_err());
}

#[test]
fn too_small_and_existing_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.raw");
    std::fs::write(&base, disk()).unwrap();
    let path = dir.path().join("o");
    let err = overlay::create(&path, Size(DISK_SIZE as u64 - 1), &base).unwrap_err();
    assert_eq!(err.code, Code::DiskTooSmall);
    assert_eq!(
        err.message,
        "Requested disk (4194303 bytes) below minimum for this image (4194304 bytes)"
    );
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    assert!(overlay::create(&path, Size::gib(1), &base).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}
