//! A daemon that plays by a script on a Unix socket, and the program `pileus` run against it.
#![allow(dead_code)] // Each test file uses its own part of this.

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
use futures_util::{StreamExt, stream};
use pileus_api::exec::{STDERR, STDOUT};
use pileus_api::{
    Code, ErrorBody, ErrorReply, ExecControl, ExecEvent, ExecRequest, Hypervisor, Instance,
    LaunchRequest, Operation, OperationEvent, OperationKind, OperationState, Phase, ServerInfo,
};
use pileus_base::Error;
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
        let script = Arc::new(Mutex::new(Script {
            instances,
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
    });
    serde_json::from_value(json).unwrap()
}

fn router(app: App) -> Router {
    Router::new()
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
    app.script.lock().unwrap().calls.push(call);
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
    app.script.lock().unwrap().launches.push(request);
    begin(&app, OperationKind::Launch, &name)
}

fn begin(app: &App, kind: OperationKind, target: &str) -> Response {
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
        ended_at: None,
    };
    app.running.lock().unwrap().push(operation.clone());
    (StatusCode::ACCEPTED, Json(operation)).into_response()
}

async fn work(State(app): State<App>, request: axum::extract::Request) -> Response {
    let path = request.uri().path().to_owned();
    let mut parts = path.split('/').skip(3);
    let name = parts.next().unwrap_or_default();
    let verb = parts.next().unwrap_or("delete");
    {
        let mut script = app.script.lock().unwrap();
        let found = script
            .instances
            .iter_mut()
            .find(|i| i.name.as_str() == name);
        let Some(instance) = found else {
            return missing(name);
        };
        match verb {
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
    let (events, end, hang, warnings) = {
        let script = app.script.lock().unwrap();
        (
            script.events.clone(),
            script.end.clone(),
            script.hang,
            script.warnings.clone(),
        )
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
        operation.warnings = warnings;
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
    upgrade: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    match (verb.as_str(), upgrade) {
        ("exec", Ok(upgrade)) => upgrade
            .max_message_size(1 << 20)
            .on_upgrade(move |socket| exec(app, name, socket)),
        _ => app.script.lock().unwrap().log.clone().into_response(),
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
    let end = play(&mut socket, &request).await;
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
