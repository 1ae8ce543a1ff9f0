//! The store: images in plain folders, named by digest, published by one rename, never changed.
//!
//! ```text
//! root/HEX/        disk.raw (sparse, read-only), kernel, initrd, image.json, used (its mtime)
//! root/sources/    what each source gave the last time (`sources.rs`)
//! root/stage/      work in progress, one locked folder each (`stage.rs`)
//! ```
//!
//! The folders are the truth: the store has no other index, and one damaged folder hurts one image.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use jiff::Timestamp;
use pileus_base::{Code, Digest, Error, Result, ResultExt, Size, files};

use crate::fetch::{self, Patience};
use crate::hosts::Host;
use crate::hosts::build::BuildHost;
use crate::hosts::file::FileHost;
use crate::hosts::http::HttpHost;
use crate::image::{self, Image, ImageInfo};
use crate::obtain::Flights;
use crate::sources::Sources;
use crate::stage;

const STAGE: &str = "stage";
const SOURCES: &str = "sources";

/// Bounds in bytes.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Of what is downloaded or read.
    pub download: u64,
    /// Of a disk as the guest sees it, and of what decompression gives.
    pub virtual_size: u64,
    /// Free space that is left to others.
    pub reserve: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            download: 64 << 30,
            virtual_size: 2 << 40,
            reserve: 512 << 20,
        }
    }
}

/// The programs and places of the host that the store uses.
#[derive(Debug, Clone)]
pub struct Tools {
    pub qemu_img: PathBuf,
    pub mmdebstrap: PathBuf,
    /// Where the machine's package sources and os-release are.
    pub etc: PathBuf,
    /// A place that other user ids can pass through, for builds without root.
    pub scratch: PathBuf,
}

impl Default for Tools {
    fn default() -> Self {
        Self {
            qemu_img: "qemu-img".into(),
            mmdebstrap: "mmdebstrap".into(),
            etc: "/etc".into(),
            scratch: "/var/tmp".into(),
        }
    }
}

#[derive(Debug, Clone)]
pub struct StoreConfig {
    pub root: PathBuf,
    /// Asked for names in this order.
    pub hosts: Vec<Arc<dyn Host>>,
    pub limits: Limits,
    pub patience: Patience,
    pub tools: Tools,
    /// Whether downloads go through the proxies that the environment names.
    pub proxies: bool,
    pub now: fn() -> Timestamp,
}

impl StoreConfig {
    /// A store at `root` with the hosts `file`, `http` and `build`, and usual bounds.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            hosts: vec![Arc::new(FileHost), Arc::new(HttpHost), Arc::new(BuildHost)],
            limits: Limits::default(),
            patience: Patience::default(),
            tools: Tools::default(),
            proxies: true,
            now: Timestamp::now,
        }
    }
}

/// An image of the store as a list shows it; unlike an [`Image`] it keeps nothing from being removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    pub info: ImageInfo,
    pub last_used: Timestamp,
    /// Bytes that it takes on the host's disk.
    pub allocated: Size,
}

/// What `prune` removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    pub info: ImageInfo,
    /// Bytes given back to the host.
    pub freed: Size,
}

#[derive(Debug)]
pub struct Store {
    pub(crate) config: StoreConfig,
    pub(crate) client: reqwest::Client,
    pub(crate) sources: Sources,
    pub(crate) flights: Arc<Flights<Arc<Image>>>,
    /// Images that someone may hold. Taken while an image is loaded or taken away.
    held: Mutex<HashMap<Digest, Weak<Image>>>,
}

impl Store {
    /// Opens the store, creating it if need be, and sweeps what a killed daemon left. Blocks.
    pub fn open(config: StoreConfig) -> Result<Arc<Self>> {
        files::create_folder(&config.root, 0o755)?;
        let stages = config.root.join(STAGE);
        // Work in progress is nobody's business but may be passed through (unprivileged builds).
        files::create_folder(&stages, 0o711)?;
        let swept = stage::sweep(&stages)?;
        if swept > 0 {
            tracing::info!(swept, "unfinished images removed");
        }
        Ok(Arc::new(Self {
            client: fetch::client(&config.patience, config.proxies)?,
            sources: Sources::open(config.root.join(SOURCES))?,
            flights: Arc::default(),
            held: Mutex::default(),
            config,
        }))
    }

    /// All images of the store, the last used first. Damaged ones are left out and logged.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let mut images: Vec<_> = self
            .digests()?
            .iter()
            .filter_map(|digest| self.get(digest))
            .map(|image| Listed {
                info: image.info().clone(),
                last_used: image.last_used(),
                allocated: image.allocated(),
            })
            .collect();
        images.sort_by_key(|image| std::cmp::Reverse(image.last_used));
        Ok(images)
    }

    /// The image with this digest. Holding it keeps it from being removed.
    pub fn get(&self, digest: &Digest) -> Option<Arc<Image>> {
        let mut held = self.held();
        if let Some(image) = held.get(digest).and_then(Weak::upgrade) {
            return Some(image);
        }
        let folder = self.folder(digest);
        if !folder.exists() {
            return None;
        }
        match Image::load(&folder, digest) {
            Ok(image) => {
                let image = Arc::new(image);
                held.retain(|_, weak| weak.strong_count() > 0);
                held.insert(digest.clone(), Arc::downgrade(&image));
                Some(image)
            }
            Err(err) => {
                tracing::warn!(image = digest.short(), %err, "image left out");
                None
            }
        }
    }

    /// Removes an image that nobody holds; returns the bytes freed.
    pub fn remove(&self, digest: &Digest) -> Result<Size> {
        let folder = self.folder(digest);
        let trash = {
            let held = self.held();
            if held.get(digest).is_some_and(|weak| weak.strong_count() > 0) {
                return Err(Error::new(
                    Code::ImageInUse,
                    format!("The image {} is in use", digest.short()),
                )
                .advise("Delete and purge the instances that were made from it first."));
            }
            let trash = self.stages().join(uuid::Uuid::new_v4().to_string());
            match std::fs::rename(&folder, &trash) {
                Ok(()) => trash,
                Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
                    return Err(not_here(digest.hex()));
                }
                Err(err) => return Err(Error::io("Removing the image", err)),
            }
        };
        let freed = image::allocated(&trash);
        self.sources.forget(digest)?;
        files::remove_folder(&trash)?;
        files::sync_folder(&self.config.root)?;
        Ok(freed)
    }

    /// Removes every image that is neither in `in_use` nor held by anyone.
    pub fn prune(&self, in_use: &HashSet<Digest>) -> Result<Vec<Removed>> {
        let mut removed = Vec::new();
        for digest in self.digests()? {
            if in_use.contains(&digest) {
                continue;
            }
            let Some(info) = self.get(&digest).map(|image| image.info().clone()) else {
                // Damaged: of no use to anybody.
                self.remove(&digest)?;
                continue;
            };
            match self.remove(&digest) {
                Ok(freed) => removed.push(Removed { info, freed }),
                Err(err) if err.code == Code::ImageInUse => {}
                Err(err) => return Err(err),
            }
        }
        Ok(removed)
    }

    pub(crate) fn find(&self, prefix: &str) -> Result<Arc<Image>> {
        let mut matching = self.digests()?;
        matching.retain(|digest| digest.hex().starts_with(prefix));
        match matching.as_slice() {
            [one] => self.get(one).ok_or_else(|| not_here(prefix)),
            [] => Err(not_here(prefix)),
            _ => Err(Error::new(
                Code::InvalidArgument,
                format!(
                    "{prefix} is the beginning of {} images' digests",
                    matching.len()
                ),
            )
            .advise("Give more digits.")),
        }
    }

    fn digests(&self) -> Result<Vec<Digest>> {
        let root = &self.config.root;
        let entries = std::fs::read_dir(root).io(format_args!("Reading {}", root.display()))?;
        Ok(entries
            .flatten()
            .filter_map(|entry| {
                let name = entry.file_name().into_string().ok()?;
                name.parse::<Digest>()
                    .ok()
                    .filter(|digest| digest.hex() == name)
            })
            .collect())
    }

    pub(crate) fn folder(&self, digest: &Digest) -> PathBuf {
        self.config.root.join(digest.hex())
    }

    pub(crate) fn stages(&self) -> PathBuf {
        self.config.root.join(STAGE)
    }

    fn held(&self) -> MutexGuard<'_, HashMap<Digest, Weak<Image>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn root(&self) -> &Path {
        &self.config.root
    }
}

fn not_here(digest: &str) -> Error {
    Error::new(
        Code::ImageNotFound,
        format!("There is no image {digest} in the store"),
    )
    .advise("`pileus images list` shows those that are.")
}
