//! A TCP port in a guest, or its serial console: a WebSocket over the daemon's Unix socket whose binary
//! messages are bytes; an empty one is the end of its direction. Both directions are pulled by their user.

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use pileus_api::routes;
use pileus_base::{Code, Error, Result};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::Client;
use crate::http::instance_path;
use crate::socket::{Refusal, Socket};

/// The way to the port or console.
#[derive(Debug)]
pub struct PortInput(SplitSink<Socket, Message>, What);

/// The way from the port or console.
#[derive(Debug)]
pub struct PortOutput(SplitStream<Socket>, What);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    Port,
    Console,
}

impl What {
    fn broken(self, err: &tungstenite::Error) -> Error {
        let what = match self {
            What::Port => "port",
            What::Console => "console",
        };
        Error::new(
            Code::GuestUnreachable,
            format!("The connection to the {what} broke: {err}"),
        )
    }
}

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
        Ok((PortInput(sink, What::Port), PortOutput(stream, What::Port)))
    }

    /// Attaches to the serial console of an instance. It ends when the instance's VM does; dropping both
    /// halves detaches.
    pub async fn console(&self, name: &str) -> Result<(PortInput, PortOutput)> {
        let path = instance_path(routes::INSTANCE_CONSOLE, name)?;
        let socket = match self.web_socket(&path).await? {
            Ok(socket) => socket,
            Err(Refusal::Told(err)) => return Err(err),
            Err(Refusal::Silent(status)) => {
                // The instance itself tells the usual reasons.
                self.instance(name).await?;
                return Err(Error::new(
                    Code::GuestUnreachable,
                    format!("The console of {name} can't be reached (HTTP status {status})"),
                ));
            }
        };
        let (sink, stream) = socket.split();
        let what = What::Console;
        Ok((PortInput(sink, what), PortOutput(stream, what)))
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
        sent.map_err(|err| self.1.broken(&err))
    }

    /// No more bytes will be sent; the other direction goes on.
    pub async fn end(&mut self) -> Result<()> {
        let sent = self.0.send(Message::Binary(Bytes::new())).await;
        sent.map_err(|err| self.1.broken(&err))
    }
}

impl PortOutput {
    /// The bytes that come next; none at their end.
    pub async fn next(&mut self) -> Result<Option<Bytes>> {
        while let Some(message) = self.0.next().await {
            match message.map_err(|err| self.1.broken(&err))? {
                Message::Binary(bytes) if bytes.is_empty() => return Ok(None),
                Message::Binary(bytes) => return Ok(Some(bytes)),
                Message::Close(_) => break,
                _ => {}
            }
        }
        // A console is there as long as the machine is.
        if self.1 == What::Console {
            return Ok(None);
        }
        Err(Error::new(
            Code::GuestUnreachable,
            "The connection to the port was cut",
        ))
    }
}
