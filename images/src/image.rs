//! An image in the store: its folder, and what is known about it (`image.json`).

use std::path::{Path, PathBuf};

use jiff::Timestamp;
use pileus_base::{Code, Digest, Error, Result, Size, files};
use serde::{Deserialize, Serialize};

/// The form of `image.json`; a reader refuses what is newer than itself.
const FORMAT: u32 = 1;
const DISK: &str = "disk.raw";
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
const INFO: &str = "image.json";
const USED: &str = "used";

/// What is known about an image; the content of `image.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    pub format: u32,
    /// SHA-256 of the artifact as it was fetched (of the disk's content for one built here).
    pub digest: Digest,
    /// `Debian`, `Ubuntu`; empty if not known.
    pub os: String,
    /// `13`, `24.04 LTS`; empty if not known.
    pub release: String,
    /// For a person: `Debian 13 (trixie)`, or the file's name.
    pub title: String,
    pub codename: String,
    /// The host's version of the image, often a date.
    pub version: String,
    /// `x86_64`; empty if not known.
    pub arch: String,
    /// What the guest sees, in bytes.
    pub virtual_size: Size,
    /// The smallest disk that an instance of it may have.
    pub min_disk: Size,
    /// The kernel command line for direct boot; there only beside a kernel.
    pub cmdline: Option<String>,
    pub kernel: bool,
    pub initrd: bool,
    /// Where it came from, as a user would write it.
    pub source: String,
    /// When it came into the store.
    pub created: Timestamp,
}

impl ImageInfo {
    pub fn new(digest: Digest, source: String, virtual_size: Size, created: Timestamp) -> Self {
        Self {
            format: FORMAT,
            digest,
            os: String::new(),
            release: String::new(),
            title: source.clone(),
            codename: String::new(),
            version: String::new(),
            arch: String::new(),
            virtual_size,
            min_disk: virtual_size,
            cmdline: None,
            kernel: false,
            initrd: false,
            source,
            created,
        }
    }
}

/// An image of the store. As long as someone holds its `Arc`, it is neither removed nor pruned.
#[derive(Debug)]
pub struct Image {
    folder: PathBuf,
    info: ImageInfo,
}

impl Image {
    /// Reads an image's folder; a folder that is not whole is an error.
    pub(crate) fn load(folder: &Path, digest: &Digest) -> Result<Self> {
        let bytes = files::read_bounded(&folder.join(INFO), 64 << 10)?;
        let damaged = |why: String| {
            Error::new(
                Code::BadImage,
                format!("The stored image {} is damaged: {why}", digest.short()),
            )
            .advise("Remove it; it is fetched again when it is needed.")
        };
        let info: ImageInfo =
            serde_json::from_slice(&bytes).map_err(|err| damaged(format!("{INFO}: {err}")))?;
        if info.format > FORMAT {
            return Err(damaged(format!(
                "{INFO} has the newer form {}",
                info.format
            )));
        }
        if info.digest != *digest {
            return Err(damaged("its folder has another image's name".into()));
        }
        let size = std::fs::metadata(folder.join(DISK)).map_or(0, |m| m.len());
        if size != info.virtual_size.bytes() {
            return Err(damaged(format!("{DISK} has {size} bytes")));
        }
        Ok(Self {
            folder: folder.to_owned(),
            info,
        })
    }

    pub fn digest(&self) -> &Digest {
        &self.info.digest
    }

    pub fn info(&self) -> &ImageInfo {
        &self.info
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The raw base disk. Open it read-only, as a backing node.
    pub fn disk(&self) -> PathBuf {
        Self::disk_in(&self.folder)
    }

    pub(crate) fn disk_in(folder: &Path) -> PathBuf {
        folder.join(DISK)
    }

    pub fn kernel(&self) -> Option<PathBuf> {
        self.info.kernel.then(|| self.folder.join(KERNEL))
    }

    pub fn initrd(&self) -> Option<PathBuf> {
        self.info.initrd.then(|| self.folder.join(INITRD))
    }

    pub fn cmdline(&self) -> Option<&str> {
        self.info.cmdline.as_deref()
    }

    /// When it was last obtained.
    pub fn last_used(&self) -> Timestamp {
        std::fs::metadata(self.folder.join(USED))
            .and_then(|m| m.modified())
            .ok()
            .and_then(|time| Timestamp::try_from(time).ok())
            .unwrap_or(self.info.created)
    }

    /// Remembers the use. Not worth failing for.
    pub(crate) fn touch(&self) {
        if let Err(err) = std::fs::write(self.folder.join(USED), b"") {
            tracing::debug!(image = self.digest().short(), %err, "use not recorded");
        }
    }

    /// Bytes that the image takes on the host's disk.
    pub fn allocated(&self) -> Size {
        allocated(&self.folder)
    }
}

/// Bytes allocated by the files of a folder.
pub(crate) fn allocated(folder: &Path) -> Size {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Size(0);
    };
    Size(
        entries
            .filter_map(|entry| entry.ok()?.metadata().ok())
            .map(|meta| meta.blocks() * 512)
            .sum(),
    )
}

/// The folder of an image while it is being made, with the names that `Image` will look for.
#[derive(Debug)]
pub(crate) struct Draft {
    pub folder: PathBuf,
}

impl Draft {
    pub fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }

    pub fn kernel(&self) -> PathBuf {
        self.folder.join(KERNEL)
    }

    pub fn initrd(&self) -> PathBuf {
        self.folder.join(INITRD)
    }

    /// Completes the folder: read-only files, `image.json`, all of it durable.
    pub fn seal(&self, info: &ImageInfo) -> Result<()> {
        use pileus_base::ResultExt;
        let mut names = vec![DISK];
        names.extend(info.kernel.then_some(KERNEL));
        names.extend(info.initrd.then_some(INITRD));
        for name in names {
            let path = self.folder.join(name);
            files::set_mode(&path, 0o444)?;
            std::fs::File::open(&path)
                .and_then(|file| file.sync_all())
                .io(format_args!("Syncing {}", path.display()))?;
        }
        let text = serde_json::to_vec_pretty(info)
            .map_err(|err| Error::internal(format!("Writing {INFO}: {err}")))?;
        files::write_atomic(&self.folder.join(INFO), &text, 0o444)
    }
}
