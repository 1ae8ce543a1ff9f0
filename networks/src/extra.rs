//! A further card of a guest, plugged into a bridge that the host has already: what is made here is the
//! tap alone. Addresses, DHCP and rules there are whatever the host's owner has set up.
//!
//! Only as root in the host's own namespace: an ordinary user's has none of the host's bridges.

use std::os::fd::OwnedFd;
use std::path::Path;

use pileus_base::{Code, Error, Result};

use crate::host::{Interface, InterfaceKind};
use crate::netlink::Netlink;
use crate::{Network, bridge, check_interface_name, host, tap};

impl Network {
    /// The bridge that a network's name means: its own, or that of which the named card is a port.
    /// Blocks for a moment.
    pub fn bridge_of(&self, network: &str) -> Result<String> {
        choose(
            Path::new("/sys/class/net"),
            &host::interfaces(self.bridge()),
            network,
        )
    }

    /// Makes a guest's further tap, plugged into that network's bridge and up. It lives as long as the
    /// returned descriptor, or a copy of it in QEMU, is open.
    pub async fn attach_extra(&self, ifname: &str, network: &str) -> Result<OwnedFd> {
        check_interface_name(ifname)?;
        let bridge = self.bridge_of(network)?;
        let tap = tap::create(ifname)?;
        let netlink = Netlink::open()?;
        bridge::plug_into(&netlink, &bridge, ifname).await?;
        Ok(tap)
    }
}

fn choose(sys: &Path, there: &[Interface], network: &str) -> Result<String> {
    let Some(found) = there.iter().find(|interface| interface.name == network) else {
        return Err(Error::new(
            Code::NetworkNotFound,
            format!("The host has no network \"{network}\""),
        )
        .advise("`pileus networks` lists those that instances can be connected to."));
    };
    if found.kind == InterfaceKind::Bridge {
        return Ok(found.name.clone());
    }
    let controller = std::fs::read_link(sys.join(network).join("brport/bridge"));
    let controller = controller.ok().and_then(|path| {
        let name = path.file_name()?.to_str()?;
        there.iter().find(|other| other.name == name)
    });
    controller.map(|bridge| bridge.name.clone()).ok_or_else(|| {
        Error::new(
            Code::NetworkFailed,
            format!("{network} is a card in no bridge, and instances are connected by bridges"),
        )
        .advise(format!(
            "Make a bridge that has it as a port (it loses its connection for a moment): `nmcli \
             connection add type bridge ifname br0`, `nmcli connection add type ethernet ifname \
             {network} master br0`; then name br0."
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_means_its_bridge() {
        let dir = tempfile::tempdir().unwrap();
        let sys = dir.path();
        for name in ["br0", "eth0/brport", "eth1", "eth2/brport", "ours"] {
            std::fs::create_dir_all(sys.join(name)).unwrap();
        }
        std::os::unix::fs::symlink(sys.join("br0"), sys.join("eth0/brport/bridge")).unwrap();
        // In our own bridge, which is nobody's to choose.
        std::os::unix::fs::symlink(sys.join("ours"), sys.join("eth2/brport/bridge")).unwrap();
        let interface = |name: &str, kind| Interface {
            name: name.into(),
            kind,
            description: String::new(),
        };
        let there = [
            interface("br0", InterfaceKind::Bridge),
            interface("eth0", InterfaceKind::Ethernet),
            interface("eth1", InterfaceKind::Ethernet),
            interface("eth2", InterfaceKind::Ethernet),
        ];
        let of = |name: &str| choose(sys, &there, name);
        assert_eq!(of("br0").unwrap(), "br0");
        assert_eq!(of("eth0").unwrap(), "br0");
        for (name, code) in [
            ("eth1", Code::NetworkFailed),
            ("eth2", Code::NetworkFailed),
            ("ours", Code::NetworkNotFound),
            ("../eth0", Code::NetworkNotFound),
            ("", Code::NetworkNotFound),
        ] {
            let err = of(name).unwrap_err();
            assert_eq!(err.code, code, "{name}");
            assert!(err.advice.is_some());
        }
    }
}
