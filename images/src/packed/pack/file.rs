//! An archive as a file that is there whole or not there.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use pileus_base::{Code, Error, Reporter, Result, ResultExt, files};

use super::{PackSource, Packed, pack};

/// So many bytes are brought to the disk while the next ones are made.
const FLUSHED: u64 = 32 << 20;

/// Writes an archive to a file: whole and synced, in place of what was there; or, if it fails or is cancelled,
/// not at all. Blocks.
pub fn pack_to_file(
    source: &PackSource<'_>,
    target: &Path,
    threads: usize,
    report: &Reporter,
) -> Result<Packed> {
    let (temp, file) = Temp::beside(target)?;
    let what = || format!("Writing {}", target.display());
    let packed = std::thread::scope(|scope| {
        let (full, flush) = sync_channel(1);
        let flusher = scope.spawn(|| flush_often(&file, flush));
        let to = Early {
            file: &file,
            unflushed: 0,
            full,
        };
        let packed = pack(source, to, threads, report)?;
        // An error of the disk is told only once, to whoever asks first.
        let flushed = flusher.join();
        flushed
            .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
            .io(what())?;
        Ok::<_, Error>(packed)
    })?;
    file.sync_all().io(what())?;
    report.check()?;
    temp.become_target(target).io(what())?;
    Ok(packed)
}

fn flush_often(file: &File, wanted: Receiver<()>) -> io::Result<()> {
    wanted.into_iter().try_for_each(|()| file.sync_data())
}

/// Has what is written brought to the disk early, so that nobody waits for all of it at the end.
struct Early<'a> {
    file: &'a File,
    unflushed: u64,
    full: SyncSender<()>,
}

impl Write for Early<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.file.write(bytes)?;
        self.unflushed += len as u64;
        if self.unflushed >= FLUSHED {
            self.unflushed = 0;
            // One that is under way is soon followed by another.
            let _ = self.full.try_send(());
        }
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that is removed unless it takes its target's place.
struct Temp {
    path: PathBuf,
}

impl Temp {
    fn beside(target: &Path) -> Result<(Self, File)> {
        let name = target.file_name().filter(|_| !target.is_dir());
        let name = name.ok_or_else(|| {
            Error::new(
                Code::InvalidArgument,
                format!("{} is no name for a file", target.display()),
            )
        })?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.part", uuid::Uuid::new_v4().simple()));
        let path = target.with_file_name(hidden);
        let mut options = File::options();
        let file = options
            .write(true)
            .create_new(true)
            .open(&path)
            .io(format_args!("Creating {}", target.display()))?;
        Ok((Self { path }, file))
    }

    fn become_target(self, target: &Path) -> io::Result<()> {
        std::fs::rename(&self.path, target)?;
        // There is no such file any more.
        std::mem::forget(self);
        let folder = target.parent().filter(|path| *path != Path::new(""));
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        if let Err(err) = files::remove_file(&self.path) {
            tracing::warn!(%err, "a half-written archive was left");
        }
    }
}
