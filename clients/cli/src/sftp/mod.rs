//! Files of a guest, over the SFTP server that its sshd has. The guest is not trusted: its answers are
//! parsed strictly, and names from it are never paths of the host (see `transfer/`).
//!
//! ```text
//! wire.rs       requests → bytes, bytes → answers        session.rs    many requests at once
//! ```

pub(crate) mod session;
pub(crate) mod wire;

use bytes::Bytes;
use pileus_api::{Code, ExecEvent, ExecRequest};
use pileus_base::Error;
use pileus_client::{Client, ExecInput, ExecOutput, ExecPart};
use tokio::sync::mpsc;

use self::session::{Pipe, Sftp};

/// Opens the files of a running instance.
pub(crate) async fn open(client: &Client, name: &str) -> Result<Sftp, Error> {
    let request = ExecRequest {
        subsystem: Some("sftp".to_owned()),
        ..Default::default()
    };
    let (input, output) = crate::session::open(client, name, &request).await?;
    Ok(Sftp::connect(carry(input, output)).await?)
}

/// Two tasks between the session's messages and the pipe.
fn carry(mut input: ExecInput, mut output: ExecOutput) -> Pipe {
    let (to, mut sent) = mpsc::channel::<Bytes>(8);
    let (received, from) = mpsc::channel(8);
    tokio::spawn(async move {
        while let Some(bytes) = sent.recv().await {
            if input.stdin(bytes).await.is_err() {
                // The other direction learns why.
                return;
            }
        }
    });
    tokio::spawn(async move {
        loop {
            let piece = match output.next().await {
                Ok(ExecPart::Stdout(bytes)) => Ok(bytes),
                // What the server says to people.
                Ok(ExecPart::Stderr(_) | ExecPart::Event(ExecEvent::Started)) => continue,
                Ok(ExecPart::Event(ExecEvent::Error { error })) => Err(error.into()),
                Ok(ExecPart::Event(ExecEvent::Exit { .. } | ExecEvent::Signalled { .. })) => {
                    return;
                }
                Err(err) => Err(Error::new(Code::GuestUnreachable, err.message)),
            };
            let last = piece.is_err();
            if received.send(piece).await.is_err() || last {
                return;
            }
        }
    });
    Pipe { to, from }
}
