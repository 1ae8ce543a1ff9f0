//! A connection to a TCP port in the guest, on a channel of the shared SSH connection: no guest network
//! is needed, and a service that listens only on the guest's loopback can be reached.
//!
//! ```text
//!   to_guest   ─▸ bytes ─▸ (waits for the guest's window)     dropped: the guest reads its end
//!   from_guest ◂─ bytes ◂─                                    closed: the guest wrote its end
//! ```
//!
//! Both directions are bounded, as in `exec.rs`, and end each by itself. Dropping `from_guest` ends the
//! connection.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pileus_base::Result;
use russh::client::Msg;
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::ssh::{Connection, SshPool, Stall};

/// Bytes kept for a reader before the guest has to wait.
const MAX_QUEUE: usize = 1 << 20;
/// A reader that takes nothing for this long holds up the others: they go another way.
const STALL_AFTER: Duration = Duration::from_millis(250);
const CLOSE_BOUND: Duration = Duration::from_secs(10);

/// An open connection.
#[derive(Debug)]
pub struct PortStream {
    pub to_guest: mpsc::Sender<Bytes>,
    pub from_guest: mpsc::Receiver<Bytes>,
}

impl SshPool {
    /// Connects to a port on the guest's loopback; an error if nothing listens there.
    pub async fn port(&self, port: u16) -> Result<PortStream> {
        let (channel, connection) = self.port_channel(port).await?;
        let (read, write) = channel.split();
        let write = Arc::new(write);
        let (to_guest, to_guest_out) = mpsc::channel(8);
        let (from_guest_in, from_guest) = mpsc::channel(8);
        let mut input = tokio::spawn(feed(Arc::clone(&write), to_guest_out));
        tokio::spawn(async move {
            // The guest may have ended its own direction only: then ours goes on.
            if let Some(read) = deliver(read, &connection, from_guest_in).await {
                tokio::select! {
                    _ = &mut input => {}
                    () = closed(read) => {}
                    () = connection.gone() => {}
                }
            }
            input.abort();
            let _ = timeout(CLOSE_BOUND, write.close()).await;
        });
        Ok(PortStream {
            to_guest,
            from_guest,
        })
    }
}

/// Bytes for the guest, as fast as it takes them; at their end EOF.
async fn feed(write: Arc<ChannelWriteHalf<Msg>>, mut bytes: mpsc::Receiver<Bytes>) {
    while let Some(piece) = bytes.recv().await {
        if write.data_bytes(piece).await.is_err() {
            return;
        }
    }
    let _ = write.eof().await;
}

async fn closed(mut read: ChannelReadHalf) {
    while !matches!(read.wait().await, None | Some(ChannelMsg::Close)) {}
}

/// Bytes of the guest, to their end; returns the channel if it is not over yet.
async fn deliver(
    mut read: ChannelReadHalf,
    connection: &Arc<Connection>,
    to: mpsc::Sender<Bytes>,
) -> Option<ChannelReadHalf> {
    let mut queue: VecDeque<Bytes> = VecDeque::new();
    let mut queued = 0;
    let mut more = true;
    let mut half = false;
    let mut stall: Option<Stall> = None;
    while more || !queue.is_empty() {
        let full = queued >= MAX_QUEUE;
        if !full {
            stall = None;
        }
        tokio::select! {
            () = to.closed() => return None,
            place = to.reserve(), if !queue.is_empty() => {
                if let (Ok(place), Some(piece)) = (place, queue.pop_front()) {
                    queued -= piece.len();
                    place.send(piece);
                }
            }
            message = read.wait(), if more && !full => match message {
                Some(ChannelMsg::Data { data }) => {
                    queued += data.len();
                    queue.push_back(data);
                }
                Some(ChannelMsg::Eof) => (more, half) = (false, true),
                Some(ChannelMsg::Close) | None => more = false,
                Some(_) => {}
            },
            () = connection.gone(), if more => more = false,
            () = sleep(STALL_AFTER), if full && stall.is_none() => {
                stall = Some(Stall::new(connection));
            }
        }
    }
    half.then_some(read)
}
