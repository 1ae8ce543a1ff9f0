//! The host's end of the agent's port: a link that connects, reconnects, keeps the last thing the guest
//! said, and carries requests. A guest that floods, lies or dies only harms its own link.
//!
//! ```text
//!   agent.sock ── bounded lines ── wire::parse ─┬─ hello, cloud-init, report   (watch channels)
//!              ◂─ one JSON line a request ──────┴─ replies by number           (request())
//! ```
//!
//! QEMU takes the socket's first connection only; what is written before the agent runs waits there and
//! is answered later. A line can be torn when either end starts anew, hence the leading line end.
//!
//! Measured with QEMU 10.0: after a reset of the guest a port whose host end stayed connected looks
//! unconnected to the new guest for ever. So the link connects anew when it is told of a reset
//! ([`AgentLink::reconnect`]), and by itself after a silence.
//!
//! Next: `ssh.rs` agrees its connections over this link.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use pileus_base::{Code, Error, Result};
use serde_json::{Map, Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Notify, broadcast, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::wire::{self, CloudInit, Hello, MAX_LINE, Message, Report};

/// More lines a second than this are not read: the socket fills, and the guest has to wait.
const LINES_PER_SECOND: u32 = 200;
const FIRST_RETRY: Duration = Duration::from_millis(20);
const LAST_RETRY: Duration = Duration::from_secs(1);
/// No agent was heard on this connection yet: try another one.
const SILENCE_BEFORE_HELLO: Duration = Duration::from_secs(5);
/// Unless something was asked of it, which a new connection would lose: a guest that was just restored, on a
/// host with much to do, may need long to come round.
const SILENCE_WHEN_ASKED: Duration = Duration::from_secs(60);
/// The agent is asked for a sign of life after half of this, and taken for lost after all of it.
const SILENCE: Duration = Duration::from_secs(40);
/// More unanswered requests than this are refused.
const MAX_PENDING: usize = 64;

type Answer = Result<Map<String, Value>>;
type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Answer>>>>;

/// A link to one guest's agent. Cheap to clone; the last clone's drop ends it.
#[derive(Clone)]
pub struct AgentLink {
    path: PathBuf,
    hello: watch::Receiver<Option<Hello>>,
    cloud_init: watch::Receiver<CloudInit>,
    report: watch::Receiver<Option<Report>>,
    ssh_ends: broadcast::Sender<String>,
    again: Arc<Notify>,
    outgoing: mpsc::Sender<Vec<u8>>,
    pending: Pending,
    next: Arc<AtomicU64>,
    _stop: Arc<DropGuard>,
}

impl AgentLink {
    /// Starts the link. It connects when the socket appears and again after every break, until it is
    /// dropped.
    pub fn connect(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let stop = CancellationToken::new();
        let (hello_in, hello) = watch::channel(None);
        let (cloud_init_in, cloud_init) = watch::channel(CloudInit::default());
        let (report_in, report) = watch::channel(None);
        let (ssh_ends, _) = broadcast::channel(16);
        let (outgoing, requests) = mpsc::channel(MAX_PENDING);
        let pending = Pending::default();
        let again = Arc::new(Notify::new());
        let task = Task {
            path: path.clone(),
            hello: hello_in,
            cloud_init: cloud_init_in,
            report: report_in,
            ssh_ends: ssh_ends.clone(),
            again: Arc::clone(&again),
            requests,
            pending: Arc::clone(&pending),
        };
        let stopped = stop.clone();
        tokio::spawn(async move {
            stopped.run_until_cancelled(task.run()).await;
        });
        Self {
            path,
            hello,
            cloud_init,
            report,
            ssh_ends,
            again,
            outgoing,
            pending,
            next: Arc::new(AtomicU64::new(1)),
            _stop: Arc::new(stop.drop_guard()),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who answers; `None` while no agent does.
    pub fn hello(&self) -> watch::Receiver<Option<Hello>> {
        self.hello.clone()
    }

    /// cloud-init's state as last told.
    pub fn cloud_init(&self) -> watch::Receiver<CloudInit> {
        self.cloud_init.clone()
    }

    /// The last report: at the agent's start, when cloud-init ends, when an address changes, on request.
    pub fn report(&self) -> watch::Receiver<Option<Report>> {
        self.report.clone()
    }

    /// Connects anew at once: to be called when the guest was reset.
    pub fn reconnect(&self) {
        self.again.notify_one();
    }

    /// The nonces of SSH connections whose `sshd` ended; a port itself shows no such end.
    pub fn ssh_ends(&self) -> broadcast::Receiver<String> {
        self.ssh_ends.subscribe()
    }

    /// Completes with the agent's first sign of life. The caller sets the bound.
    pub async fn wait_hello(&self) -> Result<Hello> {
        let mut hello = self.hello.clone();
        match hello.wait_for(Option::is_some).await {
            Ok(seen) => seen.clone().ok_or_else(|| gone(&self.path)),
            Err(_) => Err(gone(&self.path)),
        }
    }

    /// Completes when cloud-init has ended in whatever way. The caller sets the bound.
    pub async fn wait_cloud_init(&self) -> Result<CloudInit> {
        let mut state = self.cloud_init.clone();
        match state.wait_for(|c| c.state.is_final()).await {
            Ok(seen) => Ok(seen.clone()),
            Err(_) => Err(gone(&self.path)),
        }
    }

    /// Asks for a fresh report.
    pub async fn fresh_report(&self, bound: Duration) -> Result<Report> {
        self.request("report", json!({}), bound).await?;
        let report = self.report.borrow().clone();
        report.ok_or_else(|| {
            Error::new(
                Code::GuestUnreachable,
                "The guest's agent sent no valid report",
            )
        })
    }

    /// Sends `{do: what, …args}` and returns what the answer holds beside `id` and `ok`.
    pub async fn request(&self, what: &str, args: Value, bound: Duration) -> Answer {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut message = match args {
            Value::Object(map) => map,
            _ => Map::new(),
        };
        message.insert("id".into(), id.into());
        message.insert("do".into(), what.into());
        let mut line = Value::Object(message).to_string().into_bytes();
        line.push(b'\n');
        if line.len() > MAX_LINE {
            return Err(Error::internal(format!("The request {what} is too long")));
        }
        let (answer_in, answer) = oneshot::channel();
        let waiting = Waiting {
            pending: &self.pending,
            id,
        };
        {
            let mut pending = lock(&self.pending);
            if pending.len() >= MAX_PENDING {
                return Err(Error::new(
                    Code::GuestUnreachable,
                    "The guest's agent does not answer, and too many requests wait for it",
                ));
            }
            pending.insert(id, answer_in);
        }
        let answered = timeout(bound, async {
            self.outgoing
                .send(line)
                .await
                .map_err(|_| gone(&self.path))?;
            answer.await.unwrap_or_else(|_| Err(gone(&self.path)))
        })
        .await;
        drop(waiting);
        answered.unwrap_or_else(|_| {
            Err(Error::new(
                Code::GuestUnreachable,
                format!(
                    "The guest's agent did not answer {what} within {} s",
                    bound.as_secs_f32()
                ),
            ))
        })
    }
}

/// Forgets a request however its caller leaves.
struct Waiting<'a> {
    pending: &'a Pending,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(self.pending).remove(&self.id);
    }
}

fn lock(pending: &Pending) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Answer>>> {
    // A map of senders can't be left in a bad state.
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gone(path: &Path) -> Error {
    Error::new(
        Code::GuestUnreachable,
        format!("The link to the guest's agent ({}) broke", path.display()),
    )
}

struct Task {
    path: PathBuf,
    hello: watch::Sender<Option<Hello>>,
    cloud_init: watch::Sender<CloudInit>,
    report: watch::Sender<Option<Report>>,
    ssh_ends: broadcast::Sender<String>,
    again: Arc<Notify>,
    requests: mpsc::Receiver<Vec<u8>>,
    pending: Pending,
}

impl Task {
    async fn run(mut self) {
        let mut retry = FIRST_RETRY;
        loop {
            if let Ok(stream) = UnixStream::connect(&self.path).await {
                let since = Instant::now();
                let end = self.converse(stream).await;
                tracing::debug!(path = %self.path.display(), ?end, "agent link ended");
                self.hello.send_replace(None);
                lock(&self.pending).clear();
                if since.elapsed() > LAST_RETRY {
                    retry = FIRST_RETRY;
                }
            }
            sleep(retry).await;
            retry = (retry * 2).min(LAST_RETRY);
        }
    }

    /// Until the connection ends.
    async fn converse(&mut self, stream: UnixStream) -> std::io::Result<()> {
        let (mut from, mut to) = stream.into_split();
        to.write_all(b"\n{\"id\":0,\"do\":\"hello\"}\n").await?;
        let mut lines = Lines::default();
        let mut second = Instant::now();
        let mut heard = Instant::now();
        let mut asked = false;
        let mut count = 0;
        loop {
            while let Some(line) = lines.next() {
                if self.take(&line) {
                    heard = Instant::now();
                    asked = false;
                }
                count += 1;
                if count >= LINES_PER_SECOND {
                    let spent = second.elapsed();
                    if spent < Duration::from_secs(1) {
                        sleep(Duration::from_secs(1) - spent).await;
                    }
                    second = Instant::now();
                    count = 0;
                }
            }
            let (first, last) = match self.hello.borrow().is_some() {
                true => (SILENCE / 2, SILENCE),
                false if lock(&self.pending).is_empty() => {
                    (SILENCE_BEFORE_HELLO, SILENCE_BEFORE_HELLO)
                }
                false => (SILENCE_WHEN_ASKED, SILENCE_WHEN_ASKED),
            };
            let wait = if asked { last } else { first };
            tokio::select! {
                () = sleep_until(heard + wait) => {
                    if asked || first == last {
                        return Err(std::io::ErrorKind::TimedOut.into());
                    }
                    asked = true;
                    to.write_all(b"{\"id\":0,\"do\":\"ping\"}\n").await?;
                }
                () = self.again.notified() => return Ok(()),
                read = from.read_buf(lines.buffer()) => {
                    if read? == 0 {
                        return Ok(());
                    }
                }
                request = self.requests.recv() => match request {
                    // A guest that does not read must not stop us from reading.
                    Some(line) => match timeout(Duration::from_secs(5), to.write_all(&line)).await {
                        Ok(written) => written?,
                        Err(_) => return Err(std::io::ErrorKind::TimedOut.into()),
                    },
                    None => return Ok(()),
                },
            }
        }
    }

    /// Whether the line was a message.
    fn take(&self, line: &[u8]) -> bool {
        match wire::parse(line) {
            Some(Message::Hello(hello)) => {
                let known = self.hello.borrow().as_ref() == Some(&hello);
                if !known {
                    tracing::debug!(?hello, "agent says hello");
                    self.hello.send_replace(Some(hello));
                }
            }
            Some(Message::CloudInit(state)) => {
                self.cloud_init.send_if_modified(|old| {
                    let new = *old != state;
                    *old = state;
                    new
                });
            }
            Some(Message::Report(report)) => {
                self.report.send_replace(Some(report));
            }
            Some(Message::Reply(reply)) => {
                let Some(waiting) = lock(&self.pending).remove(&reply.id) else {
                    return true;
                };
                let answer = if reply.ok {
                    Ok(reply.rest)
                } else {
                    let why = reply.error.unwrap_or_else(|| "no reason given".into());
                    Err(Error::new(
                        Code::ExecFailed,
                        format!("The guest's agent refused: {why}"),
                    ))
                };
                let _ = waiting.send(answer);
            }
            Some(Message::Ssh(end)) => {
                tracing::debug!(?end, "sshd of the guest ended");
                let _ = self.ssh_ends.send(end.nonce);
            }
            None => {
                tracing::trace!(bytes = line.len(), "line of the agent not understood");
                return false;
            }
        }
        true
    }
}

/// Cuts a byte stream in lines of at most [`MAX_LINE`]; a longer one is dropped as a whole.
#[derive(Default)]
struct Lines {
    buffer: BytesMut,
    skipping: bool,
}

impl Lines {
    /// Where to read into: never more than one bound's worth.
    fn buffer(&mut self) -> &mut BytesMut {
        self.buffer.reserve(4096);
        &mut self.buffer
    }

    fn next(&mut self) -> Option<BytesMut> {
        loop {
            let Some(end) = self.buffer.iter().position(|b| *b == b'\n') else {
                if self.buffer.len() > MAX_LINE {
                    self.buffer.clear();
                    self.skipping = true;
                }
                return None;
            };
            let line = self.buffer.split_to(end);
            self.buffer.advance(1);
            if std::mem::take(&mut self.skipping) || line.is_empty() {
                continue;
            }
            return Some(line);
        }
    }
}

#[cfg(test)]
#[path = "agent_tests.rs"]
mod tests;
