//! WebSockets over the daemon's Unix socket, for what is a stream both ways.

use pileus_base::{Code, Error, Result};
use tokio::net::UnixStream;
use tokio_tungstenite::tungstenite::{self, protocol::WebSocketConfig};
use tokio_tungstenite::{WebSocketStream, client_async_with_config};

use crate::Client;
use crate::http::error_reply;

pub(crate) type Socket = WebSocketStream<UnixStream>;

/// Bound on one message from the daemon, which sends pieces of at most 64 KiB or so.
const MAX_MESSAGE: usize = 4 << 20;

/// Why the daemon did not open a WebSocket.
pub(crate) enum Refusal {
    Told(Error),
    /// The handshake ended before the reason came; only its HTTP status is known.
    Silent(u16),
}

impl Client {
    pub(crate) async fn web_socket(&self, path: &str) -> Result<Result<Socket, Refusal>> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|err| self.unreachable(err.kind(), &err.to_string()))?;
        let mut config = WebSocketConfig::default();
        config.max_message_size = Some(MAX_MESSAGE);
        config.max_frame_size = Some(MAX_MESSAGE);
        let url = format!("ws://pileus{path}");
        match client_async_with_config(url, stream, Some(config)).await {
            Ok((socket, _)) => Ok(Ok(socket)),
            Err(tungstenite::Error::Http(response)) => {
                let status = response.status().as_u16();
                let body = response.body().as_deref().unwrap_or_default();
                Ok(Err(match body {
                    [] => Refusal::Silent(status),
                    body => Refusal::Told(error_reply(status, body)),
                }))
            }
            Err(err) => Err(Error::new(
                Code::DaemonUnreachable,
                format!("The connection to the daemon broke: {err}"),
            )),
        }
    }
}
