//! `/v1/instances/{name}/console`: the serial console over a WebSocket. Binary messages are bytes, both
//! ways; an empty one from the daemon says that the machine is gone. A client that does not read fast
//! enough loses bytes, because the guest must not wait for it.

use std::time::Duration;

use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use pileus_api::ErrorReply;
use pileus_base::{Code, Error};
use pileus_instances::guest::console::Console;
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};

use super::{Path, Reply};
use crate::service::Service;

/// The largest message of a client.
const MAX_MESSAGE: usize = 1 << 20;
const PIECE: usize = 16 << 10;
/// A guest that takes no input for this long loses it.
const INPUT_BOUND: Duration = Duration::from_secs(20);

/// Attaches to the serial console of an instance (WebSocket), one client at a time.
#[utoipa::path(get, operation_id = "attach_to_console", path = "/v1/instances/{name}/console", tag = "instances",
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 101, description = "WebSocket: binary messages are bytes; an empty one is the end"),
        (status = 400, description = "Not a WebSocket request", body = ErrorReply),
        (status = 404, description = "No such instance", body = ErrorReply),
        (status = 409, description = "It does not run, or another client is attached", body = ErrorReply)))]
pub async fn console(
    State(service): State<Service>,
    Path(name): Path<String>,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Reply<Response> {
    let upgrade = upgrade.map_err(|err| Error::new(Code::InvalidArgument, err.body_text()))?;
    // Attached first, so that the reply tells whether it worked.
    let console = service.console(&name).await?;
    Ok(upgrade
        .max_message_size(MAX_MESSAGE)
        .on_upgrade(move |socket| carry(socket, console)))
}

/// Carries bytes until either side ends. The console is free again when this returns.
async fn carry(socket: WebSocket, console: Console) {
    let (from_guest, to_guest) = tokio::io::split(console);
    let (to_client, from_client) = socket.split();
    tokio::select! {
        () = up(from_client, to_guest) => {}
        () = down(from_guest, to_client) => {}
    }
}

/// What the client types, to its end.
async fn up(mut from_client: SplitStream<WebSocket>, mut to_guest: WriteHalf<Console>) {
    while let Some(Ok(message)) = from_client.next().await {
        match message {
            Message::Binary(bytes) => {
                let written = tokio::time::timeout(INPUT_BOUND, to_guest.write_all(&bytes)).await;
                if let Ok(Err(_)) = written {
                    // The machine is gone; the other direction says so.
                    std::future::pending::<()>().await;
                }
            }
            Message::Close(_) => return,
            Message::Text(_) | Message::Ping(_) | Message::Pong(_) => {}
        }
    }
}

/// What the guest writes, to its end.
async fn down(mut from_guest: ReadHalf<Console>, mut to_client: SplitSink<WebSocket, Message>) {
    let mut buffer = vec![0; PIECE];
    while let Ok(count @ 1..) = from_guest.read(&mut buffer).await {
        let piece = Bytes::copy_from_slice(&buffer[..count]);
        if to_client.send(Message::Binary(piece)).await.is_err() {
            return;
        }
    }
    let _ = to_client.send(Message::Binary(Bytes::new())).await;
    let _ = to_client.send(Message::Close(None)).await;
}
