//! The bridge that guests are plugged into: made once, known again by its MAC address, which is
//! derived from the daemon's state folder, so that a bridge that someone else made is never touched.
//! Next step: `tap.rs` plugs a guest in.

use std::path::Path;

use pileus_base::{Code, Error, Result};
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::{LinkBridge, LinkUnspec};

use crate::netlink::{Netlink, errno, error, mtu};
use crate::subnet::Subnet;
use crate::{Mac, fnv};

/// A bridge that is there.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bridge {
    pub(crate) index: u32,
    /// It was made just now, so nothing that was bound to an earlier one of this name works.
    pub(crate) created: bool,
}

/// The bridge's MAC address: locally administered, the same at each start with this state folder.
pub(crate) fn mac_of(state_dir: &Path) -> Mac {
    let hash = fnv(state_dir.as_os_str().as_encoded_bytes()).to_be_bytes();
    Mac([0x02, 0x70, hash[0], hash[1], hash[2], hash[3]])
}

/// Index of our bridge if it is there; an error if the name belongs to someone else's interface.
pub(crate) async fn find(netlink: &Netlink, name: &str, mac: Mac) -> Result<Option<u32>> {
    let Some(link) = netlink.link(name).await? else {
        return Ok(None);
    };
    if is_bridge(&link) && has_mac(&link, mac) {
        return Ok(Some(link.header.index));
    }
    Err(Error::new(
        Code::PortTaken,
        format!("The interface {name} exists already and was not made by this daemon"),
    )
    .advise(format!(
        "Choose another name with `pileusd --bridge NAME`, or remove the interface if nothing uses it (`ip link delete {name}`)."
    )))
}

/// Makes the bridge, or brings the one that is there to the state that is wanted.
pub(crate) async fn ensure(
    netlink: &Netlink,
    name: &str,
    mac: Mac,
    subnet: Subnet,
    wanted_mtu: u32,
) -> Result<Bridge> {
    let found = find(netlink, name, mac).await?;
    let index = match found {
        Some(index) => index,
        None => create(netlink, name, mac).await?,
    };
    // The private network is IPv4 only. Without IPv6 the host offers guests nothing over it either.
    let ipv6 = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    if let Err(err) = std::fs::write(&ipv6, "1") {
        tracing::debug!(%err, "IPv6 can't be switched off on {name}");
    }
    // An MTU that is set stays; otherwise the bridge takes the smallest of its taps.
    let message = LinkUnspec::new_with_index(index)
        .mtu(wanted_mtu)
        .up()
        .build();
    let set = netlink.handle.link().set(message).execute().await;
    set.map_err(|err| error(&format!("Setting the bridge {name} up"), err))?;
    for (link, address, prefix) in netlink.addresses().await? {
        if link == index && (address, prefix) != (subnet.gateway(), subnet.prefix()) {
            netlink.remove_address(index, address, prefix).await?;
        }
    }
    netlink
        .add_address(index, subnet.gateway(), subnet.prefix())
        .await?;
    Ok(Bridge {
        index,
        created: found.is_none(),
    })
}

async fn create(netlink: &Netlink, name: &str, mac: Mac) -> Result<u32> {
    // No forward delay: a guest's first DHCP request must not be swallowed.
    let message = LinkBridge::new(name)
        .forward_delay(0)
        .address(mac.0.to_vec())
        .build();
    if let Err(err) = netlink.handle.link().add(message).execute().await
        && errno(&err) != libc::EEXIST
    {
        return Err(error(&format!("Making the bridge {name}"), err));
    }
    find(netlink, name, mac).await?.ok_or_else(|| {
        Error::new(
            Code::NetworkFailed,
            format!("The bridge {name} vanished while it was made"),
        )
    })
}

/// Removes the bridge if it is there and ours.
pub(crate) async fn remove(netlink: &Netlink, name: &str, mac: Mac) -> Result<()> {
    let Ok(Some(index)) = find(netlink, name, mac).await else {
        return Ok(());
    };
    match netlink.handle.link().del(index).execute().await {
        Err(err) if errno(&err) != libc::ENODEV => {
            Err(error(&format!("Removing the bridge {name}"), err))
        }
        _ => Ok(()),
    }
}

/// Plugs a link into our bridge and sets it up.
pub(crate) async fn plug(netlink: &Netlink, bridge: &str, mac: Mac, port: &str) -> Result<()> {
    if find(netlink, bridge, mac).await?.is_none() {
        return Err(
            Error::new(Code::NetworkFailed, format!("The bridge {bridge} is gone"))
                .advise("Restart pileusd: it sets its network up again."),
        );
    }
    plug_into(netlink, bridge, port).await
}

/// Plugs a link into any bridge and sets it up.
pub(crate) async fn plug_into(netlink: &Netlink, bridge: &str, port: &str) -> Result<()> {
    let bridge_link = netlink.link(bridge).await?.filter(is_bridge);
    let (Some(bridge_link), Some(port_link)) = (bridge_link, netlink.link(port).await?) else {
        return Err(Error::new(
            Code::NetworkFailed,
            format!("The bridge {bridge} or the interface {port} is gone"),
        )
        .advise("Try again; `pileus networks` lists the bridges that are there."));
    };
    let mut message = LinkUnspec::new_with_index(port_link.header.index)
        .controller(bridge_link.header.index)
        .up();
    if let Some(mtu) = mtu(&bridge_link) {
        message = message.mtu(mtu);
    }
    let set = netlink.handle.link().set(message.build()).execute().await;
    set.map_err(|err| error(&format!("Plugging {port} into the bridge {bridge}"), err))
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    })
}

fn has_mac(link: &LinkMessage, mac: Mac) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::Address(bytes) => bytes[..] == mac.0,
        _ => false,
    })
}
