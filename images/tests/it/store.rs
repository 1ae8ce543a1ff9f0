//! What is in the store: found again, pinned, removed, pruned; damaged entries hurt only themselves.

use std::collections::HashSet;

use pileus_base::{Code, Reporter};
use pileus_images::{CatalogWish, ImageRef, Store};

use crate::support::*;

#[tokio::test]
async fn an_image_is_found_again_by_a_new_store() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let reference = fixture.file("disk.raw", &disk());
    let image = fixture
        .store
        .obtain(&reference, None, &report)
        .await
        .unwrap();
    let other = Store::open(config(fixture.store.root())).unwrap();
    let listed = other.list().unwrap();
    assert_eq!(&listed[0].info, image.info());
    assert!(listed[0].allocated.bytes() < 1 << 20);
    for text in [
        image.digest().to_string(),
        image.digest().short().to_owned(),
        format!("sha256:{}", &image.digest().hex()[..5]),
    ] {
        let found = other.obtain(&text.parse().unwrap(), None, &report).await;
        assert_eq!(found.unwrap().digest(), image.digest(), "{text}");
    }
    let got = other
        .obtain(&ImageRef::Digest("00".into()), None, &report)
        .await;
    assert_eq!(got.unwrap_err().code, Code::ImageNotFound);
}

#[tokio::test]
async fn an_unchanged_file_is_not_read_again_and_a_changed_one_is() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let reference = fixture.file("disk.raw", &disk());
    let first = fixture
        .store
        .obtain(&reference, None, &report)
        .await
        .unwrap();
    let (recorder, _, seen) = recorder();
    let second = fixture
        .store
        .obtain(&reference, None, &recorder)
        .await
        .unwrap();
    assert_eq!(first.digest(), second.digest());
    assert_eq!(seen.lock().unwrap().len(), 1, "{seen:?}");
    let mut other = disk();
    other[9000] ^= 1;
    fixture.file("disk.raw", &other);
    let third = fixture
        .store
        .obtain(&reference, None, &report)
        .await
        .unwrap();
    assert_eq!(third.digest(), &digest(&other));
}

#[tokio::test]
async fn equal_content_is_one_image_whatever_its_source() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let (a, b) = (fixture.file("a", &disk()), fixture.file("b", &disk()));
    let a = fixture.store.obtain(&a, None, &report).await.unwrap();
    let b = fixture.store.obtain(&b, None, &report).await.unwrap();
    assert!(std::sync::Arc::ptr_eq(&a, &b));
    fixture.assert_clean();
}

#[tokio::test]
async fn what_is_held_or_in_use_stays() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let mut images = Vec::new();
    for n in 0..3_u8 {
        let mut bytes = disk();
        bytes[9000] = n;
        let reference = fixture.file("disk.raw", &bytes);
        images.push(
            fixture
                .store
                .obtain(&reference, None, &report)
                .await
                .unwrap(),
        );
    }
    let digests: Vec<_> = images.iter().map(|image| image.digest().clone()).collect();
    let err = fixture.store.remove(&digests[0]).unwrap_err();
    assert_eq!(err.code, Code::ImageInUse);
    let held = images.swap_remove(0);
    drop(images);
    let in_use = HashSet::from([digests[1].clone()]);
    let removed = fixture.store.prune(&in_use).unwrap();
    assert_eq!(removed.len(), 1);
    assert_eq!(removed[0].info.digest, digests[2]);
    assert!(removed[0].freed.bytes() > 0);
    assert!(held.disk().exists());
    drop(held);
    assert_eq!(fixture.store.prune(&HashSet::new()).unwrap().len(), 2);
    assert!(fixture.store.list().unwrap().is_empty());
    assert_eq!(
        fixture.store.remove(&digests[0]).unwrap_err().code,
        Code::ImageNotFound
    );
    // Nothing is left but the four folders of the store itself.
    assert_eq!(
        std::fs::read_dir(fixture.store.root().join("sources"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(std::fs::read_dir(fixture.store.root()).unwrap().count(), 4);
    fixture.assert_clean();
}

#[tokio::test]
async fn a_damaged_image_is_left_out_and_replaced() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let reference = fixture.file("disk.raw", &disk());
    let image = fixture
        .store
        .obtain(&reference, None, &report)
        .await
        .unwrap();
    let (digest, info) = (
        image.digest().clone(),
        image.disk().with_file_name("image.json"),
    );
    drop(image);
    std::fs::remove_file(&info).unwrap();
    std::fs::write(&info, "{").unwrap();
    let store = Store::open(config(fixture.store.root())).unwrap();
    assert!(store.list().unwrap().is_empty());
    let again = store
        .obtain(&reference, Some(&digest), &report)
        .await
        .unwrap();
    assert_eq!(again.digest(), &digest);
    assert_eq!(store.list().unwrap().len(), 1);
}

#[tokio::test]
async fn unknown_names_are_told_apart() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    for (text, message) in [
        ("nonesuch", "Unable to find an image matching \"nonesuch\"."),
        (
            "build:nonesuch",
            "Unable to find an image matching \"nonesuch\" in remote \"build\".",
        ),
        (
            "mars:rock",
            "Remote \"mars\" is unknown or unreachable. If image mirror is enabled, please confirm \
             it is valid.",
        ),
    ] {
        let got = fixture
            .store
            .obtain(&text.parse().unwrap(), None, &report)
            .await;
        let err = got.unwrap_err();
        assert_eq!(err.code, Code::ImageNotFound);
        assert_eq!(err.message, message);
    }
}

#[tokio::test]
async fn the_catalogue_shows_what_can_be_built() {
    let fixture = Fixture::new();
    let catalog = fixture
        .store
        .catalog(&CatalogWish::default())
        .await
        .unwrap();
    let entry = catalog
        .iter()
        .find(|entry| entry.name == "debian-13")
        .unwrap();
    assert_eq!(entry.remote, "build");
    assert!(entry.aliases.contains(&"default".to_owned()));
    assert_eq!(entry.about.os, "Debian");
}
