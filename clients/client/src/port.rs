//! A TCP port in a guest: a WebSocket over the daemon's Unix socket whose binary messages are bytes; an
//! empty one is the end of its direction. Both directions are pulled by their user.

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use pileus_api::routes;
use pileus_base::{Code, Error, Result};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::Client;
use crate::http::instance_path;
use crate::socket::{Refusal, Socket};

/// The way to the port.
#[derive(Debug)]
pub struct PortInput(SplitSink<Socket, Message>);

/// The way from the port.
#[derive(Debug)]
pub struct PortOutput(SplitStream<Socket>);

impl Client {
    /// Connects to a TCP port on the loopback of a running instance. Dropping both halves ends the
    /// connection.
    pub async fn port(&self, name: &str, port: u16) -> Result<(PortInput, PortOutput)> {
        let path = instance_path(routes::INSTANCE_PORT, name)?;
        let socket = match self.web_socket(&format!("{path}?port={port}")).await? {
            Ok(socket) => socket,
            Err(Refusal::Told(err)) => return Err(err),
            Err(Refusal::Silent(status)) => {
                return Err(Error::new(
                    Code::GuestUnreachable,
                    format!("Port {port} of {name} can't be reached (HTTP status {status})"),
                ));
            }
        };
        let (sink, stream) = socket.split();
        Ok((PortInput(sink), PortOutput(stream)))
    }
}

impl PortInput {
    /// Sends bytes; returns when they are on their way.
    pub async fn send(&mut self, bytes: Bytes) -> Result<()> {
        // An empty message would be the end.
        if bytes.is_empty() {
            return Ok(());
        }
        let sent = self.0.send(Message::Binary(bytes)).await;
        sent.map_err(|err| broken(&err))
    }

    /// No more bytes will be sent; the other direction goes on.
    pub async fn end(&mut self) -> Result<()> {
        let sent = self.0.send(Message::Binary(Bytes::new())).await;
        sent.map_err(|err| broken(&err))
    }
}

impl PortOutput {
    /// The bytes that come next; none at their end.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        while let Some(message) = self.0.next().await {
            match message.map_err(|err| broken(&err))? {
                Message::Binary(bytes) if bytes.is_empty() => return Ok(None),
                Message::Binary(bytes) => return Ok(Some(bytes)),
                Message::Close(_) => break,
                _ => {}
            }
        }
        Err(Error::new(
            Code::GuestUnreachable,
            "The connection to the port was cut",
        ))
    }
}

fn broken(err: &tungstenite::Error) -> Error {
    Error::new(
        Code::GuestUnreachable,
        format!("The connection to the port broke: {err}"),
    )
}
