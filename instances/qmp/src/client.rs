//! The connection: one task reads, one writes, callers wait for the reply with their id.
//!
//! * A caller that goes away (a dropped future, a deadline) only forgets its id; its late reply is
//!   thrown away. Commands are written by a task of their own, so no half command is ever sent.
//! * When the connection ends, for whatever reason, every waiter gets [`QmpError::Closed`].
//! * A descriptor travels with its command's bytes; QEMU keeps only the last set it received, so
//!   such commands go one after the other.
//! * Dropping the last [`Client`] closes the connection.

use std::collections::HashMap;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::StreamExt;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use serde_json::{Value, json};
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::task::AbortHandle;
use tokio_util::codec::{FramedRead, LinesCodec};
use tokio_util::sync::CancellationToken;

use crate::message::{self, Event, Message, Refusal, Version};
use crate::{Command, QmpError};

/// Bounds on what the other side can make us wait for or hold.
#[derive(Debug, Clone)]
pub struct Options {
    /// Longest line in bytes; QEMU's longest answer (`query-qmp-schema`) has about 250 kB.
    pub max_line: usize,
    /// Bound on the greeting, which comes once QEMU has set its machine up.
    pub greeting: Duration,
    /// Bound on a command that names no bound of its own.
    pub deadline: Duration,
    /// Events held for a slow receiver; further ones are dropped (with a warning in the log).
    pub max_events: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            max_line: 16 << 20,
            greeting: Duration::from_secs(30),
            deadline: Duration::from_secs(10),
            max_events: 1024,
        }
    }
}

/// Events in the order in which they came; ends when the connection does.
pub type Events = mpsc::Receiver<Event>;

type Outcome = Result<Value, Refusal>;
type Outgoing = (Vec<u8>, Option<OwnedFd>);

/// A connection to one QEMU. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    next_id: AtomicU64,
    deadline: Duration,
    version: Version,
    /// Held while a command with a descriptor is under way.
    one_with_fd: Arc<tokio::sync::Mutex<()>>,
    reader: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.reader.abort();
        // The writer may hang in a socket that nobody reads.
        self.shared.closed.cancel();
    }
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    closed: CancellationToken,
}

#[derive(Default)]
struct State {
    waiting: HashMap<u64, oneshot::Sender<Outcome>>,
    /// Why the connection ended, once it has.
    ended: Option<String>,
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        // Nothing under this lock can leave the state half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, reason: &str) {
        let mut state = self.state();
        if state.ended.is_none() {
            state.ended = Some(reason.to_owned());
            // Dropped senders wake their waiters.
            state.waiting.clear();
        }
        drop(state);
        self.closed.cancel();
    }

    fn closed_error(&self) -> QmpError {
        let reason = self.state().ended.clone();
        QmpError::Closed {
            reason: reason.unwrap_or_else(|| "it was dropped".into()),
        }
    }
}

/// Forgets an id when its caller goes away.
struct Waiter<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.shared.state().waiting.remove(&self.id);
    }
}

impl Client {
    /// Connects to QEMU's listening socket and agrees on the protocol.
    pub async fn connect(socket: &Path, options: Options) -> Result<(Self, Events), QmpError> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|err| QmpError::Connect {
                reason: format!("{}: {err}", socket.display()),
            })?;
        Self::handshake(stream, options).await
    }

    /// Takes a connected stream: reads the greeting and leaves the negotiation mode.
    pub async fn handshake(
        stream: UnixStream,
        options: Options,
    ) -> Result<(Self, Events), QmpError> {
        let bad = |reason: String| QmpError::Connect { reason };
        let (read, write) = stream.into_split();
        let mut lines = FramedRead::new(read, LinesCodec::new_with_max_length(options.max_line));
        let first = tokio::time::timeout(options.greeting, lines.next())
            .await
            .map_err(|_| bad(format!("no greeting within {:?}", options.greeting)))?
            .ok_or_else(|| bad("it was closed before the greeting".into()))?
            .map_err(|err| bad(err.to_string()))?;
        let version = message::parse_greeting(&first)
            .map_err(|err| bad(format!("this is not QEMU's greeting: {err}")))?;

        let shared = Arc::new(Shared::default());
        let (event_sender, events) = mpsc::channel(options.max_events);
        let (outgoing, queue) = mpsc::unbounded_channel();
        tokio::spawn(write_all(write, queue, shared.clone()));
        let reader = tokio::spawn(read_all(lines, event_sender, shared.clone())).abort_handle();
        let client = Self {
            inner: Arc::new(Inner {
                shared,
                outgoing,
                next_id: AtomicU64::new(1),
                deadline: options.deadline,
                version,
                one_with_fd: Arc::default(),
                reader,
            }),
        };
        client.execute("qmp_capabilities", Value::Null).await?;
        Ok((client, events))
    }

    pub fn version(&self) -> Version {
        self.inner.version
    }

    pub fn is_closed(&self) -> bool {
        self.inner.shared.closed.is_cancelled()
    }

    /// Completes when the connection has ended.
    pub async fn closed(&self) {
        self.inner.shared.closed.cancelled().await;
    }

    /// Runs a typed command within the default bound.
    pub async fn run<C: Command>(&self, command: &C) -> Result<C::Reply, QmpError> {
        self.run_within(command, self.inner.deadline).await
    }

    pub async fn run_within<C: Command>(
        &self,
        command: &C,
        within: Duration,
    ) -> Result<C::Reply, QmpError> {
        let reply = self
            .execute_within(C::NAME, arguments(command)?, within)
            .await?;
        typed::<C>(reply)
    }

    /// Runs a typed command that hands a descriptor over (`getfd`, `add-fd`).
    pub async fn run_with_fd<C: Command>(
        &self,
        command: &C,
        fd: OwnedFd,
    ) -> Result<C::Reply, QmpError> {
        let reply = self
            .execute_with_fd(C::NAME, arguments(command)?, fd)
            .await?;
        typed::<C>(reply)
    }

    /// Runs any command. `arguments` is an object, or null for none.
    pub async fn execute(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.execute_within(command, arguments, self.inner.deadline)
            .await
    }

    pub async fn execute_within(
        &self,
        command: &str,
        arguments: Value,
        within: Duration,
    ) -> Result<Value, QmpError> {
        self.send(command, arguments, None, within).await
    }

    /// Runs a command with a descriptor beside it. It goes on even if the caller goes away, so that
    /// the next one can't overtake it and lose its descriptor.
    pub async fn execute_with_fd(
        &self,
        command: &str,
        arguments: Value,
        fd: OwnedFd,
    ) -> Result<Value, QmpError> {
        let client = self.clone();
        let command = command.to_owned();
        let work = tokio::spawn(async move {
            let lock = client.inner.one_with_fd.clone();
            let _one = lock.lock().await;
            let within = client.inner.deadline;
            client.send(&command, arguments, Some(fd), within).await
        });
        work.await.unwrap_or_else(|err| {
            Err(QmpError::Closed {
                reason: err.to_string(),
            })
        })
    }

    async fn send(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<OwnedFd>,
        within: Duration,
    ) -> Result<Value, QmpError> {
        let shared = &self.inner.shared;
        let id = self.inner.next_id.fetch_add(1, Ordering::Relaxed);
        let mut body = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            body["arguments"] = arguments;
        }
        let mut line = body.to_string().into_bytes();
        line.push(b'\n');

        let (sender, reply) = oneshot::channel();
        {
            let mut state = shared.state();
            if state.ended.is_some() {
                drop(state);
                return Err(shared.closed_error());
            }
            state.waiting.insert(id, sender);
        }
        let _waiter = Waiter { shared, id };
        if self.inner.outgoing.send((line, fd)).is_err() {
            return Err(shared.closed_error());
        }
        match tokio::time::timeout(within, reply).await {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(refusal))) => Err(QmpError::Refused {
                command: command.to_owned(),
                class: refusal.class,
                description: refusal.desc,
            }),
            Ok(Err(_)) => Err(shared.closed_error()),
            Err(_) => Err(QmpError::Deadline {
                command: command.to_owned(),
                within,
            }),
        }
    }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("version", &self.inner.version)
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

fn arguments<C: Command>(command: &C) -> Result<Value, QmpError> {
    let bad = |err: serde_json::Error| QmpError::BadReply {
        command: C::NAME.into(),
        reason: format!("its arguments can't be written: {err}"),
    };
    let value = serde_json::to_value(command).map_err(bad)?;
    let empty = value.as_object().is_some_and(serde_json::Map::is_empty);
    Ok(if empty { Value::Null } else { value })
}

fn typed<C: Command>(reply: Value) -> Result<C::Reply, QmpError> {
    serde_json::from_value(reply).map_err(|err| QmpError::BadReply {
        command: C::NAME.into(),
        reason: err.to_string(),
    })
}

async fn read_all(
    mut lines: FramedRead<OwnedReadHalf, LinesCodec>,
    events: mpsc::Sender<Event>,
    shared: Arc<Shared>,
) {
    let reason = loop {
        let line = match lines.next().await {
            None => break "QEMU closed it".to_owned(),
            Some(Err(err)) => break err.to_string(),
            Some(Ok(line)) => line,
        };
        if line.trim().is_empty() {
            continue;
        }
        match message::parse(&line) {
            Ok(Message::Reply { id, outcome }) => {
                // Nobody waits for a command that was given up.
                if let Some(waiter) = shared.state().waiting.remove(&id) {
                    let _ = waiter.send(outcome);
                }
            }
            Ok(Message::Event(event)) => {
                tracing::trace!(event = event.name, data = %event.data, "QMP event");
                // Waiting here would hold up the replies; a receiver that was dropped is no fault.
                if let Err(mpsc::error::TrySendError::Full(event)) = events.try_send(event) {
                    tracing::warn!(event = event.name, "QMP event dropped, receiver too slow");
                }
            }
            Ok(Message::Other) => tracing::debug!("QMP message of an unknown kind ignored"),
            Err(err) => break format!("it sent a line that is no QMP message: {err}"),
        }
    };
    shared.end(&reason);
}

async fn write_all(
    mut socket: OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Outgoing>,
    shared: Arc<Shared>,
) {
    while let Some((line, fd)) = queue.recv().await {
        let written = async {
            let sent = match &fd {
                Some(fd) => send_fd(socket.as_ref(), &line, fd).await?,
                None => 0,
            };
            socket.write_all(&line[sent..]).await
        };
        // Not only on error: a peer that reads nothing would otherwise hold us for ever.
        let outcome = tokio::select! {
            outcome = written => outcome,
            () = shared.closed.cancelled() => return,
        };
        if let Err(err) = outcome {
            shared.end(&err.to_string());
            return;
        }
    }
}

/// Sends the line's beginning together with the descriptor; returns how many bytes went.
async fn send_fd(socket: &UnixStream, line: &[u8], fd: &OwnedFd) -> std::io::Result<usize> {
    socket
        .async_io(Interest::WRITABLE, || {
            let fds = [fd.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
                return Err(std::io::Error::other("no room for a descriptor"));
            }
            let sent = rustix::net::sendmsg(
                socket,
                &[IoSlice::new(line)],
                &mut control,
                SendFlags::NOSIGNAL,
            )?;
            Ok(sent)
        })
        .await
}
