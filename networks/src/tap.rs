//! Taps: one per guest, made by ioctl on /dev/net/tun. A tap lives as long as a descriptor of it is
//! open, so the one that QEMU holds keeps it and nothing is left behind when QEMU ends.
//! Next step: `bridge.rs` plugs it in; the instance's task hands the descriptor to QEMU.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use pileus_base::{Code, Error, Result};

use crate::tools;

/// The device that taps are made with.
const DEVICE: &str = "/dev/net/tun";

mod ioctl {
    const TUN: u8 = b'T';
    nix::ioctl_write_ptr_bad!(
        tunsetiff,
        nix::request_code_write!(TUN, 202, size_of::<libc::c_int>()),
        libc::ifreq
    );
}

/// Opens the tun device, or says why that can't be done.
pub(crate) fn open_device() -> Result<OwnedFd> {
    open(Path::new(DEVICE))
}

fn open(device: &Path) -> Result<OwnedFd> {
    let opened = OpenOptions::new().read(true).write(true).open(device);
    opened.map(OwnedFd::from).map_err(|err| {
        let shown = device.display();
        let advice = match err.kind() {
            ErrorKind::PermissionDenied => format!(
                "Let this user open it, for example with `sudo chmod 0666 {shown}` (a udev rule keeps \
                 that over restarts), or run pileusd as root."
            ),
            _ => format!(
                "Load the kernel's tun module (`sudo modprobe tun`); in a container, pass the device \
                 {shown} in."
            ),
        };
        Error::new(Code::TunUnavailable, format!("{shown} can't be opened: {err}"))
            .advise(advice)
            .with_source(err)
    })
}

/// Makes a tap of this name and returns the descriptor that keeps it.
pub(crate) fn create(name: &str) -> Result<OwnedFd> {
    let fd = open_device()?;
    // SAFETY: ifreq is plain data for which all zeroes are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request
        .ifr_name
        .iter_mut()
        .zip(name.bytes().take(libc::IFNAMSIZ - 1))
    {
        *to = from.cast_signed();
    }
    // The kernel takes the flags as 16 bits.
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
    // SAFETY: the descriptor is open and `request` lives through the call.
    match unsafe { ioctl::tunsetiff(fd.as_raw_fd(), &raw const request) } {
        Ok(_) => Ok(fd),
        Err(nix::Error::EPERM) => Err(tools::permission(&format!("Making the tap {name}"))),
        Err(nix::Error::EBUSY | nix::Error::EINVAL) => Err(Error::new(
            Code::NetworkFailed,
            format!("The interface {name} exists already and is in use"),
        )
        .advise(
            "Stop the process that holds it (an earlier QEMU of this instance?) and try again.",
        )),
        Err(err) => Err(Error::new(
            Code::NetworkFailed,
            format!("Making the tap {name} failed: {err}"),
        )
        .with_source(err)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let err = open(&dir.path().join("tun")).unwrap_err();
        assert_eq!(err.code, Code::TunUnavailable);
        assert!(err.advice.unwrap().contains("modprobe tun"));
    }
}
