//! A tap that leads nowhere: it is made in a network namespace of its own, which nobody else ever
//! enters and which goes when the tap is closed. For [`super::Nic::Disconnected`].

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, OwnedFd};

use pileus_base::{Code, Error, Result};

/// Needs the right to make a network namespace, as the daemon has it. Blocking, about a millisecond.
pub(crate) fn make() -> Result<OwnedFd> {
    // A namespace belongs to a thread here, so the thread is used for nothing else.
    let made = std::thread::Builder::new()
        .name("loose-tap".into())
        .spawn(in_own_namespace)
        .and_then(|thread| {
            let ended = thread.join();
            ended.unwrap_or_else(|_| Err(std::io::Error::other("the thread panicked")))
        });
    made.map_err(|err| {
        let what = format!("A NIC that is connected to nothing could not be made: {err}");
        Error::new(Code::TunUnavailable, what).with_source(err)
    })
}

fn in_own_namespace() -> std::io::Result<OwnedFd> {
    // SAFETY: no pointers; the thread ends right after this and shares nothing that depends on its
    // network namespace.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    // SAFETY: zero is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"nowhere") {
        *to = from.cast_signed();
    }
    // As of the taps that are plugged in (`networks/src/tap.rs`): a saved state wants the same.
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as i16;
    // SAFETY: the descriptor is open and the request outlives the call.
    if unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &request) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(tun.into())
}
