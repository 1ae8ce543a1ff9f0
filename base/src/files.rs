//! Files that are either there whole or not there: write beside, fsync, rename, fsync the folder.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Code, Error, Result, ResultExt};

/// Replaces `path` by `bytes` with mode `mode`, so that a reader (or a crash) sees the old content or
/// the new one, never a part.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    let folder = parent(path)?;
    let name = path.file_name().unwrap_or(OsStr::new("file"));
    let mut temp_name = std::ffi::OsString::from(".");
    temp_name.push(name);
    temp_name.push(format!(".{}.tmp", uuid::Uuid::new_v4().simple()));
    let temp = folder.join(temp_name);
    let written = (|| {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .open(&temp)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temp, path)
    })();
    if let Err(err) = written {
        let _ = fs::remove_file(&temp);
        return Err(Error::io(format!("Writing {}", path.display()), err));
    }
    sync_folder(folder)
}

/// Makes the names in a folder durable.
pub fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder)
        .and_then(|dir| dir.sync_all())
        .io(format_args!("Syncing {}", folder.display()))
}

/// Creates a folder and its parents; the last one gets `mode` if it is new.
pub fn create_folder(path: &Path, mode: u32) -> Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .io(format_args!("Creating {}", path.display()))
}

/// As [`create_folder`], for a place where others can make folders too (/tmp, /dev/shm): one that is
/// somebody else's, or that others can write to, is refused.
pub fn create_own_folder(path: &Path, mode: u32) -> Result<()> {
    create_folder(path, mode)?;
    let found = fs::symlink_metadata(path).io(format_args!("Looking at {}", path.display()))?;
    let ours = found.is_dir()
        && found.uid() == rustix::process::geteuid().as_raw()
        && found.mode() & 0o022 == 0;
    if ours {
        return Ok(());
    }
    Err(Error::new(
        Code::PermissionDenied,
        format!("{} belongs to somebody else", path.display()),
    )
    .advise("Remove it, or ask its owner to."))
}

/// Bytes that a file really takes on its file system.
pub fn allocated(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |found| found.blocks().saturating_mul(512))
}

/// Reads a file of at most `limit` bytes.
pub fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let what = || format!("Reading {}", path.display());
    let file = File::open(path).io(what())?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).io(what())?;
    if bytes.len() as u64 > limit {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("{} is larger than {limit} bytes", path.display()),
        ));
    }
    Ok(bytes)
}

/// The last `limit` bytes of a file as text, from the beginning of a line.
pub fn tail(path: &Path, limit: u64) -> String {
    use std::io::{Seek, SeekFrom};
    let Ok(mut file) = File::open(path) else {
        return String::new();
    };
    let len = file.metadata().map_or(0, |m| m.len());
    let start = len.saturating_sub(limit);
    let mut bytes = Vec::new();
    if file.seek(SeekFrom::Start(start)).is_err()
        || file.take(limit).read_to_end(&mut bytes).is_err()
    {
        return String::new();
    }
    let text = String::from_utf8_lossy(&bytes).into_owned();
    match text.find('\n') {
        Some(end) if start > 0 => text[end + 1..].to_owned(),
        _ => text,
    }
}

/// Makes a file that nobody else can read, to be written and read back; it must not be there.
pub fn create_private(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o600);
    options
        .open(path)
        .io(format_args!("Creating {}", path.display()))
}

/// Removes a folder and all in it; one that is not there is fine.
pub fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("Removing {}", path.display()), err))
        }
        _ => Ok(()),
    }
}

/// Removes a file; one that is not there is fine.
pub fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(err) if err.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("Removing {}", path.display()), err))
        }
        _ => Ok(()),
    }
}

/// What is given back at a time by [`discard`], and the pause after it, in which others write.
const PIECE: u64 = 16 << 20;
const PAUSE: Duration = Duration::from_millis(30);

/// Removes a large file without waiting for its space; one that is not there is fine. A file system may
/// need seconds for some hundred MiB (measured: 1 to 3.5 s, ext4 with `discard`), in which every other
/// write waits as well. So a thread gives the space back piece by piece, unless the file has another name, or
/// this process still reads it elsewhere (an export does, to the end).
pub fn discard(path: &Path) -> Result<()> {
    let mut options = File::options();
    options
        .write(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let opened = options.open(path);
    remove_file(path)?;
    let Ok(file) = opened else { return Ok(()) };
    // If there is no thread the file is closed here, which is right but slow.
    let thread = std::thread::Builder::new().name("discard".into());
    let _ = thread.spawn(move || give_back(&file));
    Ok(())
}

fn give_back(file: &File) {
    let Ok(meta) = file.metadata() else { return };
    let mut left = meta.len();
    if meta.nlink() > 0 || left <= PIECE || is_open_twice(&meta) {
        return;
    }
    // Nobody can give it a name again, or open it.
    while left > PIECE {
        left -= PIECE;
        if file.set_len(left).is_err() {
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether this process has more than one descriptor of a file; if that can't be told, it may have.
fn is_open_twice(meta: &fs::Metadata) -> bool {
    let Ok(open) = fs::read_dir("/proc/self/fd") else {
        return true;
    };
    let same = |other: fs::Metadata| (other.dev(), other.ino()) == (meta.dev(), meta.ino());
    let same = open
        .flatten()
        .filter(|fd| fs::metadata(fd.path()).is_ok_and(same));
    same.count() > 1
}

pub fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
        .io(format_args!("Setting the mode of {}", path.display()))
}

/// Bytes that an unprivileged writer may still use on the file system of `path`.
pub fn free_space(path: &Path) -> Result<u64> {
    let stat = rustix::fs::statvfs(path).io(format_args!("Looking at {}", path.display()))?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// An exclusive lock on a file, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock, or returns `None` if another process holds it.
    pub fn try_take(path: &Path) -> Result<Option<Self>> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .io(format_args!("Opening {}", path.display()))?;
        match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(err) => Err(err).io(format_args!("Locking {}", path.display())),
        }
    }
}

fn parent(path: &Path) -> Result<&Path> {
    path.parent()
        .filter(|p| *p != PathBuf::new())
        .ok_or_else(|| Error::internal(format!("{} has no folder", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_somebody_else_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        create_own_folder(&path, 0o700).unwrap();
        create_own_folder(&path, 0o700).unwrap();
        set_mode(&path, 0o777).unwrap();
        assert_eq!(
            create_own_folder(&path, 0o700).unwrap_err().code,
            Code::PermissionDenied
        );
        let link = dir.path().join("b");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        assert!(create_own_folder(&link, 0o700).is_err());
    }

    #[test]
    fn atomic_write_replaces_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomic(&path, b"one", 0o600).unwrap();
        write_atomic(&path, b"two", 0o640).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o640
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_failed_write_keeps_the_old_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("gone").join("a");
        assert_eq!(write_atomic(&path, b"x", 0o600).unwrap_err().code, Code::Io);
    }

    #[test]
    fn what_is_discarded_is_gone_at_once_and_other_names_keep_it() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        discard(&path).unwrap();
        let text = vec![7; usize::try_from(3 * PIECE).unwrap()];
        fs::write(&path, &text).unwrap();
        fs::hard_link(&path, &other).unwrap();
        discard(&path).unwrap();
        assert!(!path.exists());
        // A new file of the same name is another one.
        fs::write(&path, b"new").unwrap();
        std::thread::sleep(4 * PAUSE);
        assert_eq!(fs::read(&other).unwrap(), text);
        assert_eq!(fs::read(&path).unwrap(), b"new");
        // Another process shows how much is left of it.
        let mut holder = std::process::Command::new("cat")
            .stdin(File::open(&other).unwrap())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let open = format!("/proc/{}/fd/0", holder.id());
        discard(&other).unwrap();
        let until = std::time::Instant::now() + Duration::from_secs(20);
        while fs::metadata(&open).unwrap().len() > PIECE {
            assert!(
                std::time::Instant::now() < until,
                "its space is not given back"
            );
            std::thread::sleep(PAUSE);
        }
        holder.kill().unwrap();
        holder.wait().unwrap();
        // A link is removed, not what it leads to.
        let link = dir.path().join("c");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        discard(&link).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn what_is_read_while_it_is_discarded_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let text = vec![7; usize::try_from(2 * PIECE).unwrap()];
        fs::write(&path, &text).unwrap();
        let mut open = File::open(&path).unwrap();
        discard(&path).unwrap();
        std::thread::sleep(4 * PAUSE);
        let mut read = Vec::new();
        open.read_to_end(&mut read).unwrap();
        assert!(read == text, "{} bytes", read.len());
    }

    #[test]
    fn a_lock_is_held_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = Lock::try_take(&path).unwrap();
        assert!(held.is_some());
        assert!(Lock::try_take(&path).unwrap().is_none());
        drop(held);
        assert!(Lock::try_take(&path).unwrap().is_some());
    }

    #[test]
    fn tail_begins_at_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        fs::write(&path, "first\nsecond\nthird\n").unwrap();
        assert_eq!(tail(&path, 9), "third\n");
        assert_eq!(tail(&path, 900), "first\nsecond\nthird\n");
        assert_eq!(tail(&dir.path().join("none"), 9), "");
    }

    #[test]
    fn bounded_read_refuses_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, [0; 10]).unwrap();
        assert_eq!(read_bounded(&path, 10).unwrap().len(), 10);
        assert!(read_bounded(&path, 9).is_err());
    }
}
