//! The file that is written before it gets its name, which it does when it is complete. Until then it has none, so nothing
//! is left of it whatever ends this program, and two commands never write into one file.
//!
//! Not all file systems have files without names. There it is `NAME.part`, which goes if it doesn't become what it was to
//! be: one command writes it at a time, and what one that was killed has left is made anew.

use std::fs::{File, Metadata, TryLockError};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pileus_base::{ResultExt, files};
use rustix::fs::{AtFlags, CWD, OFlags, linkat};

use super::receive::exists;
use crate::error::CommandError;

/// How often what is in the way may go or come while it is looked at.
const TRIES: usize = 16;

pub(super) struct Part {
    /// Nothing for a file without a name.
    path: Option<PathBuf>,
    /// Locked for as long as it is written, if it has a name.
    file: File,
}

impl Part {
    pub(super) fn create(target: &Path) -> Result<Self, CommandError> {
        match unnamed(folder_of(target)) {
            Some(file) => Ok(Self { path: None, file }),
            None => Self::named(target),
        }
    }

    fn named(target: &Path) -> Result<Self, CommandError> {
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
                let path = Some(path);
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
        match &self.path {
            Some(path) => self.rename(path, target, force, &what)?,
            None => self.appear(target, force, &what)?,
        }
        files::sync_folder(folder_of(target))?;
        Ok(())
    }

    /// From its own name to the other one.
    fn rename(&self, path: &Path, to: &Path, force: bool, what: &str) -> Result<(), CommandError> {
        if !is_at(&self.file, path) {
            let gone = io::Error::other(format!("{} is gone", path.display()));
            return Err(gone).io(what)?;
        }
        match force {
            true => std::fs::rename(path, to).io(what)?,
            // Without replacing one that came meanwhile; a file system that has no links is asked differently.
            false => match std::fs::hard_link(path, to) {
                Ok(()) => files::remove_file(path)?,
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => return Err(exists(to)),
                Err(_) if to.symlink_metadata().is_ok() => return Err(exists(to)),
                Err(_) => std::fs::rename(path, to).io(what)?,
            },
        }
        Ok(())
    }

    /// From no name to its first one.
    fn appear(&self, target: &Path, force: bool, what: &str) -> Result<(), CommandError> {
        if !force {
            return match give_name(&self.file, target) {
                Err(err) if err.kind() == io::ErrorKind::AlreadyExists => Err(exists(target)),
                given => Ok(given.io(what)?),
            };
        }
        // A first name can't be one that another file has.
        let between = between(folder_of(target));
        give_name(&self.file, &between).io(what)?;
        let renamed = std::fs::rename(&between, target);
        if renamed.is_err() {
            files::remove_file(&between)?;
        }
        Ok(renamed.io(what)?)
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Some(path) = &self.path
            && is_at(&self.file, path)
        {
            // There is nobody left to tell.
            let _ = files::remove_file(path);
        }
    }
}

fn folder_of(target: &Path) -> &Path {
    let folder = target.parent().filter(|p| !p.as_os_str().is_empty());
    folder.unwrap_or(Path::new("."))
}

/// A file without a name in the folder, unless there it could not have one or not get one.
fn unnamed(folder: &Path) -> Option<File> {
    let create = || {
        File::options()
            .write(true)
            .custom_flags(OFlags::TMPFILE.bits().cast_signed())
            .open(folder)
    };
    // Whether it can get a name is found out now, with another one, and not when all was written.
    let (probe, name) = (create().ok()?, between(folder));
    give_name(&probe, &name).ok()?;
    files::remove_file(&name).ok()?;
    create().ok()
}

/// Gives a file that has no name its first one, which nothing may have yet.
fn give_name(file: &File, name: &Path) -> io::Result<()> {
    let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
    linkat(CWD, itself, CWD, name, AtFlags::SYMLINK_FOLLOW)?;
    Ok(())
}

/// A name for a moment.
fn between(folder: &Path) -> PathBuf {
    folder.join(format!(".{}.part", uuid::Uuid::new_v4().simple()))
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

    fn entries(folder: &Path) -> usize {
        std::fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn nothing_is_to_be_seen_before_it_is_complete() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        if unnamed(folder.path()).is_none() {
            eprintln!(
                "SKIPPED: the file system of {} has no files without names",
                folder.path().display()
            );
            return;
        }
        let part = Part::create(&target).unwrap();
        part.writer().unwrap().write_all(b"first").unwrap();
        // So whatever ends this program, nothing is left.
        assert_eq!(entries(folder.path()), 0);
        // Two that write at once don't meet; the first is the one that counts, or the last that was to replace it.
        let second = Part::create(&target).unwrap();
        second.writer().unwrap().write_all(b"second").unwrap();
        let third = Part::create(&target).unwrap();
        third.writer().unwrap().write_all(b"third").unwrap();
        part.finish(&target, false).unwrap();
        let refused = second.finish(&target, false).unwrap_err().error;
        assert!(refused.message.contains("is there already"), "{refused}");
        assert_eq!(read(&target), "first");
        third.finish(&target, true).unwrap();
        assert_eq!(read(&target), "third");
        assert_eq!(entries(folder.path()), 1);
        // It may not have been what --force can replace.
        let fourth = Part::create(&target).unwrap();
        std::fs::remove_file(&target).unwrap();
        std::fs::create_dir(&target).unwrap();
        assert!(fourth.finish(&target, true).is_err());
        assert_eq!(entries(folder.path()), 1);
    }

    #[test]
    fn it_gets_the_rights_of_any_other_file() {
        let folder = tempfile::tempdir().unwrap();
        let (target, other) = (folder.path().join("x"), folder.path().join("other"));
        Part::create(&target)
            .unwrap()
            .finish(&target, false)
            .unwrap();
        std::fs::write(&other, "").unwrap();
        let mode = |path: &Path| path.metadata().unwrap().mode();
        assert_eq!(mode(&target), mode(&other));
    }

    #[test]
    fn one_writes_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("x");
        let part = Part::named(&target).unwrap();
        let second = Part::named(&target).err().unwrap().error;
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
        let part = Part::named(&target).unwrap();
        part.writer().unwrap().write_all(b"all").unwrap();
        part.finish(&target, false).unwrap();
        assert_eq!((read(&target).as_str(), left.exists()), ("all", false));
    }

    #[test]
    fn dropped_it_goes_and_takes_nothing_of_others_along() {
        let folder = tempfile::tempdir().unwrap();
        let (target, path) = (folder.path().join("x"), folder.path().join("x.part"));
        drop(Part::named(&target).unwrap());
        assert!(!path.exists());
        let part = Part::named(&target).unwrap();
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
        assert!(Part::named(&target).is_err());
        assert_eq!(read(&other), "kept");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        assert!(Part::named(&target).is_err());
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
