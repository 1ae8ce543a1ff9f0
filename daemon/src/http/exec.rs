//! `/v1/instances/{name}/exec`: a command in a guest, over a WebSocket. The messages are described in
//! `api/src/exec.rs`. Both directions wait for each other: a client that doesn't read stops the
//! guest's output, a guest that doesn't read stops the client's input.

use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::SplitSink;
use futures_util::{SinkExt, StreamExt};
use pileus_api::exec::{STDERR, STDOUT};
use pileus_api::{ErrorReply, ExecControl, ExecEvent, ExecRequest};
use pileus_base::{Code, Error, Result};
use pileus_instances::guest::exec::{Control, ExecSession, Output};

use super::{Path, Reply};
use crate::service::Service;

/// A client that connects must say what it wants within this time.
const START_BOUND: Duration = Duration::from_secs(30);
/// The largest message of a client.
const MAX_MESSAGE: usize = 1 << 20;

/// Runs a command or a shell in a running instance (WebSocket).
#[utoipa::path(get, operation_id = "exec_in_instance", path = "/v1/instances/{name}/exec", tag = "instances",
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 101, description = "WebSocket: text messages are ExecControl and ExecEvent, \
            binary ones standard streams"),
        (status = 400, description = "Not a WebSocket request", body = ErrorReply)))]
pub async fn exec(
    State(service): State<Service>,
    Path(name): Path<String>,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Reply<Response> {
    let upgrade = upgrade.map_err(|err| Error::new(Code::InvalidArgument, err.body_text()))?;
    Ok(upgrade
        .max_message_size(MAX_MESSAGE)
        .on_upgrade(move |socket| async move { serve(&service, &name, socket).await }))
}

async fn serve(service: &Service, name: &str, mut socket: WebSocket) {
    let begun = async {
        let request = first_message(&mut socket).await?;
        service.exec(name, request).await
    };
    match begun.await {
        Ok(session) => bridge(socket, session).await,
        Err(error) => {
            let event = ExecEvent::Error {
                error: error.into(),
            };
            let _ = socket.send(text(&event)).await;
            let _ = socket.send(Message::Close(None)).await;
        }
    }
}

async fn first_message(socket: &mut WebSocket) -> Result<ExecRequest> {
    let wrong = |why: &str| Error::new(Code::InvalidArgument, format!("The first message {why}"));
    let message = tokio::time::timeout(START_BOUND, socket.recv())
        .await
        .map_err(|_| wrong("did not come"))?;
    let Some(Ok(Message::Text(message))) = message else {
        return Err(wrong("must be text"));
    };
    match serde_json::from_str(&message) {
        Ok(ExecControl::Start { request }) => Ok(request),
        Ok(_) => Err(wrong("must be `start`")),
        Err(err) => Err(wrong(&format!("can't be understood: {err}"))),
    }
}

/// Carries bytes until the command or the client ends. When the client goes, the session is dropped,
/// which hangs up on the command.
async fn bridge(socket: WebSocket, mut session: ExecSession) {
    let (mut to_client, mut from_client) = socket.split();
    if to_client.send(text(&ExecEvent::Started)).await.is_err() {
        return;
    }
    let (stdin, control) = (session.stdin, session.control);
    // Input has a task of its own: it may have to wait for the guest while output goes on.
    let mut input = tokio::spawn(async move {
        while let Some(Ok(message)) = from_client.next().await {
            match message {
                Message::Binary(bytes) => {
                    // A command that takes no more input is no reason to end.
                    let _ = stdin.send(bytes).await;
                }
                Message::Text(message) => {
                    let Some(wish) = control_of(&message) else {
                        return;
                    };
                    let _ = control.send(wish).await;
                }
                Message::Close(_) => return,
                Message::Ping(_) | Message::Pong(_) => {}
            }
        }
    });
    loop {
        let output = tokio::select! {
            output = session.output.recv() => output,
            _ = &mut input => break,
        };
        let Some(output) = output else { break };
        match send(&mut to_client, output).await {
            Ok(true) => {}
            Ok(false) | Err(_) => break,
        }
    }
    input.abort();
    let _ = to_client.send(Message::Close(None)).await;
}

fn control_of(message: &str) -> Option<Control> {
    match serde_json::from_str(message).ok()? {
        ExecControl::StdinEof => Some(Control::Eof),
        ExecControl::Resize { cols, rows } => Some(Control::Resize {
            cols: cols.into(),
            rows: rows.into(),
        }),
        ExecControl::Signal { signal } => Some(Control::Signal(signal)),
        ExecControl::Start { .. } => None,
    }
}

/// Sends one piece; returns whether more may come.
async fn send(
    to_client: &mut SplitSink<WebSocket, Message>,
    output: Output,
) -> Result<bool, axum::Error> {
    let (message, more) = match output {
        Output::Stdout(bytes) => (stream(STDOUT, &bytes), true),
        Output::Stderr(bytes) => (stream(STDERR, &bytes), true),
        Output::Exit(code) => {
            let code = i32::try_from(code).unwrap_or(255);
            (text(&ExecEvent::Exit { code }), false)
        }
        Output::Signal(signal) => (text(&ExecEvent::Signalled { signal }), false),
        Output::Failed(error) => {
            let error = error.into();
            (text(&ExecEvent::Error { error }), false)
        }
    };
    to_client.send(message).await?;
    Ok(more)
}

fn stream(number: u8, bytes: &Bytes) -> Message {
    let mut framed = BytesMut::with_capacity(bytes.len() + 1);
    framed.put_u8(number);
    framed.extend_from_slice(bytes);
    Message::Binary(framed.freeze())
}

fn text(event: &ExecEvent) -> Message {
    // These types have no map with foreign keys: they can always be written.
    Message::Text(serde_json::to_string(event).unwrap_or_default().into())
}
