//! Whether an image is still what it was: all of it, by reading it, or at a glance, by what every write to
//! its disk changes.
//!
//! Next step: `overlay` (an instance's own disk, after the glance).

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use pileus_base::{Digest, Error, Phase, Reporter, Result, ResultExt, Size, files};
use sha2::Digest as _;

use crate::image::{DiskMark, Image, damaged, write_info};
use crate::packed;
use crate::store::{Store, not_here};

/// An image that is what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    pub digest: Digest,
    /// Of what the disk holds (`packed::digest`).
    pub disk_digest: Digest,
    /// The image had no such digest yet, so there was nothing to compare with: what the disk holds now counts as right
    /// from here on.
    pub recorded: bool,
    /// Bytes that were read.
    pub read: Size,
    /// What is odd but no damage, such as a mode that was set right again.
    pub warnings: Vec<String>,
}

/// One look at an image.
struct Look<'a> {
    image: &'a Image,
    report: &'a Reporter,
    read: u64,
    wrong: Vec<String>,
    warnings: Vec<String>,
}

impl Store {
    /// Reads all of an image and compares it with what was recorded when it came. One that is damaged is told as
    /// such, with all that is wrong. Blocks for as long as reading takes.
    pub fn verify(&self, digest: &Digest, report: &Reporter) -> Result<Verified> {
        report.phase(Phase::VerifyingImage);
        let image = self.load(digest)?.ok_or_else(|| not_here(digest.hex()))?;
        let mut look = Look {
            image: &image,
            report,
            read: 0,
            wrong: Vec::new(),
            warnings: Vec::new(),
        };
        let mut info = image.info().clone();
        // Before the reading: who writes meanwhile is found out the next time.
        let mark = DiskMark::of(&image.disk()).ok();
        let disk = look.disk(info.disk_digest.as_ref())?;
        let kernel = look.small(image.kernel().as_deref(), info.kernel_digest.as_ref())?;
        let initrd = look.small(image.initrd().as_deref(), info.initrd_digest.as_ref())?;
        let Look {
            read,
            wrong,
            warnings,
            ..
        } = look;
        let (Some(disk), []) = (disk, wrong.as_slice()) else {
            let mut err = damaged(digest, &wrong.join("; "));
            // Of one thing all is said.
            if wrong.len() > 1 {
                err.details = wrong;
            }
            return Err(err);
        };
        let recorded = info.disk_digest.is_none();
        (info.disk_digest, info.kernel_digest) = (Some(disk.clone()), kernel);
        (info.initrd_digest, info.disk_mark) = (initrd, mark);
        if info != *image.info() {
            write_info(image.folder(), &info)?;
            self.forget(digest);
        }
        Ok(Verified {
            digest: digest.clone(),
            disk_digest: disk,
            recorded,
            read: Size(read),
            warnings,
        })
    }

    /// A glance at an image of which something is to be made; if its disk doesn't look as it did, all of it is
    /// read. An image that was put back from a backup is found whole by that. Blocks.
    pub fn ensure_unchanged(&self, image: &Arc<Image>, report: &Reporter) -> Result<()> {
        match image.check_unchanged() {
            Ok(()) => Ok(()),
            // What it should hold is not known, so reading tells nothing; a copy has the times of what it was made of.
            Err(err) if image.info().disk_digest.is_none() => match image.is_copy() {
                true => Ok(()),
                false => Err(err),
            },
            Err(_) => self.verify(image.digest(), report).map(drop),
        }
    }

    /// The same, where blocking would stop others.
    pub(crate) async fn glance(
        self: &Arc<Self>,
        image: &Arc<Image>,
        report: &Reporter,
    ) -> Result<()> {
        if image.check_unchanged().is_ok() {
            return Ok(());
        }
        let (store, image, report) = (self.clone(), image.clone(), report.clone());
        tokio::task::spawn_blocking(move || store.ensure_unchanged(&image, &report))
            .await
            .map_err(|err| Error::internal(format!("Verifying an image panicked: {err}")))?
    }
}

impl Image {
    /// Whether the disk looks as it did when it came: same file, size and time of its last change. Takes
    /// microseconds.
    pub fn check_unchanged(&self) -> Result<()> {
        let Some(recorded) = self.info().disk_mark else {
            return Ok(());
        };
        // A verification by another process may have recorded another mark since.
        if DiskMark::of(&self.disk())? == recorded || self.is_marked_anew() {
            return Ok(());
        }
        Err(damaged(
            self.digest(),
            "its disk was changed or replaced after it came",
        )
        .advise(format!(
            "`pileus image verify {}` reads all of it and tells whether it is still right.",
            self.digest().short()
        )))
    }

    /// Whether only the file is another.
    fn is_copy(&self) -> bool {
        let (Some(recorded), Ok(now)) = (self.info().disk_mark, DiskMark::of(&self.disk())) else {
            return false;
        };
        (recorded.size, recorded.modified) == (now.size, now.modified)
    }

    fn is_marked_anew(&self) -> bool {
        let now = crate::image::read_info(self.folder(), self.digest()).ok();
        now.and_then(|info| info.disk_mark) == DiskMark::of(&self.disk()).ok()
    }
}

impl Look<'_> {
    /// The digest of what the disk holds, if it can be read.
    fn disk(&mut self, recorded: Option<&Digest>) -> Result<Option<Digest>> {
        let Some(file) = self.open(&self.image.disk())? else {
            return Ok(None);
        };
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(8));
        let (report, mut read) = (self.report, 0);
        let found = packed::digest::of_file(&file, threads, &mut |bytes| {
            read += bytes;
            report.progress(read, None);
            report.check()
        })?;
        self.read += read;
        if let Some(recorded) = recorded
            && *recorded != found
        {
            self.wrong.push(format!(
                "the disk's content has the digest {found}, not {recorded}"
            ));
        }
        Ok(Some(found))
    }

    /// The SHA-256 of a small file, if the image has it.
    fn small(&mut self, path: Option<&Path>, recorded: Option<&Digest>) -> Result<Option<Digest>> {
        let Some(path) = path else {
            return Ok(None);
        };
        let Some(mut file) = self.open(path)? else {
            return Ok(None);
        };
        self.report.check()?;
        let (found, read) = hash(&mut file).io(format_args!("Reading {}", path.display()))?;
        self.read += read;
        if let Some(recorded) = recorded
            && *recorded != found
        {
            self.wrong
                .push(format!("{} has another content", name(path)));
        }
        Ok(Some(found))
    }

    /// Opens a file of the image if it is one, and sets its mode right.
    fn open(&mut self, path: &Path) -> Result<Option<File>> {
        let mut options = File::options();
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        options.read(true).custom_flags(flags.bits().cast_signed());
        let file = match options.open(path) {
            Ok(file) => file,
            Err(err) => {
                self.wrong
                    .push(format!("{} can't be read: {err}", name(path)));
                return Ok(None);
            }
        };
        let found = file
            .metadata()
            .io(format_args!("Looking at {}", path.display()))?;
        if !found.is_file() {
            self.wrong.push(format!("{} is no file", name(path)));
            return Ok(None);
        }
        if found.mode() & 0o222 != 0 {
            self.warnings.push(format!(
                "{} could be written; it is read-only again",
                name(path)
            ));
            files::set_mode(path, 0o444)?;
        }
        if found.nlink() > 1 {
            self.warnings.push(format!(
                "{} has another name elsewhere, by which it can be changed",
                name(path)
            ));
        }
        Ok(Some(file))
    }
}

fn name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The SHA-256 of a small file.
pub(crate) fn file_digest(path: &Path) -> Result<Digest> {
    let what = || format!("Reading {}", path.display());
    let mut file = File::open(path).io(what())?;
    Ok(hash(&mut file).io(what())?.0)
}

/// The SHA-256 of what is read, and how much that is.
fn hash(input: &mut impl Read) -> std::io::Result<(Digest, u64)> {
    let mut hash = sha2::Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut read = 0;
    loop {
        match input.read(&mut buffer) {
            Ok(0) => return Ok((Digest::from_bytes(hash.finalize().into()), read)),
            Ok(n) => {
                hash.update(&buffer[..n]);
                read += n as u64;
            }
            Err(err) if err.kind() == std::io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
}
