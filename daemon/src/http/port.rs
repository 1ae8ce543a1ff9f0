//! `/v1/instances/{name}/port`: a TCP port on a guest's loopback, over a WebSocket. Binary messages are
//! bytes; an empty one is the end of that direction, a close the end of both. Whoever does not read
//! makes the other end wait.

use std::sync::atomic::{AtomicBool, Ordering};

use axum::extract::State;
use axum::extract::ws::{Message, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use pileus_api::{ErrorReply, PortQuery};
use pileus_base::{Code, Error};
use pileus_instances::guest::port::PortStream;

use super::{Path, Query, Reply};
use crate::service::Service;

/// The largest message of a client.
const MAX_MESSAGE: usize = 1 << 20;

/// Connects to a TCP port in a running instance (WebSocket).
#[utoipa::path(get, operation_id = "connect_to_port", path = "/v1/instances/{name}/port", tag = "instances",
    params(("name" = String, Path, description = "The instance"), PortQuery),
    responses(
        (status = 101, description = "WebSocket: binary messages are bytes; an empty one is the end \
            of its direction"),
        (status = 400, description = "Not a WebSocket request", body = ErrorReply),
        (status = 404, description = "No such instance", body = ErrorReply),
        (status = 502, description = "Nothing listens on the port", body = ErrorReply)))]
pub async fn port(
    State(service): State<Service>,
    Path(name): Path<String>,
    Query(query): Query<PortQuery>,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Reply<Response> {
    let upgrade = upgrade.map_err(|err| Error::new(Code::InvalidArgument, err.body_text()))?;
    // Connected first, so that the reply tells whether it worked.
    let stream = service.port(&name, query.port).await?;
    Ok(upgrade
        .max_message_size(MAX_MESSAGE)
        .on_upgrade(move |socket| bridge(socket, stream)))
}

/// Carries bytes until both directions are over, or the client is gone.
async fn bridge(socket: WebSocket, stream: PortStream) {
    let (mut to_client, mut from_client) = socket.split();
    let PortStream {
        to_guest,
        mut from_guest,
    } = stream;
    let guest_ended = AtomicBool::new(false);
    let up = async {
        // Dropped at the client's end, which is how the guest learns of it.
        let mut to_guest = Some(to_guest);
        while let Some(Ok(message)) = from_client.next().await {
            match message {
                Message::Binary(bytes) if bytes.is_empty() => to_guest = None,
                Message::Binary(bytes) => {
                    let Some(open) = &to_guest else { continue };
                    // A guest that takes no more may still have something to say.
                    if open.send(bytes).await.is_err() && guest_ended.load(Ordering::Relaxed) {
                        return;
                    }
                }
                Message::Close(_) => return,
                Message::Text(_) | Message::Ping(_) | Message::Pong(_) => {}
            }
        }
    };
    let down = async {
        while let Some(bytes) = from_guest.recv().await {
            if to_client.send(Message::Binary(bytes)).await.is_err() {
                return;
            }
        }
        if to_client.send(Message::Binary(Bytes::new())).await.is_err() {
            return;
        }
        guest_ended.store(true, Ordering::Relaxed);
        // The client closes when its own direction is over, too.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = up => {}
        () = down => {}
    }
}
