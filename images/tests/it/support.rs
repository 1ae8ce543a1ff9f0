//! Small disks to play with, and a store in a temporary folder.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pileus_base::{Digest, Reporter, Update};
use pileus_images::{ImageRef, Store, StoreConfig};
use sha2::Digest as _;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

pub const DISK_SIZE: usize = 4 << 20;

/// A disk with a boot signature, some data at the beginning and at the end, and zeros in between.
pub fn disk() -> Vec<u8> {
    let mut disk = vec![0; DISK_SIZE];
    for (at, byte) in disk[4096..100_000].iter_mut().enumerate() {
        *byte = (at * 7 % 251) as u8;
    }
    disk[510] = 0x55;
    disk[511] = 0xaa;
    disk[DISK_SIZE - 3..].copy_from_slice(b"end");
    disk
}

pub fn digest(bytes: &[u8]) -> Digest {
    Digest::from_bytes(sha2::Sha256::digest(bytes).into())
}

pub fn qemu_img(args: &[&str]) {
    let done = Command::new("qemu-img").args(args).output().unwrap();
    assert!(
        done.status.success(),
        "qemu-img {args:?}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

pub fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut out = xz2::write::XzEncoder::new(Vec::new(), 1);
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

pub fn gz(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

pub fn zst(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 1).unwrap()
}

/// A store in a folder of its own, patient in milliseconds.
pub struct Fixture {
    pub dir: TempDir,
    pub store: Arc<Store>,
}

pub fn config(root: &Path) -> StoreConfig {
    let mut config = StoreConfig::new(root);
    config.limits.reserve = 0;
    config.limits.virtual_size = 64 << 20;
    config.limits.download = 64 << 20;
    config.patience.pause = Duration::from_millis(5);
    config.patience.idle = Duration::from_secs(5);
    config.patience.attempts = 3;
    config.proxies = false;
    config
}

impl Fixture {
    pub fn new() -> Self {
        Self::with(|_| ())
    }

    pub fn with(change: impl FnOnce(&mut StoreConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(&dir.path().join("images"));
        change(&mut config);
        let store = Store::open(config).unwrap();
        Self { dir, store }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file beside the store and names it.
    pub fn file(&self, name: &str, bytes: &[u8]) -> ImageRef {
        std::fs::write(self.path(name), bytes).unwrap();
        self.reference(name)
    }

    pub fn reference(&self, name: &str) -> ImageRef {
        ImageRef::File(self.path(name))
    }

    /// Nothing half-made is left.
    pub fn assert_clean(&self) {
        let left: Vec<_> = std::fs::read_dir(self.store.root().join("stage"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// A reporter that remembers.
pub fn recorder() -> (Reporter, CancellationToken, Arc<Mutex<Vec<Update>>>) {
    let seen: Arc<Mutex<Vec<Update>>> = Arc::default();
    let cancel = CancellationToken::new();
    let sink = seen.clone();
    let report = Reporter::new(
        move |update| sink.lock().unwrap().push(update),
        cancel.clone(),
    );
    (report, cancel, seen)
}
