//! An image in the making, in a folder of its own: a raw disk that a machine writes to, and the machine. The
//! ancestor's `MutableImage`, with errors where that one panicked.
//!
//! ```text
//! new, from_file ──→ MutableImage ── disk_file() ──→ DiskFile    in use: until this is dropped
//!                     │  resize, package, dispose                refused while it is
//! ```
//!
//! Next step: `pack` writes the archive.

use std::fs::File;
use std::ops::Deref;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pileus_base::{Code, Error, Reporter, Result, ResultExt, Size, Update, files};

use super::machine::Machine;
use super::manifest::{Manifest, Provenance};
use super::pack::{PackSource, Packed, pack_to_file};
use super::unpack::{Budgets, Unpacked, take_in};
use super::{DISK, LAYER};
use crate::store::{Limits, Tools};

/// A disk has at least so many bytes.
pub const LEAST: Size = Size::mib(1);
/// And consists of whole ones of these.
const SECTOR: u64 = 512;

/// What images in the making may cost, and the programs that help.
#[derive(Debug, Clone, Default)]
pub struct Workshop {
    /// `virtual_size` bounds a disk whatever way it comes to be: made, loaded, grown, or packed. One of just
    /// this size is fine.
    pub limits: Limits,
    pub tools: Tools,
}

/// An image in the making. Dropped, it stays in its folder; [`MutableImage::dispose`] removes it.
#[derive(Debug)]
pub struct MutableImage {
    folder: PathBuf,
    machine: Machine,
    workshop: Workshop,
    /// What its archive will tell of where it comes from.
    pub provenance: Provenance,
    in_use: Arc<AtomicBool>,
    disposed: bool,
}

impl MutableImage {
    /// A new one with an empty disk. The folder must be empty or not there. `size` is at least [`LEAST`], in whole
    /// sectors.
    pub fn new(folder: &Path, size: Size, machine: Machine) -> Result<Self> {
        Self::new_in(Workshop::default(), folder, size, machine)
    }

    /// The same with bounds of the caller's.
    pub fn new_in(workshop: Workshop, folder: &Path, size: Size, machine: Machine) -> Result<Self> {
        workshop.check(size)?;
        let place = Place::make(folder)?;
        let mut options = File::options();
        let disk = options.write(true).create_new(true).mode(0o600);
        disk.open(folder.join(DISK))
            .and_then(|disk| disk.set_len(size.bytes()))
            .io(format_args!("Creating a disk in {}", folder.display()))?;
        Ok(place.becomes(workshop, machine, Provenance::ours()))
    }

    /// One made of a packed image; what its layer has is merged into the disk. The folder must be empty or not
    /// there, and is so again if it fails or, a moment later, if the future is dropped.
    pub async fn from_file(archive: &Path, folder: &Path) -> Result<Self> {
        Self::from_file_in(Workshop::default(), archive, folder, &Reporter::silent()).await
    }

    /// The same with bounds of the caller's.
    pub async fn from_file_in(
        workshop: Workshop,
        archive: &Path,
        folder: &Path,
        report: &Reporter,
    ) -> Result<Self> {
        let input = open(archive)?;
        let place = Place::make(folder)?;
        // The work ends with this future, but in a task of its own: the folder goes when nobody is at work in
        // it any more.
        let cancel = report.cancel_token().child_token();
        let _ends = cancel.clone().drop_guard();
        let told = report.clone();
        let report = Reporter::new(move |update| forward(&told, update), cancel);
        let work = tokio::spawn(async move {
            let loaded = load(&workshop, input, &place, &report).await?;
            Ok::<_, Error>((place, workshop, loaded))
        });
        let (place, workshop, (machine, provenance)) = work
            .await
            .map_err(|err| Error::internal(format!("Loading an image panicked: {err}")))??;
        Ok(place.becomes(workshop, machine, provenance))
    }

    /// The disk, for a machine to use. While what it gives is held the image is in use: nobody else gets it, and
    /// it can't be packed.
    pub fn disk_file(&self) -> Result<DiskFile> {
        self.alive()?;
        if self.in_use.swap(true, Ordering::AcqRel) {
            return Err(in_use());
        }
        Ok(DiskFile {
            path: self.disk(),
            in_use: self.in_use.clone(),
        })
    }

    /// The format of the disk.
    pub fn format(&self) -> &'static str {
        "raw"
    }

    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What a guest sees of the disk.
    pub fn size(&self) -> Result<Size> {
        self.alive()?;
        let found = std::fs::symlink_metadata(self.disk()).io("Looking at the disk")?;
        Ok(Size(found.len()))
    }

    /// Grows the disk; partitions and file systems are the guest's affair.
    pub fn resize(&mut self, size: Size) -> Result<()> {
        self.idle()?;
        self.workshop.check(size)?;
        let now = self.size()?;
        if size < now {
            return Err(Error::new(
                Code::InvalidSize,
                format!("The disk has {now}, and can't shrink to {size}"),
            ));
        }
        let mut options = File::options();
        let disk = options.write(true).custom_flags(nofollow());
        disk.open(self.disk())
            .and_then(|disk| disk.set_len(size.bytes()))
            .io("Growing the disk")
    }

    /// Writes the image to an archive, which is there whole and synced or, after an error, as it was before.
    /// Blocks.
    pub fn package(&mut self, target: &Path, report: &Reporter) -> Result<Packed> {
        self.idle()?;
        // Whoever used it may have grown it.
        self.workshop.check(self.size()?)?;
        let mut options = File::options();
        let disk = options.read(true).custom_flags(nofollow());
        let disk = disk.open(self.disk()).io("Opening the disk")?;
        let source = PackSource {
            disk: &disk,
            machine: &self.machine,
            provenance: self.provenance.clone(),
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        pack_to_file(&source, target, threads, report)
    }

    /// Removes the folder with all that is in it. After that nothing works any more but this, which does nothing
    /// then.
    pub fn dispose(&mut self) -> Result<()> {
        if self.disposed {
            return Ok(());
        }
        self.idle()?;
        files::remove_folder(&self.folder)?;
        self.disposed = true;
        Ok(())
    }

    fn disk(&self) -> PathBuf {
        self.folder.join(DISK)
    }

    fn alive(&self) -> Result<()> {
        match self.disposed {
            true => Err(Error::new(Code::WrongState, "The image was disposed of")),
            false => Ok(()),
        }
    }

    /// Who may change the image knows that nobody begins to use it meanwhile.
    fn idle(&mut self) -> Result<()> {
        self.alive()?;
        match self.in_use.load(Ordering::Acquire) {
            true => Err(in_use()),
            false => Ok(()),
        }
    }
}

fn in_use() -> Error {
    Error::new(Code::ImageInUse, "The image's disk is in use")
        .advise("Stop the machine that uses it first.")
}

/// The path of a disk that is in use as long as this is held.
#[derive(Debug)]
pub struct DiskFile {
    path: PathBuf,
    in_use: Arc<AtomicBool>,
}

impl DiskFile {
    /// The disk is no longer used. The same as to drop it.
    pub fn release(self) {}
}

impl Deref for DiskFile {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

impl AsRef<Path> for DiskFile {
    fn as_ref(&self) -> &Path {
        &self.path
    }
}

impl Drop for DiskFile {
    fn drop(&mut self) {
        self.in_use.store(false, Ordering::Release);
    }
}

impl Workshop {
    fn check(&self, size: Size) -> Result<()> {
        if size < LEAST || !size.bytes().is_multiple_of(SECTOR) {
            return Err(Error::new(
                Code::InvalidSize,
                format!("An image's disk can't have {} bytes", size.bytes()),
            )
            .advise(format!(
                "Give at least {LEAST}, in whole sectors of {SECTOR} bytes."
            )));
        }
        let limit = Size(self.limits.virtual_size);
        if size > limit {
            return Err(Error::new(
                Code::ImageTooLarge,
                format!("A disk of {size} is above the limit of {limit}"),
            ));
        }
        Ok(())
    }
}

/// A folder that is to become an image's; dropped before it is one, nothing of ours stays in it.
struct Place {
    folder: PathBuf,
    /// It was not there before.
    ours: bool,
}

impl Place {
    fn make(folder: &Path) -> Result<Self> {
        let ours = match std::fs::read_dir(folder) {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Err(Error::new(
                        Code::InvalidArgument,
                        format!("The folder {} is not empty", folder.display()),
                    ));
                }
                false
            }
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => {
                files::create_folder(folder, 0o700)?;
                true
            }
            Err(err) => return Err(Error::io(format!("Opening {}", folder.display()), err)),
        };
        Ok(Self {
            folder: folder.to_owned(),
            ours,
        })
    }

    fn becomes(self, workshop: Workshop, machine: Machine, provenance: Provenance) -> MutableImage {
        let folder = self.folder.clone();
        std::mem::forget(self);
        MutableImage {
            folder,
            machine,
            workshop,
            provenance,
            in_use: Arc::default(),
            disposed: false,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let removed = match self.ours {
            true => files::remove_folder(&self.folder),
            false => [DISK, LAYER]
                .iter()
                .try_for_each(|name| files::remove_file(&self.folder.join(name))),
        };
        if let Err(err) = removed {
            tracing::warn!(folder = %self.folder.display(), %err, "not removed");
        }
    }
}

/// Opens an archive, which must be an ordinary file: a pipe would wait for ever.
fn open(archive: &Path) -> Result<File> {
    let what = || format!("Opening {}", archive.display());
    let mut options = File::options();
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let file = options.read(true).custom_flags(nonblocking);
    let file = file.open(archive).io(what())?;
    if file.metadata().io(what())?.is_file() {
        return Ok(file);
    }
    Err(Error::new(
        Code::InvalidArgument,
        format!("{} is not an ordinary file", archive.display()),
    ))
}

fn nofollow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits() as i32
}

async fn load(
    workshop: &Workshop,
    input: File,
    place: &Place,
    report: &Reporter,
) -> Result<(Machine, Provenance)> {
    let budgets = Budgets::of(&workshop.limits);
    let stage = uuid::Uuid::new_v4().to_string();
    let (folder, tools) = (&place.folder, &workshop.tools);
    let unpacked = take_in(input, folder, &budgets, tools, &stage, report).await?;
    workshop.check(Size(unpacked.disk_size))?;
    let parsed = Machine::parse(&unpacked.machine)?;
    for warning in &parsed.warnings {
        report.warn(warning);
    }
    Ok((parsed.machine, origin(&unpacked)?))
}

fn origin(unpacked: &Unpacked) -> Result<Provenance> {
    let manifest = unpacked.manifest.as_deref().map(Manifest::parse);
    let before = manifest
        .transpose()?
        .map(|manifest| manifest.provenance)
        .unwrap_or_default();
    Ok(Provenance {
        source: before.source,
        source_digest: Some(unpacked.archive.clone()),
        title: before.title,
        os: before.os,
        release: before.release,
        codename: before.codename,
        version: before.version,
        arch: before.arch,
        ..Provenance::ours()
    })
}

fn forward(to: &Reporter, update: Update) {
    match update {
        Update::Phase(phase) => to.phase(phase),
        Update::Progress { done, total } => to.progress(done, total),
        Update::Took(phase, time) => to.took(phase, time),
        Update::Result(name) => to.result(name),
        Update::Log(line) => to.log(line),
        Update::Warning(line) => to.warn(line),
    }
}
