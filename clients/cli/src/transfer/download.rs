//! Guest to host. The guest is not trusted: a name from it is one name in a folder that is open here, never
//! a path; no link is written through; set-user bits are dropped; lists are bounded; the host's disk is not
//! filled up, whatever size a file is said to have. Links are made as they
//! are, wherever they lead to: nothing here follows them.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use pileus_base::Size;
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::report::{Jobs, Report, shown};
use super::upload::os_text;
use super::{Options, Target};
use crate::sftp::session::{CHUNK, Done, Failure, Handle, Sftp};
use crate::sftp::wire::{Attrs, Kind, Name, flags};

/// Pieces of one file that are on the way at once.
const AHEAD: usize = 64;
const MAX_DEPTH: usize = 128;
/// Names in all folders of one source.
const MAX_ENTRIES: usize = 1_000_000;
/// Bytes of paths that are kept for the end of one source.
const MAX_PATHS: usize = 64 << 20;
/// What stays free of the host's file system, or a fiftieth of a small one; looked at as often.
const RESERVE: u64 = 64 << 20;
const LOOK_EVERY: u64 = 16 << 20;
/// Longest name that Linux has.
const MAX_NAME: usize = 255;

#[derive(Clone)]
pub(super) struct Download {
    pub sftp: Arc<Sftp>,
    pub report: Arc<Report>,
    pub options: Options,
}

/// A folder of the guest that is being copied. Only those from the source down to the present one are
/// open, however many there are.
struct Folder {
    path: Vec<u8>,
    /// Its name below the source's own folder, part by part.
    below: Vec<OsString>,
    to: Arc<OwnedFd>,
    mode: u32,
    rest: std::vec::IntoIter<Name>,
}

/// What is still to be taken of one source, and what is to be done at its end.
struct Tree {
    /// How many names may still come.
    entries: usize,
    /// How many bytes of paths may still be kept.
    bytes: usize,
    /// Folders that their owner may not fill, which they have to be before.
    late: Vec<(Vec<OsString>, u32)>,
}

impl Download {
    /// Copies one source to the target, or into it if that is a folder.
    pub async fn run(&self, source: &[u8], target: &Target, jobs: &mut Jobs) {
        if let Err(text) = self.source(source, target, jobs).await {
            self.report.fail(&text);
        }
    }

    async fn source(&self, source: &[u8], target: &Target, jobs: &mut Jobs) -> Result<(), String> {
        let found = self.sftp.stat(source).await;
        let found = found.map_err(|failure| cannot_open(source, &failure))?;
        let folder = found.kind() == Kind::Folder;
        if folder && !self.options.recursive {
            return Err(format!(
                "omitting remote directory \"{}\": recursive mode not specified",
                shown(source)
            ));
        }
        let place = match target {
            Target::Into(folder) => (folder.clone(), self.own_name(source).await?),
            Target::As(folder, name) => (folder.clone(), name.clone()),
            Target::Open(path) if !folder => return self.write_in_place(source, path).await,
            Target::Open(path) => {
                return Err(format!(
                    "cannot overwrite local non-directory {path:?} with directory \"{}\"",
                    shown(source)
                ));
            }
        };
        let (to, name) = place;
        if folder {
            return self.tree(source, &to, &name, found, jobs).await;
        }
        let job = self.clone().file(source.to_vec(), to, name, found);
        jobs.add(job).await;
        Ok(())
    }

    /// The last part of a path of the guest, as one name.
    async fn own_name(&self, source: &[u8]) -> Result<OsString, String> {
        let last = |path: &[u8]| {
            let end = path.iter().rposition(|byte| *byte != b'/')? + 1;
            let path = &path[..end];
            let begin = path.iter().rposition(|byte| *byte == b'/');
            let name = &path[begin.map_or(0, |slash| slash + 1)..];
            is_name(name).then(|| OsString::from_vec(name.to_vec()))
        };
        if let Some(name) = last(source) {
            return Ok(name);
        }
        let whole = self.sftp.real_path(source).await;
        let whole = whole.map_err(|failure| cannot_open(source, &failure))?;
        last(&whole).ok_or_else(|| format!("\"{}\" has no name of its own", shown(source)))
    }

    async fn tree(
        &self,
        source: &[u8],
        to: &Arc<OwnedFd>,
        name: &OsStr,
        found: Attrs,
        jobs: &mut Jobs,
    ) -> Result<(), String> {
        let mut tree = Tree {
            entries: MAX_ENTRIES,
            bytes: MAX_PATHS,
            late: Vec::new(),
        };
        let root = enter(to, name)?;
        let begin = self.open(source.to_vec(), Vec::new(), root.clone(), found, &mut tree);
        let mut open = vec![begin.await?];
        while let Some(folder) = open.last_mut() {
            let Some(found) = folder.rest.next() else {
                tree.close(folder)?;
                open.pop();
                continue;
            };
            if open.len() > MAX_DEPTH {
                self.report
                    .fail(&format!("\"{}\" lies too deep", shown(source)));
                open.pop();
                continue;
            }
            let Some(folder) = open.last() else { break };
            match self.entry(folder, found, &mut tree, jobs).await {
                Ok(inner) => open.extend(inner),
                Err(text) => self.report.fail(&text),
            }
        }
        jobs.finish().await;
        // Inner ones come first: without its outer ones' leave a folder can't be reached.
        for (below, mode) in tree.late {
            let set = below
                .iter()
                .try_fold(root.clone(), |at, name| enter(&at, name));
            let set = set.and_then(|folder| set_mode(&folder, mode));
            set.unwrap_or_else(|text| self.report.fail(&text));
        }
        Ok(())
    }

    /// Lists a folder that is there on the host already.
    async fn open(
        &self,
        path: Vec<u8>,
        below: Vec<OsString>,
        to: Arc<OwnedFd>,
        found: Attrs,
        tree: &mut Tree,
    ) -> Result<Folder, String> {
        let rest = self.list(&path, &mut tree.entries).await?.into_iter();
        Ok(Folder {
            path,
            below,
            to,
            mode: permissions(found),
            rest,
        })
    }

    /// Copies what a folder holds under one name; gives back a folder that is to be copied.
    async fn entry(
        &self,
        folder: &Folder,
        found: Name,
        tree: &mut Tree,
        jobs: &mut Jobs,
    ) -> Result<Option<Folder>, String> {
        let path = [&folder.path[..], b"/", &found.name].concat();
        let name = OsStr::from_bytes(&found.name);
        let mut attrs = found.attrs;
        if attrs.mode.is_none() {
            let found = self.sftp.lstat(&path).await;
            attrs = found.map_err(|failure| cannot_open(&path, &failure))?;
        }
        match attrs.kind() {
            Kind::Folder => {
                let to = enter(&folder.to, name)?;
                let below = [&folder.below[..], &[name.to_owned()]].concat();
                self.open(path, below, to, attrs, tree).await.map(Some)
            }
            Kind::Link => {
                self.link(&path, &folder.to, name).await?;
                Ok(None)
            }
            Kind::File => {
                let to = folder.to.clone();
                jobs.add(self.clone().file(path, to, name.to_owned(), attrs))
                    .await;
                Ok(None)
            }
            Kind::Other => Err(format!(
                "omitting \"{}\": it is neither a file, a folder nor a link",
                shown(&path)
            )),
        }
    }

    /// All names of a folder.
    async fn list(&self, path: &[u8], entries: &mut usize) -> Result<Vec<Name>, String> {
        let failed = |failure: Failure| {
            format!(
                "cannot open remote directory \"{}\": {failure}",
                shown(path)
            )
        };
        let handle = self.sftp.open_folder(path).await.map_err(failed)?;
        let mut all: Vec<Name> = Vec::new();
        let result = loop {
            let names = match self.sftp.names(&handle).await {
                Ok(names) if names.is_empty() => break Ok(all),
                Ok(names) => names,
                Err(failure) => break Err(failed(failure)),
            };
            let Some(left) = entries.checked_sub(names.len()) else {
                break Err(format!("\"{}\" holds too many files", shown(path)));
            };
            *entries = left;
            for found in names {
                match &found.name[..] {
                    b"." | b".." => {}
                    // A copy, since the packet that it came in may be much larger.
                    name if is_name(name) => all.push(Name {
                        name: Bytes::copy_from_slice(name),
                        attrs: found.attrs,
                    }),
                    name => self.report.fail(&format!(
                        "the guest's folder \"{}\" has a name that is refused: \"{}\"",
                        shown(path),
                        shown(name)
                    )),
                }
            }
        };
        let _ = self.sftp.close(&handle).await;
        result
    }

    async fn link(&self, path: &[u8], to: &OwnedFd, name: &OsStr) -> Result<(), String> {
        let target = self.sftp.read_link(path).await;
        let target = target.map_err(|failure| cannot_open(path, &failure))?;
        let failed = |err: Errno| {
            let text = os_text(&err.into());
            format!("cannot create local symlink {name:?}: {text}")
        };
        let partial = self.report.partial_name();
        rustix::fs::symlinkat(OsStr::from_bytes(&target), to, &partial).map_err(failed)?;
        let moved = rustix::fs::renameat(to, &partial, to, name).map_err(failed);
        if moved.is_err() {
            let _ = rustix::fs::unlinkat(to, &partial, AtFlags::empty());
        }
        moved
    }

    async fn file(self, path: Vec<u8>, to: Arc<OwnedFd>, name: OsString, found: Attrs) {
        self.report.working_on(&shown(&path));
        if let Err(text) = self.copy(&path, &to, &name, found).await {
            self.report.fail(&text);
        }
    }

    async fn copy(
        &self,
        path: &[u8],
        to: &Arc<OwnedFd>,
        name: &OsStr,
        found: Attrs,
    ) -> Result<(), String> {
        let opened = self.sftp.open(path, flags::READ, None).await;
        let handle = opened.map_err(|failure| cannot_open(path, &failure))?;
        let partial = self.report.partial_name();
        let begun = self.report.begin_on_host(to, &partial);
        let failed = |err: Errno| cannot_write(name, &os_text(&err.into()));
        let how =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let written = async {
            let file = rustix::fs::openat(&**to, &partial, how, Mode::RUSR | Mode::WUSR);
            let file = File::from(file.map_err(failed)?);
            has_room(to, found.size.unwrap_or(0)).map_err(|why| cannot_write(name, &why))?;
            let mut file = tokio::fs::File::from_std(file);
            let room = Some((&**to, name));
            self.pull(path, &handle, found.size, &mut file, room)
                .await?;
            let file = file.into_std().await;
            let mode = Mode::from_raw_mode(permissions(found));
            rustix::fs::fchmod(&file, mode).map_err(failed)?;
            rustix::fs::renameat(&**to, &partial, &**to, name).map_err(|err| match err {
                Errno::ISDIR => {
                    format!("cannot overwrite local directory {name:?} with non-directory")
                }
                err => failed(err),
            })
        };
        let result = written.await;
        if result.is_err() {
            let _ = rustix::fs::unlinkat(&**to, &partial, AtFlags::empty());
        }
        begun.over();
        let _ = self.sftp.close(&handle).await;
        result
    }

    /// To what is there and is no regular file, or stands where nothing can be made.
    async fn write_in_place(&self, source: &[u8], path: &Path) -> Result<(), String> {
        let file = fs::OpenOptions::new().write(true).truncate(true).open(path);
        let file = file.map_err(|err| cannot_write(path.as_os_str(), &os_text(&err)))?;
        self.stream(source, tokio::fs::File::from_std(file)).await
    }

    /// A file of the guest to a stream.
    pub async fn stream(
        &self,
        source: &[u8],
        mut to: impl AsyncWrite + Unpin,
    ) -> Result<(), String> {
        let failed = |failure: Failure| cannot_open(source, &failure);
        let found = self.sftp.stat(source).await.map_err(failed)?;
        if found.kind() == Kind::Folder {
            return Err(format!(
                "omitting remote directory \"{}\": a stream holds one file",
                shown(source)
            ));
        }
        let opened = self.sftp.open(source, flags::READ, None).await;
        let handle = opened.map_err(failed)?;
        let result = self.pull(source, &handle, found.size, &mut to, None).await;
        let _ = self.sftp.close(&handle).await;
        result
    }

    /// Takes all of a file, many pieces at once, and writes them in order, as long as the disk with the
    /// folder `room` has some for that name.
    async fn pull(
        &self,
        path: &[u8],
        handle: &Handle,
        size: Option<u64>,
        to: &mut (impl AsyncWrite + Unpin),
        room: Option<(&OwnedFd, &OsStr)>,
    ) -> Result<(), String> {
        let mut written = 0;
        // One piece more than the size tells, which finds the end; beyond it only as bytes come, since
        // the size of some files (in /proc) is not told.
        let mut ahead = size.unwrap_or(0);
        let mut offset = 0;
        let mut under_way = FuturesOrdered::new();
        let read = |at| -> Pin<Box<dyn Future<Output = Done<Bytes>> + Send + '_>> {
            Box::pin(self.sftp.read(handle, at, CHUNK))
        };
        loop {
            while under_way.len() < AHEAD && offset <= ahead {
                under_way.push_back(read(offset));
                offset += CHUNK as u64;
            }
            let Some(piece) = under_way.next().await else {
                break;
            };
            let piece = piece.map_err(|failure| {
                format!(
                    "cannot read from remote file \"{}\": {failure}",
                    shown(path)
                )
            })?;
            to.write_all(&piece)
                .await
                .map_err(|err| self.unwritten(&err))?;
            self.report.moved(piece.len());
            written += piece.len() as u64;
            if written >= LOOK_EVERY
                && let Some((folder, name)) = room
            {
                written = 0;
                has_room(folder, 0).map_err(|why| cannot_write(name, &why))?;
            }
            if piece.len() < CHUNK {
                break;
            }
            ahead = ahead.max(offset);
        }
        to.flush().await.map_err(|err| self.unwritten(&err))
    }

    fn unwritten(&self, err: &std::io::Error) -> String {
        if err.kind() == std::io::ErrorKind::BrokenPipe {
            self.report.close();
        }
        format!("cannot write what was read: {}", os_text(err))
    }
}

impl Tree {
    /// All of a folder is on its way. Its mode is set now if it does not hinder what is still under way.
    fn close(&mut self, folder: &mut Folder) -> Result<(), String> {
        const OWNER: u32 = 0o700;
        if folder.mode & OWNER == OWNER {
            return set_mode(&folder.to, folder.mode);
        }
        let below = std::mem::take(&mut folder.below);
        let bytes: usize = below
            .iter()
            .map(|name| name.len() + size_of::<OsString>())
            .sum();
        self.bytes = self
            .bytes
            .checked_sub(bytes + 64)
            .ok_or("the guest's folders are too many")?;
        self.late.push((below, folder.mode));
        Ok(())
    }
}

fn set_mode(folder: &OwnedFd, mode: u32) -> Result<(), String> {
    let set = rustix::fs::fchmod(folder, Mode::from_raw_mode(mode));
    set.map_err(|err| format!("cannot set the mode of a folder: {}", os_text(&err.into())))
}

/// Refuses to fill the file system of a folder up. One that does not tell how large it is has room.
fn has_room(folder: &OwnedFd, bytes: u64) -> Result<(), String> {
    let Ok(found) = rustix::fs::fstatvfs(folder) else {
        return Ok(());
    };
    let of = |blocks: u64| blocks.saturating_mul(found.f_frsize);
    room(of(found.f_blocks), of(found.f_bavail), bytes)
}

fn room(total: u64, free: u64, bytes: u64) -> Result<(), String> {
    let reserve = RESERVE.min(total / 50);
    if total == 0 || bytes.saturating_add(reserve) <= free {
        return Ok(());
    }
    Err(format!(
        "the disk has no room for it: {} are free, of which {} stay so",
        Size(free),
        Size(reserve)
    ))
}

/// Whether bytes are one name in a folder.
fn is_name(name: &[u8]) -> bool {
    let dots = matches!(name, b"" | b"." | b"..");
    !dots && name.len() <= MAX_NAME && !name.contains(&b'/') && !name.contains(&0)
}

/// The permissions, without what would lend someone's rights to others.
fn permissions(attrs: Attrs) -> u32 {
    attrs.mode.map_or(0o664, |mode| mode & 0o777)
}

/// Opens a folder in another one, made if it is not there. A link is not followed.
fn enter(from: &OwnedFd, name: &OsStr) -> Result<Arc<OwnedFd>, String> {
    let how = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || rustix::fs::openat(from.as_fd(), name, how, Mode::empty());
    let opened = match open() {
        Err(Errno::NOENT) => rustix::fs::mkdirat(from, name, Mode::RWXU).and_then(|()| open()),
        opened => opened,
    };
    opened.map(Arc::new).map_err(|err| match err {
        Errno::NOTDIR | Errno::LOOP => {
            format!("cannot overwrite local non-directory {name:?} with a directory")
        }
        err => format!(
            "cannot create local directory {name:?}: {}",
            os_text(&err.into())
        ),
    })
}

fn cannot_open(path: &[u8], failure: &Failure) -> String {
    format!("cannot open remote file \"{}\": {failure}", shown(path))
}

fn cannot_write(name: &OsStr, why: &str) -> String {
    format!("cannot write to local file {name:?}: {why}")
}

/// What the user gave as target, once for all sources.
pub(super) fn target(path: &Path, several: bool, options: Options) -> Result<Target, String> {
    let slash = path.as_os_str().as_bytes().ends_with(b"/");
    let failed =
        |err: std::io::Error| format!("cannot create local directory {path:?}: {}", os_text(&err));
    if options.parents {
        let folder = match (several || slash, path.parent()) {
            (true, _) => path,
            (false, Some(parent)) => parent,
            (false, None) => Path::new(""),
        };
        if folder != Path::new("") {
            fs::create_dir_all(folder).map_err(failed)?;
        }
    }
    let open = |path: &Path| {
        let how = OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, how, Mode::empty()).map(Arc::new)
    };
    // The target is the user's word: links in it are followed.
    let found = fs::metadata(path).ok();
    if found.as_ref().is_some_and(fs::Metadata::is_dir) {
        return open(path)
            .map(Target::Into)
            .map_err(|err| failed(err.into()));
    }
    if several || (slash && found.is_some()) {
        return Err(format!("Target {path:?} is not a directory"));
    }
    if found.as_ref().is_some_and(|found| !found.is_file()) {
        return Ok(Target::Open(path.to_owned()));
    }
    // A link that leads to a file stays; the file is replaced.
    let whole = match found {
        Some(_) => fs::canonicalize(path).map_err(failed)?,
        None => path.to_owned(),
    };
    let Some(name) = whole.file_name() else {
        return Err(format!("Target {path:?} is not a directory"));
    };
    let parent = match whole.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    let writable = rustix::fs::access(&parent, rustix::fs::Access::WRITE_OK).is_ok();
    if found.is_some() && !writable {
        return Ok(Target::Open(whole));
    }
    match open(&parent) {
        Ok(folder) => Ok(Target::As(folder, name.to_owned())),
        Err(err) => {
            let text = os_text(&err.into());
            Err(format!("cannot write to local file {path:?}: {text}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_disk_is_not_filled_up() {
        const GIB: u64 = 1 << 30;
        let large = 100 * GIB;
        assert!(room(large, GIB, GIB - RESERVE).is_ok());
        assert!(room(large, GIB, GIB - RESERVE + 1).is_err());
        assert!(room(large, RESERVE, 0).is_ok());
        assert!(room(large, RESERVE - 1, 0).is_err());
        // A size that nothing has, as a guest may claim.
        assert!(room(large, GIB, u64::MAX).is_err());
        // A small one may be filled to 98 %; one that tells nothing is taken as it is.
        assert!(room(200 << 20, 4 << 20, 0).is_ok());
        assert!(room(200 << 20, 3 << 20, 0).is_err());
        assert!(room(0, 0, GIB).is_ok());
    }
}
