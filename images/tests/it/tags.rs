//! Names that persons give to images.

use pileus_base::{Code, Reporter};
use pileus_images::{ImageRef, Store};

use crate::support::*;

#[tokio::test]
async fn a_tag_launches_its_image_and_keeps_it() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let reference = fixture.file("disk.raw", &disk());
    let image = fixture
        .store
        .obtain(&reference, None, &report)
        .await
        .unwrap();
    let digest = image.digest().clone();
    drop(image);
    let store = &fixture.store;
    // Also a name that a host knows: what a person says goes before.
    for name in ["mine", "debian"] {
        assert_eq!(store.tag(name, &digest).unwrap(), None);
        let name = ImageRef::Name(name.into());
        let found = store.obtain(&name, None, &report).await;
        assert_eq!(found.unwrap().digest(), &digest);
    }
    let shown = store.search(&"mine".parse().unwrap()).await.unwrap();
    assert_eq!(shown.digest, Some(digest.clone()));
    assert_eq!(store.list().unwrap()[0].tags, ["debian", "mine"]);

    assert!(store.prune(&Default::default()).unwrap().is_empty());
    let err = store.remove(&digest).unwrap_err();
    assert_eq!(err.code, Code::ImageInUse);
    assert!(err.message.contains("debian, mine"), "{err}");

    // It is there for another store as well, and for the one after a restart.
    let other = Store::open(config(store.root())).unwrap();
    assert_eq!(other.untag("debian").unwrap(), digest);
    assert_eq!(other.untag("debian").unwrap_err().code, Code::ImageNotFound);
    assert_eq!(other.tags().unwrap().len(), 1);
    store.remove_with_tags(&digest).unwrap();
    assert!(store.tags().unwrap().is_empty());
    assert!(store.list().unwrap().is_empty());
    let name = ImageRef::Name("mine".into());
    let gone = store.obtain(&name, None, &report).await;
    assert_eq!(gone.unwrap_err().code, Code::ImageNotFound);
}

#[tokio::test]
async fn a_tag_moves_and_is_only_given_to_what_is_there() {
    let fixture = Fixture::new();
    let report = Reporter::silent();
    let store = &fixture.store;
    let one = fixture.file("one", &disk());
    let mut bytes = disk();
    bytes[9000] ^= 1;
    let two = fixture.file("two", &bytes);
    let one = store.obtain(&one, None, &report).await.unwrap();
    let two = store.obtain(&two, None, &report).await.unwrap();
    store.tag("ci", one.digest()).unwrap();
    assert_eq!(
        store.tag("ci", two.digest()).unwrap().as_ref(),
        Some(one.digest())
    );
    let now = store.obtain(&"ci".parse().unwrap(), None, &report).await;
    assert_eq!(now.unwrap().digest(), two.digest());
    let err = store.tag("ci", &digest(b"nothing")).unwrap_err();
    assert_eq!(err.code, Code::ImageNotFound);
    let err = store.tag("build:x", one.digest()).unwrap_err();
    assert_eq!(err.code, Code::InvalidName);
    // What somebody took away by hand is no longer named after the next start.
    std::fs::remove_dir_all(store.root().join(two.digest().hex())).unwrap();
    let err = store.obtain(&"ci".parse().unwrap(), None, &report).await;
    assert_eq!(err.unwrap_err().code, Code::ImageNotFound);
    let again = Store::open(config(store.root())).unwrap();
    assert!(again.tags().unwrap().is_empty());
}
