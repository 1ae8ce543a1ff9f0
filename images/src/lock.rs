//! Locks between processes that share a store. All are `flock`s, so the kernel ends them with their process,
//! whatever happened to it.
//!
//! ```text
//! on an image's folder     shared: someone uses it       exclusive: it is being taken away
//! on `tags/`, `sources/`   shared: a file is written     exclusive: leftovers are swept
//! on `locks/KEY`           exclusive: an item is fetched (or the store collected) by one process at a time
//! on a file `lock`         exclusive: a place of work is somebody's (see `stage`)
//! ```
//!
//! What is at a path may have been replaced while one waited for its lock, so who has a lock looks again. Processes
//! that are being forked off share a lock for a moment, until they become another program: who finds a lock
//! taken tries again for a while before it says so.
//!
//! Next step: `image` (holds one), `store` (takes one away).

use std::fs::File;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pileus_base::{Code, Digest, Error, Phase, Reporter, Result, ResultExt, files};
use rustix::fs::FlockOperation;
use sha2::Digest as _;

use crate::store::Store;

const PAUSE: Duration = Duration::from_millis(2);
/// Who holds a folder exclusively only renames or unlinks a few files.
const SHARED_PATIENCE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// A locked file or folder.
#[derive(Debug)]
pub(crate) struct Hold {
    file: File,
}

/// What came of the wish to have something alone.
#[derive(Debug)]
pub(crate) enum Grip {
    Held(Hold),
    /// Others hold it.
    Busy,
    /// It is not there.
    Gone,
}

impl Hold {
    /// Holds a folder together with others; nothing if it is not there.
    pub fn shared(folder: &Path) -> Result<Option<Self>> {
        let grip = take(
            folder,
            FlockOperation::NonBlockingLockShared,
            SHARED_PATIENCE,
        )?;
        match grip {
            Grip::Held(hold) => Ok(Some(hold)),
            Grip::Gone => Ok(None),
            Grip::Busy => Err(Error::new(
                Code::Io,
                format!("Another process keeps {} locked", folder.display()),
            )
            .advise("See which with `lsof`; it may be stopped.")),
        }
    }

    /// Holds a folder alone, if no one else lets go of it within `patience`.
    pub fn exclusive(folder: &Path, patience: Duration) -> Result<Grip> {
        take(folder, FlockOperation::NonBlockingLockExclusive, patience)
    }

    /// Whether what is held is what can be found at `path`.
    pub fn is_at(&self, path: &Path) -> bool {
        let (Ok(held), Ok(there)) = (self.file.metadata(), std::fs::symlink_metadata(path)) else {
            return false;
        };
        (held.dev(), held.ino()) == (there.dev(), there.ino())
    }
}

fn take(folder: &Path, wish: FlockOperation, patience: Duration) -> Result<Grip> {
    let begin = Instant::now();
    let mut options = File::options();
    options.read(true).custom_flags(libc_flags(
        rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::NOFOLLOW,
    ));
    loop {
        let file = match options.open(folder) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(Grip::Gone),
            Err(err) => return Err(Error::io(format!("Opening {}", folder.display()), err)),
        };
        loop {
            match rustix::fs::flock(&file, wish) {
                Ok(()) => break,
                Err(rustix::io::Errno::WOULDBLOCK) if begin.elapsed() >= patience => {
                    return Ok(Grip::Busy);
                }
                Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => {
                    std::thread::sleep(PAUSE);
                }
                Err(err) => return Err(err).io(format_args!("Locking {}", folder.display())),
            }
        }
        let hold = Hold { file };
        if hold.is_at(folder) {
            return Ok(Grip::Held(hold));
        }
        // Taken away, and perhaps replaced, meanwhile.
    }
}

fn libc_flags(flags: rustix::fs::OFlags) -> i32 {
    flags.bits().cast_signed()
}

/// A file whose lock is held; it goes when that is dropped.
#[derive(Debug)]
pub(crate) struct FileLock {
    path: PathBuf,
    _file: File,
}

impl FileLock {
    /// Takes the lock on the file `path`, made if need be; nothing if someone else has it.
    pub fn try_take(path: &Path) -> Result<Option<Self>> {
        let what = || format!("Locking {}", path.display());
        loop {
            let mut options = File::options();
            options.create(true).truncate(false).write(true).mode(0o600);
            let file = options.open(path).io(what())?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(rustix::io::Errno::INTR) => continue,
                Err(err) => return Err(err).io(what()),
            }
            let hold = Hold { file };
            if hold.is_at(path) {
                return Ok(Some(Self {
                    path: path.to_owned(),
                    _file: hold.file,
                }));
            }
            // Its last holder removed it while we came.
        }
    }

    /// As [`try_take`](Self::try_take), waiting for `patience`.
    pub fn take(path: &Path, patience: Duration) -> Result<Option<Self>> {
        let begin = Instant::now();
        loop {
            match Self::try_take(path)? {
                None if begin.elapsed() < patience => std::thread::sleep(PAUSE),
                found => return Ok(found),
            }
        }
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // While the lock is still held: who waits for it sees that the file is gone, and makes its own.
        if let Err(err) = files::remove_file(&self.path) {
            tracing::debug!(%err, "lock file left; swept at next start");
        }
    }
}

/// Work on an item is this process's, until it is dropped.
#[derive(Debug)]
pub struct ItemLock {
    _lock: FileLock,
}

impl Store {
    /// Waits until no other holder of this store, in whatever process, works on the item `key`, and keeps them
    /// from it. What they did meanwhile is to be looked at afterwards. Fails when cancelled.
    pub async fn lock_item(&self, key: &str, report: &Reporter) -> Result<ItemLock> {
        let hash = Digest::from_bytes(sha2::Sha256::digest(key.as_bytes()).into());
        let path = self.locks().join(&hash.hex()[..32]);
        let mut pause = PAUSE;
        loop {
            report.check()?;
            if let Some(lock) = FileLock::try_take(&path)? {
                return Ok(ItemLock { _lock: lock });
            }
            if pause == PAUSE {
                report.phase(Phase::Queued);
            }
            report
                .or_cancelled(async {
                    tokio::time::sleep(pause).await;
                    Ok(())
                })
                .await?;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

/// Removes lock files that nobody holds.
pub(crate) fn sweep_locks(folder: &Path) -> Result<()> {
    for entry in std::fs::read_dir(folder).io(format_args!("Reading {}", folder.display()))? {
        // Taken and dropped, it goes.
        drop(FileLock::try_take(&entry.io("Reading the locks")?.path())?);
    }
    Ok(())
}

/// Removes what a killed process was about to put into a folder of small files. Who writes there holds it shared
/// (see [`write_small`]); while someone does, it is left to the next start.
pub(crate) fn sweep_drafts(folder: &Path, patience: Duration) -> Result<()> {
    let Grip::Held(_hold) = Hold::exclusive(folder, patience)? else {
        return Ok(());
    };
    for entry in std::fs::read_dir(folder).io(format_args!("Reading {}", folder.display()))? {
        let entry = entry.io("Reading a folder")?;
        let name = entry.file_name();
        let name = name.as_encoded_bytes();
        // As `files::write_atomic` names them.
        if name.starts_with(b".") && name.ends_with(b".tmp") {
            files::remove_file(&entry.path())?;
        }
    }
    Ok(())
}

/// Writes a small file of a folder that others may be sweeping.
pub(crate) fn write_small(path: &Path, bytes: &[u8]) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let _hold = Hold::shared(folder)?;
    files::write_atomic(path, bytes, 0o644)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(10);

    #[test]
    fn many_hold_a_folder_and_one_takes_it_away() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a");
        assert!(Hold::shared(&folder).unwrap().is_none());
        std::fs::create_dir(&folder).unwrap();
        let one = Hold::shared(&folder).unwrap().unwrap();
        let two = Hold::shared(&folder).unwrap().unwrap();
        drop(one);
        assert!(matches!(
            Hold::exclusive(&folder, SHORT).unwrap(),
            Grip::Busy
        ));
        drop(two);
        let Grip::Held(alone) = Hold::exclusive(&folder, SHORT).unwrap() else {
            panic!("nobody else holds it");
        };
        std::fs::rename(&folder, dir.path().join("b")).unwrap();
        assert!(!alone.is_at(&folder));
        // Who comes later holds what is there then.
        std::fs::create_dir(&folder).unwrap();
        let new = Hold::shared(&folder).unwrap().unwrap();
        assert!(new.is_at(&folder));
    }

    #[test]
    fn who_waited_for_a_folder_that_went_finds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("a");
        std::fs::create_dir(&folder).unwrap();
        let Grip::Held(alone) = Hold::exclusive(&folder, SHORT).unwrap() else {
            panic!("nobody else holds it");
        };
        let waiting = {
            let folder = folder.clone();
            std::thread::spawn(move || Hold::shared(&folder).unwrap())
        };
        std::thread::sleep(Duration::from_millis(30));
        std::fs::rename(&folder, dir.path().join("b")).unwrap();
        drop(alone);
        assert!(waiting.join().unwrap().is_none());
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("a");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(Hold::shared(&link).is_err());
    }

    #[test]
    fn a_lock_file_goes_with_its_lock_and_many_never_share_it() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        let lock = FileLock::take(&path, Duration::from_secs(60)).unwrap();
                        assert!(lock.is_some());
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn drafts_of_small_files_are_swept_unless_one_is_being_written() {
        let dir = tempfile::tempdir().unwrap();
        let draft = dir.path().join(".a.0123.tmp");
        std::fs::write(&draft, "x").unwrap();
        write_small(&dir.path().join("a"), b"x").unwrap();
        let writing = Hold::shared(dir.path()).unwrap();
        sweep_drafts(dir.path(), SHORT).unwrap();
        assert!(draft.exists());
        drop(writing);
        sweep_drafts(dir.path(), SHORT).unwrap();
        assert!(!draft.exists() && dir.path().join("a").exists());
    }
}
