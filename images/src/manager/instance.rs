//! A disk of one's own on an image, thrown away with the `Instance`.
//!
//! Next step: whoever starts a machine with it; the base is opened by what `image` says, not by what the disk does.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;

use pileus_base::{Result, files};

use crate::image::Image;
use crate::lock::Hold;
use crate::overlay;
use crate::packed::Machine;
use crate::stage::own_folder;

/// The folder of a process's instances; swept by others once this process is dead.
#[derive(Debug)]
pub(super) struct Place {
    folder: PathBuf,
    next: AtomicU64,
    _hold: Hold,
}

impl Place {
    pub fn create(instances: &Path) -> Result<Self> {
        let (folder, hold) = own_folder(instances, 0o700)?;
        Ok(Self {
            folder,
            next: AtomicU64::new(1),
            _hold: hold,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(err) = files::remove_folder(&self.folder) {
            tracing::warn!(%err, "instances' folder left; swept at next start");
        }
    }
}

/// An instance of an image: its own disk, which reads as the image's and takes what is written. Dropped, it is gone, and
/// the image is free to be collected.
#[derive(Debug)]
pub struct Instance {
    disk: PathBuf,
    /// Nothing after the release.
    image: Option<Arc<Image>>,
    machine: Machine,
    bell: SyncSender<()>,
    _place: Arc<Place>,
}

impl Instance {
    pub(super) fn create(
        image: Arc<Image>,
        place: &Arc<Place>,
        bell: SyncSender<()>,
    ) -> Result<Self> {
        let number = place.next.fetch_add(1, Ordering::Relaxed);
        let disk = place.folder.join(format!("{number}.qcow2"));
        overlay::create(&disk, image.info().virtual_size, &image.disk())?;
        Ok(Self {
            disk,
            machine: image.info().machine.clone().unwrap_or_default(),
            image: Some(image),
            bell,
            _place: place.clone(),
        })
    }

    /// The disk's file, of the format that [`format`](Self::format) says.
    pub fn disk_file(&self) -> &Path {
        &self.disk
    }

    pub fn format(&self) -> &'static str {
        "qcow2"
    }

    /// The raw disk below, to be opened read-only as an explicit backing node.
    pub fn base(&self) -> PathBuf {
        self.image
            .as_ref()
            .map(|image| image.disk())
            .unwrap_or_default()
    }

    /// The machine that the image wants; empty if it came with none.
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Throws the disk away. What dropping does as well, but for telling of an error.
    pub fn release(mut self) -> Result<()> {
        self.let_go()
    }

    fn let_go(&mut self) -> Result<()> {
        let Some(image) = self.image.take() else {
            return Ok(());
        };
        let removed = files::remove_file(&self.disk);
        image.touch();
        drop(image);
        // If it is ringing already, that is for this as well.
        let _ = self.bell.try_send(());
        removed
    }
}

impl Drop for Instance {
    fn drop(&mut self) {
        if let Err(err) = self.let_go() {
            tracing::warn!(%err, "an instance's disk is left; swept at next start");
        }
    }
}
