//! Which image a source gave the last time, and how to tell whether it still would: one small file
//! a source, so that a damaged one costs one fetch and nothing else.

use std::path::{Path, PathBuf};

use pileus_base::{Digest, Error, Result, files};
use serde::{Deserialize, Serialize};
use sha2::Digest as _;

use crate::lock::write_small;

/// What the source said about its content; equal marks mean equal content.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Mark {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etag: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_modified: Option<String>,
    /// Size, mtime in nanoseconds, inode and device of a local file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<(u64, i128, u64, u64)>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The item's key, for a person and against collisions of file names.
    pub key: String,
    pub digest: Digest,
    #[serde(default)]
    pub mark: Mark,
}

#[derive(Debug)]
pub struct Sources {
    folder: PathBuf,
}

impl Sources {
    pub fn open(folder: PathBuf) -> Result<Self> {
        files::create_folder(&folder, 0o755)?;
        Ok(Self { folder })
    }

    pub fn get(&self, key: &str) -> Option<Record> {
        let record = read(&self.path(key))?;
        (record.key == key).then_some(record)
    }

    pub fn put(&self, record: &Record) -> Result<()> {
        let text = serde_json::to_vec_pretty(record)
            .map_err(|err| Error::internal(format!("Writing a source: {err}")))?;
        write_small(&self.path(&record.key), &text)
    }

    /// Forgets what a source gave, and returns it.
    pub fn take(&self, key: &str) -> Result<Option<Record>> {
        let record = self.get(key);
        files::remove_file(&self.path(key))?;
        Ok(record)
    }

    /// Forgets what led to an image that is no longer there.
    pub fn forget(&self, digest: &Digest) -> Result<()> {
        self.forget_unless(|known| known != digest)
    }

    /// Forgets what leads to images that `keep` does not know. What is written at the same time may be lost,
    /// which costs one fetch.
    pub fn forget_unless(&self, keep: impl Fn(&Digest) -> bool) -> Result<()> {
        let Ok(entries) = std::fs::read_dir(&self.folder) else {
            return Ok(());
        };
        for entry in entries.flatten() {
            if read(&entry.path()).is_some_and(|record| !keep(&record.digest)) {
                files::remove_file(&entry.path())?;
            }
        }
        Ok(())
    }

    fn path(&self, key: &str) -> PathBuf {
        let hash = Digest::from_bytes(sha2::Sha256::digest(key.as_bytes()).into());
        self.folder.join(format!("{}.json", &hash.hex()[..32]))
    }
}

fn read(path: &Path) -> Option<Record> {
    let bytes = files::read_bounded(path, 64 << 10).ok()?;
    serde_json::from_slice(&bytes).ok()
}
