//! Work in progress: one folder a piece of work below `stage/`, locked by who works in it. Dropping it removes it;
//! what a killed process left behind is swept when the store is opened, with the programs that still run.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pileus_base::{Error, Result, ResultExt, files};

use crate::image::Draft;
use crate::lock::{Grip, Hold};
use crate::tool;

const IMAGE: &str = "image";
/// Names a folder outside of the stage that belongs to it (see `hosts/build.rs`).
const SCRATCH: &str = "scratch";

#[derive(Debug)]
pub(crate) struct Stage {
    folder: PathBuf,
    /// Goes with the folder.
    hold: Option<Hold>,
}

impl Stage {
    pub fn create(stages: &Path) -> Result<Self> {
        // Others may pass through (an unprivileged build's programs have other user ids) but see nothing.
        let (folder, hold) = own_folder(stages, 0o711)?;
        files::create_folder(&folder.join(IMAGE), 0o755)?;
        Ok(Self {
            folder,
            hold: Some(hold),
        })
    }

    /// The stage's name, which the programs working in it carry in their environment.
    pub fn id(&self) -> String {
        name(&self.folder)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The image in the making.
    pub fn draft(&self) -> Draft {
        Draft {
            folder: self.folder.join(IMAGE),
        }
    }

    /// Makes `folder` a part of this stage, so that a sweep removes it too.
    pub fn adopt_scratch(&self, folder: &Path) -> Result<()> {
        let text = folder.as_os_str().as_encoded_bytes();
        files::write_atomic(&self.path(SCRATCH), text, 0o600)?;
        files::create_folder(folder, 0o755)
    }

    /// Moves the sealed draft to `target` in one step. `false` if an image is there already.
    pub fn publish(&self, target: &Path) -> Result<bool> {
        files::sync_folder(&self.folder.join(IMAGE))?;
        match std::fs::rename(self.folder.join(IMAGE), target) {
            Ok(()) => {}
            Err(err)
                if matches!(
                    err.kind(),
                    std::io::ErrorKind::DirectoryNotEmpty | std::io::ErrorKind::AlreadyExists
                ) =>
            {
                return Ok(false);
            }
            Err(err) => return Err(Error::io("Publishing the image", err)),
        }
        if let Some(parent) = target.parent() {
            files::sync_folder(parent)?;
        }
        Ok(true)
    }
}

impl Drop for Stage {
    /// A half-made root has tens of thousands of files, which some disks take many seconds to let go
    /// of. Nobody has to wait for that: usually it is done at once, otherwise it goes on alone (and a
    /// start after a crash sweeps what is left).
    fn drop(&mut self) {
        let folder = self.folder.clone();
        let hold = self.hold.take();
        let (done, waiting) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            if let Err(err) = clear(&folder) {
                tracing::warn!(stage = %folder.display(), %err, "stage not removed; swept at next start");
            }
            drop(hold);
            // Nobody may be waiting any more.
            let _ = done.send(());
        });
        let _ = waiting.recv_timeout(std::time::Duration::from_millis(300));
    }
}

/// Makes a folder with a new name below `parent`, held by this process until the `Hold` is dropped.
pub(crate) fn own_folder(parent: &Path, mode: u32) -> Result<(PathBuf, Hold)> {
    for _ in 0..100 {
        let folder = parent.join(uuid::Uuid::new_v4().to_string());
        files::create_folder(&folder, mode)?;
        // A sweep may have been faster: to it, a folder that nobody holds is a leftover.
        if let Grip::Held(hold) = Hold::exclusive(&folder, Duration::ZERO)? {
            return Ok((folder, hold));
        }
    }
    Err(Error::internal(
        "New places of work are swept as soon as they are made",
    ))
}

/// Removes every place of work below `parent` that no living process holds. Returns how many.
pub(crate) fn sweep(parent: &Path) -> Result<usize> {
    let mut swept = 0;
    for entry in std::fs::read_dir(parent).io(format_args!("Reading {}", parent.display()))? {
        let folder = entry.io("Reading the stage")?.path();
        let hold = match Hold::exclusive(&folder, Duration::ZERO) {
            Ok(Grip::Busy | Grip::Gone) => continue,
            Ok(Grip::Held(hold)) => Some(hold),
            // Not a folder, or one without permission: try to remove it all the same.
            Err(_) => None,
        };
        tool::end_leftovers(&name(&folder));
        match clear(&folder) {
            Ok(()) => swept += 1,
            Err(err) => tracing::warn!(stage = %folder.display(), %err, "stage not swept"),
        }
        drop(hold);
    }
    Ok(swept)
}

fn clear(folder: &Path) -> Result<()> {
    unmount_below(folder)?;
    if let Ok(bytes) = files::read_bounded(&folder.join(SCRATCH), 4096) {
        use std::os::unix::ffi::OsStrExt;
        let scratch = Path::new(std::ffi::OsStr::from_bytes(&bytes));
        // Only what this program named itself.
        if name(scratch).starts_with("pileus-build-") && files::remove_folder(scratch).is_err() {
            tool::remove_as_subordinate(scratch)?;
        }
    }
    if folder.is_dir() {
        return files::remove_folder(folder);
    }
    files::remove_file(folder)
}

/// Takes away what is mounted below a folder that is going to be removed. A build has mounts of its
/// own namespace only; should one ever show here, removing files must not walk into it.
fn unmount_below(folder: &Path) -> Result<()> {
    for point in mounts_below(folder)?.iter().rev() {
        tracing::warn!(mount = %point.display(), "unmounting a leftover");
        rustix::mount::unmount(point, rustix::mount::UnmountFlags::DETACH)
            .map_err(std::io::Error::from)
            .io(format_args!("Unmounting {}", point.display()))?;
    }
    match mounts_below(folder)?.first() {
        Some(point) => Err(Error::internal(format!(
            "{} is still mounted",
            point.display()
        ))),
        None => Ok(()),
    }
}

fn mounts_below(folder: &Path) -> Result<Vec<PathBuf>> {
    let folder = folder
        .canonicalize()
        .io(format_args!("Looking at {}", folder.display()))?;
    let mounts = std::fs::read("/proc/self/mountinfo").io("Reading the mounts")?;
    Ok(mounts
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(unescape)
        .filter(|point| point.starts_with(&folder))
        .collect())
}

/// Undoes the `\040` of mountinfo.
fn unescape(text: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    let mut bytes = Vec::new();
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        match tail {
            [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] if *first == b'\\' => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

fn name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_in_use_stays_and_a_leftover_goes() {
        let dir = tempfile::tempdir().unwrap();
        let stage = Stage::create(dir.path()).unwrap();
        let left = dir.path().join("0001");
        std::fs::create_dir_all(left.join("image")).unwrap();
        std::fs::write(left.join("image/disk.raw"), "x").unwrap();
        std::fs::write(dir.path().join("stray"), "").unwrap();
        let scratch = dir.path().join("pileus-build-1");
        std::fs::create_dir_all(scratch.join("root")).unwrap();
        std::fs::write(left.join(SCRATCH), scratch.to_str().unwrap()).unwrap();
        sweep(dir.path()).unwrap();
        assert!(!left.exists() && !scratch.exists());
        assert!(stage.draft().folder.exists());
        let folder = stage.folder.clone();
        drop(stage);
        assert!(!folder.exists());
    }

    #[test]
    fn mount_points_are_read_as_written() {
        assert_eq!(unescape(b"/a\\040b\\134c"), Path::new("/a b\\c"));
        assert_eq!(unescape(b"/a\\04"), Path::new("/a\\04"));
        assert!(
            mounts_below(Path::new("/"))
                .unwrap()
                .contains(&"/proc".into())
        );
    }

    #[test]
    fn a_scratch_folder_with_another_name_is_not_ours() {
        let dir = tempfile::tempdir().unwrap();
        let precious = dir.path().join("precious");
        std::fs::create_dir_all(&precious).unwrap();
        let stages = dir.path().join("stage");
        let left = stages.join("0001");
        std::fs::create_dir_all(&left).unwrap();
        std::fs::write(left.join(SCRATCH), precious.to_str().unwrap()).unwrap();
        sweep(&stages).unwrap();
        assert!(precious.exists() && !left.exists());
    }
}
