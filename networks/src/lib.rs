//! What instances are plugged into: a Linux bridge with its own private subnet, DHCP and DNS by
//! dnsmasq, NAT by one nftables table, one tap per guest. One code path: as root in the host's
//! network namespace, as an ordinary user in a namespace of that user's own (`user_mode.rs`, called
//! before this).
//!
//! ```text
//!   guest ── tap ── bridge (gateway address) ── nftables: masquerade ── the host's routes
//!                     └ dnsmasq: DHCP (fixed addresses), DNS (NAME and NAME.pileus, rest upstream)
//! ```
//!
//! Everything that is set up here outlives the daemon and is found again by the next one:
//! the bridge by its MAC, dnsmasq by its configuration file, taps by the QEMUs that hold them, and
//! the table is simply replaced. `Network::start` switches `net.ipv4.ip_forward` on and nothing
//! switches it off again, because others may rely on it by then.
//!
//! One mechanism a file, in the order of the set-up: `subnet`, `bridge`, `firewall`, `dhcp/`, `tap`; and
//! of the host's own networks `host` (which there are) and `extra` (a guest's further card in one).

mod bridge;
mod dhcp;
mod extra;
mod firewall;
pub mod host;
mod netlink;
pub mod subnet;
mod tap;
mod tools;
pub mod user_mode;

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use pileus_base::process::ProcessId;
use pileus_base::{Code, Error, InstanceName, Result, files};

pub use crate::subnet::Subnet;
pub use pileus_base::Mac;

use crate::dhcp::Settings;
use crate::dhcp::process::Server;
use crate::netlink::Netlink;

/// MTU of an Ethernet network, and the largest that guests are given.
const USUAL_MTU: u32 = 1500;
/// Below this IPv4 does not work well; an uplink that says so is not believed.
const SMALLEST_MTU: u32 = 576;

/// What `Network::start` needs to know.
#[derive(Debug, Clone)]
pub struct NetworkConfig {
    /// Name of the bridge and of the nftables table.
    pub bridge: String,
    /// The subnet that was used before, from the daemon's state; `None` chooses a free one.
    pub subnet: Option<Subnet>,
    /// Folder for dnsmasq's files (`Layout::network_run`). For dnsmasq to run without privileges,
    /// it and the folders above it must let others pass (mode o+x).
    pub state_dir: PathBuf,
    /// DNS domain of the guests.
    pub domain: String,
    /// Name servers to ask for other names; empty: those of the host's /etc/resolv.conf.
    pub upstream: Vec<IpAddr>,
    /// Networks that a newly chosen subnet must not overlap although no interface here shows them.
    pub avoid: Vec<Subnet>,
    /// The card that pasta serves, in a user's own namespace.
    pub uplink: Option<String>,
}

impl NetworkConfig {
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            bridge: "pileus0".into(),
            subnet: None,
            state_dir: state_dir.into(),
            domain: "pileus".into(),
            upstream: Vec::new(),
            avoid: Vec::new(),
            uplink: None,
        }
    }

    /// Takes over what an ordinary user's namespace needs to know of the host outside.
    #[must_use]
    pub fn inside(mut self, entered: &user_mode::Entered) -> Self {
        self.upstream.clone_from(&entered.upstream);
        self.avoid.clone_from(&entered.host_networks);
        self.uplink = Some(user_mode::UPLINK.into());
        self
    }

    fn check(&self) -> Result<()> {
        check_interface_name(&self.bridge)?;
        // The name is also that of the nftables table, whose grammar knows no hyphen.
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let first = self.bridge.starts_with(|c: char| c.is_ascii_alphabetic());
        if !first || !self.bridge.chars().all(plain) {
            return Err(Error::new(
                Code::InvalidArgument,
                format!(
                    "{} can't be the bridge's name: only letters, digits and _ are allowed",
                    self.bridge
                ),
            ));
        }
        self.domain.parse::<InstanceName>().map_err(|err| {
            Error::new(
                Code::InvalidArgument,
                format!("{} can't be the guests' domain", self.domain),
            )
            .with_source(err)
        })?;
        let path = self.state_dir.to_str().unwrap_or_default();
        if !self.state_dir.is_absolute()
            || path.contains(|c: char| c.is_control() || "\"#, ".contains(c))
        {
            return Err(Error::new(
                Code::InvalidArgument,
                format!(
                    "dnsmasq can't use the folder {}: its path has blanks or one of \" # ,",
                    self.state_dir.display()
                ),
            )
            .advise("Use a storage folder with a plain path."));
        }
        Ok(())
    }
}

/// One guest's place in the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nic {
    /// Name of the tap on the host, at most 15 bytes.
    pub ifname: String,
    pub mac: Mac,
    /// The address that DHCP always gives to this MAC.
    pub address: Ipv4Addr,
    pub hostname: InstanceName,
}

/// The private network, up. Dropping it changes nothing on the host.
#[derive(Debug)]
pub struct Network {
    bridge: String,
    mac: Mac,
    settings: Settings,
    server: Server,
}

impl Network {
    /// Sets the network up, or takes over what an earlier daemon left. Can be repeated.
    pub async fn start(config: NetworkConfig) -> Result<Self> {
        config.check()?;
        files::create_folder(&config.state_dir, 0o755)?;
        let NetworkConfig {
            bridge,
            state_dir,
            domain,
            upstream,
            avoid,
            uplink,
            ..
        } = config;
        let mac = bridge::mac_of(&state_dir);
        let netlink = Netlink::open()?;
        let existing = bridge::find(&netlink, &bridge, mac).await?;
        let mut taken = netlink.taken(existing).await?;
        let subnet = match config.subnet {
            Some(subnet) => {
                subnet::check_given(subnet, &taken)?;
                subnet
            }
            None => {
                taken.routes.extend(avoid);
                subnet::choose(fnv(state_dir.as_os_str().as_encoded_bytes()), &taken)?
            }
        };
        let mtu = netlink
            .uplink_mtu()
            .await?
            .filter(|mtu| *mtu >= SMALLEST_MTU);
        let mtu = mtu.unwrap_or(USUAL_MTU).min(USUAL_MTU);
        if let Some(lo) = netlink.link("lo").await? {
            netlink.set_up("lo", lo.header.index).await?;
        }
        let made = bridge::ensure(&netlink, &bridge, mac, subnet, mtu).await?;
        // Rules first: forwarding must not be open for a moment without them.
        firewall::apply(&bridge, subnet, uplink.as_deref()).await?;
        forward()?;
        let settings = Settings {
            dir: state_dir,
            bridge: bridge.clone(),
            subnet,
            domain,
            mtu: (mtu < USUAL_MTU).then_some(mtu),
            upstream,
        };
        let server = Server::start(settings.clone(), made.created).await?;
        tracing::info!(bridge, %subnet, mtu, index = made.index, new = made.created, "the private network is up");
        Ok(Self {
            bridge,
            mac,
            settings,
            server,
        })
    }

    pub fn subnet(&self) -> Subnet {
        self.settings.subnet
    }

    /// The host's address on the bridge, which is also the guests' name server.
    pub fn gateway(&self) -> Ipv4Addr {
        self.settings.subnet.gateway()
    }

    /// DNS domain of the guests.
    pub fn domain(&self) -> &str {
        &self.settings.domain
    }

    pub fn bridge(&self) -> &str {
        &self.bridge
    }

    /// The running dnsmasq.
    pub fn dnsmasq(&self) -> Option<ProcessId> {
        self.server.process()
    }

    /// The lowest address that is not in `used`.
    pub fn free_address(&self, used: &HashSet<Ipv4Addr>) -> Result<Ipv4Addr> {
        free_address(self.settings.subnet, used)
    }

    /// Makes a guest's tap, plugged in and up, and its DHCP and DNS entry. The tap lives as long as
    /// the returned descriptor, or a copy of it in QEMU, is open.
    pub async fn attach(&self, nic: &Nic) -> Result<OwnedFd> {
        self.register(nic)?;
        let plugged = async {
            let tap = tap::create(&nic.ifname)?;
            let netlink = Netlink::open()?;
            bridge::plug(&netlink, &self.bridge, self.mac, &nic.ifname).await?;
            Ok(tap)
        };
        let plugged = plugged.await;
        if plugged.is_err() {
            let _ = self.settings.remove_entry(&nic.ifname);
            self.server.reload();
        }
        plugged
    }

    /// Only the DHCP and DNS entry: for a guest whose tap is there already.
    pub fn register(&self, nic: &Nic) -> Result<()> {
        check_interface_name(&nic.ifname)?;
        let subnet = self.settings.subnet;
        if !subnet.contains(nic.address) || nic.address == subnet.gateway() {
            return Err(Error::new(
                Code::InvalidArgument,
                format!(
                    "{} is no guest address of the private network {subnet}",
                    nic.address
                ),
            ));
        }
        self.settings.free_lease(nic);
        self.settings.write_entry(nic)?;
        self.server.reload();
        Ok(())
    }

    /// Removes a guest's entry and lease. Its tap goes when the last descriptor is closed.
    pub fn detach(&self, nic: &Nic) -> Result<()> {
        self.settings.remove_entry(&nic.ifname)?;
        self.settings.forget_lease(nic.mac);
        self.server.reload();
        Ok(())
    }

    /// Makes the entries exactly those of `nics`: for a daemon that starts and knows who runs.
    pub fn reconcile(&self, nics: &[Nic]) -> Result<()> {
        let wanted: HashSet<&str> = nics.iter().map(|nic| nic.ifname.as_str()).collect();
        for entry in self.settings.entries()? {
            let name = entry.to_string_lossy();
            if !wanted.contains(name.as_ref()) {
                self.settings.remove_entry(&name)?;
            }
        }
        for nic in nics {
            self.register(nic)?;
        }
        self.server.reload();
        Ok(())
    }

    /// What is wrong at the moment; empty when all is well.
    pub async fn health(&self) -> Vec<Error> {
        let mut problems: Vec<Error> = self.server.problem().into_iter().collect();
        match self.bridge_is_up().await {
            Ok(true) => {}
            Ok(false) => problems.push(missing(&format!(
                "The bridge {} or its address is gone",
                self.bridge
            ))),
            Err(err) => problems.push(err),
        }
        match firewall::is_present(&self.bridge).await {
            Ok(true) => problems.extend(firewall::foreign_drop(&self.bridge).await),
            Ok(false) => problems.push(missing(
                "The firewall rules of pileus are gone, so guests don't reach the outside",
            )),
            Err(err) => problems.push(err),
        }
        if !forwards() {
            problems.push(missing(
                "The host no longer forwards packets (net.ipv4.ip_forward is 0)",
            ));
        }
        problems
    }

    async fn bridge_is_up(&self) -> Result<bool> {
        let netlink = Netlink::open()?;
        let index = bridge::find(&netlink, &self.bridge, self.mac).await?;
        let addresses = netlink.addresses().await?;
        let gateway = self.gateway();
        Ok(index.is_some_and(|index| {
            addresses
                .iter()
                .any(|(link, address, _)| *link == index && *address == gateway)
        }))
    }

    /// Takes everything down: for a daemon that ends while no instance runs.
    pub async fn stop(&self) -> Result<()> {
        // Each step even if one before it failed; the first failure is told.
        let dnsmasq = self.server.stop().await;
        let rules = firewall::remove(&self.bridge).await;
        let bridge = match Netlink::open() {
            Ok(netlink) => bridge::remove(&netlink, &self.bridge, self.mac).await,
            Err(err) => Err(err),
        };
        dnsmasq.and(rules).and(bridge)
    }
}

fn free_address(subnet: Subnet, used: &HashSet<Ipv4Addr>) -> Result<Ipv4Addr> {
    subnet
        .guest_addresses()
        .find(|address| !used.contains(address))
        .ok_or_else(|| {
            Error::new(
                Code::NoAddress,
                format!("All addresses of the private network {subnet} are in use"),
            )
            .advise("Delete and purge instances that you don't need any more.")
        })
}

const IP_FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// Switches forwarding on in this network namespace.
fn forward() -> Result<()> {
    if forwards() {
        return Ok(());
    }
    std::fs::write(IP_FORWARD, "1").map_err(|err| {
        Error::new(
            Code::NetworkFailed,
            format!("Forwarding can't be switched on ({IP_FORWARD}): {err}"),
        )
        .advise("Set it on the host: `sysctl -w net.ipv4.ip_forward=1`.")
        .with_source(err)
    })
}

fn forwards() -> bool {
    std::fs::read_to_string(IP_FORWARD).is_ok_and(|text| text.trim() != "0")
}

fn missing(what: &str) -> Error {
    Error::new(Code::NetworkFailed, what).advise("Restart pileusd: it sets its network up again.")
}

/// A name that the kernel takes for an interface and that is safe as a file name and in dnsmasq's and
/// nft's files.
fn check_interface_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if (1..libc::IFNAMSIZ).contains(&name.len()) && name.chars().all(plain) {
        return Ok(());
    }
    Err(Error::new(
        Code::InvalidArgument,
        format!(
            "{name:?} can't be an interface's name: 1 to 15 letters, digits, - or _ are allowed"
        ),
    ))
}

/// FNV-1a: only has to be stable and spread.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses() {
        let mac: Mac = "52:54:00:AB:cd:0f".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:0f");
        for bad in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:0f:00",
            "+2:54:00:ab:cd:0f",
            "5:254:00:ab:cd:0f",
            "52-54-00-ab-cd-0f",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
    }

    #[test]
    fn addresses_are_given_lowest_first_until_there_is_none() {
        let subnet: Subnet = "10.87.21.0/29".parse().unwrap();
        let mut used = HashSet::new();
        for last in 2..=6 {
            let address = free_address(subnet, &used).unwrap();
            assert_eq!(address, Ipv4Addr::new(10, 87, 21, last));
            used.insert(address);
        }
        assert_eq!(
            free_address(subnet, &used).unwrap_err().code,
            Code::NoAddress
        );
    }

    #[test]
    fn names_that_would_break_a_file_are_refused() {
        for bad in ["", "a/b", "..", "sixteen-letters-", "a b", "a\nb", "a\"b"] {
            assert!(check_interface_name(bad).is_err(), "{bad}");
        }
        let mut config = NetworkConfig::new("/run/x");
        config.check().unwrap();
        config.bridge = "a-b".into();
        assert!(config.check().is_err());
        config = NetworkConfig::new("/run/a b");
        assert!(config.check().is_err());
        config = NetworkConfig::new("/run/x");
        config.domain = "x\nserver=1.2.3.4".into();
        assert!(config.check().is_err());
    }
}
