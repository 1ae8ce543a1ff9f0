//! A daemon that plays by a script on a Unix socket, and the program `pileus` run against it.
#![allow(dead_code)] // Each test file uses its own part of this.

mod settings;
pub mod snapshots;
pub mod terminal;

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::sse::{Event as Sse, Sse as SseReply};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, stream};
use pileus_api::exec::{STDERR, STDOUT};
use pileus_api::{
    Code, ErrorBody, ErrorReply, ExecControl, ExecEvent, ExecRequest, Hypervisor, Instance,
    LaunchRequest, Operation, OperationEvent, OperationKind, OperationState, Phase, PhaseTime,
    ServerInfo,
};
use pileus_base::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, watch};

/// What the daemon was asked and what it has.
#[derive(Default)]
pub struct Script {
    pub instances: Vec<Instance>,
    /// How the next operations go: events, then the end. Empty: they succeed at once.
    pub events: Vec<OperationEvent>,
    pub end: Option<ErrorBody>,
    pub warnings: Vec<String>,
    /// Operations run until they are cancelled.
    pub hang: bool,
    /// The wish to cancel is heard but not heeded.
    pub deaf: bool,
    /// Calls as they came, `POST /v1/instances/foo/start`.
    pub calls: Vec<String>,
    pub launches: Vec<LaunchRequest>,
    /// Seconds of each lease that was asked for.
    pub leases: Vec<u64>,
    /// The daemon takes no deletions.
    pub undeletable: bool,
    /// The folder that is the guest's home, for commands that really run.
    pub home: PathBuf,
    pub templates: Vec<serde_json::Value>,
    pub template_requests: Vec<serde_json::Value>,
    pub forks: Vec<serde_json::Value>,
    pub identities: Vec<serde_json::Value>,
    pub settings: Vec<(String, String)>,
    /// As the API writes them.
    pub snapshots: Vec<serde_json::Value>,
    pub catalog: Vec<serde_json::Value>,
    /// What settings refuse: key and error.
    pub bad_setting: Option<(String, Code, String)>,
    /// The bodies of what was sent: `POST /v1/instances/foo/stop` and its JSON.
    pub bodies: Vec<(String, serde_json::Value)>,
    /// How the operations' phases went.
    pub phases: Vec<PhaseTime>,
    pub log: Vec<u8>,
}

#[derive(Clone)]
struct App {
    script: Arc<Mutex<Script>>,
    running: Arc<Mutex<Vec<Operation>>>,
    cancel: Arc<Notify>,
}

pub struct Daemon {
    pub dir: tempfile::TempDir,
    pub script: Arc<Mutex<Script>>,
    _stop: watch::Sender<()>,
}

impl Daemon {
    pub fn start(instances: Vec<Instance>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().join("home");
        std::fs::create_dir(&home).unwrap();
        let script = Arc::new(Mutex::new(Script {
            instances,
            home,
            ..Default::default()
        }));
        let (stop, mut stopped) = watch::channel(());
        let app = App {
            script: script.clone(),
            running: Arc::default(),
            cancel: Arc::default(),
        };
        let socket = dir.path().join("sock");
        let (ready, is_ready) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::UnixListener::bind(socket).unwrap();
                ready.send(()).unwrap();
                tokio::select! {
                    result = axum::serve(listener, router(app)).into_future() => result.unwrap(),
                    _ = stopped.changed() => {}
                }
            });
        });
        is_ready.recv().unwrap();
        Self {
            dir,
            script,
            _stop: stop,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("sock")
    }

    /// The program with this line of arguments (split at spaces).
    pub fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pileus"));
        command
            .args(line.split(' ').filter(|word| !word.is_empty()))
            .env_remove("PILEUS_STORAGE")
            .env_remove("XDG_CONFIG_HOME")
            .env_remove("XDG_DATA_HOME")
            .env("PILEUS_SOCKET", self.socket())
            .env("HOME", self.dir.path())
            .env("TZ", "Europe/Berlin")
            .env("TERM", "xterm")
            .stdin(Stdio::null());
        command
    }

    pub fn run(&self, line: &str) -> Ran {
        Ran::of(&self.command(line).output().unwrap())
    }

    /// The program called by the name `multipass`.
    pub fn multipass_command(&self, line: &str) -> Command {
        let link = self.dir.path().join("multipass");
        // Several threads of a test may come here.
        let _ = std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_pileus"), &link);
        let mut command = Command::new(link);
        command.env_clear().env("PATH", "/usr/bin:/bin");
        for (key, value) in self.command(line).get_envs() {
            if let Some(value) = value {
                command.env(key, value);
            }
        }
        command
            .args(self.command(line).get_args())
            .stdin(Stdio::null());
        command
    }

    pub fn multipass(&self, line: &str) -> Ran {
        Ran::of(&self.multipass_command(line).output().unwrap())
    }

    /// What was sent since the last look, and where.
    pub fn bodies(&self) -> Vec<(String, serde_json::Value)> {
        std::mem::take(&mut self.script.lock().unwrap().bodies)
    }

    pub fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.script.lock().unwrap().calls)
    }
}

/// What a run of the program gave.
#[derive(Debug, PartialEq, Eq)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ran {
    pub fn of(output: &Output) -> Self {
        use std::os::unix::process::ExitStatusExt;
        let signal = output.status.signal().map(|signal| -signal);
        Self {
            code: output.status.code().or(signal).unwrap(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    pub fn ok(out: &str) -> Self {
        Self {
            code: 0,
            out: out.to_owned(),
            err: String::new(),
        }
    }
}

/// An instance with little to tell.
pub fn instance(name: &str, state: &str) -> Instance {
    let json = serde_json::json!({
        "id": uuid::Uuid::new_v4(), "name": name, "state": state, "deleted": false,
        "image": {"digest": format!("sha256:{}", "ab".repeat(32)), "source": "debian-13",
                  "os": "Debian", "release": "13"},
        "cpus": 1, "memory": 1_u64 << 30, "disk": 5_u64 << 30, "mac": "52:54:00:00:00:01",
        "ipv4": if state == "running" { vec!["10.1.2.3"] } else { vec![] },
        "created_at": "2026-11-21T20:00:00Z", "started_at": null, "phases": [],
        "cloud_init": null, "last_error": null, "report": null,
        "origin": {"kind": "cold"}, "lease_expires_at": null, "shutdown_at": null,
        "suspended": null, "pending": null, "snapshots": 0, "autostart": "last", "on_crash": "stop",
        "snapshots": 0, "autostart": "last", "on_crash": "stop",
    });
    serde_json::from_value(json).unwrap()
}

fn router(app: App) -> Router {
    snapshots::routes()
        .merge(settings::routes())
        .route("/v1/server", get(server))
        .route("/v1/instances", get(list).post(launch))
        .route("/v1/instances/{name}", get(one).delete(work))
        .route("/v1/instances/{name}/{verb}", post(work).get(read))
        .route("/v1/purge", post(async || Json(vec!["old"])))
        .route("/v1/operations/{id}", delete(cancel))
        .route("/v1/operations/{id}/events", get(events))
        .layer(axum::middleware::from_fn_with_state(app.clone(), note))
        .with_state(app)
}

async fn note(
    State(app): State<App>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> Response {
    let call = format!("{} {}", request.method(), request.uri());
    app.script.lock().unwrap().calls.push(call.clone());
    if !matches!(request.method().as_str(), "POST" | "PUT") {
        return next.run(request).await;
    }
    let (parts, body) = request.into_parts();
    let bytes = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    if let Ok(json) = serde_json::from_slice(&bytes) {
        app.script.lock().unwrap().bodies.push((call, json));
    }
    let request = axum::extract::Request::from_parts(parts, bytes.into());
    next.run(request).await
}

async fn server() -> Json<ServerInfo> {
    Json(ServerInfo {
        version: "9.8.7".into(),
        api: 1,
        pid: 1,
        mode: "user".into(),
        hypervisor: Hypervisor {
            version: "10.0.2".into(),
            accelerator: "tcg".into(),
        },
        storage: "/".into(),
        warnings: vec![],
    })
}

async fn list(State(app): State<App>) -> Json<Vec<Instance>> {
    Json(app.script.lock().unwrap().instances.clone())
}

fn missing(name: &str) -> Response {
    let error = Error::new(
        Code::InstanceNotFound,
        format!("instance \"{name}\" does not exist"),
    );
    let error = error.into();
    (StatusCode::NOT_FOUND, Json(ErrorReply { error })).into_response()
}

async fn one(State(app): State<App>, Path(name): Path<String>) -> Response {
    let script = app.script.lock().unwrap();
    match script.instances.iter().find(|i| i.name.as_str() == name) {
        Some(instance) => Json(instance).into_response(),
        None => missing(&name),
    }
}

async fn launch(State(app): State<App>, Json(request): Json<LaunchRequest>) -> Response {
    let name = request
        .name
        .clone()
        .map_or("calm-cod".to_owned(), String::from);
    let mut script = app.script.lock().unwrap();
    script.launches.push(request);
    if script.end.is_none() && !script.hang {
        script.instances.retain(|i| i.name.as_str() != name);
        script.instances.push(instance(&name, "running"));
    }
    drop(script);
    begin(&app, OperationKind::Launch, &name)
}

fn begin(app: &App, kind: OperationKind, target: &str) -> Response {
    let operation = new_operation(app, kind, target);
    (StatusCode::ACCEPTED, Json(operation)).into_response()
}

fn new_operation(app: &App, kind: OperationKind, target: &str) -> Operation {
    let operation = Operation {
        id: uuid::Uuid::new_v4(),
        kind,
        target: target.to_owned(),
        state: OperationState::Running,
        phase: None,
        progress: None,
        phases: vec![],
        warnings: vec![],
        error: None,
        created_at: "2026-11-21T20:00:00Z".parse().unwrap(),
        // The id of the second template that the tests know.
        result: (kind == OperationKind::CreateTemplate).then(|| "fedcba9876543210".to_owned()),
        ended_at: None,
    };
    app.running.lock().unwrap().push(operation.clone());
    operation
}

async fn work(State(app): State<App>, request: axum::extract::Request) -> Response {
    let path = request.uri().path().to_owned();
    let (_, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 20).await.unwrap();
    let json = || serde_json::from_slice::<serde_json::Value>(&body).unwrap();
    let mut parts = path.split('/').skip(3);
    let name = parts.next().unwrap_or_default();
    let verb = parts.next().unwrap_or("delete");
    {
        let mut script = app.script.lock().unwrap();
        if verb == "lease" {
            // Of an instance that is being launched as well.
            script.leases.push(json()["seconds"].as_u64().unwrap());
            return StatusCode::NO_CONTENT.into_response();
        }
        if verb == "delete" && script.undeletable {
            let error = Error::new(Code::Database, "The state can't be written").into();
            let status = StatusCode::INTERNAL_SERVER_ERROR;
            return (status, Json(ErrorReply { error })).into_response();
        }
        let found = script
            .instances
            .iter_mut()
            .find(|i| i.name.as_str() == name);
        let Some(instance) = found else {
            return missing(name);
        };
        match verb {
            "fork" => {
                script.forks.push(json());
                drop(script);
                let operation = new_operation(&app, OperationKind::Fork, name);
                let names = [format!("{name}-fork1"), format!("{name}-fork2")];
                let reply = serde_json::json!({"operation": operation, "names": names});
                return (StatusCode::ACCEPTED, Json(reply)).into_response();
            }
            "clone" => {
                drop(script);
                let operation = new_operation(&app, OperationKind::Clone, name);
                let clone = json()["name"].as_str().map(str::to_owned);
                let clone = clone.unwrap_or_else(|| format!("{name}-clone1"));
                let reply = serde_json::json!({"operation": operation, "name": clone});
                return (StatusCode::ACCEPTED, Json(reply)).into_response();
            }
            "rename" => return Json(&*instance).into_response(),
            "start" => instance.state = pileus_api::InstanceState::Running,
            "recover" => {
                instance.deleted = false;
                return Json(&*instance).into_response();
            }
            _ => {}
        }
    }
    let kind = match verb {
        "start" => OperationKind::Start,
        "stop" => OperationKind::Stop,
        "restart" => OperationKind::Restart,
        _ => OperationKind::Delete,
    };
    begin(&app, kind, name)
}

async fn cancel(State(app): State<App>) -> StatusCode {
    if !app.script.lock().unwrap().deaf {
        app.cancel.notify_one();
    }
    StatusCode::OK
}

async fn events(State(app): State<App>, Path(id): Path<uuid::Uuid>) -> Response {
    let running = app.running.lock().unwrap().clone();
    let mut operation = running.into_iter().find(|o| o.id == id).unwrap();
    let (events, end, hang) = {
        let script = app.script.lock().unwrap();
        operation.warnings = script.warnings.clone();
        operation.phases = script.phases.clone();
        (script.events.clone(), script.end.clone(), script.hang)
    };
    let first = stream::iter(events);
    let cancelled = app.cancel.clone();
    let last = stream::once(async move {
        if hang {
            cancelled.notified().await;
            operation.state = OperationState::Cancelled;
        } else {
            operation.state = match end {
                Some(_) => OperationState::Failed,
                None => OperationState::Succeeded,
            };
        }
        operation.error = end;
        operation.phase = Some(Phase::Booting);
        OperationEvent::Done {
            operation: Box::new(operation),
        }
    });
    let events = first.chain(last).then(async |event| {
        tokio::time::sleep(Duration::from_millis(5)).await;
        Sse::default().json_data(&event)
    });
    SseReply::new(Box::pin(events)).into_response()
}

async fn read(
    State(app): State<App>,
    Path((name, verb)): Path<(String, String)>,
    uri: axum::http::Uri,
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let port = request_port(&uri);
    match (verb.as_str(), upgrade) {
        ("port", Ok(upgrade)) => match tokio::net::TcpStream::connect(("127.0.0.1", port)).await {
            Ok(stream) => upgrade.on_upgrade(move |socket| carry(socket, stream)),
            Err(_) => {
                let error = Error::new(Code::GuestUnreachable, "Nothing listens there").into();
                (StatusCode::BAD_GATEWAY, Json(ErrorReply { error })).into_response()
            }
        },
        ("identity", _) => {
            let script = app.script.lock().unwrap();
            match script.identities.iter().find(|i| i["name"] == name) {
                Some(identity) => Json(identity).into_response(),
                None => missing(&name),
            }
        }
        ("exec", Ok(upgrade)) => upgrade
            .max_message_size(1 << 20)
            .on_upgrade(move |socket| exec(app, name, socket)),
        _ => app.script.lock().unwrap().log.clone().into_response(),
    }
}

fn request_port(uri: &axum::http::Uri) -> u16 {
    let query = uri.query().unwrap_or_default();
    let port = query
        .strip_prefix("port=")
        .and_then(|port| port.parse().ok());
    port.unwrap_or_default()
}

/// A port of the guest, which is one of this host.
async fn carry(socket: WebSocket, mut stream: tokio::net::TcpStream) {
    let (mut sink, mut source) = socket.split();
    let (mut read, mut write) = stream.split();
    let up = async {
        while let Some(Ok(message)) = source.next().await {
            match message {
                Message::Binary(bytes) if bytes.is_empty() => write.shutdown().await.unwrap(),
                Message::Binary(bytes) => write.write_all(&bytes).await.unwrap(),
                _ => return,
            }
        }
    };
    let down = async {
        let mut buffer = vec![0; 10_000];
        loop {
            let len = read.read(&mut buffer).await.unwrap_or_default();
            let piece = Bytes::copy_from_slice(&buffer[..len]);
            if sink.send(Message::Binary(piece)).await.is_err() {
                return;
            }
            if len == 0 {
                std::future::pending::<()>().await;
            }
        }
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}

/// Plays a guest: the first word of the command says what it does.
async fn exec(app: App, name: String, mut socket: WebSocket) {
    let Some(Ok(Message::Text(first))) = socket.recv().await else {
        return;
    };
    let Ok(ExecControl::Start { request }) = serde_json::from_str(&first) else {
        return;
    };
    if let Err(error) = usable(&app, &name) {
        let error = error.into();
        return say(&mut socket, &ExecEvent::Error { error }).await;
    }
    say(&mut socket, &ExecEvent::Started).await;
    let end = match request.command.first().map(String::as_str) {
        // Real ones, in the home.
        Some("sh") => really(&app, &mut socket, &request).await,
        _ => play(&mut socket, &request).await,
    };
    say(&mut socket, &end).await;
    let _ = socket.send(Message::Close(None)).await;
}

fn usable(app: &App, name: &str) -> Result<(), Error> {
    let script = app.script.lock().unwrap();
    let instance = script.instances.iter().find(|i| i.name.as_str() == name);
    let text = format!("instance \"{name}\" does not exist");
    let instance = instance.ok_or_else(|| Error::new(Code::InstanceNotFound, text))?;
    match instance.state {
        pileus_api::InstanceState::Running => Ok(()),
        _ => Err(Error::new(Code::WrongState, "It is not running")),
    }
}

async fn say(socket: &mut WebSocket, event: &ExecEvent) {
    let text = serde_json::to_string(event).unwrap();
    let _ = socket.send(Message::text(text)).await;
}

async fn put(socket: &mut WebSocket, stream: u8, bytes: &[u8]) -> bool {
    let framed: Bytes = [&[stream], bytes].concat().into();
    socket.send(Message::Binary(framed)).await.is_ok()
}

/// Runs a command on this host, in the folder that stands for the guest's home.
async fn really(app: &App, socket: &mut WebSocket, request: &ExecRequest) -> ExecEvent {
    let home = app.script.lock().unwrap().home.clone();
    let folder = request.working_directory.as_deref().unwrap_or(".");
    let mut child = tokio::process::Command::new(&request.command[0])
        .args(&request.command[1..])
        .envs(&request.env)
        .env("HOME", &home)
        .current_dir(home.join(folder))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut input = child.stdin.take();
    let (mut out, mut err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (mut out_buffer, mut err_buffer) = (vec![0; 60_000], vec![0; 60_000]);
    let (mut out_open, mut err_open) = (true, true);
    while out_open || err_open {
        tokio::select! {
            len = out.read(&mut out_buffer), if out_open => {
                let len = len.unwrap_or_default();
                out_open = len > 0 && put(socket, STDOUT, &out_buffer[..len]).await;
            }
            len = err.read(&mut err_buffer), if err_open => {
                let len = len.unwrap_or_default();
                err_open = len > 0 && put(socket, STDERR, &err_buffer[..len]).await;
            }
            message = socket.recv() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    if let Some(input) = &mut input {
                        let _ = input.write_all(&bytes).await;
                    }
                }
                Some(Ok(Message::Text(text))) if text.contains("stdin-eof") => input = None,
                Some(Ok(Message::Text(text))) if text.contains("KILL") => child.kill().await.unwrap(),
                Some(Ok(_)) => {}
                _ => return ExecEvent::Exit { code: 255 },
            }
        }
    }
    let code = child.wait().await.unwrap().code().unwrap_or(137);
    ExecEvent::Exit { code }
}

async fn play(socket: &mut WebSocket, request: &ExecRequest) -> ExecEvent {
    let words: Vec<&str> = request.command.iter().map(String::as_str).collect();
    match words.as_slice() {
        // The shell: runs nothing, repeats its lines.
        [] | ["cat"] => {
            while let Some(bytes) = stdin(socket).await {
                put(socket, STDOUT, &bytes).await;
            }
        }
        ["count"] => {
            let mut count = 0;
            while let Some(bytes) = stdin(socket).await {
                count += bytes.len();
            }
            put(socket, STDOUT, count.to_string().as_bytes()).await;
        }
        ["zeros", mib] => {
            for _ in 0..mib.parse::<usize>().unwrap() * 16 {
                if !put(socket, STDOUT, &[0; 64 << 10]).await {
                    break;
                }
            }
        }
        ["both"] => {
            put(socket, STDOUT, b"out\x00\xff\n").await;
            put(socket, STDERR, b"err\n").await;
        }
        ["request"] => {
            let text = serde_json::to_string(request).unwrap();
            put(socket, STDOUT, text.as_bytes()).await;
        }
        // Tells what comes until `q`.
        ["tell"] => {
            put(socket, STDOUT, b"ready\n").await;
            while let Some(Ok(message)) = socket.recv().await {
                let text = match message {
                    Message::Text(text) => text.to_string(),
                    Message::Binary(bytes) if &bytes[..] == b"q" => break,
                    Message::Binary(bytes) => format!("bytes {bytes:?}"),
                    _ => continue,
                };
                put(socket, STDOUT, format!("{text}\n").as_bytes()).await;
                if text.contains("TERM") {
                    let signal = "TERM".to_owned();
                    return ExecEvent::Signalled { signal };
                }
            }
        }
        ["broken"] => {
            let error = Error::new(Code::GuestUnreachable, "The guest is gone").into();
            return ExecEvent::Error { error };
        }
        ["exit", code] => {
            let code = code.parse().unwrap();
            return ExecEvent::Exit { code };
        }
        _ => return ExecEvent::Exit { code: 127 },
    }
    ExecEvent::Exit { code: 0 }
}

/// The next bytes of standard input; `None` at its end.
async fn stdin(socket: &mut WebSocket) -> Option<Bytes> {
    while let Some(Ok(message)) = socket.recv().await {
        match message {
            Message::Binary(bytes) => return Some(bytes),
            Message::Text(text) if text.contains("stdin-eof") => return None,
            _ => {}
        }
    }
    None
}
