//! Carries this process's standard streams to a port or the console of an instance and back.

use std::io::{self, Write};
use std::time::Duration;

use bytes::Bytes;
use pileus_client::{PortInput, PortOutput};
use rustix::event::{PollFd, PollFlags, Timespec};

use crate::error::CommandError;
use crate::session;

/// Between two looks at whether standard output is still read.
const LOOK: Duration = Duration::from_millis(250);

/// What becomes of a piece of standard input.
pub(crate) enum Take {
    Send(Bytes),
    /// The user wants to leave; this is sent before.
    Leave(Bytes),
}

/// Returns when the other side has ended or the user left. The end of standard input is passed on, and what
/// still comes is shown.
pub(crate) async fn pump(
    mut to: PortInput,
    mut from: PortOutput,
    mut take: impl FnMut(Bytes) -> Take,
) -> Result<(), CommandError> {
    let up = async {
        let mut stdin = session::read_stdin();
        while let Some(piece) = stdin.recv().await {
            let (piece, leave) = match take(piece) {
                Take::Send(piece) => (piece, false),
                Take::Leave(piece) => (piece, true),
            };
            if to.send(piece).await.is_err() {
                // The other direction learns why.
                return std::future::pending().await;
            }
            if leave {
                return;
            }
        }
        let _ = to.end().await;
        std::future::pending().await
    };
    let down = async {
        while let Some(piece) = from.next().await? {
            write_out(&piece)?;
        }
        Ok(())
    };
    tokio::select! {
        () = up => Ok(()),
        result = down => result,
        () = closed() => Err(io::Error::from(io::ErrorKind::BrokenPipe).into()),
    }
}

/// Returns when nobody reads standard output any more, which a console that is silent would not notice
/// by writing.
async fn closed() {
    loop {
        tokio::time::sleep(LOOK).await;
        let stdout = rustix::stdio::stdout();
        let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
        let polled = rustix::event::poll(&mut fds, Some(&Timespec::default()));
        if polled.is_ok() && fds[0].revents().contains(PollFlags::ERR) {
            return;
        }
    }
}

fn write_out(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}
