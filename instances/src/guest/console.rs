//! The serial console, both ways. QEMU's socket takes one client at a time and lets a second one wait in
//! silence, so it is counted here: the second is refused at once.
//!
//! ```text
//!   guest ─▸ QEMU ─┬─▸ console.log
//!                  └─▸ reader ─▸ [256 KiB] ─▸ client       full: what comes is left out, and told
//!   guest ◂─ QEMU ◂─────────────────────────── client
//! ```
//!
//! QEMU waits for its client before it writes to the log, and drops what it can't write. So the reader never
//! waits for the client.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use pileus_base::{Code, Error, Result};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::AbortHandle;

/// Most bytes of one piece, and most pieces that wait for the client.
const PIECE: usize = 4 << 10;
const PIECES: usize = 64;

/// Where the console of one machine is, and whether somebody is at it.
#[derive(Debug)]
pub(super) struct ConsolePlace {
    socket: PathBuf,
    free: Arc<Semaphore>,
}

/// An open console: reads what the guest writes from now on, and writes what it is to read. It ends with
/// the machine; dropping it makes it free for others.
#[derive(Debug)]
pub struct Console {
    pieces: mpsc::Receiver<Bytes>,
    rest: Bytes,
    to_guest: OwnedWriteHalf,
    reader: AbortHandle,
    _place: OwnedSemaphorePermit,
}

impl ConsolePlace {
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            free: Arc::new(Semaphore::new(1)),
        }
    }

    pub async fn open(&self) -> Result<Console> {
        let place = Arc::clone(&self.free).try_acquire_owned().map_err(|_| {
            Error::new(Code::WrongState, "The console is in use").advise(
                "One client can be attached to it at a time; `pileus logs` shows it to all.",
            )
        })?;
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|err| gone(&self.socket, err))?;
        let (from_guest, to_guest) = stream.into_split();
        let (pieces_in, pieces) = mpsc::channel(PIECES);
        let reader = tokio::spawn(read(from_guest, pieces_in)).abort_handle();
        Ok(Console {
            pieces,
            rest: Bytes::new(),
            to_guest,
            reader,
            _place: place,
        })
    }
}

fn gone(socket: &Path, err: io::Error) -> Error {
    Error::new(
        Code::GuestStopped,
        format!("The machine's console {} can't be opened", socket.display()),
    )
    .with_source(err)
}

/// Passes on what the client has room for, to the machine's end.
async fn read(mut from: OwnedReadHalf, to: mpsc::Sender<Bytes>) {
    let mut buffer = BytesMut::new();
    let mut lost = 0;
    loop {
        buffer.reserve(PIECE);
        let mut room = (&mut from).take(PIECE as u64);
        match room.read_buf(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let piece = buffer.split().freeze();
        // The word about it needs room as well, before what it is about goes on.
        if lost > 0 && to.capacity() >= 2 {
            let word = format!("\r\n[{lost} bytes were left out here]\r\n");
            lost = 0;
            let _ = to.try_send(word.into());
        }
        match to.try_send(piece) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(piece)) => lost += piece.len(),
            Err(mpsc::error::TrySendError::Closed(_)) => return,
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // With its half the socket is closed, before the place becomes free.
        self.reader.abort();
    }
}

impl AsyncRead for Console {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.rest.is_empty() {
            match ready!(self.pieces.poll_recv(context)) {
                Some(piece) => self.rest = piece,
                None => return Poll::Ready(Ok(())),
            }
        }
        let count = self.rest.len().min(buffer.remaining());
        buffer.put_slice(&self.rest[..count]);
        self.rest.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Console {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.to_guest).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.to_guest).poll_flush(context)
    }

    /// A serial line has no end: nothing happens, and what the guest writes still comes.
    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::io::AsyncWriteExt;
    use tokio::net::UnixListener;
    use tokio::time::timeout;

    const SOON: Duration = Duration::from_secs(10);

    struct Machine {
        _dir: tempfile::TempDir,
        port: UnixListener,
        place: ConsolePlace,
    }

    fn machine() -> Machine {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("console.sock");
        Machine {
            port: UnixListener::bind(&socket).unwrap(),
            place: ConsolePlace::new(socket),
            _dir: dir,
        }
    }

    async fn accept(machine: &Machine) -> UnixStream {
        timeout(SOON, machine.port.accept())
            .await
            .unwrap()
            .unwrap()
            .0
    }

    #[tokio::test]
    async fn bytes_go_both_ways_and_a_second_client_is_refused() {
        let machine = machine();
        let mut console = machine.place.open().await.unwrap();
        let mut qemu = accept(&machine).await;
        let err = machine.place.open().await.unwrap_err();
        assert_eq!(err.code, Code::WrongState);
        assert!(err.message.contains("in use"), "{err}");

        console.write_all(b"root\x00\r").await.unwrap();
        let mut seen = [0; 6];
        qemu.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"root\x00\r");
        qemu.write_all(b"Password:").await.unwrap();
        // In small bites, and after our own end.
        console.shutdown().await.unwrap();
        let mut seen = [0; 4];
        console.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"Pass");
        let mut seen = [0; 5];
        console.read_exact(&mut seen).await.unwrap();
        assert_eq!(&seen, b"word:");

        // Whoever is gone makes room: for QEMU as well.
        drop(console);
        assert_eq!(
            timeout(SOON, qemu.read(&mut seen)).await.unwrap().unwrap(),
            0
        );
        let mut console = machine.place.open().await.unwrap();
        drop(accept(&machine).await);
        let mut all = Vec::new();
        timeout(SOON, console.read_to_end(&mut all))
            .await
            .unwrap()
            .unwrap();
        assert!(all.is_empty());
    }

    #[tokio::test]
    async fn a_client_that_sleeps_holds_nobody_up() {
        let machine = machine();
        let mut console = machine.place.open().await.unwrap();
        let mut qemu = accept(&machine).await;
        let flood = vec![b'x'; 4 << 20];
        timeout(SOON, qemu.write_all(&flood))
            .await
            .unwrap()
            .unwrap();
        // Some of it, then news of the rest.
        let mut all = vec![0; PIECE];
        let seen = timeout(SOON, console.read(&mut all))
            .await
            .unwrap()
            .unwrap();
        assert!(seen > 0);
        let mut all = Vec::new();
        drop(timeout(Duration::from_millis(300), console.read_to_end(&mut all)).await);
        // What waited here and in the kernel.
        assert!(all.len() < 1 << 20, "{} bytes were kept", all.len());
        qemu.write_all(b"login:").await.unwrap();
        drop(qemu);
        timeout(SOON, console.read_to_end(&mut all))
            .await
            .unwrap()
            .unwrap();
        let text = String::from_utf8(all).unwrap();
        assert!(text.contains("bytes were left out here"));
        assert!(text.ends_with("login:"));
    }

    #[tokio::test]
    async fn without_a_machine_the_place_stays_free() {
        let place = ConsolePlace::new("/nonexistent/console.sock".into());
        for _ in 0..2 {
            assert_eq!(place.open().await.unwrap_err().code, Code::GuestStopped);
        }
    }
}
