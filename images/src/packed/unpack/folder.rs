//! The folder that an archive is unpacked into. Files are made beneath it and never through a link; those that were
//! made are gone again unless all went well.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use pileus_base::{Result, ResultExt};
use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};

use super::Layer;
use crate::packed::members::Kind;

pub struct Folder {
    dir: OwnedFd,
    path: PathBuf,
    /// What is to go.
    made: RefCell<Vec<Kind>>,
}

impl Folder {
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())
            .io(format_args!("Opening {}", path.display()))?;
        Ok(Self {
            dir,
            path: path.to_owned(),
            made: RefCell::default(),
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes a member's file, to be written and read back.
    pub fn create(&self, kind: Kind) -> Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let fd = rustix::fs::openat2(
            &self.dir,
            kind.name(),
            flags | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )
        .io(format_args!(
            "Creating {}",
            self.path.join(kind.name()).display()
        ))?;
        self.made.borrow_mut().push(kind);
        Ok(File::from(fd))
    }

    /// Free bytes on its file system.
    pub fn free(&self) -> Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.dir).io("Looking for free space")?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// All went well: the disk stays, and a layer that says something.
    pub fn keep(&self, layer: Layer) {
        self.made
            .borrow_mut()
            .retain(|kind| *kind == Kind::Layer && layer == Layer::Empty);
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        for kind in self.made.take() {
            if let Err(err) = rustix::fs::unlinkat(&self.dir, kind.name(), AtFlags::empty()) {
                tracing::warn!(file = kind.name(), folder = %self.path.display(), %err, "not removed");
            }
        }
    }
}
