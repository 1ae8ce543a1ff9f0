//! What goes when the host runs short: things that can be had again are registered with a tracker, which disposes of
//! the least recently used until enough disk and memory are free.
//!
//! The manager has it look before each download, after each release, and now and then. Disposing may take long (an image
//! has gigabytes), so it is done with no lock held that anybody else waits for.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::Timestamp;
use pileus_base::{Error, Result, files};

/// Something that can be had again.
pub trait Disposable: Send + Sync {
    /// Bytes of disk that disposing gives back; nothing if that is not known, but may be many.
    fn disk_size(&self) -> Option<u64>;

    /// Bytes of memory that disposing gives back; nothing if that is not known, but may be many.
    fn memory_size(&self) -> Option<u64>;

    /// When it was last acquired or released.
    fn last_used(&self) -> Timestamp;

    /// Disposes of it, unless it is in use: then `false`, and it stays registered. Blocks.
    fn dispose(&self) -> Result<bool>;
}

/// Knows what can be disposed of.
pub trait ResourceTracker: Send + Sync {
    fn register(&self, resource: Arc<dyn Disposable>);

    /// Whether it was registered.
    fn unregister(&self, resource: &Arc<dyn Disposable>) -> bool;

    /// Disposes of what it takes so that its minima, and `need` bytes of disk more, are free. Blocks.
    fn collect(&self, need: u64) -> Collected;
}

/// What came of a collection.
#[derive(Debug, Default)]
pub struct Collected {
    /// How many things went.
    pub disposed: usize,
    /// What could not be disposed of although it was not in use; it stays registered.
    pub failed: Vec<Error>,
}

/// Free bytes; an error tells that it can't be known.
type Measure = Box<dyn Fn() -> Result<u64> + Send + Sync>;

/// What is to stay free.
pub struct Minima {
    /// Bytes of disk.
    pub disk: u64,
    /// Bytes of memory.
    pub memory: u64,
}

/// The usual tracker: of the disk that a folder is on, and of the host's memory.
pub struct Tracker {
    minima: Minima,
    free_disk: Measure,
    free_memory: Measure,
    resources: Mutex<Vec<Arc<dyn Disposable>>>,
    /// Held while collecting, so that two don't dispose of twice as much.
    collecting: Mutex<()>,
}

impl Tracker {
    /// Keeps `minima` free on the file system of `folder` and of the host's memory.
    pub fn new(folder: impl Into<PathBuf>, minima: Minima) -> Self {
        let folder = folder.into();
        Self::measuring(minima, move || files::free_space(&folder), available_memory)
    }

    /// One that is told what is free.
    pub fn measuring(
        minima: Minima,
        free_disk: impl Fn() -> Result<u64> + Send + Sync + 'static,
        free_memory: impl Fn() -> Result<u64> + Send + Sync + 'static,
    ) -> Self {
        Self {
            minima,
            free_disk: Box::new(free_disk),
            free_memory: Box::new(free_memory),
            resources: Mutex::default(),
            collecting: Mutex::default(),
        }
    }

    /// Disposes of all that is not in use. Blocks.
    pub fn collect_all(&self) -> Collected {
        self.dispose_while(|_| true)
    }

    /// Disposes of the least recently used that `wanted` asks for, each looked at when its turn comes.
    fn dispose_while(&self, wanted: impl Fn(&dyn Disposable) -> bool) -> Collected {
        let _alone = lock(&self.collecting);
        let mut resources = lock(&self.resources).clone();
        resources.sort_by_cached_key(|resource| resource.last_used());
        let mut collected = Collected::default();
        for resource in resources {
            if !wanted(resource.as_ref()) {
                continue;
            }
            match resource.dispose() {
                Ok(true) => {
                    collected.disposed += 1;
                    self.unregister(&resource);
                }
                Ok(false) => {}
                Err(err) => {
                    tracing::error!(%err, "a resource could not be disposed of");
                    collected.failed.push(err);
                }
            }
        }
        collected
    }
}

impl ResourceTracker for Tracker {
    fn register(&self, resource: Arc<dyn Disposable>) {
        lock(&self.resources).push(resource);
    }

    fn unregister(&self, resource: &Arc<dyn Disposable>) -> bool {
        let mut resources = lock(&self.resources);
        let before = resources.len();
        resources.retain(|known| !Arc::ptr_eq(known, resource));
        resources.len() < before
    }

    fn collect(&self, need: u64) -> Collected {
        // What can't be measured is no reason to throw everything away.
        let lacks = |measure: &Measure, minimum: u64| {
            minimum > 0
                && measure().map_or_else(
                    |err| {
                        tracing::warn!(%err, "what is free is not known");
                        false
                    },
                    |free| free < minimum,
                )
        };
        self.dispose_while(|resource| {
            let disk = self.minima.disk.saturating_add(need);
            resource.disk_size() != Some(0) && lacks(&self.free_disk, disk)
                || resource.memory_size() != Some(0) && lacks(&self.free_memory, self.minima.memory)
        })
    }
}

/// What the kernel thinks that programs may still use, in bytes.
fn available_memory() -> Result<u64> {
    let path = std::path::Path::new("/proc/meminfo");
    let text = files::read_bounded(path, 64 << 10)?;
    let text = String::from_utf8_lossy(&text);
    text.lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
        .map(|kib| kib << 10)
        .ok_or_else(|| Error::internal("/proc/meminfo has no MemAvailable"))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Tracker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tracker").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

    use proptest::prelude::*;

    use super::*;

    /// Gives back what it has.
    struct Thing {
        disk: Option<u64>,
        memory: Option<u64>,
        used: i64,
        busy: AtomicBool,
        fails: bool,
        free: Arc<[AtomicU64; 2]>,
        gone: AtomicBool,
    }

    impl Disposable for Thing {
        fn disk_size(&self) -> Option<u64> {
            self.disk
        }
        fn memory_size(&self) -> Option<u64> {
            self.memory
        }
        fn last_used(&self) -> Timestamp {
            Timestamp::from_second(self.used).unwrap()
        }
        fn dispose(&self) -> Result<bool> {
            if self.fails {
                return Err(Error::internal("stuck"));
            }
            if self.busy.load(Ordering::SeqCst) {
                return Ok(false);
            }
            assert!(!self.gone.swap(true, Ordering::SeqCst), "disposed twice");
            self.free[0].fetch_add(self.disk.unwrap_or(7), Ordering::SeqCst);
            self.free[1].fetch_add(self.memory.unwrap_or(7), Ordering::SeqCst);
            Ok(true)
        }
    }

    struct Scene {
        free: Arc<[AtomicU64; 2]>,
        tracker: Tracker,
        things: Vec<Arc<Thing>>,
    }

    impl Scene {
        fn new(disk: u64, memory: u64) -> Self {
            let free: Arc<[AtomicU64; 2]> = Arc::default();
            let (a, b) = (free.clone(), free.clone());
            let tracker = Tracker::measuring(
                Minima { disk, memory },
                move || Ok(a[0].load(Ordering::SeqCst)),
                move || Ok(b[1].load(Ordering::SeqCst)),
            );
            Self {
                free,
                tracker,
                things: Vec::new(),
            }
        }

        fn add(&mut self, disk: Option<u64>, memory: Option<u64>, used: i64) -> Arc<Thing> {
            self.put(disk, memory, used, false)
        }

        fn put(
            &mut self,
            disk: Option<u64>,
            memory: Option<u64>,
            used: i64,
            fails: bool,
        ) -> Arc<Thing> {
            let thing = Arc::new(Thing {
                disk,
                memory,
                used,
                fails,
                busy: false.into(),
                free: self.free.clone(),
                gone: false.into(),
            });
            self.tracker.register(thing.clone());
            self.things.push(thing.clone());
            thing
        }

        fn gone(&self) -> Vec<bool> {
            let gone = |thing: &Arc<Thing>| thing.gone.load(Ordering::SeqCst);
            self.things.iter().map(gone).collect()
        }
    }

    #[test]
    fn the_least_recently_used_go_until_enough_is_free() {
        let mut scene = Scene::new(25, 0);
        for (disk, used) in [(10, 3), (10, 1), (10, 2), (10, 4)] {
            scene.add(Some(disk), Some(0), used);
        }
        assert_eq!(scene.tracker.collect(0).disposed, 3);
        assert_eq!(scene.gone(), [true, true, true, false]);
        assert_eq!(scene.tracker.collect(0).disposed, 0);
        assert_eq!(scene.tracker.collect(10).disposed, 1);
    }

    #[test]
    fn memory_is_not_got_by_disposing_of_disks() {
        let mut scene = Scene::new(0, 5);
        scene.add(Some(10), Some(0), 1);
        scene.add(Some(0), Some(10), 2);
        scene.add(None, None, 3);
        scene.tracker.collect(0);
        assert_eq!(scene.gone(), [false, true, false]);
    }

    #[test]
    fn what_is_in_use_or_stuck_stays_and_is_tried_again() {
        let mut scene = Scene::new(100, 0);
        let busy = scene.add(Some(10), None, 1);
        busy.busy.store(true, Ordering::SeqCst);
        scene.put(Some(10), None, 0, true);
        scene.add(None, None, 2);
        let first = scene.tracker.collect(0);
        assert_eq!((first.disposed, first.failed.len()), (1, 1));
        busy.busy.store(false, Ordering::SeqCst);
        let second = scene.tracker.collect_all();
        assert_eq!((second.disposed, second.failed.len()), (1, 1));
        assert_eq!(scene.gone(), [true, false, true]);
    }

    #[test]
    fn what_is_not_known_throws_nothing_away() {
        let broken = || Err(Error::internal("no idea"));
        let minima = Minima { disk: 5, memory: 5 };
        let tracker = Tracker::measuring(minima, broken, broken);
        let mut scene = Scene::new(0, 0);
        let thing = scene.add(Some(1), Some(1), 1);
        let thing: Arc<dyn Disposable> = thing;
        tracker.register(thing.clone());
        assert_eq!(tracker.collect(0).disposed, 0);
        assert!(tracker.unregister(&thing));
        assert!(!tracker.unregister(&thing));
        assert!(available_memory().unwrap() > 0);
    }

    proptest! {
        #[test]
        fn nothing_is_disposed_of_twice_and_the_order_is_kept(
            things in prop::collection::vec((0_u64..20, 0_i64..50, any::<bool>()), 0..20),
            minimum in 0_u64..200,
        ) {
            let mut scene = Scene::new(minimum, 0);
            for (disk, used, busy) in &things {
                let thing = scene.add(Some(*disk), Some(0), *used);
                thing.busy.store(*busy, Ordering::SeqCst);
            }
            std::thread::scope(|scope| {
                for _ in 0..2 { scope.spawn(|| scene.tracker.collect(0)); }
            });
            let free = scene.free[0].load(Ordering::SeqCst);
            for (thing, gone) in things.iter().zip(scene.gone()) {
                let (disk, used, busy) = *thing;
                prop_assert!(!(gone && (busy || disk == 0)));
                // What stayed was needed by nobody, or is younger than all that went.
                if !gone && !busy && disk > 0 {
                    prop_assert!(free >= minimum);
                    for (other, gone) in things.iter().zip(scene.gone()) {
                        prop_assert!(!gone || other.1 <= used);
                    }
                }
            }
        }
    }
}
