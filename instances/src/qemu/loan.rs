//! Lets a QEMU that runs under a user id of its own open a file of memory, for a moment.
//!
//! `memory-backend-file` opens its file by `open(2)` on `/proc/self/fd/N`, and the kernel then asks
//! the file's owner and mode again. The memory of a machine holds all its secrets, so the mode stays
//! 0600; instead the file belongs to QEMU's user from the start of the process until it answers, and
//! then to us again. No instruction of a guest has run by then. One loan per file at a time.
//!
//! A daemon that is killed in between leaves the file lent; [`take_back`] mends that.

use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};

use pileus_base::{Code, Error, Result, ResultExt};
use tokio::sync::OwnedMutexGuard;

type Turn = tokio::sync::Mutex<()>;
/// Device and inode.
type FileKey = (u64, u64);
type Turns = HashMap<FileKey, Weak<Turn>>;

/// The files that someone has on loan or waits for.
static TURNS: LazyLock<Mutex<Turns>> = LazyLock::new(Mutex::default);

/// The files on loan now.
static LENT: LazyLock<Mutex<HashSet<FileKey>>> = LazyLock::new(Mutex::default);

/// While this lives, `user` owns the file.
#[derive(Debug)]
pub(crate) struct Loan {
    file: File,
    key: FileKey,
    owner: u32,
    _turn: OwnedMutexGuard<()>,
}

impl Loan {
    /// Waits for its turn, then gives the file to `user`.
    pub(crate) async fn take(path: &Path, user: u32) -> Result<Self> {
        let file = open(path)?;
        let key = key(&file
            .metadata()
            .io(format_args!("Looking at {}", path.display()))?);
        let loan = Self {
            _turn: wait_for_turn(key).await,
            file,
            key,
            owner: rustix::process::geteuid().as_raw(),
        };
        // Before the owner changes, so that nobody sees a stranger's file that is not lent.
        lent().insert(key);
        set_owner(&loan.file, user).map_err(|err| {
            let what = format!(
                "QEMU's user {user} can't be given {}: {err}",
                path.display()
            );
            Error::new(Code::Io, what).with_source(err)
        })?;
        Ok(loan)
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        if let Err(err) = set_owner(&self.file, self.owner) {
            tracing::error!(%err, "a file of memory can't be taken back from QEMU's user");
        }
        lent().remove(&self.key);
    }
}

fn lent() -> MutexGuard<'static, HashSet<FileKey>> {
    LENT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn key(meta: &Metadata) -> FileKey {
    (meta.dev(), meta.ino())
}

/// Whether a file belongs to another user because we lent it.
pub(crate) fn is_lent(meta: &Metadata) -> bool {
    lent().contains(&key(meta))
}

/// Waits until nobody has the file on loan, and keeps it so while the guard lives.
async fn wait_for_turn(key: FileKey) -> OwnedMutexGuard<()> {
    let turn = {
        let mut turns = TURNS.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| turn.strong_count() > 0);
        turns.get(&key).and_then(Weak::upgrade).unwrap_or_else(|| {
            let turn = Arc::new(Turn::new(()));
            turns.insert(key, Arc::downgrade(&turn));
            turn
        })
    };
    turn.lock_owned().await
}

/// Makes a file ours again that an earlier daemon lent and could not take back. Returns whether it
/// was lent. To be called before any machine is started from the file, when the machine that has it
/// on loan is ended.
pub async fn take_back(path: &Path) -> Result<bool> {
    let file = open(path)?;
    let what = || format!("Taking {} back", path.display());
    let meta = file.metadata().io(what())?;
    let _turn = wait_for_turn(key(&meta)).await;
    let owner = rustix::process::geteuid().as_raw();
    if file.metadata().io(what())?.uid() == owner {
        return Ok(false);
    }
    set_owner(&file, owner).io(what())?;
    Ok(true)
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .io(format_args!("Opening {}", path.display()))
}

fn set_owner(file: &File, owner: u32) -> std::io::Result<()> {
    let owner = rustix::fs::Uid::from_raw(owner);
    Ok(rustix::fs::fchown(file, Some(owner), None)?)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn owner(path: &Path) -> u32 {
        path.metadata().unwrap().uid()
    }

    #[tokio::test]
    async fn a_file_is_lent_to_one_at_a_time_and_comes_back() {
        let me = rustix::process::geteuid();
        if !me.is_root() {
            eprintln!("SKIPPED: a_file_is_lent: only root can give files away");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ram");
        std::fs::write(&path, "x").unwrap();
        let before = path.metadata().unwrap();
        let loan = Loan::take(&path, 0x7000_0001).await.unwrap();
        assert_eq!(owner(&path), 0x7000_0001);
        let second = Loan::take(&path, 0x7000_0002);
        let second = tokio::time::timeout(Duration::from_millis(50), second).await;
        assert!(second.is_err(), "lent twice");
        drop(loan);
        assert_eq!(owner(&path), me.as_raw());
        drop(Loan::take(&path, 0x7000_0002).await.unwrap());
        assert_eq!(owner(&path), me.as_raw());
        assert_eq!(path.metadata().unwrap().mtime_nsec(), before.mtime_nsec());

        // What a killed daemon leaves behind.
        std::os::unix::fs::chown(&path, Some(0x7000_0003), None).unwrap();
        assert!(take_back(&path).await.unwrap());
        assert!(!take_back(&path).await.unwrap());
        assert_eq!(owner(&path), me.as_raw());

        // A link is not followed.
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        assert!(Loan::take(&link, 0x7000_0001).await.is_err());
    }
}
