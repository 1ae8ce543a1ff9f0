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
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::{Path, Reply};
use crate::service::Service;
use crate::service::console::Console;

/// The largest message of a client.
const MAX_MESSAGE: usize = 1 << 20;
const PIECE: usize = 16 << 10;
/// Pieces that wait for a slow client: 1 MiB.
const QUEUE: usize = 64;
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
async fn carry(socket: WebSocket, mut console: Console) {
    let (from_guest, to_guest) = console.stream.split();
    let (to_client, from_client) = socket.split();
    let (queue, queued) = mpsc::channel(QUEUE);
    tokio::select! {
        () = up(from_client, to_guest) => {}
        () = async {
            tokio::join!(down(from_guest, queue), deliver(queued, to_client));
        } => {}
    }
}

/// What the client types, to its end.
async fn up(mut from_client: SplitStream<WebSocket>, mut to_guest: impl AsyncWrite + Unpin) {
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

/// What the guest writes, to its end. Never waits for the client.
async fn down(mut from_guest: impl AsyncRead + Unpin, queue: mpsc::Sender<Bytes>) {
    let mut buffer = vec![0; PIECE];
    let mut lost = 0;
    loop {
        let count = match from_guest.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        // Told with the next piece that finds room.
        let mut piece = match lost {
            0 => Vec::new(),
            lost => format!("\r\n[{lost} bytes were not read in time]\r\n").into_bytes(),
        };
        piece.extend_from_slice(&buffer[..count]);
        match queue.try_send(piece.into()) {
            Ok(()) => lost = 0,
            Err(_) => lost += count,
        }
    }
}

async fn deliver(mut queued: mpsc::Receiver<Bytes>, mut to_client: SplitSink<WebSocket, Message>) {
    while let Some(piece) = queued.recv().await {
        if to_client.send(Message::Binary(piece)).await.is_err() {
            return;
        }
    }
    let _ = to_client.send(Message::Binary(Bytes::new())).await;
    let _ = to_client.send(Message::Close(None)).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_client_loses_bytes_and_is_told() {
        let (mut guest, console) = tokio::io::duplex(64 << 10);
        let (queue, mut queued) = mpsc::channel(2);
        let task = tokio::spawn(down(console, queue));
        // Nobody takes any of it, and still the guest can write.
        for _ in 0..40 {
            let written = guest.write_all(&[b'x'; PIECE]);
            tokio::time::timeout(Duration::from_secs(5), written)
                .await
                .unwrap()
                .unwrap();
        }
        while queued.len() < 2 {
            tokio::task::yield_now().await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(queued.recv().await.unwrap().starts_with(b"x"));
        assert!(queued.recv().await.unwrap().starts_with(b"x"));
        guest.write_all(b"login:").await.unwrap();
        drop(guest);
        let last = queued.recv().await.unwrap();
        let text = String::from_utf8_lossy(&last);
        assert!(
            text.contains("bytes were not read in time") && text.ends_with("login:"),
            "{text}"
        );
        assert!(queued.recv().await.is_none());
        task.await.unwrap();
    }
}
