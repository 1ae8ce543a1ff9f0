//! The store: images in plain folders, named by digest, published by one rename, never changed.
//!
//! ```text
//! root/HEX/        disk.raw (sparse, read-only), kernel, initrd, image.json, used (its mtime)
//! root/sources/    what each source gave the last time (`sources.rs`)
//! root/tags/       names that persons gave (`tags.rs`)
//! root/stage/      work in progress, one locked folder each (`stage.rs`)
//! root/locks/      who fetches what (`lock.rs`)
//! root/keeper      whose store it is, if only one program may remove images
//! ```
//!
//! The folders are the truth: the store has no other index, and one damaged folder hurts one image. Processes
//! may share it; they agree by locks.
//!
//! Next step: `bring` (fills it), `collect` (empties it).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use jiff::Timestamp;
use pileus_base::{Code, Digest, Error, Result, ResultExt, Size, files};

use crate::collect::Budget;
use crate::fetch::{self, Patience};
use crate::hosts::Host;
use crate::hosts::build::BuildHost;
use crate::hosts::file::FileHost;
use crate::hosts::http::HttpHost;
use crate::image::{self, Image, ImageInfo};
use crate::lock::{self, Hold};
use crate::obtain::Flights;
use crate::sources::Sources;
use crate::stage::{self, Stage};

const STAGE: &str = "stage";
const SOURCES: &str = "sources";
const TAGS: &str = "tags";
const LOCKS: &str = "locks";
const KEEPER: &str = "keeper";
/// How long a sweep at the start waits for someone who writes a small file.
const SWEEP_PATIENCE: Duration = Duration::from_millis(200);

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

/// Tells which images are needed although nobody holds them: those that stopped instances stand on.
#[derive(Clone)]
pub struct InUse(pub Arc<dyn Fn() -> HashSet<Digest> + Send + Sync>);

impl Default for InUse {
    fn default() -> Self {
        Self(Arc::new(HashSet::new))
    }
}

impl fmt::Debug for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InUse")
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
    /// What the images may take; the least recently used go.
    pub budget: Budget,
    /// Asked before anything is collected.
    pub in_use: InUse,
    /// A store that has a keeper is emptied by that program only, as others don't know what it needs. Who gives
    /// a name becomes the keeper of a store that has none.
    pub keeper: Option<String>,
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
            budget: Budget::default(),
            in_use: InUse::default(),
            keeper: None,
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
    /// The names that persons gave it, in order.
    pub tags: Vec<String>,
}

#[derive(Debug)]
pub struct Store {
    pub(crate) config: StoreConfig,
    pub(crate) client: reqwest::Client,
    pub(crate) sources: Sources,
    pub(crate) flights: Arc<Flights<Arc<Image>>>,
    /// Images that someone here may hold, so that they share one.
    held: Mutex<HashMap<Digest, Weak<Image>>>,
    /// What images may take now; at first as configured.
    budget: RwLock<Budget>,
    /// An image was let go since the last look (see `Store::tidy`).
    pub(crate) released: Arc<AtomicBool>,
}

impl Store {
    /// Opens the store, creating it if need be, and sweeps what killed processes left. Blocks.
    pub fn open(config: StoreConfig) -> Result<Arc<Self>> {
        let root = &config.root;
        files::create_folder(root, 0o755)?;
        // Work in progress is nobody's business but may be passed through (unprivileged builds).
        for (name, mode) in [(STAGE, 0o711), (LOCKS, 0o755), (TAGS, 0o755)] {
            files::create_folder(&root.join(name), mode)?;
        }
        let store = Arc::new(Self {
            client: fetch::client(&config.patience, config.proxies)?,
            sources: Sources::open(root.join(SOURCES))?,
            flights: Arc::default(),
            held: Mutex::default(),
            released: Arc::default(),
            budget: RwLock::new(config.budget.clone()),
            config,
        });
        store.appoint()?;
        store.sweep()?;
        Ok(store)
    }

    /// What images may take from now on; nothing is removed by this.
    pub fn set_budget(&self, budget: Budget) {
        *self.budget.write().unwrap_or_else(PoisonError::into_inner) = budget;
    }

    pub(crate) fn budget(&self) -> Budget {
        let budget = self.budget.read();
        budget.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Becomes the store's keeper, if that is wished.
    fn appoint(&self) -> Result<()> {
        let Some(name) = &self.config.keeper else {
            return Ok(());
        };
        match self.keeper()? {
            Some(keeper) if keeper == *name => Ok(()),
            Some(keeper) => Err(Error::new(
                Code::StorageLocked,
                format!(
                    "The images in {} are kept by {keeper}",
                    self.root().display()
                ),
            )
            .advise("Choose another folder.")),
            None => lock::write_small(&self.root().join(KEEPER), name.as_bytes()),
        }
    }

    /// Who alone may remove images, if there is someone.
    pub(crate) fn keeper(&self) -> Result<Option<String>> {
        let path = self.root().join(KEEPER);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = files::read_bounded(&path, 4096)?;
        Ok(Some(String::from_utf8_lossy(&bytes).trim().to_owned()))
    }

    /// Removes what killed processes left, and nothing that a living one works on.
    fn sweep(&self) -> Result<()> {
        let swept = stage::sweep(&self.stages())?;
        if swept > 0 {
            tracing::info!(swept, "unfinished images removed");
        }
        lock::sweep_locks(&self.locks())?;
        let root = self.root();
        for folder in [root, &root.join(SOURCES), &root.join(TAGS)] {
            lock::sweep_drafts(folder, SWEEP_PATIENCE)?;
        }
        for digest in self.digests()? {
            // One that is held is not worth waiting for.
            lock::sweep_drafts(&self.folder(&digest), Duration::ZERO)?;
        }
        self.sources.forget_unless(|digest| self.has(digest))?;
        self.sweep_tags(SWEEP_PATIENCE)
    }

    /// All images of the store, the last used first. Damaged ones are left out and logged.
    pub fn list(&self) -> Result<Vec<Listed>> {
        let mut tags: BTreeMap<Digest, Vec<String>> = BTreeMap::new();
        for (name, digest) in self.tags()? {
            tags.entry(digest).or_default().push(name);
        }
        let mut images = Vec::new();
        for digest in self.digests()? {
            let folder = self.folder(&digest);
            // Not held: a look keeps nobody from removing it.
            match image::read_info(&folder, &digest) {
                Ok(info) => images.push(Listed {
                    last_used: image::last_used(&folder).unwrap_or(info.created),
                    allocated: image::allocated(&folder),
                    tags: tags.remove(&digest).unwrap_or_default(),
                    info,
                }),
                Err(err) if folder.exists() => {
                    tracing::warn!(image = digest.short(), %err, "image left out");
                }
                Err(_) => {}
            }
        }
        images.sort_by_key(|image| std::cmp::Reverse(image.last_used));
        Ok(images)
    }

    /// The image with this digest. Holding it keeps it from being removed, by whatever process.
    pub fn get(&self, digest: &Digest) -> Option<Arc<Image>> {
        self.load(digest).unwrap_or_else(|err| {
            tracing::warn!(image = digest.short(), %err, "image left out");
            None
        })
    }

    /// As [`get`](Self::get), telling a damaged image from none.
    pub(crate) fn load(&self, digest: &Digest) -> Result<Option<Arc<Image>>> {
        let known = self.held().get(digest).and_then(Weak::upgrade);
        if let Some(image) = known.filter(|image| image.is_in_place()) {
            return Ok(Some(image));
        }
        // With no lock on the others: it may take a while to get hold of this one.
        let folder = self.folder(digest);
        let Some(hold) = Hold::shared(&folder)? else {
            return Ok(None);
        };
        let image = Arc::new(Image::load(&folder, digest, hold, &self.released)?);
        let mut held = self.held();
        // Another thread may have been faster.
        let known = held.get(digest).and_then(Weak::upgrade);
        if let Some(known) = known.filter(|known| known.is_in_place()) {
            return Ok(Some(known));
        }
        held.retain(|_, weak| weak.strong_count() > 0);
        held.insert(digest.clone(), Arc::downgrade(&image));
        Ok(Some(image))
    }

    /// Whether someone here holds the image.
    pub(crate) fn is_held(&self, digest: &Digest) -> bool {
        let held = self.held();
        held.get(digest).is_some_and(|weak| weak.strong_count() > 0)
    }

    /// So that the next one who asks reads anew what is known of the image.
    pub(crate) fn forget(&self, digest: &Digest) {
        self.held().remove(digest);
    }

    /// Makes what is in the stage the image `info.digest`. It is held from its first moment on. If that image
    /// is there already, it is the one; a damaged one is replaced. Blocks.
    pub(crate) fn publish(&self, stage: &Stage, mut info: ImageInfo) -> Result<Arc<Image>> {
        let draft = stage.draft();
        draft.seal(&mut info)?;
        let target = self.folder(&info.digest);
        for _ in 0..10 {
            let hold = Hold::shared(&draft.folder)?
                .ok_or_else(|| Error::internal("An image in the making is gone"))?;
            if stage.publish(&target)? {
                let image = Image::load(&target, &info.digest, hold, &self.released)?;
                let image = Arc::new(image);
                self.held()
                    .insert(info.digest.clone(), Arc::downgrade(&image));
                return Ok(image);
            }
            match self.load(&info.digest) {
                Ok(Some(image)) => return Ok(image),
                // Just removed: once more.
                Ok(None) => {}
                Err(err) => {
                    tracing::warn!(%err, "replaced");
                    self.take_away(&info.digest)?;
                }
            }
        }
        Err(Error::internal(
            "An image is removed as soon as it is published",
        ))
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

    /// All images, damaged ones too.
    pub fn digests(&self) -> Result<Vec<Digest>> {
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

    /// Whether there is a folder of this image, whole or not.
    pub(crate) fn has(&self, digest: &Digest) -> bool {
        self.folder(digest).is_dir()
    }

    pub(crate) fn tags_folder(&self) -> PathBuf {
        self.config.root.join(TAGS)
    }

    pub(crate) fn locks(&self) -> PathBuf {
        self.config.root.join(LOCKS)
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

pub(crate) fn not_here(digest: &str) -> Error {
    Error::new(
        Code::ImageNotFound,
        format!("There is no image {digest} in the store"),
    )
    .advise("`pileus image list` shows those that are.")
}
