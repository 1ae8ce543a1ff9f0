//! Who may read which file: a system daemon acts for users, and reads for each what that one may read.

use std::fs::File;
use std::path::Path;

use pileus_base::{Code, Error, Result};

use crate::http::listener::Peer;
use crate::service::Mode;

/// A system daemon reads files as root; it must not do so for someone who may not read them. Opens
/// the file with the caller's own rights (user and first group); nothing if the caller may do all.
pub(in crate::service) fn open_as(mode: &Mode, peer: Peer, path: &Path) -> Result<Option<File>> {
    if peer.uid == 0 || matches!(mode, Mode::User(_)) {
        return Ok(None);
    }
    // Opened by a thread that is this user for a moment. Only this thread's identity changes, and it
    // ends right after.
    let path = path.to_owned();
    let opened = std::thread::spawn(move || {
        rustix::thread::set_thread_groups(&[])?;
        nix::unistd::setfsgid(nix::unistd::Gid::from_raw(peer.gid));
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(peer.uid));
        File::open(&path)
    })
    .join();
    match opened {
        Ok(Ok(file)) => Ok(Some(file)),
        Ok(Err(err)) if err.kind() == std::io::ErrorKind::NotFound => Err(Error::new(
            Code::ImageNotFound,
            "There is no such file, or not for you",
        )),
        Ok(Err(err)) => Err(Error::new(
            Code::PermissionDenied,
            format!("The user {} may not read the image's file: {err}", peer.uid),
        )),
        Err(_) => Err(Error::internal("Checking the file's permission failed")),
    }
}
