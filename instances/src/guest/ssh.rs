//! The daemon's own SSH connections into one guest, kept open and shared: a new command is a new
//! channel, which costs tens of milliseconds, where a new connection costs the guest a second.
//!
//! ```text
//!  pool ─┬─ slot 0: ssh0.sock   opened when first needed; agreed with the agent (below)
//!        ├─ slot 1: …           used only while a slow reader holds up slot 0
//!        └─ or the guest's IP, port 22: for images that can't run the agent
//!
//!  agent: ssh-open{nonce} ─▸ old sshd ended, port drained ─▸ ok
//!  host:  connect, throw away all up to the line `PILEUS-SSH nonce`, then speak SSH
//! ```
//!
//! Why slots: the SSH library widens a channel's window when data *arrives*, and stops the whole
//! connection when one channel's reader does not keep up. So a session whose reader sleeps marks its
//! connection as stalled, and new sessions take the next slot.
//!
//! Next: `exec.rs` runs commands on the channels.

use std::borrow::Cow;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use pileus_base::{Code, Error, Result, files};
use russh::client::{self, Handle, Msg};
use russh::keys::ssh_key::PublicKey;
use russh::keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate};
use russh::{Channel, Disconnect, Preferred, cipher, kex, mac};
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Mutex;
use tokio::sync::broadcast::error::RecvError;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::agent::AgentLink;
use super::keys::InstanceKeys;
use super::wire::Hello;

/// The agent may have to wait until cloud-init has made the login user.
const USER_WAIT: Duration = Duration::from_secs(120);
const HELLO_WAIT: Duration = Duration::from_secs(30);
/// sshd's greeting, key exchange and login, in a guest without hardware virtualisation.
const LOGIN_BOUND: Duration = Duration::from_secs(60);
/// How long a guest has for its greeting, try by try; it takes some milliseconds.
const GREETINGS: [Duration; 3] = [
    Duration::from_secs(3),
    Duration::from_secs(8),
    Duration::from_secs(20),
];
const OPEN_BOUND: Duration = Duration::from_secs(30);
const CLOSE_BOUND: Duration = Duration::from_secs(2);
const KEEPALIVE: Duration = Duration::from_secs(30);
/// What an old connection may leave behind, at most.
const MAX_LEFTOVER: usize = 64 << 20;

/// How the guest is reached.
#[derive(Clone)]
pub enum Access {
    /// Over virtio-serial ports, agreed with the agent. One connection a port.
    Agent {
        link: AgentLink,
        /// `(name of the port in the guest, its socket on the host)`.
        ports: Vec<(String, PathBuf)>,
    },
    /// Over the network. The guest must show our host key; an image that ignores it has its own key
    /// pinned at first use, in this file.
    Tcp {
        address: SocketAddr,
        pin_file: PathBuf,
    },
}

/// Shared connections into one guest. Cheap to clone.
#[derive(Clone)]
pub struct SshPool {
    shared: Arc<Shared>,
}

struct Shared {
    access: Access,
    user: String,
    keys: InstanceKeys,
    config: Arc<client::Config>,
    slots: Vec<Slot>,
}

#[derive(Default)]
struct Slot {
    open: Mutex<Option<Arc<Connection>>>,
}

/// One authenticated connection.
pub struct Connection {
    handle: Handle<Client>,
    stalls: AtomicUsize,
    /// Set when the agent says that the other end is gone, which a port itself never shows.
    dead: CancellationToken,
}

/// Says, while it lives, that its session's reader holds up the connection.
pub struct Stall(Arc<Connection>);

impl Stall {
    pub(super) fn new(connection: &Arc<Connection>) -> Self {
        connection.stalls.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(connection))
    }
}

impl Drop for Stall {
    fn drop(&mut self) {
        self.0.stalls.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // Ends the task that watches for the end.
        self.dead.cancel();
    }
}

impl Connection {
    fn is_open(&self) -> bool {
        !self.handle.is_closed() && !self.dead.is_cancelled()
    }

    /// Completes when the other end is known to be gone.
    pub(super) async fn gone(&self) {
        self.dead.cancelled().await;
    }

    fn is_stalled(&self) -> bool {
        self.stalls.load(Ordering::Relaxed) > 0
    }
}

impl SshPool {
    /// Nothing is opened before it is needed.
    pub fn new(access: Access, user: impl Into<String>, keys: InstanceKeys) -> Self {
        let slots = match &access {
            Access::Agent { ports, .. } => ports.len().max(1),
            Access::Tcp { .. } => 4,
        };
        Self {
            shared: Arc::new(Shared {
                access,
                user: user.into(),
                keys,
                config: Arc::new(config()),
                slots: (0..slots).map(|_| Slot::default()).collect(),
            }),
        }
    }

    pub fn user(&self) -> &str {
        &self.shared.user
    }

    /// Opens the connection if it is not open yet.
    pub async fn warm_up(&self) -> Result<()> {
        self.connection().await.map(|_| ())
    }

    /// A new session channel, for a command, a shell or a subsystem.
    pub async fn channel(&self) -> Result<(Channel<Msg>, Arc<Connection>)> {
        self.open(None).await
    }

    /// A new channel to a TCP port on the guest's loopback (`port.rs`).
    pub(super) async fn port_channel(&self, port: u16) -> Result<(Channel<Msg>, Arc<Connection>)> {
        self.open(Some(port)).await
    }

    /// Opens a channel. A connection that broke since it was last used is made anew once.
    async fn open(&self, port: Option<u16>) -> Result<(Channel<Msg>, Arc<Connection>)> {
        let mut again = true;
        loop {
            let connection = self.connection().await?;
            let open = async {
                let handle = &connection.handle;
                match port {
                    None => handle.channel_open_session().await,
                    // The name stands for both 127.0.0.1 and ::1.
                    Some(port) => {
                        let to = ("localhost", u32::from(port));
                        handle
                            .channel_open_direct_tcpip(to.0, to.1, "127.0.0.1", 0)
                            .await
                    }
                }
            };
            // A port shows no end, so an answer that can't come any more is not waited for.
            let open = async {
                tokio::select! {
                    opened = open => opened,
                    () = connection.gone() => Err(russh::Error::Disconnect),
                }
            };
            let err = match (timeout(OPEN_BOUND, open).await, port) {
                (Ok(Ok(channel)), _) => return Ok((channel, connection)),
                (Ok(Err(err)), None) => unreachable_guest("The guest opened no session", err),
                (Ok(Err(err)), Some(port)) => unreachable_guest(
                    &format!("Nothing in the guest takes connections on port {port}"),
                    err,
                ),
                (Err(_), None) => late("open a session", OPEN_BOUND),
                (Err(_), Some(_)) => late("connect to the port", OPEN_BOUND),
            };
            // A refusal (too many sessions) is an answer; only a broken connection is made anew.
            if !again || connection.is_open() {
                return Err(err);
            }
            again = false;
        }
    }

    /// Ends all connections; sessions on them end too. The next use opens anew.
    pub async fn close(&self) {
        for slot in &self.shared.slots {
            let old = slot.open.lock().await.take();
            end(old).await;
        }
    }

    /// The first connection that works and is not held up, or a new one.
    async fn connection(&self) -> Result<Arc<Connection>> {
        let last = self.shared.slots.len() - 1;
        for (index, slot) in self.shared.slots.iter().enumerate() {
            let mut open = slot.open.lock().await;
            if let Some(connection) = open.as_ref().filter(|c| c.is_open()) {
                if !connection.is_stalled() || index == last {
                    return Ok(Arc::clone(connection));
                }
                continue;
            }
            // The port takes one connection at a time, so the old one has to be gone first.
            end(open.take()).await;
            let connection = Arc::new(self.shared.open(index).await?);
            *open = Some(Arc::clone(&connection));
            return Ok(connection);
        }
        Err(Error::internal("An SSH pool without slots"))
    }
}

async fn end(old: Option<Arc<Connection>>) {
    let Some(old) = old else {
        return;
    };
    let goodbye = old
        .handle
        .disconnect(Disconnect::ByApplication, "closed", "");
    let _ = timeout(CLOSE_BOUND, goodbye).await;
    // Its socket is closed when its task has ended.
    let _ = timeout(CLOSE_BOUND, async {
        while !old.handle.is_closed() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

impl Shared {
    async fn open(&self, slot: usize) -> Result<Connection> {
        let started = std::time::Instant::now();
        let mut dead = CancellationToken::new();
        let handle = match &self.access {
            Access::Agent { link, ports } => {
                let (name, socket) = ports
                    .get(slot)
                    .ok_or_else(|| Error::internal("An SSH pool without ports"))?;
                let stream;
                (stream, dead) = agreed(link, name, socket).await?;
                let pin = Pin::Known(self.keys.host_public().clone());
                self.login(stream, pin).await?
            }
            Access::Tcp { address, pin_file } => {
                let stream = timeout(Duration::from_secs(10), TcpStream::connect(address))
                    .await
                    .map_err(|_| late("take a connection", Duration::from_secs(10)))?
                    .map_err(|err| unreachable_guest("The guest refused the connection", err))?;
                let _ = stream.set_nodelay(true);
                let pin = Pin::from_file(self.keys.host_public().clone(), pin_file)?;
                self.login(stream, pin).await?
            }
        };
        tracing::debug!(
            slot,
            ms = started.elapsed().as_millis(),
            "SSH connection open"
        );
        Ok(Connection {
            handle,
            stalls: AtomicUsize::new(0),
            dead,
        })
    }

    async fn login<S>(&self, stream: S, pin: Pin) -> Result<Handle<Client>>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let refused = Arc::new(StdMutex::new(None));
        let client = Client {
            pin,
            refused: Arc::clone(&refused),
        };
        let work = async {
            let mut handle = client::connect_stream(Arc::clone(&self.config), stream, client)
                .await
                .map_err(|err| match refused.lock().ok().and_then(|mut r| r.take()) {
                    Some(why) => Error::new(Code::GuestUnreachable, why),
                    None => unreachable_guest("The guest's SSH server gave no connection", err),
                })?;
            let key = PrivateKeyWithHashAlg::new(Arc::new(self.keys.client().clone()), None);
            let answer = handle
                .authenticate_publickey(self.user.as_str(), key)
                .await
                .map_err(|err| unreachable_guest("The guest's SSH server broke off", err))?;
            if !answer.success() {
                return Err(Error::new(
                    Code::GuestUnreachable,
                    format!("The guest refused pileus's key for the user {}", self.user),
                ));
            }
            Ok(handle)
        };
        timeout(LOGIN_BOUND, work)
            .await
            .unwrap_or_else(|_| Err(late("log pileus in", LOGIN_BOUND)))
    }
}

/// Cancels `dead` when the connection's sshd ended or the guest booted anew. Ends by itself when `dead`
/// is cancelled, at the latest when the connection is dropped.
fn watch_end(
    link: &AgentLink,
    nonce: String,
    dead: CancellationToken,
) -> impl Future<Output = ()> + Send + 'static {
    let mut ends = link.ssh_ends();
    let mut hello = link.hello();
    let known = |hello: &Option<Hello>| hello.as_ref().map(|h| h.boot_id.clone());
    let mut boot_id = known(&hello.borrow_and_update());
    async move {
        let ended = async {
            loop {
                tokio::select! {
                    end = ends.recv() => match end {
                        Ok(end) if end == nonce => return,
                        Err(RecvError::Closed) => return,
                        _ => {}
                    },
                    changed = hello.changed() => {
                        let now = known(&hello.borrow_and_update());
                        let another = now.is_some() && boot_id.is_some() && now != boot_id;
                        // The first hello may come after the beginning.
                        boot_id = boot_id.or(now);
                        if changed.is_err() || another {
                            return;
                        }
                    }
                }
            }
        };
        if dead.run_until_cancelled(ended).await.is_some() {
            dead.cancel();
        }
    }
}

/// Agrees a connection with the agent; with it comes what is cancelled when its other end is gone.
///
/// A guest that stood still while the old connection broke may greet before it knows: into nothing. Then
/// a new agreement helps, and waiting does not.
async fn agreed(
    link: &AgentLink,
    port: &str,
    socket: &Path,
) -> Result<(BufReader<UnixStream>, CancellationToken)> {
    let mut waited = Duration::ZERO;
    for bound in GREETINGS {
        let nonce = Uuid::new_v4().simple().to_string();
        let dead = CancellationToken::new();
        // Listens from before the beginning, so that no end is missed.
        tokio::spawn(watch_end(link, nonce.clone(), dead.clone()));
        let unless_open = dead.clone().drop_guard();
        if let Some(stream) = agreed_stream(link, port, socket, &nonce, bound).await? {
            unless_open.disarm();
            return Ok((stream, dead));
        }
        waited += bound;
        tracing::debug!(port, ?bound, "no greeting: the connection is agreed anew");
    }
    Err(late("greet on its SSH port", waited))
}

/// Agrees a connection and reads up to its greeting; `None` if that does not come.
async fn agreed_stream(
    link: &AgentLink,
    port: &str,
    socket: &Path,
    nonce: &str,
    greeted_within: Duration,
) -> Result<Option<BufReader<UnixStream>>> {
    // Without an agent there is nobody to agree with; a guest that boots gets a moment.
    timeout(HELLO_WAIT, link.wait_hello())
        .await
        .unwrap_or_else(|_| Err(late("answer with its agent", HELLO_WAIT)))?;
    let args = json!({ "nonce": nonce, "port": port, "wait": USER_WAIT.as_secs() });
    let bound = USER_WAIT + Duration::from_secs(15);
    link.request("ssh-open", args, bound).await?;
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|err| unreachable_guest("The machine's SSH port can't be opened", err))?;
    let mut stream = BufReader::new(stream);
    match timeout(greeted_within, greeting(&mut stream, nonce)).await {
        Ok(greeted) => greeted.map(|()| Some(stream)),
        Err(_) => Ok(None),
    }
}

/// Throws away everything up to and with the line `PILEUS-SSH nonce`.
async fn greeting<R: AsyncRead + Unpin>(stream: &mut BufReader<R>, nonce: &str) -> Result<()> {
    let wanted = format!("PILEUS-SSH {nonce}\n").into_bytes();
    let mut matched = 0;
    let mut seen = 0;
    loop {
        let piece = stream
            .fill_buf()
            .await
            .map_err(|err| unreachable_guest("The machine's SSH port broke", err))?;
        if piece.is_empty() || seen > MAX_LEFTOVER {
            return Err(Error::new(
                Code::GuestUnreachable,
                "The guest did not greet on its SSH port",
            ));
        }
        // The line begins with its only `P` after which `ILEUS` follows; on a mismatch a new line can
        // begin at the earliest with this very byte.
        let mut used = 0;
        for byte in piece {
            used += 1;
            if *byte == wanted[matched] {
                matched += 1;
            } else {
                matched = usize::from(*byte == wanted[0]);
            }
            if matched == wanted.len() {
                break;
            }
        }
        stream.consume(used);
        seen += used;
        if matched == wanted.len() {
            return Ok(());
        }
    }
}

/// The cheapest algorithms first: the way is local, and an emulated guest pays for each byte. Measured
/// in `docs/decisions/`; all of them are sound.
fn config() -> client::Config {
    const KEX: &[kex::Name] = &[
        kex::CURVE25519,
        kex::CURVE25519_PRE_RFC_8731,
        kex::ECDH_SHA2_NISTP256,
        kex::MLKEM768X25519_SHA256,
        kex::DH_G14_SHA256,
        kex::EXTENSION_SUPPORT_AS_CLIENT,
        kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT,
    ];
    const CIPHERS: &[cipher::Name] = &[
        cipher::AES_128_GCM,
        cipher::AES_256_GCM,
        cipher::CHACHA20_POLY1305,
        cipher::AES_128_CTR,
        cipher::AES_256_CTR,
    ];
    const MACS: &[mac::Name] = &[mac::HMAC_SHA256_ETM, mac::HMAC_SHA512_ETM, mac::HMAC_SHA256];
    client::Config {
        preferred: Preferred {
            kex: Cow::Borrowed(KEX),
            cipher: Cow::Borrowed(CIPHERS),
            mac: Cow::Borrowed(MACS),
            ..Preferred::default()
        },
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: 4,
        nodelay: true,
        ..client::Config::default()
    }
}

/// Which host key is right.
enum Pin {
    Known(PublicKey),
    /// Ours, or the one pinned before, or else the first one seen, which is then written down.
    FirstUse {
        ours: PublicKey,
        pinned: Option<PublicKey>,
        file: PathBuf,
    },
}

impl Pin {
    fn from_file(ours: PublicKey, file: &Path) -> Result<Self> {
        let pinned = match files::read_bounded(file, 16 * 1024) {
            Ok(bytes) => Some(
                PublicKey::from_openssh(&String::from_utf8_lossy(&bytes)).map_err(|err| {
                    Error::internal(format!("{} is not a public key: {err}", file.display()))
                })?,
            ),
            Err(_) if !file.exists() => None,
            Err(err) => return Err(err),
        };
        Ok(Pin::FirstUse {
            ours,
            pinned,
            file: file.to_owned(),
        })
    }

    fn accepts(&self, shown: &PublicKey) -> Result<bool> {
        match self {
            Pin::Known(key) => Ok(key.key_data() == shown.key_data()),
            Pin::FirstUse { ours, pinned, file } => {
                if ours.key_data() == shown.key_data() {
                    return Ok(true);
                }
                if let Some(pinned) = pinned {
                    return Ok(pinned.key_data() == shown.key_data());
                }
                let line = shown.to_openssh().map_err(|err| {
                    Error::internal(format!("A host key can't be written: {err}"))
                })?;
                files::write_atomic(file, line.as_bytes(), 0o600)?;
                Ok(true)
            }
        }
    }
}

/// The library's callbacks: the host key is all that matters; nothing that a guest asks for (forwarded
/// ports, agents, X11) is granted.
pub struct Client {
    pin: Pin,
    refused: Arc<StdMutex<Option<String>>>,
}

impl client::Handler for Client {
    type Error = russh::Error;

    async fn check_server_key(
        &mut self,
        shown: &PublicKeyOrCertificate,
    ) -> std::result::Result<bool, russh::Error> {
        let PublicKeyOrCertificate::PublicKey { key, .. } = shown else {
            return Ok(false);
        };
        let why = match self.pin.accepts(key) {
            Ok(true) => return Ok(true),
            Ok(false) => "The guest shows another host key than the one that is pinned".to_owned(),
            Err(err) => err.to_string(),
        };
        if let Ok(mut refused) = self.refused.lock() {
            *refused = Some(why);
        }
        Ok(false)
    }
}

fn unreachable_guest(
    what: &str,
    err: impl Into<Box<dyn std::error::Error + Send + Sync + 'static>>,
) -> Error {
    let err = err.into();
    Error::new(Code::GuestUnreachable, format!("{what}: {err}")).with_source(err)
}

fn late(what: &str, bound: Duration) -> Error {
    let seconds = bound.as_secs();
    Error::new(
        Code::GuestUnreachable,
        format!("The guest did not {what} within {seconds} s"),
    )
}

#[cfg(test)]
#[path = "ssh_tests.rs"]
mod tests;
