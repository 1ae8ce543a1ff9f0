//! A DHCPRELEASE in a guest's name: the one way to make a running dnsmasq give up a lease. It matters
//! because leases never end, and dnsmasq gives no address that another MAC has leased.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};

use nix::sys::socket::{setsockopt, sockopt};

use crate::Mac;

const BOOTREQUEST: u8 = 1;
const ETHERNET: u8 = 1;
const MAGIC: [u8; 4] = [99, 130, 83, 99];
const OPTION_MESSAGE_TYPE: u8 = 53;
const OPTION_SERVER_ID: u8 = 54;
const OPTION_END: u8 = 255;
const DHCPRELEASE: u8 = 7;

/// The packet (RFC 2131, 4.4.6): fixed header of 236 bytes, magic, options.
fn packet(server: Ipv4Addr, mac: Mac, address: Ipv4Addr) -> Vec<u8> {
    let mut bytes = vec![0; 236];
    bytes[..3].copy_from_slice(&[BOOTREQUEST, ETHERNET, 6]);
    bytes[12..16].copy_from_slice(&address.octets());
    bytes[28..34].copy_from_slice(&mac.0);
    bytes.extend(MAGIC);
    bytes.extend([OPTION_MESSAGE_TYPE, 1, DHCPRELEASE, OPTION_SERVER_ID, 4]);
    bytes.extend(server.octets());
    bytes.push(OPTION_END);
    bytes.resize(300, 0);
    bytes
}

/// Sends it to our dnsmasq. There is no answer to a release, and failing is harmless until the
/// address is used again, so it is only logged.
pub(super) fn send(bridge: &str, server: Ipv4Addr, mac: Mac, address: Ipv4Addr) {
    let sent = || -> std::io::Result<()> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        // Bound to the bridge, the packet counts as one that came in there, and not on `lo`.
        setsockopt(&socket, sockopt::BindToDevice, &OsString::from(bridge))?;
        socket.send_to(&packet(server, mac, address), SocketAddrV4::new(server, 67))?;
        Ok(())
    };
    match sent() {
        Ok(()) => tracing::debug!(%mac, %address, "lease released"),
        Err(err) => tracing::warn!(%mac, %address, %err, "the lease could not be released"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_packet_has_its_fields_where_they_belong() {
        let mac = "52:54:00:01:02:03".parse().unwrap();
        let bytes = packet(Ipv4Addr::new(10, 1, 2, 1), mac, Ipv4Addr::new(10, 1, 2, 9));
        assert_eq!(bytes.len(), 300);
        assert_eq!(bytes[12..16], [10, 1, 2, 9]);
        assert_eq!(bytes[28..34], [0x52, 0x54, 0, 1, 2, 3]);
        assert_eq!(
            bytes[236..250],
            [99, 130, 83, 99, 53, 1, 7, 54, 4, 10, 1, 2, 1, 255]
        );
    }
}
