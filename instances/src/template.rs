//! The folder of a template: what a machine was saved to, and whether it may be restored.
//!
//! ```text
//!   template.json  key, sizes, digest of the state, inode and times of the rest; written last
//!   state          QEMU's devices
//!   ram            the guest's memory, sparse; here, or where its path says
//!
//! and elsewhere, because instances stand on it: the disk layer that the template's guest wrote
//! ```
//!
//! A template is used only if its key is the one asked for and its files are those that were saved:
//! a guest restored on other memory than its own would destroy its disk. The memory is too large to
//! be read at each launch, so it is known by inode, length and time. Next step: `warm.rs` fills and
//! uses it; `daemon/src/service/templates/` says which ones there are.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{Read, Seek};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use pileus_base::{Code, Digest, Error, Result, ResultExt, Size, files};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::machine::Shape;
use crate::qemu::{Accelerator, Growth, Qemu, argv, loan};

/// Version of `template.json`.
const FORMAT: u32 = 1;
const MANIFEST: &str = "template.json";
const MANIFEST_LIMIT: u64 = 64 << 10;
/// Devices take half a megabyte.
const STATE_LIMIT: u64 = 256 << 20;

/// All that a saved machine depends on. Whatever changes, changes the id.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TemplateKey {
    pub image: Digest,
    pub cpus: u32,
    pub memory: Size,
    /// Size of the disk that the template's guest saw.
    pub disk: Size,
    pub machine_type: String,
    pub accelerator: Accelerator,
    pub qemu: Program,
    /// The room to grow in, which the guest sees too.
    pub growth: Growth,
    /// The processor as the guest sees it.
    pub cpu: String,
    /// Of the machine, [`argv::LAYOUT`].
    pub layout: u32,
    /// Of the agent that runs in the guest.
    pub agent: Digest,
}

/// A build of QEMU: one that was exchanged under the same version is another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Program {
    /// The first line of `--version`.
    pub build: String,
    pub size: u64,
    pub modified: Time,
}

/// A file's time, since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Time {
    pub seconds: i64,
    pub nanoseconds: i64,
}

impl Time {
    fn modified(meta: &Metadata) -> Self {
        Self {
            seconds: meta.mtime(),
            nanoseconds: meta.mtime_nsec(),
        }
    }
}

impl TemplateKey {
    /// The key of a machine that this host makes with this QEMU, now.
    pub fn new(
        image: Digest,
        shape: Shape,
        disk: Size,
        qemu: &Qemu,
        accelerator: Accelerator,
        growth: Growth,
    ) -> Self {
        // A program that can't be looked at can't be started either.
        let program = std::fs::metadata(&qemu.program).ok();
        let program = program.as_ref();
        Self {
            image,
            cpus: shape.cpus,
            memory: shape.memory,
            disk,
            machine_type: qemu.machine_type.clone(),
            accelerator,
            qemu: Program {
                build: qemu.build.clone(),
                size: program.map_or(0, Metadata::len),
                modified: program.map_or(Time::default(), Time::modified),
            },
            growth,
            cpu: cpu_model(accelerator),
            layout: argv::LAYOUT,
            agent: digest(crate::guest::seed::agent_digest().as_bytes()),
        }
    }

    /// Sixteen hex digits; the folder's name.
    pub fn id(&self) -> String {
        // Fields in the order of their declaration, no map and no float: the same text each time.
        let text = serde_json::to_vec(self).unwrap_or_default();
        digest(&text).hex()[..16].to_owned()
    }
}

fn digest(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}

/// TCG shows the same processor on every host; KVM shows the host's own.
fn cpu_model(accelerator: Accelerator) -> String {
    match accelerator {
        Accelerator::Tcg => "max".into(),
        Accelerator::Kvm => {
            let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            format!("host:{}", cpu_digest(&cpuinfo))
        }
    }
}

/// What the first processor says of its model, without what changes from one moment to the next.
fn cpu_digest(cpuinfo: &str) -> String {
    const TELLING: [&str; 7] = [
        "vendor_id",
        "cpu family",
        "model",
        "model name",
        "stepping",
        "microcode",
        "flags",
    ];
    let first = cpuinfo.split("\n\n").next().unwrap_or_default();
    let telling = first.lines().filter(|line| {
        let key = line.split(':').next().unwrap_or_default().trim();
        TELLING.contains(&key)
    });
    let text = telling.collect::<Vec<_>>().join("\n");
    digest(text.as_bytes()).hex()[..16].to_owned()
}

/// `template.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: u32,
    pub key: TemplateKey,
    /// As the daemon writes times.
    pub created_at: String,
    pub state: Summed,
    pub ram: Sealed,
    pub disk: Sealed,
}

/// A file that is read whole before it is used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Summed {
    pub digest: Digest,
    /// In bytes.
    pub length: u64,
}

/// A file that is never written again, known by what changes if it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sealed {
    pub path: PathBuf,
    /// In bytes, holes included.
    pub length: u64,
    pub device: u64,
    pub inode: u64,
    pub modified: Time,
}

impl Manifest {
    /// Reads a manifest, wherever it lies. Blocking.
    pub fn read(path: &Path) -> Result<Self> {
        let bad = |what: String| Error::new(Code::NoTemplate, what);
        let bytes = files::read_bounded(path, MANIFEST_LIMIT)
            .map_err(|err| bad(format!("The template can't be read: {err}")).with_source(err))?;
        let manifest: Self = serde_json::from_slice(&bytes).map_err(|err| {
            bad(format!(
                "The template's {} is damaged: {err}",
                path.display()
            ))
            .with_source(err)
        })?;
        if manifest.format != FORMAT {
            let what = format!("The template has format {}, not {FORMAT}", manifest.format);
            return Err(bad(what));
        }
        Ok(manifest)
    }
}

/// Where a template's files lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    path: PathBuf,
    ram: PathBuf,
    disk: PathBuf,
}

/// A template whose files are those that were saved.
#[derive(Debug)]
pub struct Ready {
    pub manifest: Manifest,
    /// Open at its beginning; for `Vm::restore`.
    pub state: File,
}

impl Folder {
    /// `ram` may lie elsewhere (on a tmpfs), `disk` always does; neither is a link.
    pub fn new(
        path: impl Into<PathBuf>,
        ram: impl Into<PathBuf>,
        disk: impl Into<PathBuf>,
    ) -> Self {
        Self {
            path: path.into(),
            ram: ram.into(),
            disk: disk.into(),
        }
    }

    /// As its manifest says. Blocking.
    pub fn read(path: impl Into<PathBuf>) -> Result<(Self, Manifest)> {
        let path = path.into();
        let manifest = Manifest::read(&path.join(MANIFEST))?;
        let (ram, disk) = (&manifest.ram.path, &manifest.disk.path);
        Ok((Self::new(path, ram, disk), manifest))
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn manifest_path(&self) -> PathBuf {
        self.path.join(MANIFEST)
    }

    pub fn disk(&self) -> PathBuf {
        self.disk.clone()
    }

    pub fn state(&self) -> PathBuf {
        self.path.join("state")
    }

    pub fn ram(&self) -> PathBuf {
        self.ram.clone()
    }

    pub fn manifest(&self) -> Result<Manifest> {
        Manifest::read(&self.manifest_path())
    }

    /// Bytes that all files of the template really take.
    pub fn used_bytes(&self) -> u64 {
        [self.manifest_path(), self.disk(), self.state(), self.ram()]
            .iter()
            .map(|file| files::allocated(file))
            .sum()
    }

    /// Makes what lies in the folder a template, by writing its manifest. The template's QEMU must
    /// have ended. Blocking: brings the memory to the disk, unless it is on a tmpfs.
    pub fn finish(&self, key: &TemplateKey, created_at: &str) -> Result<Manifest> {
        let state = open_own(&self.state(), "state")?;
        state.sync_all().io("Syncing a template's state")?;
        let manifest = Manifest {
            format: FORMAT,
            key: key.clone(),
            created_at: created_at.to_owned(),
            state: sum(state)?.0,
            ram: seal(&self.ram(), "memory")?,
            disk: seal(&self.disk(), "disk")?,
        };
        if manifest.ram.length != ram_length(key) {
            return Err(bad("memory", "has another length than the machine's"));
        }
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|err| Error::internal("A template can't be described").with_source(err))?;
        files::write_atomic(&self.manifest_path(), &text, 0o600)?;
        Ok(manifest)
    }

    /// Opens the template if it is the one asked for and nobody has touched it. Blocking, a few
    /// milliseconds; the error (`no-template`) says in one sentence what is wrong.
    pub fn open_checked(&self, key: &TemplateKey) -> Result<Ready> {
        let manifest = self.manifest()?;
        if manifest.key != *key {
            let what = "The template was made for another image, shape or host";
            return Err(Error::new(Code::NoTemplate, what));
        }
        if manifest.ram.path != self.ram() || manifest.disk.path != self.disk() {
            let what = "The template was moved to another folder";
            return Err(Error::new(Code::NoTemplate, what));
        }
        if manifest.ram.length != ram_length(key) {
            return Err(bad("memory", "has another length than the machine's"));
        }
        check_seal(&manifest.ram, "memory")?;
        check_seal(&manifest.disk, "disk")?;
        let state = open_own(&self.state(), "state")?;
        let (summed, state) = sum(state)?;
        if summed.length != manifest.state.length {
            return Err(bad("state", "has another length than when it was saved"));
        }
        if summed.digest != manifest.state.digest {
            return Err(bad("state", "is not what was saved"));
        }
        Ok(Ready { manifest, state })
    }
}

fn ram_length(key: &TemplateKey) -> u64 {
    crate::qemu::spec::ram_bytes(key.memory)
}

fn bad(which: &str, how: &str) -> Error {
    Error::new(Code::NoTemplate, format!("The template's {which} {how}"))
}

/// Opens a file that must be a plain one of our own that nobody else can reach.
fn open_own(path: &Path, which: &str) -> Result<File> {
    // Not blocking: a FIFO in its place would hold us up.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(|err| match err.kind() {
            std::io::ErrorKind::NotFound => bad(which, "is not there"),
            _ if err.raw_os_error() == Some(libc::ELOOP) => bad(which, "is a link"),
            _ => bad(which, &format!("can't be opened: {err}")).with_source(err),
        })?;
    let looked = || file.metadata().io("Looking at a template");
    let meta = looked()?;
    if !meta.is_file() {
        return Err(bad(which, "is no plain file"));
    }
    if meta.mode() & 0o7777 != 0o600 {
        let mode = meta.mode() & 0o7777;
        return Err(bad(which, &format!("has the mode {mode:o}, not 600")));
    }
    if meta.nlink() != 1 {
        return Err(bad(which, "has a second name"));
    }
    let owner = rustix::process::geteuid().as_raw();
    // Not ours and not lent: if it came back between the two looks, the next one shows it.
    let mut tries = 0..3;
    while looked()?.uid() != owner && !loan::is_lent(&meta) {
        if tries.next().is_none() {
            return Err(bad(which, "belongs to another user"));
        }
    }
    Ok(file)
}

/// Reads the state whole.
fn sum(file: File) -> Result<(Summed, File)> {
    let what = "Reading a template's state";
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 128 << 10];
    let mut length = 0;
    let mut reader = (&file).take(STATE_LIMIT + 1);
    loop {
        let read = reader.read(&mut buffer).io(what)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        length += read as u64;
    }
    if length > STATE_LIMIT {
        return Err(bad("state", "is far too large"));
    }
    if length == 0 {
        return Err(bad("state", "is empty"));
    }
    (&file).rewind().io(what)?;
    let digest = Digest::from_bytes(hash.finalize().into());
    Ok((Summed { digest, length }, file))
}

fn seal(path: &Path, which: &str) -> Result<Sealed> {
    let file = open_own(path, which)?;
    let what = format!("Syncing a template's {which}");
    // Also settles the time of what was written through a mapping.
    file.sync_all().io(&what)?;
    let meta = file.metadata().io(&what)?;
    Ok(Sealed {
        path: path.to_owned(),
        length: meta.len(),
        device: meta.dev(),
        inode: meta.ino(),
        modified: Time::modified(&meta),
    })
}

fn check_seal(seal: &Sealed, which: &str) -> Result<()> {
    let file = open_own(&seal.path, which)?;
    let meta = file.metadata().io("Looking at a template")?;
    if (meta.dev(), meta.ino()) != (seal.device, seal.inode) {
        return Err(bad(which, "was replaced by another file"));
    }
    if meta.len() != seal.length {
        return Err(bad(which, "has another length than when it was saved"));
    }
    if Time::modified(&meta) != seal.modified {
        return Err(bad(which, "was written to after it was saved"));
    }
    Ok(())
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
