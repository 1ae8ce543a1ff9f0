//! The ancestor's way to use images, for programs that have no daemon: a `Manager` gives an `Instance` of an image that
//! it downloads once, an instance's disk is thrown away with it, and a `ResourceTracker` keeps the cache within
//! what the host can spare.
//!
//! ```text
//! downloader   where an image's bytes come from       asked once, however many want the image
//! instance     a disk of one's own                    a thin overlay, gone when it is dropped
//! gc           what goes when disk or memory is short
//! ```
//!
//! It is a thin layer on the one store: images survive restarts and kills, and processes may share a folder. What is
//! this layer's own is which image an id means (kept as one more source, see `sources`), and the instances' disks:
//!
//! ```text
//! FOLDER/instances/ID/   one locked folder a process, with a disk an instance; a dead process's is swept
//! ```
//!
//! Next step: `packed::mutable` (makes an image), `store` (keeps them).

mod downloader;
pub mod gc;
mod instance;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use jiff::Timestamp;
use pileus_base::{Code, Digest, Error, Mac, Reporter, Result, files};

use crate::collect::Budget;
use crate::fetch::Patience;
use crate::image::Image;
use crate::obtain::Flights;
use crate::sources::{Mark, Record};
use crate::stage;
use crate::store::{Limits, Store, StoreConfig, Tools};

pub use downloader::{Downloader, Payload, download_image};
pub use gc::{Disposable, ResourceTracker, Tracker};
pub use instance::Instance;

pub use crate::packed::mutable::MutableImage;

use instance::Place;

const INSTANCES: &str = "instances";
/// How often the cache is looked after although nothing happens.
const HOUSEKEEPING: Duration = Duration::from_secs(60);

/// A hardware address for a NIC: random, locally administered, of one station.
pub fn random_mac() -> Mac {
    let mut bytes: [u8; 6] = rand::random();
    bytes[0] = (bytes[0] | 0x02) & 0xfe;
    Mac(bytes)
}

/// How a manager fetches and keeps images; by default within the store's usual bounds.
#[derive(Debug, Clone)]
pub struct Config {
    pub limits: Limits,
    pub patience: Patience,
    pub tools: Tools,
    /// Whether downloads go through the proxies that the environment names.
    pub proxies: bool,
    /// What the images may take, besides what the tracker says.
    pub budget: Budget,
    pub now: fn() -> Timestamp,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            patience: Patience::default(),
            tools: Tools::default(),
            proxies: true,
            budget: Budget {
                min_free: 0,
                ..Budget::default()
            },
            now: Timestamp::now,
        }
    }
}

/// Images by the ids that its user gives them, each downloaded once. Cheap to clone.
#[derive(Clone)]
pub struct Manager {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<Store>,
    tracker: Arc<dyn ResourceTracker>,
    flights: Arc<Flights<Arc<Image>>>,
    place: Arc<Place>,
    /// The images that the tracker knows.
    registered: Mutex<HashMap<Digest, Weak<dyn Disposable>>>,
    /// Rung when something was released.
    bell: SyncSender<()>,
}

impl Manager {
    /// Manages the images in `folder`, which may be one that other processes, or earlier ones, use as well. What dead
    /// processes left is removed. Blocks for a moment.
    pub fn new(
        folder: impl Into<PathBuf>,
        tracker: Arc<dyn ResourceTracker>,
        config: Config,
    ) -> Result<Self> {
        let folder = folder.into();
        files::create_folder(&folder, 0o755)?;
        let folder = folder
            .canonicalize()
            .map_err(|err| Error::io(format!("Looking at {}", folder.display()), err))?;
        let mut store = StoreConfig::new(folder);
        store.limits = config.limits;
        store.patience = config.patience;
        store.tools = config.tools;
        store.proxies = config.proxies;
        store.budget = config.budget;
        store.now = config.now;
        Self::on(Store::open(store)?, tracker)
    }

    /// Manages the images of a store. Blocks for a moment.
    pub fn on(store: Arc<Store>, tracker: Arc<dyn ResourceTracker>) -> Result<Self> {
        let instances = store.root().join(INSTANCES);
        files::create_folder(&instances, 0o711)?;
        let swept = stage::sweep(&instances)?;
        if swept > 0 {
            tracing::info!(swept, "instances of dead processes removed");
        }
        let (bell, rung) = sync_channel(1);
        let shared = Arc::new(Shared {
            place: Arc::new(Place::create(&instances)?),
            flights: Arc::default(),
            registered: Mutex::default(),
            store: store.clone(),
            tracker: tracker.clone(),
            bell,
        });
        for listed in store.list()? {
            shared.register(&listed.info.digest);
        }
        std::thread::Builder::new()
            .name("pileus-gc".into())
            .spawn(move || keep_house(&store, tracker.as_ref(), &rung))
            .map_err(|err| Error::io("Starting a thread", err))?;
        Ok(Self { shared })
    }

    /// The images that are kept.
    pub fn store(&self) -> &Arc<Store> {
        &self.shared.store
    }

    /// A new instance of the image that `image_id` means. The id is the caller's word for it, and so is who may use it. If
    /// the image isn't here, `download` is asked for it; of callers that come at the same time, in whatever process,
    /// one's is. Each sees the progress; one that is cancelled disturbs no other; a failure is everybody's who waits,
    /// and is not remembered.
    pub async fn instance(
        &self,
        image_id: &str,
        download: Downloader,
        report: &Reporter,
    ) -> Result<Instance> {
        let image = self.image(image_id, download, report).await?;
        let shared = self.shared.clone();
        blocking(move || {
            image.touch();
            Instance::create(image, &shared.place, shared.bell.clone())
        })
        .await
    }

    async fn image(
        &self,
        image_id: &str,
        download: Downloader,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        report.check()?;
        let key = format!("image-id:{image_id}");
        if let Some(image) = self.shared.known(&key, report).await? {
            self.shared.register(image.digest());
            return Ok(image);
        }
        let (shared, id) = (self.shared.clone(), image_id.to_owned());
        let flights = &self.shared.flights;
        let image = flights
            .join(&key.clone(), report, |report| async move {
                shared.fetch(&id, &key, download, &report).await
            })
            .await?;
        self.shared.register(image.digest());
        Ok(image)
    }
}

impl Shared {
    /// The image that a key meant the last time, if it is still here and whole.
    async fn known(self: &Arc<Self>, key: &str, report: &Reporter) -> Result<Option<Arc<Image>>> {
        let Some(record) = self.store.sources.get(key) else {
            return Ok(None);
        };
        let Some(image) = self.store.get(&record.digest) else {
            return Ok(None);
        };
        if image.check_unchanged().is_ok() {
            return Ok(Some(image));
        }
        // Somebody wrote to it, or put it back from a backup: reading tells.
        let (shared, report) = (self.clone(), report.clone());
        blocking(
            move || match shared.store.ensure_unchanged(&image, &report) {
                Ok(()) => Ok(Some(image)),
                Err(err) if err.code == Code::BadImage => {
                    tracing::warn!(%err, "downloaded again");
                    let digest = image.digest().clone();
                    drop(image);
                    shared.store.take_away(&digest)?;
                    Ok(None)
                }
                Err(err) => Err(err),
            },
        )
        .await
    }

    async fn fetch(
        self: Arc<Self>,
        id: &str,
        key: &str,
        download: Downloader,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        let _alone = self.store.lock_item(key, report).await?;
        // Another process may have been faster.
        if let Some(image) = self.known(key, report).await? {
            return Ok(image);
        }
        let tracker = self.tracker.clone();
        blocking(move || {
            tracker.collect(0);
            Ok(())
        })
        .await?;
        let image = download.take_in(&self.store, id, report).await?;
        self.store.sources.put(&Record {
            key: key.to_owned(),
            digest: image.digest().clone(),
            mark: Mark::default(),
        })?;
        Ok(image)
    }

    /// Tells the tracker of an image, once.
    fn register(&self, digest: &Digest) {
        let mut registered = self
            .registered
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        registered.retain(|_, known| known.strong_count() > 0);
        if registered.contains_key(digest) {
            return;
        }
        let cached: Arc<dyn Disposable> = Arc::new(Cached {
            store: self.store.clone(),
            digest: digest.clone(),
        });
        registered.insert(digest.clone(), Arc::downgrade(&cached));
        drop(registered);
        self.tracker.register(cached);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let registered = self
            .registered
            .get_mut()
            .unwrap_or_else(PoisonError::into_inner);
        // The next manager of this folder registers what is there then.
        for cached in registered.values().filter_map(Weak::upgrade) {
            self.tracker.unregister(&cached);
        }
    }
}

/// An image, as the tracker sees it.
struct Cached {
    store: Arc<Store>,
    digest: Digest,
}

impl Disposable for Cached {
    fn disk_size(&self) -> Option<u64> {
        Some(crate::image::allocated(&self.store.folder(&self.digest)).bytes())
    }

    fn memory_size(&self) -> Option<u64> {
        Some(0)
    }

    fn last_used(&self) -> Timestamp {
        crate::image::last_used(&self.store.folder(&self.digest)).unwrap_or(Timestamp::MIN)
    }

    fn dispose(&self) -> Result<bool> {
        match self.store.remove(&self.digest) {
            Ok(_) => Ok(true),
            Err(err) if err.code == Code::ImageNotFound => Ok(true),
            // Held by someone, or tagged; or this store is another program's to empty.
            Err(err) if matches!(err.code, Code::ImageInUse | Code::PermissionDenied) => Ok(false),
            Err(err) => Err(err),
        }
    }
}

/// Keeps the budgets when something was released, and now and then, until the manager and its instances are gone.
fn keep_house(store: &Store, tracker: &dyn ResourceTracker, rung: &Receiver<()>) {
    loop {
        match rung.recv_timeout(HOUSEKEEPING) {
            Ok(()) | Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        if let Err(err) = store.tidy() {
            tracing::warn!(%err, "images not collected");
        }
        tracker.collect(0);
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|err| Error::internal(format!("Work on an image panicked: {err}")))?
}

impl std::fmt::Debug for Manager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Manager")
            .field("store", &self.shared.store.root())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_mac_is_local_and_of_one_station() {
        let mut seen = std::collections::HashSet::new();
        for _ in 0..200 {
            let mac = random_mac();
            assert_eq!(mac.0[0] & 3, 2, "{mac}");
            assert_eq!(mac.to_string().parse::<Mac>().unwrap(), mac);
            assert!(seen.insert(mac));
        }
    }
}
