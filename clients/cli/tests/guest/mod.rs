//! A daemon that stands in for the real one where streams of a guest are concerned: its file server is
//! OpenSSH's own, its port 22 a real `sshd -i`, its console repeats what it is told.
#![allow(dead_code)] // Each test file uses its own part of this.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path as InPath, State};
use axum::http::StatusCode;
use axum::response::sse::{Event as Sse, Sse as SseReply};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use bytes::Bytes;
use futures_util::stream;
use pileus_api::exec::STDOUT;
use pileus_api::{Code, ErrorReply, Event, ExecControl, ExecEvent, Instance, InstanceState};
use pileus_base::Error;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{broadcast, watch};

use crate::support::Ran;

pub const SFTP_SERVER: &str = "/usr/lib/openssh/sftp-server";

pub struct World {
    pub instances: Vec<Instance>,
    pub calls: Vec<String>,
    /// What each question for the usage is answered with; the last one stays.
    pub usage: Vec<Value>,
    pub host: Value,
    pub networks: Value,
    pub ssh: Value,
    /// What `sshd -i` is run with; no SSH if empty.
    pub sshd: Vec<String>,
    /// The folder that is the guest's home.
    pub home: PathBuf,
    pub events: broadcast::Sender<Event>,
}

type Shared = Arc<Mutex<World>>;

pub struct Daemon {
    pub dir: tempfile::TempDir,
    pub world: Shared,
    _stop: watch::Sender<()>,
}

impl Daemon {
    pub fn start(instances: Vec<Instance>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        for folder in ["home", "host", "user"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        let world = Arc::new(Mutex::new(World {
            instances,
            calls: vec![],
            usage: vec![],
            host: json!({"cpus": 2, "memory": 8_u64 << 30, "memory_available": 4_u64 << 30,
                         "space_available": 9_u64 << 30, "checks": []}),
            networks: json!([]),
            ssh: Value::Null,
            sshd: vec![],
            home,
            events: broadcast::channel(100).0,
        }));
        let (stop, mut stopped) = watch::channel(());
        let router = router(world.clone());
        let socket = dir.path().join("sock");
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::bind(socket).unwrap();
                ready.send(()).unwrap();
                tokio::select! {
                    result = axum::serve(listener, router).into_future() => result.unwrap(),
                    _ = stopped.changed() => {}
                }
            });
            runtime.shutdown_background();
        });
        is_ready.recv().unwrap();
        Self {
            dir,
            world,
            _stop: stop,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    /// A path of the folder in which the program runs.
    pub fn host(&self, path: &str) -> PathBuf {
        self.dir.path().join("host").join(path)
    }

    pub fn home(&self, path: &str) -> PathBuf {
        self.dir.path().join("home").join(path)
    }

    /// The program, by a name, with this line of arguments (split at spaces).
    pub fn named(&self, name: &str, line: &str) -> Command {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new(env!("CARGO_BIN_EXE_pileus"));
        command
            .arg0(name)
            .args(line.split(' ').filter(|word| !word.is_empty()))
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("PILEUS_SOCKET", self.socket())
            .env("HOME", self.dir.path().join("user"))
            .env("TERM", "xterm")
            .current_dir(self.host(""))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub fn command(&self, line: &str) -> Command {
        self.named("pileus", line)
    }

    pub fn run(&self, line: &str) -> Ran {
        Ran::of(&self.command(line).output().unwrap())
    }

    pub fn change(&self, name: &str, change: impl FnOnce(&mut Instance)) {
        let mut world = self.world.lock().unwrap();
        let instances = &mut world.instances;
        let instance = instances.iter_mut().find(|i| i.name.as_str() == name);
        let instance = instance.unwrap();
        change(instance);
        let event = Event::Instance {
            id: instance.id,
            name: instance.name.clone(),
            state: instance.state,
            deleted: instance.deleted,
        };
        let _ = world.events.send(event);
    }
}

pub fn has_sftp_server() -> bool {
    let has = Path::new(SFTP_SERVER).exists();
    if !has {
        eprintln!("SKIPPED: this host has no {SFTP_SERVER} (Debian: openssh-sftp-server)");
    }
    has
}

fn router(world: Shared) -> Router {
    Router::new()
        .route("/v1/instances", get(list))
        .route("/v1/instances/{name}", get(one).delete(delete))
        .route("/v1/instances/{name}/exec", get(exec))
        .route("/v1/instances/{name}/console", get(console))
        .route("/v1/instances/{name}/port", get(port))
        .route("/v1/instances/{name}/ssh", get(ssh))
        .route("/v1/usage", get(usage))
        .route("/v1/host", get(host))
        .route("/v1/networks", get(networks))
        .route("/v1/events", get(events))
        .layer(axum::middleware::from_fn_with_state(world.clone(), note))
        .with_state(world)
}

async fn note(
    State(world): State<Shared>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let call = format!("{} {}", request.method(), request.uri());
    world.lock().unwrap().calls.push(call);
    next.run(request).await
}

fn refuse(status: StatusCode, code: Code, text: String) -> Response {
    let error = Error::new(code, text).into();
    (status, Json(ErrorReply { error })).into_response()
}

fn missing(name: &str) -> Response {
    let text = format!("instance \"{name}\" does not exist");
    refuse(StatusCode::NOT_FOUND, Code::InstanceNotFound, text)
}

fn find(world: &Shared, name: &str) -> Option<Instance> {
    let world = world.lock().unwrap();
    let mut instances = world.instances.iter();
    instances.find(|i| i.name.as_str() == name).cloned()
}

async fn list(State(world): State<Shared>) -> Json<Vec<Instance>> {
    Json(world.lock().unwrap().instances.clone())
}

async fn one(State(world): State<Shared>, InPath(name): InPath<String>) -> Response {
    match find(&world, &name) {
        Some(instance) => Json(instance).into_response(),
        None => missing(&name),
    }
}

/// Deletes for good, at once.
async fn delete(State(world): State<Shared>, InPath(name): InPath<String>) -> Response {
    let mut world = world.lock().unwrap();
    world.instances.retain(|i| i.name.as_str() != name);
    let operation = json!({
        "id": uuid::Uuid::new_v4(), "kind": "delete", "target": name, "state": "succeeded",
        "phase": null, "progress": null, "phases": [], "warnings": [], "error": null,
        "created_at": "2026-11-21T20:00:00Z", "ended_at": "2026-11-21T20:00:01Z",
    });
    Json(operation).into_response()
}

async fn ssh(State(world): State<Shared>, InPath(name): InPath<String>) -> Response {
    let mut info = world.lock().unwrap().ssh.clone();
    if info.is_null() {
        return missing(&name);
    }
    info["name"] = name.into();
    Json(info).into_response()
}

async fn usage(State(world): State<Shared>) -> Json<Value> {
    let usage = &mut world.lock().unwrap().usage;
    match usage.len() {
        0 => Json(json!([])),
        1 => Json(usage[0].clone()),
        _ => Json(usage.remove(0)),
    }
}

async fn host(State(world): State<Shared>) -> Json<Value> {
    Json(world.lock().unwrap().host.clone())
}

async fn networks(State(world): State<Shared>) -> Json<Value> {
    Json(world.lock().unwrap().networks.clone())
}

async fn events(State(world): State<Shared>) -> Response {
    let receiver = world.lock().unwrap().events.subscribe();
    let events = stream::unfold(receiver, |mut receiver| async {
        let event = receiver.recv().await.ok()?;
        Some((Sse::default().json_data(&event), receiver))
    });
    SseReply::new(Box::pin(events)).into_response()
}

async fn console(
    State(world): State<Shared>,
    InPath(name): InPath<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    match find(&world, &name) {
        None => missing(&name),
        Some(instance) if instance.state != InstanceState::Running => {
            let text = format!("instance \"{name}\" is not running");
            refuse(StatusCode::CONFLICT, Code::WrongState, text)
        }
        Some(_) => upgrade.on_upgrade(repeat),
    }
}

/// Says all that it is told; `off` powers it off.
async fn repeat(mut socket: WebSocket) {
    let login = Bytes::from_static(b"\x1b[1mlogin:\x1b[0m ");
    socket.send(Message::Binary(login)).await.unwrap();
    while let Some(Ok(message)) = socket.recv().await {
        match message {
            // The end of what is typed is not the end of the machine.
            Message::Binary(bytes) if bytes.is_empty() => {}
            Message::Binary(bytes) if bytes.starts_with(b"off") => break,
            Message::Binary(bytes) => {
                let text = [b"<", &bytes[..], b">"].concat();
                let _ = socket.send(Message::Binary(text.into())).await;
            }
            _ => break,
        }
    }
    let _ = socket.send(Message::Close(None)).await;
}

async fn port(
    State(world): State<Shared>,
    InPath(name): InPath<String>,
    uri: axum::http::Uri,
    upgrade: WebSocketUpgrade,
) -> Response {
    let sshd = world.lock().unwrap().sshd.clone();
    if find(&world, &name).is_none() {
        return missing(&name);
    }
    if sshd.is_empty() || uri.query() != Some("port=22") {
        let text = "Nothing listens there".to_owned();
        return refuse(StatusCode::BAD_GATEWAY, Code::GuestUnreachable, text);
    }
    upgrade.on_upgrade(async move |socket| {
        let mut command = tokio::process::Command::new(&sshd[0]);
        command.args(&sshd[1..]).stderr(Stdio::null());
        carry(socket, command, None).await;
    })
}

async fn exec(
    State(world): State<Shared>,
    InPath(name): InPath<String>,
    upgrade: WebSocketUpgrade,
) -> Response {
    upgrade
        .max_message_size(1 << 20)
        .on_upgrade(async move |mut socket| {
            let Some(Ok(Message::Text(first))) = socket.recv().await else {
                return;
            };
            let Ok(ExecControl::Start { request }) = serde_json::from_str(&first) else {
                return;
            };
            let problem = match find(&world, &name) {
                None => Some((Code::InstanceNotFound, "does not exist")),
                Some(i) if i.state != InstanceState::Running => {
                    Some((Code::WrongState, "is not running"))
                }
                Some(_) => None,
            };
            if let Some((code, why)) = problem {
                let error = Error::new(code, format!("instance \"{name}\" {why}")).into();
                return say(&mut socket, &ExecEvent::Error { error }).await;
            }
            say(&mut socket, &ExecEvent::Started).await;
            if request.subsystem.as_deref() == Some("sftp") {
                let mut command = tokio::process::Command::new(SFTP_SERVER);
                command.current_dir(&world.lock().unwrap().home);
                return carry(socket, command, Some(STDOUT)).await;
            }
            // Tells what it was asked to run.
            let text = request.command.join("|");
            let bytes = [&[STDOUT], text.as_bytes(), b"\n"].concat();
            let _ = socket.send(Message::Binary(bytes.into())).await;
            say(&mut socket, &ExecEvent::Exit { code: 7 }).await;
            let _ = socket.send(Message::Close(None)).await;
        })
}

async fn say(socket: &mut WebSocket, event: &ExecEvent) {
    let text = serde_json::to_string(event).unwrap();
    let _ = socket.send(Message::text(text)).await;
}

/// Connects a program's streams with a socket; `stream` stands before each piece of its output.
async fn carry(mut socket: WebSocket, mut command: tokio::process::Command, stream: Option<u8>) {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut input = child.stdin.take();
    let mut output = child.stdout.take().unwrap();
    let mut buffer = vec![0; 60_000];
    loop {
        tokio::select! {
            len = output.read(&mut buffer) => {
                let len = len.unwrap_or_default();
                let mark = stream.as_slice();
                let piece = [mark, &buffer[..len]].concat();
                if len == 0 && stream.is_some() {
                    break;
                }
                if socket.send(Message::Binary(piece.into())).await.is_err() || len == 0 {
                    break;
                }
            }
            message = socket.recv() => match message {
                Some(Ok(Message::Binary(bytes))) if bytes.is_empty() => input = None,
                Some(Ok(Message::Binary(bytes))) => {
                    if let Some(input) = &mut input {
                        let _ = input.write_all(&bytes).await;
                    }
                }
                Some(Ok(Message::Text(_))) => input = None,
                Some(Ok(_)) => {}
                _ => return,
            }
        }
    }
    if stream.is_some() {
        say(&mut socket, &ExecEvent::Exit { code: 0 }).await;
    }
    let _ = socket.send(Message::Close(None)).await;
}
