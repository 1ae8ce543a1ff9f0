//! Takes a tar archive that a guest made, which may be made to do harm. What comes out is regular files,
//! folders and relative links, all of them below the target and nowhere else:
//!
//! - every name is walked one part at a time with `O_NOFOLLOW`, so no link is ever written through,
//!   neither one of the archive nor one that was there before;
//! - a file is written beside its place and moved there, so what is replaced is replaced at once;
//! - no devices, no hard links, no set-user bits, no links that lead out of the target;
//! - bytes, entries and lengths of names are bounded.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Component, Path, PathBuf};

use pileus_base::{Code, Error, Result, ResultExt, Size};
use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps};
use rustix::io::Errno;
use tar::{Archive, Entry, EntryType, PaxExtensions};

/// Bounds on what is taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Of the whole archive.
    pub bytes: u64,
    pub entries: u64,
}

/// Of the records that hold long names.
const MAX_RECORD: u64 = 64 << 10;
const MAX_DEPTH: usize = 128;

/// Unpacks a folder's archive as the folder `target`, or a file's archive as the file `target`, or into
/// it if that is a folder already, under `name`.
pub(super) fn unpack(from: impl Read, target: &Path, name: &OsStr, bounds: Bounds) -> Result<()> {
    let mut archive = Archive::new(Bounded {
        from,
        left: bounds.bytes,
        limit: bounds.bytes,
    });
    let entries = archive.entries().map_err(|err| broken(&err))?.raw(true);
    let mut long = Long::default();
    let mut tree: Option<Tree> = None;
    let mut count = 0;
    for entry in entries {
        let mut entry = entry.map_err(|err| broken(&err))?;
        count += 1;
        if count > bounds.entries {
            return Err(refused(&format!(
                "has more than {} entries",
                bounds.entries
            )));
        }
        if long.take(&mut entry)? {
            continue;
        }
        let path = long.path.take();
        let path = path.unwrap_or_else(|| entry.path_bytes().into_owned());
        let link = long.link.take();
        let link = link.or_else(|| entry.link_name_bytes().map(|link| link.into_owned()));
        let place = Place::of(&path)?;
        match &mut tree {
            None => tree = Some(Tree::begin(&mut entry, &place, target, name)?),
            Some(tree) => tree.add(&mut entry, &place, link)?,
        }
    }
    if tree.is_none() {
        return Err(refused("is empty"));
    }
    // Padding: its writer waits until it is read.
    let rest = io::copy(&mut archive.into_inner(), &mut io::sink());
    rest.map(drop).map_err(|err| broken(&err))
}

fn refused(what: &str) -> Error {
    Error::new(
        Code::InvalidArgument,
        format!("The guest's archive was refused: it {what}"),
    )
}

fn broken(err: &io::Error) -> Error {
    match err
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<TooLarge>())
    {
        Some(TooLarge(limit)) => Error::new(
            Code::InvalidArgument,
            format!("What is copied out is larger than {}", Size(*limit)),
        )
        .advise("A larger bound is given with --max-copy."),
        None => refused(&format!("can't be read: {err}")),
    }
}

#[derive(Debug)]
struct TooLarge(u64);

impl std::fmt::Display for TooLarge {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "larger than {} bytes", self.0)
    }
}

impl std::error::Error for TooLarge {}

/// Reads no more than so many bytes.
struct Bounded<R> {
    from: R,
    left: u64,
    limit: u64,
}

impl<R: Read> Read for Bounded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.from.read(buffer)?;
        self.left = self
            .left
            .checked_sub(len as u64)
            .ok_or_else(|| io::Error::other(TooLarge(self.limit)))?;
        Ok(len)
    }
}

/// Names that are too long for a header come as records before it.
#[derive(Default)]
struct Long {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
}

impl Long {
    /// Takes the entry if it is such a record.
    fn take(&mut self, entry: &mut Entry<'_, impl Read>) -> Result<bool> {
        let kind = entry.header().entry_type();
        let known = [
            EntryType::GNULongName,
            EntryType::GNULongLink,
            EntryType::XHeader,
            EntryType::XGlobalHeader,
        ];
        if !known.contains(&kind) {
            return Ok(false);
        }
        if entry.size() > MAX_RECORD {
            return Err(refused("has a name that is too long"));
        }
        let mut record = Vec::new();
        entry.read_to_end(&mut record).map_err(|err| broken(&err))?;
        match kind {
            EntryType::GNULongName => self.path = Some(until_nul(record)),
            EntryType::GNULongLink => self.link = Some(until_nul(record)),
            EntryType::XHeader => {
                for extension in PaxExtensions::new(&record) {
                    let extension = extension.map_err(|err| broken(&err))?;
                    let value = extension.value_bytes().to_vec();
                    match extension.key_bytes() {
                        b"path" => self.path = Some(value),
                        b"linkpath" => self.link = Some(value),
                        // The size in the header would not be the real one.
                        b"size" => return Err(refused("has a file that is too large")),
                        key if key.starts_with(b"GNU.sparse") => {
                            return Err(refused("has a sparse file"));
                        }
                        _ => {}
                    }
                }
            }
            // Holds for all that follows; nothing of it matters here.
            _ => {}
        }
        Ok(true)
    }
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

/// A name below the target, part by part; empty for the target itself.
#[derive(Debug, PartialEq, Eq)]
struct Place(Vec<OsString>);

impl Place {
    fn of(bytes: &[u8]) -> Result<Self> {
        let path = PathBuf::from(OsString::from_vec(bytes.to_vec()));
        let name = || path.display();
        if bytes.is_empty() || bytes.contains(&0) {
            return Err(refused("has an entry without a name"));
        }
        let mut parts = Vec::new();
        for part in path.components() {
            match part {
                Component::Normal(part) => parts.push(part.to_owned()),
                Component::CurDir => {}
                _ => {
                    return Err(refused(&format!(
                        "has the name {}, which leads out",
                        name()
                    )));
                }
            }
        }
        if parts.len() > MAX_DEPTH {
            return Err(refused("has folders that are too deep"));
        }
        Ok(Self(parts))
    }

    /// Whether a link here that leads to `link` stays below the target, whatever links it leads over:
    /// it may go up only at its beginning, where the folders are known to be real ones.
    fn keeps(&self, link: &[u8]) -> bool {
        if link.is_empty() || link.contains(&0) {
            return false;
        }
        let mut depth = self.0.len().saturating_sub(1);
        let mut down = false;
        for part in Path::new(OsStr::from_bytes(link)).components() {
            match part {
                Component::Normal(_) => down = true,
                Component::CurDir => {}
                Component::ParentDir if depth > 0 && !down => depth -= 1,
                _ => return false,
            }
        }
        true
    }
}

/// What is being made.
enum Tree {
    Folder(Folder),
    /// The one file is there; nothing may follow.
    File,
}

impl Tree {
    /// The first entry says whether it is a folder or a file.
    fn begin(
        entry: &mut Entry<'_, impl Read>,
        place: &Place,
        target: &Path,
        name: &OsStr,
    ) -> Result<Self> {
        let kind = entry.header().entry_type();
        if kind.is_dir() && place.0.is_empty() {
            return Folder::open(target).map(Self::Folder);
        }
        if !kind.is_file() || place.0.len() != 1 {
            return Err(refused("begins with neither a folder nor a file"));
        }
        let (folder, name) = match (target.is_dir(), target.parent(), target.file_name()) {
            (true, ..) => (target, name),
            (false, Some(parent), Some(name)) => (parent, name),
            _ => (target, name),
        };
        Folder::open(folder)?.file(entry, &Place(vec![name.to_owned()]))?;
        Ok(Self::File)
    }

    fn add(
        &mut self,
        entry: &mut Entry<'_, impl Read>,
        place: &Place,
        link: Option<Vec<u8>>,
    ) -> Result<()> {
        let Self::Folder(folder) = self else {
            return Err(refused("has more than the one file"));
        };
        match entry.header().entry_type() {
            EntryType::Directory => folder.folder(entry, place),
            EntryType::Regular => folder.file(entry, place),
            EntryType::Symlink => folder.link(place, &link.unwrap_or_default()),
            kind => {
                let path = place.0.iter().collect::<PathBuf>();
                let what = match kind {
                    EntryType::Link => "a hard link",
                    EntryType::Char | EntryType::Block => "a device",
                    EntryType::Fifo => "a FIFO",
                    _ => "an unknown kind of file",
                };
                Err(refused(&format!("has {what}: {}", path.display())))
            }
        }
    }
}

/// The target, and the folder below it that was used last.
struct Folder {
    root: OwnedFd,
    last: Option<(Vec<OsString>, OwnedFd)>,
    /// Names for files that are not complete.
    partial: String,
}

impl Folder {
    /// The target itself is the user's word: links in it are followed.
    fn open(path: &Path) -> Result<Self> {
        let what = || format!("Making the folder {}", path.display());
        std::fs::create_dir_all(path).io(what())?;
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            root: rustix::fs::open(path, flags, Mode::empty()).io(what())?,
            last: None,
            partial: format!(".pileus-copy-{}", std::process::id()),
        })
    }

    /// The folder in which the last part of a place stands, and that part.
    fn parent<'a>(&'a mut self, place: &'a Place) -> Result<(BorrowedFd<'a>, &'a OsStr)> {
        let Some((name, parents)) = place.0.split_last() else {
            return Err(refused("has a file in the place of its folder"));
        };
        if parents.is_empty() {
            return Ok((self.root.as_fd(), name));
        }
        let known = self.last.as_ref().is_some_and(|(at, _)| at == parents);
        if !known {
            let mut at: Option<OwnedFd> = None;
            for part in parents {
                let from = at.as_ref().map_or(self.root.as_fd(), AsFd::as_fd);
                at = Some(enter(from, part, Mode::from_raw_mode(0o777))?);
            }
            self.last = at.map(|at| (parents.to_vec(), at));
        }
        match &self.last {
            Some((_, at)) => Ok((at.as_fd(), name)),
            None => Ok((self.root.as_fd(), name)),
        }
    }

    fn folder(&mut self, entry: &Entry<'_, impl Read>, place: &Place) -> Result<()> {
        if place.0.is_empty() {
            return Ok(());
        }
        let mode = mode(entry)? | Mode::RWXU;
        let (parent, name) = self.parent(place)?;
        enter(parent, name, mode).map(drop)
    }

    fn file(&mut self, entry: &mut Entry<'_, impl Read>, place: &Place) -> Result<()> {
        let mode = mode(entry)?;
        let size = entry.size();
        let time = entry.header().mtime().ok();
        let partial = self.partial.clone();
        let (parent, name) = self.parent(place)?;
        let what = format!("Writing {}", Path::new(name).display());
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(parent, &partial, flags, mode).io(&what)?;
        let written = (|| {
            let mut file = File::from(file);
            let len = copy(entry, &mut file, &what)?;
            if len != size {
                return Err(refused("ends in the middle of a file"));
            }
            if let Some(time) = time.and_then(|time| i64::try_from(time).ok()) {
                let time = Timespec {
                    tv_sec: time,
                    tv_nsec: 0,
                };
                let times = Timestamps {
                    last_access: time,
                    last_modification: time,
                };
                // A time that this file system can't hold is no loss.
                let _ = rustix::fs::futimens(&file, &times);
            }
            rustix::fs::renameat(parent, &partial, parent, name).io(&what)
        })();
        if written.is_err() {
            let _ = rustix::fs::unlinkat(parent, &partial, AtFlags::empty());
        }
        written
    }

    fn link(&mut self, place: &Place, link: &[u8]) -> Result<()> {
        let path = || place.0.iter().collect::<PathBuf>();
        if !place.keeps(link) {
            return Err(refused(&format!(
                "has a link that leads out: {} → {}",
                path().display(),
                String::from_utf8_lossy(link)
            )));
        }
        let partial = self.partial.clone();
        let (parent, name) = self.parent(place)?;
        let what = format!("Making the link {}", Path::new(name).display());
        rustix::fs::symlinkat(OsStr::from_bytes(link), parent, &partial).io(&what)?;
        let moved = rustix::fs::renameat(parent, &partial, parent, name).io(&what);
        if moved.is_err() {
            let _ = rustix::fs::unlinkat(parent, &partial, AtFlags::empty());
        }
        moved
    }
}

/// Opens a folder in another, made if it is not there. A link is not followed.
fn enter(from: BorrowedFd<'_>, name: &OsStr, mode: Mode) -> Result<OwnedFd> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || rustix::fs::openat(from, name, flags, Mode::empty());
    let opened = match open() {
        Err(Errno::NOENT) => {
            rustix::fs::mkdirat(from, name, mode).io(format_args!(
                "Making the folder {}",
                Path::new(name).display()
            ))?;
            open()
        }
        opened => opened,
    };
    opened.map_err(|err| match err {
        Errno::LOOP | Errno::NOTDIR => Error::new(
            Code::InvalidArgument,
            format!(
                "{} is in the way of what is copied out: it is a file or a link, and a folder is needed",
                Path::new(name).display()
            ),
        ),
        err => Error::io(format_args!("Opening {}", Path::new(name).display()), err.into()),
    })
}

/// The permissions, without what would lend someone's rights to others.
fn mode(entry: &Entry<'_, impl Read>) -> Result<Mode> {
    let mode = entry.header().mode().map_err(|err| broken(&err))?;
    Ok(Mode::from_raw_mode(mode & 0o777))
}

/// Copies; tells errors of reading from those of writing.
fn copy(entry: &mut Entry<'_, impl Read>, file: &mut File, what: &str) -> Result<u64> {
    let mut buffer = vec![0; 64 << 10];
    let mut all = 0;
    loop {
        let len = entry.read(&mut buffer).map_err(|err| broken(&err))?;
        if len == 0 {
            return Ok(all);
        }
        io::Write::write_all(file, &buffer[..len]).io(what)?;
        all += len as u64;
    }
}

#[cfg(test)]
#[path = "unpack_tests.rs"]
mod tests;
