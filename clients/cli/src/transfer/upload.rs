//! Host to guest.

use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncRead, AsyncReadExt};

use super::Options;
use super::report::{Jobs, Report, shown};
use crate::sftp::session::{CHUNK, Done, Failure, Handle, Sftp};
use crate::sftp::wire::{Attrs, Kind, flags};

/// Of a file whose source has no mode.
const DEFAULT_MODE: u32 = 0o664;
/// The name of a stream that is sent to a folder.
const STREAM_NAME: &[u8] = b"stream_output.dat";
/// Folders within folders.
const MAX_DEPTH: usize = 1024;

#[derive(Clone)]
pub(super) struct Upload {
    pub sftp: Arc<Sftp>,
    pub report: Arc<Report>,
    pub options: Options,
}

impl Upload {
    /// Copies each source to the target, or into it if that is a folder.
    pub async fn run(&self, sources: &[PathBuf], target: &[u8]) -> Done<()> {
        let mut found = self.look_at_target(target).await?;
        if found.is_none() && self.options.parents {
            // With several sources the target is to be a folder, otherwise its parent is.
            let folder = match sources.len() > 1 || target.ends_with(b"/") {
                true => Some(target),
                false => parent(target),
            };
            if let Some(folder) = folder {
                let made = self.make_parents(folder).await;
                made.map_err(|failure| unusable(folder, failure))?;
            }
            found = self.look_at_target(target).await?;
        }
        let into = found.is_some_and(|attrs| attrs.kind() == Kind::Folder);
        if !into && (sources.len() > 1 || (found.is_some() && target.ends_with(b"/"))) {
            return Err(not_a_folder(target));
        }
        let mut jobs = Jobs::default();
        let mut modes = Vec::new();
        for source in sources {
            self.source(source, target, into, &mut jobs, &mut modes)
                .await;
        }
        jobs.finish().await;
        // Inner folders first; one that may not be written to could not have been filled before.
        for (path, mode) in modes.into_iter().rev() {
            if let Err(failure) = self.sftp.set_mode(&path, mode).await {
                let path = shown(&path);
                self.report
                    .fail(&format!("cannot set the mode of \"{path}\": {failure}"));
            }
        }
        Ok(())
    }

    async fn source(
        &self,
        source: &Path,
        target: &[u8],
        into: bool,
        jobs: &mut Jobs,
        modes: &mut Vec<(Vec<u8>, u32)>,
    ) {
        // What the user names is followed if it is a link.
        let found = match fs::metadata(source) {
            Ok(found) => found,
            Err(err) => {
                let text = format!("cannot open local file {source:?}: {}", os_text(&err));
                return self.report.fail(&text);
            }
        };
        let place = match (into, own_name(source)) {
            (true, Some(name)) => join(target, &name),
            // The root, or a folder that has no name any more.
            (true, None) | (false, _) => target.to_vec(),
        };
        if !found.is_dir() {
            return jobs
                .add(self.clone().file(source.to_owned(), place, found))
                .await;
        }
        if !self.options.recursive {
            let text = format!("omitting local directory {source:?}: recursive mode not specified");
            return self.report.fail(&text);
        }
        let mut open = vec![(source.to_owned(), place, found, 0)];
        while let Some((from, to, found, depth)) = open.pop() {
            match self.folder(&from, &to).await {
                Ok(()) => modes.push((to.clone(), found.permissions().mode() & 0o7777)),
                Err(text) => {
                    self.report.fail(&text);
                    continue;
                }
            }
            if depth >= MAX_DEPTH {
                self.report.fail(&format!("{from:?} lies too deep"));
                continue;
            }
            for (path, found) in self.entries(&from) {
                let place = join(&to, path.file_name().unwrap_or_default().as_bytes());
                if found.is_dir() {
                    open.push((path, place, found, depth + 1));
                } else if found.is_symlink() {
                    jobs.add(self.clone().link(path, place)).await;
                } else if found.is_file() {
                    jobs.add(self.clone().file(path, place, found)).await;
                } else {
                    let text =
                        format!("omitting {path:?}: it is neither a file, a folder nor a link");
                    self.report.fail(&text);
                }
            }
        }
    }

    fn entries(&self, folder: &Path) -> Vec<(PathBuf, Metadata)> {
        let mut entries = Vec::new();
        let tell = |err: &io::Error, path: &Path| {
            let text = os_text(err);
            self.report.fail(&format!("cannot read {path:?}: {text}"));
        };
        match fs::read_dir(folder) {
            Err(err) => tell(&err, folder),
            Ok(list) => {
                for entry in list {
                    match entry.and_then(|entry| Ok((entry.path(), entry.metadata()?))) {
                        Ok(entry) => entries.push(entry),
                        Err(err) => tell(&err, folder),
                    }
                }
            }
        }
        entries
    }

    async fn folder(&self, from: &Path, to: &[u8]) -> Result<(), String> {
        let Err(failure) = self.sftp.make_folder(to, 0o700).await else {
            return Ok(());
        };
        match self.look(to).await {
            Ok(Some(attrs)) if attrs.kind() == Kind::Folder => Ok(()),
            Ok(Some(_)) => Err(format!(
                "cannot overwrite remote non-directory \"{}\" with directory {from:?}",
                shown(to)
            )),
            _ => Err(format!(
                "cannot create remote directory \"{}\": {failure}",
                shown(to)
            )),
        }
    }

    async fn link(self, from: PathBuf, to: Vec<u8>) {
        let sent = async {
            let target = fs::read_link(&from).map_err(|err| os_text(&err))?;
            if let Err(failure) = self.remove_file(&to).await {
                return Err(failure.to_string());
            }
            let made = self
                .sftp
                .make_link(target.as_os_str().as_bytes(), &to)
                .await;
            made.map_err(|failure| failure.to_string())
        };
        if let Err(why) = sent.await {
            let text = format!("cannot create remote symlink \"{}\": {why}", shown(&to));
            self.report.fail(&text);
        }
    }

    /// Makes room for a link.
    async fn remove_file(&self, path: &[u8]) -> Done<()> {
        match self.sftp.lstat(path).await {
            Ok(attrs) if attrs.kind() == Kind::Folder => {
                Err(Failure::Other("a directory is in its place".to_owned()))
            }
            Ok(_) => self.sftp.remove(path).await,
            Err(Failure::NoSuchFile) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    async fn file(self, from: PathBuf, to: Vec<u8>, found: Metadata) {
        self.report.working_on(&from.display().to_string());
        let sent = async {
            let file = tokio::fs::File::open(&from)
                .await
                .map_err(|err| format!("cannot open local file {from:?}: {}", os_text(&err)))?;
            let mode = found.is_file().then(|| found.permissions().mode() & 0o7777);
            self.write(file, &to, mode).await
        };
        if let Err(text) = sent.await {
            self.report.fail(&text);
        }
    }

    /// Sends a stream to a file, or into a folder under a name that it is given.
    pub async fn stream(&self, from: impl AsyncRead + Unpin, target: &[u8]) -> Result<(), String> {
        let place = match self.look(target).await {
            Ok(Some(attrs)) if attrs.kind() == Kind::Folder => join(target, STREAM_NAME),
            Ok(_) => target.to_vec(),
            Err(failure) => return Err(cannot_open(target, &failure)),
        };
        if let Some(folder) = parent(&place).filter(|_| self.options.parents) {
            let made = self.make_parents(folder).await;
            made.map_err(|failure| cannot_open(&place, &failure))?;
        }
        self.write(from, &place, None).await
    }

    /// Writes a file beside its place and moves it there. What is no regular file, or stands in a folder
    /// that the user may not change, is written to as it is.
    async fn write(
        &self,
        from: impl AsyncRead + Unpin,
        to: &[u8],
        mode: Option<u32>,
    ) -> Result<(), String> {
        let opening = |failure: Failure| cannot_open(to, &failure);
        let before = self.look(to).await.map_err(opening)?;
        let mut place = to.to_vec();
        match before.as_ref().map(Attrs::kind) {
            Some(Kind::Folder) => {
                let text = "cannot overwrite remote directory";
                return Err(format!("{text} \"{}\" with non-directory", shown(to)));
            }
            Some(Kind::Other | Kind::Link) => return self.write_in_place(from, to).await,
            // Where it leads to is replaced, and the link stays.
            Some(Kind::File) => {
                let own = self.sftp.lstat(to).await.map_err(opening)?;
                if own.kind() == Kind::Link {
                    place = self.sftp.real_path(to).await.map_err(opening)?.to_vec();
                }
            }
            None => {}
        }
        let kept = before.and_then(|attrs| attrs.mode);
        let mode = mode.or(kept).unwrap_or(DEFAULT_MODE) & 0o7777;
        let partial = beside(&place, &self.report.partial_name());
        let begun = self.report.begin_in_guest(&self.sftp, &partial);
        let how = flags::WRITE | flags::CREATE | flags::EXCLUSIVE;
        let handle = match self.sftp.open(&partial, how, Some(0o600)).await {
            Ok(handle) => handle,
            Err(failure) => {
                begun.over();
                if before.is_some() && matches!(failure, Failure::Denied) {
                    return self.write_in_place(from, to).await;
                }
                return Err(opening(failure));
            }
        };
        let written = async {
            self.pump(from, &handle, to).await?;
            let writing = |failure| cannot_write(to, &failure);
            let set = self.sftp.set_handle_mode(&handle, mode).await;
            set.map_err(|failure| {
                format!(
                    "cannot set permissions for remote file \"{}\": {failure}",
                    shown(to)
                )
            })?;
            self.sftp.close(&handle).await.map_err(writing)?;
            self.sftp.rename(&partial, &place).await.map_err(writing)
        };
        let result = written.await;
        if result.is_err() {
            let _ = self.sftp.close(&handle).await;
            let _ = self.sftp.remove(&partial).await;
        }
        begun.over();
        result
    }

    async fn write_in_place(&self, from: impl AsyncRead + Unpin, to: &[u8]) -> Result<(), String> {
        let how = flags::WRITE | flags::TRUNCATE;
        let opened = self.sftp.open(to, how, None).await;
        let handle = opened.map_err(|failure| cannot_open(to, &failure))?;
        let result = self.pump(from, &handle, to).await;
        let closed = self.sftp.close(&handle).await;
        result.and(closed.map_err(|failure| cannot_write(to, &failure)))
    }

    /// Sends all of a stream, many pieces at once.
    async fn pump(
        &self,
        mut from: impl AsyncRead + Unpin,
        handle: &Handle,
        to: &[u8],
    ) -> Result<(), String> {
        let mut offset = 0;
        let mut under_way = FuturesUnordered::new();
        let lost = |failure: Failure| cannot_write(to, &failure);
        loop {
            let piece = tokio::select! {
                biased;
                // Answers are taken first, so that a failure ends the reading.
                Some(done) = under_way.next(), if !under_way.is_empty() => {
                    let len: usize = Result::map_err(done, lost)?;
                    self.report.moved(len);
                    continue;
                }
                piece = fill(&mut from), if under_way.len() < AHEAD => piece,
            };
            let piece = piece.map_err(|err| {
                format!(
                    "cannot read what is sent to \"{}\": {}",
                    shown(to),
                    os_text(&err)
                )
            })?;
            if piece.is_empty() {
                break;
            }
            let len = piece.len();
            let at = offset;
            offset += len as u64;
            let write = async move { self.sftp.write(handle, at, piece).await.map(|()| len) };
            under_way.push(write);
        }
        while let Some(done) = under_way.next().await {
            self.report.moved(done.map_err(lost)?);
        }
        Ok(())
    }

    async fn look_at_target(&self, target: &[u8]) -> Done<Option<Attrs>> {
        let found = self.look(target).await;
        found.map_err(|failure| unusable(target, failure))
    }

    /// What a path leads to; `None` if nothing is there.
    async fn look(&self, path: &[u8]) -> Done<Option<Attrs>> {
        match self.sftp.stat(path).await {
            Ok(attrs) => Ok(Some(attrs)),
            Err(Failure::NoSuchFile) => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// Makes a folder and those above it.
    async fn make_parents(&self, folder: &[u8]) -> Done<()> {
        for end in 1..=folder.len() {
            if end < folder.len() && folder[end] != b'/' {
                continue;
            }
            let part = &folder[..end];
            if self.look(part).await?.is_none() {
                self.sftp.make_folder(part, 0o777).await?;
            }
        }
        Ok(())
    }
}

/// Pieces of one file that are on the way at once.
const AHEAD: usize = 64;

/// A whole piece, or what is left at the end. May be dropped only while nothing was read: the caller
/// polls it again before anything else is lost, so it reads once.
async fn fill(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Bytes> {
    let mut piece = BytesMut::with_capacity(CHUNK);
    from.read_buf(&mut piece).await?;
    Ok(piece.freeze())
}

fn join(folder: &[u8], name: &[u8]) -> Vec<u8> {
    let slash: &[u8] = if folder.ends_with(b"/") { b"" } else { b"/" };
    [folder, slash, name].concat()
}

/// The folder of a path; none for a name alone and for the root.
fn parent(path: &[u8]) -> Option<&[u8]> {
    let path = path.strip_suffix(b"/").unwrap_or(path);
    let slash = path.iter().rposition(|byte| *byte == b'/')?;
    (slash > 0).then(|| &path[..slash])
}

/// A name in the folder of a path.
fn beside(path: &[u8], name: &str) -> Vec<u8> {
    let end = path.iter().rposition(|byte| *byte == b'/');
    [&path[..end.map_or(0, |slash| slash + 1)], name.as_bytes()].concat()
}

/// The last part of a path, also of `.` and `..`.
fn own_name(path: &Path) -> Option<Vec<u8>> {
    let name = path.file_name().map(ToOwned::to_owned).or_else(|| {
        let whole = path.canonicalize().ok()?;
        whole.file_name().map(ToOwned::to_owned)
    });
    name.map(|name| name.as_bytes().to_vec())
}

/// Says which path it was, unless all is lost.
fn unusable(path: &[u8], failure: Failure) -> Failure {
    match failure {
        Failure::Lost(_) => failure,
        failure => Failure::Other(format!("cannot access \"{}\": {failure}", shown(path))),
    }
}

fn not_a_folder(target: &[u8]) -> Failure {
    Failure::Other(format!("Target \"{}\" is not a directory", shown(target)))
}

fn cannot_open(path: &[u8], failure: &Failure) -> String {
    format!("cannot open remote file \"{}\": {failure}", shown(path))
}

fn cannot_write(path: &[u8], failure: &Failure) -> String {
    format!("cannot write to remote file \"{}\": {failure}", shown(path))
}

/// The system's word, without the number.
pub(super) fn os_text(err: &io::Error) -> String {
    let text = err.to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}
