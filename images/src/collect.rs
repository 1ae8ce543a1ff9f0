//! Taking images away: one by name, all that nobody needs, or the least recently used until a budget is kept.
//!
//! Never one that somebody holds, in whatever process, that has a tag, or that the daemon's instances stand on.
//! Whoever takes one away holds its folder alone, looks once more, moves it out of sight by one rename, and only
//! then, with no lock that anybody waits for, deletes what may be many gigabytes.
//!
//! Next step: `make_room` is called by `bring` before an item is fetched, `tidy` by whoever lets images go.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use jiff::SignedDuration;
use pileus_base::{Code, Digest, Error, Reporter, Result, ResultExt, Size, files};

use crate::image::{self, ImageInfo};
use crate::lock::{FileLock, Grip, Hold};
use crate::stage::Stage;
use crate::store::{Listed, Store, not_here};

/// For one that somebody asked for by name. Forked processes share our locks for a moment.
const PATIENCE: Duration = Duration::from_millis(500);
/// For one of many, any of which will do.
const SHORT_PATIENCE: Duration = Duration::from_millis(10);
/// While another process collects.
const COLLECT_PATIENCE: Duration = Duration::from_secs(120);
const COLLECTING: &str = "collecting";
/// What a disk that is full is freed of if nobody knows how much is needed.
const RELIEF: u64 = 1 << 30;

/// What the store's images may take. What is needed goes before it: a budget is kept as well as it can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// Bytes of the file system that are to stay free.
    pub min_free: u64,
    /// Bytes that all images may take together.
    pub max_bytes: Option<u64>,
    /// How long an image that nobody uses stays.
    pub max_age: Option<Duration>,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            min_free: 1 << 30,
            max_bytes: None,
            max_age: None,
        }
    }
}

/// An image that was taken away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    pub info: ImageInfo,
    /// Bytes given back to the host.
    pub freed: Size,
}

impl Store {
    /// Removes an image that nobody holds and that has no tag; returns the bytes freed. Blocks.
    pub fn remove(&self, digest: &Digest) -> Result<Size> {
        self.removing(digest, Tags::Refuse, PATIENCE)
    }

    /// As [`remove`](Self::remove), with the image's tags.
    pub fn remove_with_tags(&self, digest: &Digest) -> Result<Size> {
        self.removing(digest, Tags::Remove, PATIENCE)
    }

    /// Removes every image that is neither in `in_use`, nor held by anyone, nor tagged. Blocks.
    pub fn prune(&self, in_use: &HashSet<Digest>) -> Result<Vec<Removed>> {
        let mut keep = (self.config.in_use.0)();
        keep.extend(in_use.iter().cloned());
        keep.extend(self.tags()?.into_values());
        let mut removed = Vec::new();
        for digest in self.digests()? {
            if keep.contains(&digest) || self.is_held(&digest) {
                continue;
            }
            // A damaged one is of no use to anybody.
            let info = image::read_info(&self.folder(&digest), &digest).ok();
            match self.removing(&digest, Tags::Refuse, SHORT_PATIENCE) {
                Ok(freed) => removed.extend(info.map(|info| Removed { info, freed })),
                Err(err) if is_kept(&err) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(removed)
    }

    /// Keeps the budget: takes the least recently used images away until `need` more bytes fit in it. What is in
    /// `keep`, in use, held or tagged stays. Returns what went; whether it was enough is for the caller to
    /// see. Blocks, for as long as deleting takes.
    pub fn collect(&self, keep: &HashSet<Digest>, need: u64) -> Result<Vec<Removed>> {
        let mut removed = Vec::new();
        if !self.may_remove()? || !self.is_short(need)? {
            return Ok(removed);
        }
        // One at a time, so that two don't each free what is needed once.
        let lock = FileLock::take(&self.locks().join(COLLECTING), COLLECT_PATIENCE)?;
        if lock.is_none() {
            tracing::warn!("another process has been collecting images for minutes");
            return Ok(removed);
        }
        let mut keep = keep.clone();
        keep.extend((self.config.in_use.0)());
        keep.extend(self.tags()?.into_values());
        let mut images = self.list()?;
        let mut total: u64 = images.iter().map(|image| image.allocated.bytes()).sum();
        // The least recently used first; those of the same moment in a fixed order.
        images.sort_by(|a, b| {
            (a.last_used, a.info.digest.hex()).cmp(&(b.last_used, b.info.digest.hex()))
        });
        for Listed {
            info, last_used, ..
        } in images
        {
            let age = (self.config.now)().duration_since(last_used);
            if !self.is_over(total, need, age)? {
                // All others are younger.
                break;
            }
            if keep.contains(&info.digest) || self.is_held(&info.digest) {
                continue;
            }
            match self.removing(&info.digest, Tags::Refuse, SHORT_PATIENCE) {
                Ok(freed) => {
                    total = total.saturating_sub(freed.bytes());
                    tracing::info!(image = info.digest.short(), title = info.title, %freed, "collected");
                    removed.push(Removed { info, freed });
                }
                Err(err) if is_kept(&err) => {}
                Err(err) => return Err(err),
            }
        }
        Ok(removed)
    }

    /// Collects if an image was let go since the last time, some may have become too old, or the disk is short: to be
    /// called now and then, and after instances went. Blocks, usually for microseconds.
    pub fn tidy(&self) -> Result<Vec<Removed>> {
        let released = self.released.swap(false, Ordering::Relaxed);
        if !released && self.budget().max_age.is_none() && !self.lacks_space(0)? {
            return Ok(Vec::new());
        }
        self.collect(&HashSet::new(), 0)
    }

    /// Makes room for `need` more bytes. If even without all that may go they don't fit beside what is to stay
    /// free, that is the error.
    pub async fn make_room(self: &Arc<Self>, need: u64, report: &Reporter) -> Result<()> {
        report.check()?;
        let store = self.clone();
        blocking(move || {
            store.collect(&HashSet::new(), need)?;
            let (free, reserve) = (
                files::free_space(store.root())?,
                store.config.limits.reserve,
            );
            if free >= need.saturating_add(reserve) {
                return Ok(());
            }
            Err(Error::new(
                Code::NoSpace,
                format!(
                    "The image needs {} of disk space, and {} have to stay free; {} has {} left",
                    Size(need),
                    Size(reserve),
                    store.root().display(),
                    Size(free),
                ),
            )
            .advise("Free some space, or remove images with `pileus image prune`."))
        })
        .await
    }

    /// After a full disk: takes images away for `need` bytes (a gibibyte, if that is not known) beyond what is free
    /// now. Whether any went, and the work is worth another try.
    pub async fn relieve(self: &Arc<Self>, need: u64) -> Result<bool> {
        let store = self.clone();
        blocking(move || {
            let need = if need == 0 { RELIEF } else { need };
            Ok(!store.collect(&HashSet::new(), need)?.is_empty())
        })
        .await
    }

    /// Whether the budget could be broken: without a look at each image.
    fn is_short(&self, need: u64) -> Result<bool> {
        let budget = self.budget();
        Ok(budget.max_bytes.is_some() || budget.max_age.is_some() || self.lacks_space(need)?)
    }

    fn is_over(&self, total: u64, need: u64, age: SignedDuration) -> Result<bool> {
        let budget = self.budget();
        let too_old = budget
            .max_age
            .is_some_and(|max| SignedDuration::try_from(max).is_ok_and(|max| age > max));
        let too_much = budget
            .max_bytes
            .is_some_and(|max| total.saturating_add(need) > max);
        Ok(too_old || too_much || self.lacks_space(need)?)
    }

    fn lacks_space(&self, need: u64) -> Result<bool> {
        let wanted = self.budget().min_free.max(self.config.limits.reserve);
        Ok(files::free_space(self.root())? < wanted.saturating_add(need))
    }

    /// Whether this program is the one that may remove images here.
    fn may_remove(&self) -> Result<bool> {
        let keeper = self.keeper()?;
        Ok(keeper.is_none() || keeper == self.config.keeper)
    }

    fn removing(&self, digest: &Digest, tags: Tags, patience: Duration) -> Result<Size> {
        if !self.may_remove()? {
            let keeper = self.keeper()?.unwrap_or_default();
            return Err(Error::new(
                Code::PermissionDenied,
                format!(
                    "The images in {} are kept by {keeper}",
                    self.root().display()
                ),
            )
            .advise(format!("Let {keeper} remove the image.")));
        }
        if self.is_held(digest) {
            return Err(in_use(digest));
        }
        let hold = self.alone(digest, patience)?;
        match self.tags_of(digest)?.as_slice() {
            [] => {}
            names if tags == Tags::Refuse => return Err(is_tagged(digest, names)),
            // Before the image: a tag of nothing would be worse than an image without its tags.
            _ => self.untag_all(digest)?,
        }
        self.bury(digest, hold)
    }

    /// Takes away what is at the place of an image that is damaged, and that nobody could hold.
    pub(crate) fn take_away(&self, digest: &Digest) -> Result<()> {
        let hold = match Hold::exclusive(&self.folder(digest), PATIENCE)? {
            Grip::Held(hold) => hold,
            Grip::Gone => return Ok(()),
            Grip::Busy => return Err(in_use(digest)),
        };
        self.bury(digest, hold).map(drop)
    }

    fn alone(&self, digest: &Digest, patience: Duration) -> Result<Hold> {
        match Hold::exclusive(&self.folder(digest), patience)? {
            Grip::Held(hold) => Ok(hold),
            Grip::Gone => Err(not_here(digest.hex())),
            Grip::Busy => Err(in_use(digest)),
        }
    }

    /// Moves an image that is held alone into a stage of its own, and deletes it there.
    fn bury(&self, digest: &Digest, hold: Hold) -> Result<Size> {
        let grave = Stage::create(&self.stages())?;
        let folder = grave.draft().folder;
        std::fs::rename(self.folder(digest), &folder)
            .io(format_args!("Removing the image {}", digest.short()))?;
        files::sync_folder(self.root())?;
        self.forget(digest);
        // Who waited for it finds nothing at its place.
        drop(hold);
        self.sources.forget(digest)?;
        let freed = image::allocated(&folder);
        // Here and not with the stage, which doesn't wait: the room is wanted now.
        files::remove_folder(&folder)?;
        Ok(freed)
    }
}

/// What to do with the tags of an image that is to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tags {
    Refuse,
    Remove,
}

/// Not an error when any image would do.
fn is_kept(err: &Error) -> bool {
    matches!(err.code, Code::ImageInUse | Code::ImageNotFound)
}

fn in_use(digest: &Digest) -> Error {
    Error::new(
        Code::ImageInUse,
        format!("The image {} is in use", digest.short()),
    )
    .advise("Delete and purge the instances that were made from it first.")
}

fn is_tagged(digest: &Digest, names: &[String]) -> Error {
    let names = names.join(", ");
    Error::new(
        Code::ImageInUse,
        format!("The image {} has the tag {names}", digest.short()),
    )
    .advise("Remove the tag first, or remove the image with `--force`.")
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|err| Error::internal(format!("Collecting images panicked: {err}")))?
}
