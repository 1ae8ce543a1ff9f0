//! A client of a guest's SFTP server. Requests of many tasks travel at once; each task waits for its own
//! answer, so a slow way costs one round trip and not one for each piece.
//!
//! ```text
//! request ─▶ writer task ─▶ Pipe ═════▶ guest
//! answer  ◀─ by its id ◀─ reader task ◀═╝
//! ```

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use pileus_base::{Code, Error};
use tokio::sync::{Semaphore, mpsc, oneshot};

use super::wire::{self, Answer, Ask, Attrs, Frames, Name, Packet, status};

/// Bytes of one read or write; every server takes this much.
pub(crate) const CHUNK: usize = 32 << 10;
/// Reads and writes on the way at once: 2 MiB.
const WINDOW: usize = 64;

/// The way to a server, in pieces of any size. The receiver's end is the end of the way.
pub(crate) struct Pipe {
    pub to: mpsc::Sender<Bytes>,
    pub from: mpsc::Receiver<Result<Bytes, Error>>,
}

/// Why a request failed.
#[derive(Debug, Clone)]
pub(crate) enum Failure {
    NoSuchFile,
    Denied,
    /// The server's own word.
    Other(String),
    /// The way to the server broke: nothing else will work either.
    Lost(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Failure::NoSuchFile => "No such file or directory",
            Failure::Denied => "Permission denied",
            Failure::Other(text) | Failure::Lost(text) => text,
        })
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let code = match failure {
            Failure::Lost(_) => Code::GuestUnreachable,
            _ => Code::ExecFailed,
        };
        Error::new(code, failure.to_string())
    }
}

pub(crate) type Done<T> = Result<T, Failure>;

type Waiting = HashMap<u32, oneshot::Sender<Answer>>;

/// What both tasks and the callers share.
#[derive(Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    /// Why the way ended.
    end: Mutex<Option<String>>,
}

impl Shared {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, why: &str) {
        let mut end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        end.get_or_insert_with(|| why.to_owned());
        drop(end);
        // Whoever waits learns it by this.
        self.waiting().clear();
    }

    fn ended(&self) -> Option<String> {
        let end = self.end.lock().unwrap_or_else(PoisonError::into_inner);
        end.clone()
    }
}

/// An open file or folder of the server. Close it: the server has few.
#[derive(Debug, Clone)]
pub(crate) struct Handle(Bytes);

pub(crate) struct Sftp {
    requests: mpsc::Sender<Bytes>,
    shared: Arc<Shared>,
    next: AtomicU32,
    window: Semaphore,
    posix_rename: bool,
}

impl Sftp {
    /// Greets the server.
    pub async fn connect(mut pipe: Pipe) -> Done<Self> {
        // The version stands in the place of an id.
        let hello = Packet::new(Ask::Init, 3).finish();
        let lost = || Failure::Lost("The way to the guest's file server broke".into());
        pipe.to.send(hello).await.map_err(|_| lost())?;
        let mut frames = Frames::default();
        let first = loop {
            match frames.next() {
                Ok(Some(packet)) => break packet,
                Ok(None) => {}
                Err(err) => return Err(Failure::Lost(err.message)),
            }
            match pipe.from.recv().await {
                Some(Ok(bytes)) => frames.add(&bytes),
                Some(Err(err)) => return Err(Failure::Lost(err.message)),
                None => {
                    return Err(Failure::Lost(
                        "The guest has no file server (SFTP), or it ended at once".into(),
                    ));
                }
            }
        };
        let posix_rename = wire::version(first).map_err(|err| Failure::Lost(err.message))?;
        let shared = Arc::new(Shared::default());
        tokio::spawn(read(pipe.from, frames, shared.clone()));
        Ok(Self {
            requests: pipe.to,
            shared,
            next: AtomicU32::new(1),
            window: Semaphore::new(WINDOW),
            posix_rename,
        })
    }

    async fn ask(&self, ask: Ask, fill: impl FnOnce(Packet) -> Packet) -> Done<Answer> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let bytes = fill(Packet::new(ask, id)).finish();
        let (answer, answered) = oneshot::channel();
        let lost = || {
            let text = self.shared.ended();
            Failure::Lost(text.unwrap_or_else(|| "The way to the guest broke".into()))
        };
        self.shared.waiting().insert(id, answer);
        if self.shared.ended().is_some() || self.requests.send(bytes).await.is_err() {
            self.shared.waiting().remove(&id);
            return Err(lost());
        }
        answered.await.map_err(|_| lost())
    }

    /// As [`Self::ask`], where only success or failure is told.
    async fn tell(&self, ask: Ask, fill: impl FnOnce(Packet) -> Packet) -> Done<()> {
        match self.ask(ask, fill).await? {
            Answer::Status {
                code: status::OK, ..
            } => Ok(()),
            answer => Err(failure(answer)),
        }
    }

    pub async fn open(&self, path: &[u8], flags: u32, mode: Option<u32>) -> Done<Handle> {
        let fill = |packet: Packet| packet.string(path).u32(flags).mode(mode);
        self.handle(Ask::Open, fill).await
    }

    async fn handle(&self, ask: Ask, fill: impl FnOnce(Packet) -> Packet) -> Done<Handle> {
        match self.ask(ask, fill).await? {
            Answer::Handle(handle) => Ok(Handle(handle)),
            answer => Err(failure(answer)),
        }
    }

    pub async fn close(&self, handle: &Handle) -> Done<()> {
        self.tell(Ask::Close, |p| p.string(&handle.0)).await
    }

    /// At most `len` (up to [`CHUNK`]) bytes from `offset` on; fewer only at the end of the file.
    pub async fn read(&self, handle: &Handle, offset: u64, len: usize) -> Done<Bytes> {
        let mut all = Bytes::new();
        loop {
            let asked = len - all.len();
            let at = offset + all.len() as u64;
            let part = self.read_once(handle, at, asked).await?;
            let end = part.is_empty() || part.len() == asked;
            all = match all.is_empty() {
                true => part,
                false => [all, part].concat().into(),
            };
            if end {
                return Ok(all);
            }
        }
    }

    async fn read_once(&self, handle: &Handle, offset: u64, len: usize) -> Done<Bytes> {
        let _turn = self.window.acquire().await;
        let asked = u32::try_from(len).unwrap_or(u32::MAX);
        let fill = |p: Packet| p.string(&handle.0).u64(offset).u32(asked);
        match self.ask(Ask::Read, fill).await? {
            Answer::Data(bytes) if bytes.len() > len => Err(Failure::Other(
                "The guest sent more than it was asked for".into(),
            )),
            // An empty piece would be asked for again and again.
            Answer::Data(bytes) if !bytes.is_empty() => Ok(bytes),
            Answer::Status {
                code: status::EOF, ..
            } => Ok(Bytes::new()),
            answer => Err(failure(answer)),
        }
    }

    /// Writes a piece of up to [`CHUNK`] bytes.
    pub async fn write(&self, handle: &Handle, offset: u64, bytes: Bytes) -> Done<()> {
        let _turn = self.window.acquire().await;
        let fill = |p: Packet| p.string(&handle.0).u64(offset).string(&bytes);
        self.tell(Ask::Write, fill).await
    }

    /// What a path leads to.
    pub async fn stat(&self, path: &[u8]) -> Done<Attrs> {
        self.attrs(Ask::Stat, path).await
    }

    /// What a path is itself, be it a link.
    pub async fn lstat(&self, path: &[u8]) -> Done<Attrs> {
        self.attrs(Ask::Lstat, path).await
    }

    async fn attrs(&self, ask: Ask, path: &[u8]) -> Done<Attrs> {
        match self.ask(ask, |p| p.string(path)).await? {
            Answer::Attrs(attrs) => Ok(attrs),
            answer => Err(failure(answer)),
        }
    }

    pub async fn set_mode(&self, path: &[u8], mode: u32) -> Done<()> {
        let fill = |p: Packet| p.string(path).mode(Some(mode));
        self.tell(Ask::Setstat, fill).await
    }

    pub async fn set_handle_mode(&self, handle: &Handle, mode: u32) -> Done<()> {
        let fill = |p: Packet| p.string(&handle.0).mode(Some(mode));
        self.tell(Ask::Fsetstat, fill).await
    }

    pub async fn make_folder(&self, path: &[u8], mode: u32) -> Done<()> {
        let fill = |p: Packet| p.string(path).mode(Some(mode));
        self.tell(Ask::Mkdir, fill).await
    }

    pub async fn remove(&self, path: &[u8]) -> Done<()> {
        self.tell(Ask::Remove, |p| p.string(path)).await
    }

    /// Gives a file the name of another one, which is replaced at once where the server can do that.
    pub async fn rename(&self, from: &[u8], to: &[u8]) -> Done<()> {
        if self.posix_rename {
            let name = b"posix-rename@openssh.com";
            let fill = |p: Packet| p.string(name).string(from).string(to);
            return self.tell(Ask::Extended, fill).await;
        }
        match self.remove(to).await {
            Ok(()) | Err(Failure::NoSuchFile) => {}
            Err(failure) => return Err(failure),
        }
        let fill = |p: Packet| p.string(from).string(to);
        self.tell(Ask::Rename, fill).await
    }

    pub async fn open_folder(&self, path: &[u8]) -> Done<Handle> {
        self.handle(Ask::Opendir, |p| p.string(path)).await
    }

    /// The next names of a folder; none at the end.
    pub async fn names(&self, handle: &Handle) -> Done<Vec<Name>> {
        match self.ask(Ask::Readdir, |p| p.string(&handle.0)).await? {
            Answer::Names(names) if !names.is_empty() => Ok(names),
            Answer::Status {
                code: status::EOF, ..
            } => Ok(Vec::new()),
            answer => Err(failure(answer)),
        }
    }

    pub async fn read_link(&self, path: &[u8]) -> Done<Bytes> {
        self.one_name(Ask::Readlink, path).await
    }

    /// The path without links and without `..`.
    pub async fn real_path(&self, path: &[u8]) -> Done<Bytes> {
        self.one_name(Ask::Realpath, path).await
    }

    async fn one_name(&self, ask: Ask, path: &[u8]) -> Done<Bytes> {
        match self.ask(ask, |p| p.string(path)).await? {
            Answer::Names(mut names) if names.len() == 1 => Ok(names.remove(0).name),
            answer => Err(failure(answer)),
        }
    }

    /// Makes a link at `path` that says `target`. (OpenSSH has the two the other way round than the
    /// draft, and everyone follows it.)
    pub async fn make_link(&self, target: &[u8], path: &[u8]) -> Done<()> {
        let fill = |p: Packet| p.string(target).string(path);
        self.tell(Ask::Symlink, fill).await
    }
}

/// Hands answers to those who wait for them.
async fn read(
    mut from: mpsc::Receiver<Result<Bytes, Error>>,
    mut frames: Frames,
    shared: Arc<Shared>,
) {
    let why = loop {
        match frames.next() {
            Ok(Some(packet)) => match wire::answer(packet) {
                Ok((id, answer)) => {
                    let Some(waiting) = shared.waiting().remove(&id) else {
                        break "The guest's file server answered what nobody asked".to_owned();
                    };
                    // Who asked may have given up.
                    let _ = waiting.send(answer);
                    continue;
                }
                Err(err) => break err.message,
            },
            Ok(None) => {}
            Err(err) => break err.message,
        }
        match from.recv().await {
            Some(Ok(bytes)) => frames.add(&bytes),
            Some(Err(err)) => break err.message,
            None => break "The guest's file server ended".to_owned(),
        }
    };
    shared.end(&why);
}

fn failure(answer: Answer) -> Failure {
    match answer {
        Answer::Status { code, message } => match code {
            status::NO_SUCH_FILE => Failure::NoSuchFile,
            status::DENIED => Failure::Denied,
            status::FAILURE => Failure::Other("The guest could not do it".into()),
            status::UNSUPPORTED => Failure::Other("The guest's file server can't do this".into()),
            _ => Failure::Other(message),
        },
        _ => Failure::Other("The guest's file server gave an answer to another question".into()),
    }
}
