//! The kernel's view of links, addresses and routes, over rtnetlink. Only questions and small helpers
//! here; what pileus changes is in `bridge.rs` and `tap.rs`.

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use pileus_base::{Code, Error, Result};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{LinkAttribute, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage};
use rtnetlink::{AddressMessageBuilder, Handle, LinkUnspec, RouteMessageBuilder};
use tokio::task::JoinHandle;

use crate::subnet::{Subnet, Taken};
use crate::tools;

/// Local and broadcast addresses live in this table; they repeat what the addresses tell.
const TABLE_LOCAL: u32 = 255;

/// A connection to the kernel of the network namespace that the calling thread is in.
pub(crate) struct Netlink {
    pub(crate) handle: Handle,
    connection: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

impl Netlink {
    pub(crate) fn open() -> Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(|err| {
            Error::new(
                Code::NetworkFailed,
                format!("The kernel's netlink socket can't be opened: {err}"),
            )
            .with_source(err)
        })?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// The link of that name, if there is one.
    pub(crate) async fn link(&self, name: &str) -> Result<Option<LinkMessage>> {
        let request = self.handle.link().get().match_name(name.to_owned());
        match request.execute().try_next().await {
            Ok(link) => Ok(link),
            Err(err) if errno(&err) == libc::ENODEV => Ok(None),
            Err(err) => Err(error(&format!("Looking for the interface {name}"), err)),
        }
    }

    /// Sets a link up.
    pub(crate) async fn set_up(&self, name: &str, index: u32) -> Result<()> {
        let message = LinkUnspec::new_with_index(index).up().build();
        let set = self.handle.link().set(message).execute().await;
        set.map_err(|err| error(&format!("Setting the interface {name} up"), err))
    }

    /// IPv4 addresses with their link's index and prefix.
    pub(crate) async fn addresses(&self) -> Result<Vec<(u32, Ipv4Addr, u8)>> {
        let mut found = Vec::new();
        let mut stream = std::pin::pin!(self.handle.address().get().execute());
        let what = "Listing the host's addresses";
        while let Some(message) = stream.try_next().await.map_err(|err| error(what, err))? {
            // On a point-to-point link `Local` is the host's own address.
            let own = message
                .attributes
                .iter()
                .find_map(|attribute| match attribute {
                    AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
                    _ => None,
                });
            if let Some(address) = own {
                found.push((message.header.index, address, message.header.prefix_len));
            }
        }
        Ok(found)
    }

    async fn routes(&self) -> Result<Vec<RouteMessage>> {
        let question = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes = self.handle.route().get(question).execute();
        let routes: Vec<RouteMessage> = routes
            .try_collect()
            .await
            .map_err(|err| error("Listing the host's routes", err))?;
        let ours = |route: &RouteMessage| {
            route.header.address_family == AddressFamily::Inet && table(route) != TABLE_LOCAL
        };
        Ok(routes.into_iter().filter(ours).collect())
    }

    /// What interfaces other than `except` use.
    pub(crate) async fn taken(&self, except: Option<u32>) -> Result<Taken> {
        let addresses = self.addresses().await?;
        let addresses = addresses
            .into_iter()
            .filter(|(index, ..)| Some(*index) != except);
        let routes = self.routes().await?;
        Ok(Taken {
            addresses: addresses
                .map(|(_, address, prefix)| Subnet::containing(address, prefix))
                .collect(),
            routes: routes
                .iter()
                .filter(|route| except.is_none() || output(route) != except)
                .filter_map(destination)
                .collect(),
        })
    }

    /// MTU of the interface that the default route leaves by, in bytes.
    pub(crate) async fn uplink_mtu(&self) -> Result<Option<u32>> {
        let routes = self.routes().await?;
        let default = routes
            .iter()
            .filter(|route| route.header.destination_prefix_length == 0 && output(route).is_some())
            .min_by_key(|route| metric(route));
        let Some(index) = default.and_then(output) else {
            return Ok(None);
        };
        let request = self.handle.link().get().match_index(index);
        let link = request.execute().try_next().await;
        Ok(link.ok().flatten().and_then(|link| mtu(&link)))
    }

    pub(crate) async fn add_address(
        &self,
        index: u32,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<()> {
        let request = self.handle.address().add(index, address.into(), prefix);
        match request.execute().await {
            Err(err) if errno(&err) != libc::EEXIST => Err(error(
                &format!("Giving the bridge its address {address}"),
                err,
            )),
            _ => Ok(()),
        }
    }

    pub(crate) async fn remove_address(
        &self,
        index: u32,
        address: Ipv4Addr,
        prefix: u8,
    ) -> Result<()> {
        let message = AddressMessageBuilder::<Ipv4Addr>::new()
            .index(index)
            .address(address, prefix)
            .build();
        let request = self.handle.address().del(message);
        request
            .execute()
            .await
            .map_err(|err| error(&format!("Taking the address {address} off the bridge"), err))
    }
}

pub(crate) fn mtu(link: &LinkMessage) -> Option<u32> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::Mtu(mtu) => Some(*mtu),
            _ => None,
        })
}

fn table(route: &RouteMessage) -> u32 {
    let wide = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        });
    wide.unwrap_or_else(|| route.header.table.into())
}

fn output(route: &RouteMessage) -> Option<u32> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => Some(*index),
            _ => None,
        })
}

fn metric(route: &RouteMessage) -> u32 {
    let metric = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Priority(metric) => Some(*metric),
            _ => None,
        });
    metric.unwrap_or(0)
}

/// Where a route leads; `None` for the default route.
fn destination(route: &RouteMessage) -> Option<Subnet> {
    route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                let prefix = route.header.destination_prefix_length;
                (prefix > 0).then(|| Subnet::containing(*address, prefix))
            }
            _ => None,
        })
}

/// The kernel's error number as a positive value; 0 if there is none.
pub(crate) fn errno(err: &rtnetlink::Error) -> i32 {
    match err {
        rtnetlink::Error::NetlinkError(message) => message.raw_code().abs(),
        _ => 0,
    }
}

/// Turns a netlink error into ours.
pub(crate) fn error(what: &str, err: rtnetlink::Error) -> Error {
    let number = errno(&err);
    match number {
        libc::EPERM | libc::EACCES => tools::permission(what),
        0 => Error::new(Code::NetworkFailed, format!("{what} failed: {err}")),
        _ => {
            let io = std::io::Error::from_raw_os_error(number);
            Error::new(Code::NetworkFailed, format!("{what} failed: {io}"))
        }
    }
    .with_source(err)
}
