//! An image in the store: its folder, and what is known about it (`image.json`).
//!
//! Next step: `overlay` (an instance's own disk on it), `verify` (is it still what it was).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use jiff::Timestamp;
use pileus_base::{Code, Digest, Error, Result, ResultExt, Size, files};
use serde::{Deserialize, Serialize};

use crate::lock::Hold;
use crate::packed::Machine;
use crate::verify::file_digest;

/// The form of `image.json`; a reader refuses what is newer than itself.
const FORMAT: u32 = 1;
const DISK: &str = "disk.raw";
const KERNEL: &str = "kernel";
const INITRD: &str = "initrd";
pub(crate) const INFO: &str = "image.json";
/// Of `image.json`, in bytes.
const INFO_LIMIT: u64 = 256 << 10;
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
    /// The machine that the image came with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<Machine>,
    /// Of what the disk holds (`packed::digest`); images of the first days have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_digest: Option<Digest>,
    /// SHA-256 of the kernel's file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_digest: Option<Digest>,
    /// SHA-256 of the initrd's file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd_digest: Option<Digest>,
    /// What it was made of and how, for a person: the lines of a packed image's manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_of: Option<String>,
    /// SHA-256 of the recipe that it was built by, as it says itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe: Option<Digest>,
    /// By which a change of the disk shows without reading it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_mark: Option<DiskMark>,
}

/// What every write to a file changes, or its replacement by another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMark {
    pub inode: u64,
    /// In bytes.
    pub size: u64,
    /// Nanoseconds after 1970.
    pub modified: i128,
}

impl DiskMark {
    pub(crate) fn of(path: &Path) -> Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let found =
            std::fs::symlink_metadata(path).io(format_args!("Looking at {}", path.display()))?;
        Ok(Self {
            inode: found.ino(),
            size: found.len(),
            modified: i128::from(found.mtime()) * 1_000_000_000 + i128::from(found.mtime_nsec()),
        })
    }
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
            machine: None,
            disk_digest: None,
            kernel_digest: None,
            initrd_digest: None,
            made_of: None,
            recipe: None,
            disk_mark: None,
        }
    }
}

/// An image of the store. As long as someone holds its `Arc`, in whatever process, it is neither removed nor
/// collected.
#[derive(Debug)]
pub struct Image {
    folder: PathBuf,
    info: ImageInfo,
    /// What the holding consists of.
    hold: Hold,
    /// Set when the image is let go, so that the store knows that there may be something to collect.
    released: Arc<AtomicBool>,
}

impl Drop for Image {
    fn drop(&mut self) {
        self.released.store(true, Ordering::Relaxed);
    }
}

impl Image {
    /// Reads an image's folder, which is held; one that is not whole is an error.
    pub(crate) fn load(
        folder: &Path,
        digest: &Digest,
        hold: Hold,
        released: &Arc<AtomicBool>,
    ) -> Result<Self> {
        Ok(Self {
            info: read_info(folder, digest)?,
            folder: folder.to_owned(),
            hold,
            released: released.clone(),
        })
    }

    /// Whether the folder at its place is still the image's own.
    pub(crate) fn is_in_place(&self) -> bool {
        self.hold.is_at(&self.folder)
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
        last_used(&self.folder).unwrap_or(self.info.created)
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

/// What an image's folder says of it, if the folder is whole.
pub(crate) fn read_info(folder: &Path, digest: &Digest) -> Result<ImageInfo> {
    let bytes = files::read_bounded(&folder.join(INFO), INFO_LIMIT)?;
    let damaged = |why: String| damaged(digest, &why);
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
    let missing = |there: bool, name: &str| there && !folder.join(name).is_file();
    for (there, name) in [(info.kernel, KERNEL), (info.initrd, INITRD)] {
        if missing(there, name) {
            return Err(damaged(format!("{name} is missing")));
        }
    }
    Ok(info)
}

pub(crate) fn damaged(digest: &Digest, why: &str) -> Error {
    Error::new(
        Code::BadImage,
        format!("The stored image {} is damaged: {why}", digest.short()),
    )
    .advise("Remove it; it is fetched again when it is needed.")
}

/// When the image of a folder was last used, if that was recorded.
pub(crate) fn last_used(folder: &Path) -> Option<Timestamp> {
    let used = std::fs::metadata(folder.join(USED)).ok()?;
    Timestamp::try_from(used.modified().ok()?).ok()
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
    pub fn seal(&self, info: &mut ImageInfo) -> Result<()> {
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
        for (there, path, digest) in [
            (info.kernel, self.kernel(), &mut info.kernel_digest),
            (info.initrd, self.initrd(), &mut info.initrd_digest),
        ] {
            if there && digest.is_none() {
                *digest = Some(file_digest(&path)?);
            }
        }
        info.disk_mark = Some(DiskMark::of(&self.disk())?);
        write_info(&self.folder, info)
    }
}

/// Replaces an image's `image.json`.
pub(crate) fn write_info(folder: &Path, info: &ImageInfo) -> Result<()> {
    let text = serde_json::to_vec_pretty(info)
        .map_err(|err| Error::internal(format!("Writing {INFO}: {err}")))?;
    files::write_atomic(&folder.join(INFO), &text, 0o444)
}
