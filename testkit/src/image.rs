//! The guest images that tests share: built once by the real build host, kept in the target folder, and put
//! into each daemon's store by hard links. All but one test use the same image.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pileus_base::Reporter;
use pileus_images::{Image, Store, StoreConfig};

/// What tests call the image, and what it was made as.
pub const GUEST_IMAGE: &str = "build:debian-13";
/// Its kernel does not ask whether the hardware is real before it takes processors that come later.
pub const OLDER_GUEST_IMAGE: &str = "build:debian-12";

/// The image's folder in a store that outlives the tests. The first caller builds it (about a
/// minute, over the machine's own network); others wait for it.
///
/// # Panics
/// If the build fails.
pub fn guest_image() -> PathBuf {
    folder_of(&shared(GUEST_IMAGE))
}

/// The same as the store knows it.
pub(crate) fn shared(source: &str) -> Arc<Image> {
    let root = store_root();
    fs::create_dir_all(&root).expect("the store's folder can be made");
    let lock = File::create(root.join("build.lock")).expect("a lock file can be made");
    lock.lock().expect("the lock can be taken");
    get(&root.join("images"), source)
}

pub(crate) fn folder_of(image: &Image) -> PathBuf {
    let folder = image.disk().parent().map(Path::to_owned);
    folder.expect("a disk lies in its image's folder")
}

/// Brings a raw disk into a store that no daemon has open.
pub(crate) fn import(disk: &Path, store: &Path) -> Arc<Image> {
    get(store, &format!("file://{}", disk.display()))
}

fn get(store: &Path, source: &str) -> Arc<Image> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be made");
    runtime.block_on(async {
        let store = Store::open(StoreConfig::new(store)).expect("the store opens");
        let reference = source.parse().expect("the name is well-formed");
        store
            .obtain(&reference, None, &Reporter::silent())
            .await
            .unwrap_or_else(|err| {
                panic!("the image {source} can't be had: {err}\n{:?}", err.details)
            })
    })
}

/// What outlives the tests.
pub(crate) fn store_root() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own program");
    let target = test
        .ancestors()
        .find(|folder| folder.ends_with("target"))
        .map_or_else(
            || std::env::temp_dir().join("pileus-target"),
            Path::to_owned,
        );
    target.join("guest-image")
}

/// Puts the shared image into a store that no daemon has open.
pub(crate) fn plant(image: &Path, store: &Path) {
    let name = image
        .file_name()
        .expect("the folder is named by its digest");
    let target = store.join(name);
    copy_tree(image, &target);
    let sources = image
        .parent()
        .expect("the store holds the image")
        .join("sources");
    copy_tree(&sources, &store.join("sources"));
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a folder can be made");
    for entry in fs::read_dir(from)
        .expect("the folder can be read")
        .flatten()
    {
        let target = to.join(entry.file_name());
        // Read-only and never changed: a link is as good as a copy. Another file system takes one.
        if fs::hard_link(entry.path(), &target).is_err() {
            let status = std::process::Command::new("cp")
                .args(["--sparse=always", "-p"])
                .arg(entry.path())
                .arg(&target)
                .status();
            assert!(
                status.is_ok_and(|s| s.success()),
                "{} can't be copied",
                entry.path().display()
            );
        }
    }
}
