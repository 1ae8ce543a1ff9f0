//! An image is read again and compared with what came.

use std::os::unix::fs::PermissionsExt;

use pileus_base::{Code, Reporter};
use pileus_images::Store;

use crate::support::*;

fn write(path: &std::path::Path, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

#[tokio::test]
async fn one_that_was_changed_is_found_out() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let reference = fixture.file("disk.raw", &disk());
    let store = &fixture.store;
    let image = store.obtain(&reference, None, &report).await.unwrap();
    let digest = image.digest().clone();
    image.check_unchanged().unwrap();
    let first = store.verify(&digest, &report).unwrap();
    assert_eq!(first.digest, digest);
    let again = store.verify(&digest, &report).unwrap();
    assert!(!again.recorded);
    assert_eq!(again.disk_digest, first.disk_digest);
    assert!(again.warnings.is_empty(), "{:?}", again.warnings);
    assert!(again.read.bytes() < disk().len() as u64);
    let image = store.get(&digest).unwrap();
    assert_eq!(image.info().disk_digest.as_ref(), Some(&first.disk_digest));

    write(&image.disk(), 9000, b"?");
    let err = image.check_unchanged().unwrap_err();
    assert_eq!(err.code, Code::BadImage);
    let err = store.ensure_unchanged(&image, &report).unwrap_err();
    assert_eq!(err.code, Code::BadImage);
    let err = store.verify(&digest, &report).unwrap_err();
    assert_eq!(err.code, Code::BadImage);
    assert!(err.message.contains("disk's content"), "{err}");

    // Put right again, it is whole, although its disk looks changed.
    write(&image.disk(), 9000, &disk()[9000..9001]);
    assert!(image.check_unchanged().is_err());
    store.ensure_unchanged(&image, &report).unwrap();
    image.check_unchanged().unwrap();
    store.get(&digest).unwrap().check_unchanged().unwrap();
    let mode = std::fs::metadata(image.disk()).unwrap().permissions();
    assert_eq!(mode.mode() & 0o777, 0o444);
}

#[tokio::test]
async fn what_is_missing_or_in_its_place_is_told() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let reference = fixture.file("disk.raw", &disk());
    let store = &fixture.store;
    let image = store.obtain(&reference, None, &report).await.unwrap();
    let digest = image.digest().clone();
    store.verify(&digest, &report).unwrap();
    // The same content by another name outside.
    let outside = fixture.path("outside");
    std::fs::rename(image.disk(), &outside).unwrap();
    std::os::unix::fs::symlink(&outside, image.disk()).unwrap();
    assert!(image.check_unchanged().is_err());
    let err = store.verify(&digest, &report).unwrap_err();
    assert_eq!(err.code, Code::BadImage);
    assert!(err.message.contains("disk.raw can't be read"), "{err}");
    std::fs::remove_file(image.disk()).unwrap();
    std::fs::hard_link(&outside, image.disk()).unwrap();
    let found = store.verify(&digest, &report).unwrap();
    assert!(found.warnings[0].contains("another name"), "{found:?}");
    let err = store.verify(&crate::support::digest(b""), &report);
    assert_eq!(err.unwrap_err().code, Code::ImageNotFound);
    // What was said of it can't be read: damaged, not missing.
    drop(image);
    std::fs::remove_file(store.root().join(digest.hex()).join("image.json")).unwrap();
    let other = Store::open(config(store.root())).unwrap();
    let err = other.verify(&digest, &report).unwrap_err();
    assert_ne!(err.code, Code::ImageNotFound, "{err}");
}

#[tokio::test]
async fn what_was_changed_is_not_launched_and_what_was_put_back_is() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let reference = fixture.file("disk.raw", &disk());
    let store = &fixture.store;
    let image = store.obtain(&reference, None, &report).await.unwrap();
    let folder = store.root().join(image.digest().hex());
    drop(image);
    // As a backup would have it: another file with the same times.
    let copy = fixture.path("copy");
    let status = std::process::Command::new("cp")
        .arg("-a")
        .args([&folder, &copy])
        .status();
    assert!(status.unwrap().success());
    std::fs::remove_dir_all(&folder).unwrap();
    std::fs::rename(&copy, &folder).unwrap();
    let image = store.obtain(&reference, None, &report).await.unwrap();
    image.check_unchanged().unwrap();
    write(&image.disk(), 9000, b"?");
    let err = store.obtain(&reference, None, &report).await.unwrap_err();
    assert_eq!(err.code, Code::BadImage);
    assert!(err.advice.unwrap().contains("Remove it"));
}
