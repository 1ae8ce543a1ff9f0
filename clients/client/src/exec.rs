//! A command in a guest: a WebSocket over the daemon's Unix socket (`api/src/exec.rs` tells what
//! travels). Both directions are pulled by their user, so nothing piles up here when one is slow.

use bytes::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use pileus_api::exec::{STDERR, STDOUT};
use pileus_api::{ExecControl, ExecEvent, ExecRequest, routes};
use pileus_base::{Code, Error, Result};
use tokio_tungstenite::tungstenite::{self, Message};

use crate::Client;
use crate::http::instance_path;
use crate::socket::{Refusal, Socket};

/// What a command says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecPart {
    Stdout(Bytes),
    Stderr(Bytes),
    /// Started, or the end: exit, signalled, error.
    Event(ExecEvent),
}

/// The way to the command.
#[derive(Debug)]
pub struct ExecInput(SplitSink<Socket, Message>);

/// The way from the command.
#[derive(Debug)]
pub struct ExecOutput(SplitStream<Socket>);

impl Client {
    /// Starts a command. Dropping both halves hangs up on it.
    pub async fn exec(&self, name: &str, request: ExecRequest) -> Result<(ExecInput, ExecOutput)> {
        let path = instance_path(routes::INSTANCE_EXEC, name)?;
        let socket = match self.web_socket(&path).await? {
            Ok(socket) => socket,
            Err(refusal) => return Err(self.refused(name, refusal).await),
        };
        let (sink, stream) = socket.split();
        let mut input = ExecInput(sink);
        input.control(&ExecControl::Start { request }).await?;
        Ok((input, ExecOutput(stream)))
    }

    /// Why the daemon did not open the WebSocket.
    async fn refused(&self, name: &str, refusal: Refusal) -> Error {
        match refusal {
            Refusal::Told(err) => err,
            // The instance itself tells the usual reasons.
            Refusal::Silent(status) => match self.instance(name).await {
                Err(err) => err,
                Ok(_) => Error::new(
                    Code::ExecFailed,
                    format!("The daemon refused to run the command (HTTP status {status})"),
                ),
            },
        }
    }
}

impl ExecInput {
    /// Sends bytes of standard input; returns when they are on their way.
    pub async fn stdin(&mut self, bytes: Bytes) -> Result<()> {
        self.send(Message::Binary(bytes)).await
    }

    pub async fn eof(&mut self) -> Result<()> {
        self.control(&ExecControl::StdinEof).await
    }

    pub async fn resize(&mut self, cols: u16, rows: u16) -> Result<()> {
        self.control(&ExecControl::Resize { cols, rows }).await
    }

    /// Sends a signal, named without SIG.
    pub async fn signal(&mut self, signal: &str) -> Result<()> {
        let signal = signal.to_owned();
        self.control(&ExecControl::Signal { signal }).await
    }

    async fn control(&mut self, control: &ExecControl) -> Result<()> {
        let text = serde_json::to_string(control)
            .map_err(|err| Error::internal(format!("Writing a message: {err}")))?;
        self.send(Message::text(text)).await
    }

    async fn send(&mut self, message: Message) -> Result<()> {
        self.0.send(message).await.map_err(|err| broken(&err))
    }
}

impl ExecOutput {
    /// What comes next; an error if the session breaks before its end.
    pub async fn next(&mut self) -> Result<ExecPart> {
        while let Some(message) = self.0.next().await {
            match message.map_err(|err| broken(&err))? {
                Message::Binary(mut bytes) if !bytes.is_empty() => {
                    let stream = bytes.split_to(1)[0];
                    match stream {
                        STDOUT => return Ok(ExecPart::Stdout(bytes)),
                        STDERR => return Ok(ExecPart::Stderr(bytes)),
                        _ => return Err(nonsense()),
                    }
                }
                Message::Text(text) => {
                    let event = serde_json::from_str(&text).map_err(|_| nonsense())?;
                    return Ok(ExecPart::Event(event));
                }
                Message::Close(_) => break,
                _ => {}
            }
        }
        Err(Error::new(
            Code::ExecFailed,
            "The session ended before the command did",
        ))
    }
}

fn broken(err: &tungstenite::Error) -> Error {
    Error::new(
        Code::ExecFailed,
        format!("The connection to the command broke: {err}"),
    )
}

fn nonsense() -> Error {
    Error::internal("The daemon sent a message that could not be understood")
}
