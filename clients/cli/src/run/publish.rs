//! Ports of this host that lead into the guest. Each connection travels over the API, so nothing is
//! needed of the guest's network, and a service on the guest's loopback is reached as well.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use pileus_api::Code;
use pileus_base::{Error, Result};
use pileus_client::Client;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::options::Publish;
use crate::terminal::tell;

/// Connections at once, for each port.
const MAX_CONNECTIONS: usize = 256;
const PIECE: usize = 64 << 10;

/// Ports that are taken, so that nobody else gets them while the instance is launched; who connects
/// meanwhile waits.
pub(crate) struct Ports(Vec<(TcpListener, u16)>);

/// Carries connections until it is dropped.
pub(crate) struct Published(#[allow(dead_code)] JoinSet<()>);

impl Ports {
    pub async fn take(wanted: &[Publish]) -> Result<Self> {
        let mut taken = Vec::new();
        for port in wanted {
            let failed = |err: std::io::Error| {
                let code = match err.kind() {
                    std::io::ErrorKind::AddrInUse => Code::PortTaken,
                    _ => Code::Io,
                };
                Error::new(code, format!("Listening on {}: {err}", port.host))
                    .advise("With port 0 any free one is taken and told.")
            };
            let listener = TcpListener::bind(port.host).await.map_err(failed)?;
            if port.host.port() == 0 {
                let address = listener.local_addr().map_err(failed)?;
                tell(&format!("Port {} of the guest is at {address}", port.guest));
            }
            taken.push((listener, port.guest));
        }
        Ok(Self(taken))
    }

    /// Begins to carry connections to the instance.
    pub fn serve(self, client: &Client, name: &str, verbose: bool) -> Published {
        let mut all = JoinSet::new();
        for (listener, guest) in self.0 {
            all.spawn(accept(
                client.clone(),
                name.to_owned(),
                listener,
                guest,
                verbose,
            ));
        }
        Published(all)
    }
}

async fn accept(client: Client, name: String, listener: TcpListener, guest: u16, verbose: bool) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            // The other side gave up already, or this process has too many files open.
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let (client, name) = (client.clone(), name.clone());
        connections.spawn(async move {
            let _place = place;
            if let Err(err) = carry(&client, &name, guest, stream).await
                && verbose
            {
                tell(&format!("port {guest}: {err}"));
            }
        });
        // Those that have ended are let go.
        while connections.try_join_next().is_some() {}
    }
}

async fn carry(client: &Client, name: &str, guest: u16, mut stream: TcpStream) -> Result<()> {
    let _ = stream.set_nodelay(true);
    let (mut input, mut output) = match client.port(name, guest).await {
        Ok(halves) => halves,
        Err(err) => {
            // As a port where nobody listens: a reset, not an end.
            let _ = stream.set_zero_linger();
            return Err(err);
        }
    };
    let (mut read, mut write) = stream.split();
    let broken = |err: std::io::Error| Error::io("A connection of this host", err);
    let up = async {
        let mut buffer = BytesMut::new();
        loop {
            buffer.reserve(PIECE);
            if read.read_buf(&mut buffer).await.map_err(broken)? == 0 {
                return input.end().await;
            }
            input.send(buffer.split().freeze()).await?;
        }
    };
    let down = async {
        while let Some(bytes) = output.next().await? {
            write.write_all(&bytes).await.map_err(broken)?;
        }
        write.shutdown().await.map_err(broken)
    };
    tokio::try_join!(up, down).map(|_| ())
}
