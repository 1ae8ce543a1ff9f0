//! The Unix socket: made fresh or taken over from systemd, and who is at its other end.

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, FromRequestParts};
use axum::http::request::Parts;
use axum::serve::IncomingStream;
use pileus_base::{Code, Error, Result, ResultExt, files};
use tokio::net::UnixListener;

/// The process at the other end of a connection, as the kernel tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
}

impl Connected<IncomingStream<'_, UnixListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        // A peer that can't be told is nobody.
        stream.io().peer_cred().map_or(
            Peer {
                uid: 65534,
                gid: 65534,
            },
            |cred| Peer {
                uid: cred.uid(),
                gid: cred.gid(),
            },
        )
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Peer {
    type Rejection = super::Failure;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        parts
            .extensions
            .get::<ConnectInfo<Peer>>()
            .map(|info| info.0)
            .ok_or_else(|| {
                super::Failure(Error::new(
                    Code::PermissionDenied,
                    "The caller can't be told",
                ))
            })
    }
}

/// Listens on `path`. The storage's lock is held, so a socket that lies there is a dead daemon's.
pub fn bind(path: &Path, group: Option<u32>) -> Result<UnixListener> {
    if path.as_os_str().len() >= 108 {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("{} is too long for a socket's path", path.display()),
        )
        .advise("Give a path of fewer than 108 bytes with --socket."));
    }
    let what = format!("Listening on {}", path.display());
    match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.file_type().is_socket() => files::remove_file(path)?,
        Ok(_) => {
            return Err(Error::new(
                Code::InvalidArgument,
                format!("{} exists and is no socket", path.display()),
            )
            .advise("Give another path with --socket."));
        }
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).io(&what)?;
    if group.is_some() {
        std::os::unix::fs::chown(path, None, group).io(&what)?;
        files::set_mode(path, 0o660)?;
    } else {
        files::set_mode(path, 0o600)?;
    }
    Ok(listener)
}

/// Takes over a socket that systemd listens on already.
pub fn inherited() -> Result<Option<UnixListener>> {
    let what = "Taking over systemd's socket";
    let Some(listener) = listenfd::ListenFd::from_env()
        .take_unix_listener(0)
        .io(what)?
    else {
        return Ok(None);
    };
    listener.set_nonblocking(true).io(what)?;
    let fd = OwnedFd::from(listener);
    Ok(Some(UnixListener::from_std(fd.into()).io(what)?))
}
