//! The file that is written beside the one that is to be: `NAME.part`. It gets the name when it is complete, and goes if
//! that doesn't come to be. One command writes it at a time; what one that was killed has left is made anew.

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pileus_base::{ResultExt, files};
use rustix::fs::OFlags;

use super::receive::exists;
use crate::error::CommandError;

/// How often what is in the way may go or come while it is looked at.
const TRIES: usize = 16;

pub(super) struct Part {
    path: PathBuf,
    /// Locked for as long as it is written.
    file: File,
}

impl Part {
    pub(super) fn create(target: &Path) -> Result<Self, CommandError> {
        let mut path = target.as_os_str().to_owned();
        path.push(".part");
        let path = PathBuf::from(path);
        for _ in 0..TRIES {
            let file = match File::create_new(&path) {
                Ok(file) => file,
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
                    clear(&path, target)?;
                    continue;
                }
                Err(err) => {
                    return Err(err).io(format_args!("Creating {}", target.display()))?;
                }
            };
            // Between the two somebody else may have taken it for one that was left.
            if !is_taken(&file) && is_at(&file, &path) {
                return Ok(Self { path, file });
            }
        }
        Err(written_by_another(target))
    }

    pub(super) fn writer(&self) -> Result<File, CommandError> {
        Ok(self.file.try_clone().io("Opening the file")?)
    }

    pub(super) fn finish(self, target: &Path, force: bool) -> Result<(), CommandError> {
        let what = format!("Writing {}", target.display());
        self.file.sync_all().io(&what)?;
        if !is_at(&self.file, &self.path) {
            let gone = io::Error::other(format!("{} is gone", self.path.display()));
            return Err(gone).io(what)?;
        }
        match force {
            true => std::fs::rename(&self.path, target).io(&what)?,
            // Without replacing one that came meanwhile; a file system that has no links is asked differently.
            false => match std::fs::hard_link(&self.path, target) {
                Ok(()) => files::remove_file(&self.path)?,
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
                    return Err(exists(target));
                }
                Err(_) if target.symlink_metadata().is_ok() => return Err(exists(target)),
                Err(_) => std::fs::rename(&self.path, target).io(&what)?,
            },
        }
        let folder = target.parent().filter(|p| !p.as_os_str().is_empty());
        files::sync_folder(folder.unwrap_or(Path::new(".")))?;
        Ok(())
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if is_at(&self.file, &self.path) {
            // There is nobody left to tell.
            let _ = files::remove_file(&self.path);
        }
    }
}

/// Removes what one that was killed has left; what another command writes stays.
fn clear(path: &Path, target: &Path) -> Result<(), CommandError> {
    let how = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
    let left = File::options()
        .write(true)
        .custom_flags(how.cast_signed())
        .open(path);
    let left = match left {
        Ok(left) if left.metadata().is_ok_and(|found| found.is_file()) => left,
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        Ok(_) | Err(_) => {
            let text = format!("{} is in the way", path.display());
            return Err(CommandError::usage(text).hint("Remove it, or name another file."));
        }
    };
    if is_taken(&left) {
        return Err(written_by_another(target));
    }
    if is_at(&left, path) {
        files::remove_file(path)?;
    }
    Ok(())
}

/// Takes the lock, unless somebody has it. Where there are no locks, nobody does.
fn is_taken(file: &File) -> bool {
    matches!(file.try_lock(), Err(TryLockError::WouldBlock))
}

/// Whether this very file has the name.
fn is_at(file: &File, path: &Path) -> bool {
    let same = |a: Metadata, b: Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
    match (file.metadata(), path.symlink_metadata()) {
        (Ok(ours), Ok(there)) => same(ours, there),
        _ => false,
    }
}

fn written_by_another(target: &Path) -> CommandError {
    let text = format!("{} is being written by another command", target.display());
    CommandError::usage(text).hint("Wait until that is done, or name another file.")
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(path: &Path) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn one_writes_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        let part = Part::create(&target).unwrap();
        let second = Part::create(&target).err().unwrap().error;
        assert!(second.message.ends_with("by another command"), "{second}");
        part.writer().unwrap().write_all(b"first").unwrap();
        part.finish(&target, false).unwrap();
        assert_eq!(read(&target), "first");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_killed_one_left_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        let left = folder.path().join("x.part");
        std::fs::write(&left, "half of somethi").unwrap();
        let part = Part::create(&target).unwrap();
        part.writer().unwrap().write_all(b"all").unwrap();
        part.finish(&target, false).unwrap();
        assert_eq!((read(&target).as_str(), left.exists()), ("all", false));
    }

    #[test]
    fn dropped_it_goes_and_takes_nothing_of_others_along() {
        let folder = tempfile::tempdir().unwrap();
        let (target, path) = (folder.path().join("x"), folder.path().join("x.part"));
        drop(Part::create(&target).unwrap());
        assert!(!path.exists());
        let part = Part::create(&target).unwrap();
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "somebody else's").unwrap();
        assert!(part.finish(&target, false).is_err());
        assert_eq!(read(&path), "somebody else's");
        assert!(!target.exists());
    }

    #[test]
    fn links_and_folders_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let (target, path) = (folder.path().join("x"), folder.path().join("x.part"));
        let other = folder.path().join("other");
        std::fs::write(&other, "kept").unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(Part::create(&target).is_err());
        assert_eq!(read(&other), "kept");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(Part::create(&target).is_err());
    }

    #[test]
    fn a_folder_that_is_missing_is_told_by_the_files_own_name() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("none/x");
        let message = Part::create(&target).err().unwrap().error.message.clone();
        let said = format!("Creating {}: No such file", target.display());
        assert!(message.starts_with(&said), "{message}");
    }
}
