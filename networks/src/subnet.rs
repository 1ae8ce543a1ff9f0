//! IPv4 subnets and the choice of a free one. Pure: what the host uses comes in as a list.
//! Next step: `bridge.rs` puts the subnet's gateway address on the bridge.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use pileus_base::{Code, Error, Result};
use serde::{Deserialize, Serialize};

/// An IPv4 network such as `10.87.21.0/24`. Host bits are always zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// The network that holds `address`; host bits are cut off. `prefix` above 32 counts as 32.
    pub fn containing(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = prefix.min(32);
        Self {
            network: Ipv4Addr::from_bits(address.to_bits() & mask(prefix)),
            prefix,
        }
    }

    /// The network address, for example `10.87.21.0`.
    pub fn network(self) -> Ipv4Addr {
        self.network
    }

    /// Length of the prefix in bits.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    pub fn netmask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(mask(self.prefix))
    }

    pub fn broadcast(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits() | !mask(self.prefix))
    }

    /// The host's address on the bridge: the first one.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.network.to_bits().saturating_add(1))
    }

    pub fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix) == self.network.to_bits()
    }

    pub fn overlaps(self, other: Self) -> bool {
        let shorter = self.prefix.min(other.prefix);
        (self.network.to_bits() ^ other.network.to_bits()) & mask(shorter) == 0
    }

    /// Addresses that guests may have, lowest first: all but network, gateway and broadcast.
    pub fn guest_addresses(self) -> impl Iterator<Item = Ipv4Addr> {
        let first = self.gateway().to_bits().saturating_add(1);
        (first..self.broadcast().to_bits()).map(Ipv4Addr::from_bits)
    }

    /// Whether a private network of ours can be made of it: room for guests, not too large for DHCP.
    fn check_usable(self) -> Result<()> {
        if (16..=29).contains(&self.prefix) {
            return Ok(());
        }
        Err(Error::new(
            Code::InvalidArgument,
            format!(
                "{self} can't be the private network: its prefix is not between 16 and 29 bits"
            ),
        )
        .advise("Use a /24, for example 10.87.21.0/24."))
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl FromStr for Subnet {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let parsed = text.split_once('/').and_then(|(address, prefix)| {
            let address: Ipv4Addr = address.parse().ok()?;
            let prefix: u8 = prefix.parse().ok().filter(|p| *p <= 32)?;
            let subnet = Self::containing(address, prefix);
            (subnet.network == address).then_some(subnet)
        });
        parsed.ok_or_else(|| {
            Error::new(
                Code::InvalidArgument,
                format!("{text} is not an IPv4 subnet"),
            )
            .advise("Write a subnet as 10.87.21.0/24, with the host bits zero.")
        })
    }
}

impl TryFrom<String> for Subnet {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> Self {
        subnet.to_string()
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

/// What the host's other interfaces use.
#[derive(Debug, Clone, Default)]
pub struct Taken {
    /// Networks of the addresses on other interfaces.
    pub addresses: Vec<Subnet>,
    /// Destinations of routes through other interfaces, without the default route.
    pub routes: Vec<Subnet>,
}

/// Checks a subnet that was decided before. A route that is broader than it (a VPN's 10.0.0.0/8) does
/// no harm, because ours is the more specific one, and must not keep existing machines from starting.
pub fn check_given(subnet: Subnet, taken: &Taken) -> Result<()> {
    subnet.check_usable()?;
    let narrow = |route: &&Subnet| route.prefix >= subnet.prefix;
    let clash = taken
        .addresses
        .iter()
        .chain(taken.routes.iter().filter(narrow))
        .find(|other| other.overlaps(subnet));
    match clash {
        None => Ok(()),
        Some(other) => Err(Error::new(
            Code::SubnetTaken,
            format!("The private network {subnet} overlaps {other}, which another interface of this host uses"),
        )
        .advise("Give pileus another subnet, or end the other network (`ip route` shows it).")),
    }
}

/// Chooses a free /24: the same one for the same seed while it is free, somewhere in 10.0.0.0/8,
/// and when all of that is routed elsewhere, in 172.16.0.0/12 or 192.168.0.0/16.
pub fn choose(seed: u64, taken: &Taken) -> Result<Subnet> {
    let free = |subnet: &Subnet| {
        !taken
            .addresses
            .iter()
            .chain(&taken.routes)
            .any(|other| other.overlaps(*subnet))
    };
    candidates(seed).find(free).ok_or_else(|| {
        Error::new(
            Code::SubnetTaken,
            "No free private subnet was found: routes of this host cover 10.0.0.0/8, 172.16.0.0/12 \
             and 192.168.0.0/16",
        )
        .advise("Give pileus a subnet that is free in your network.")
    })
}

fn candidates(seed: u64) -> impl Iterator<Item = Subnet> {
    let spread = move |step: u64| seed.wrapping_add(step).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
    // Low second octets of 10/8 are what people and clouds use first, so they are left out.
    let in_10 = (0..1024).map(move |step| {
        let n = spread(step);
        (10, 32 + (n >> 8) as u8 % 200, n as u8)
    });
    let in_172 = (16..32).flat_map(|x| (0..=255).map(move |y| (172, x, y)));
    let in_192 = (0..=255).map(|y| (192, 168, y));
    in_10
        .chain(in_172)
        .chain(in_192)
        .map(|(a, b, c)| Subnet::containing(Ipv4Addr::new(a, b, c, 0), 24))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn nets(texts: &[&str]) -> Vec<Subnet> {
        texts.iter().map(|t| t.parse().unwrap()).collect()
    }

    #[test]
    fn the_parts_of_a_subnet() {
        let subnet: Subnet = "10.87.21.0/29".parse().unwrap();
        assert_eq!(subnet.gateway().to_string(), "10.87.21.1");
        assert_eq!(subnet.netmask().to_string(), "255.255.255.248");
        assert_eq!(subnet.broadcast().to_string(), "10.87.21.7");
        let guests: Vec<_> = subnet.guest_addresses().map(|a| a.to_string()).collect();
        assert_eq!(guests.first().unwrap(), "10.87.21.2");
        assert_eq!(guests.last().unwrap(), "10.87.21.6");
        for bad in [
            "",
            "10.0.0.0",
            "10.0.0.1/24",
            "10.0.0.0/33",
            "::/0",
            "10.0.0.0/x",
        ] {
            assert!(bad.parse::<Subnet>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_choice_is_stable_and_avoids_what_is_used() {
        let first = choose(7, &Taken::default()).unwrap();
        assert_eq!(first, choose(7, &Taken::default()).unwrap());
        assert_ne!(first, choose(8, &Taken::default()).unwrap());
        let second = choose(
            7,
            &Taken {
                addresses: vec![first],
                routes: vec![],
            },
        )
        .unwrap();
        assert!(!first.overlaps(second));
    }

    #[test]
    fn a_vpn_on_all_of_10_moves_the_choice_elsewhere_and_a_full_host_is_an_error() {
        let vpn = Taken {
            addresses: vec![],
            routes: nets(&["10.0.0.0/8", "172.16.0.0/13"]),
        };
        let chosen = choose(1, &vpn).unwrap();
        assert_eq!(chosen.to_string(), "172.24.0.0/24");
        let full = Taken {
            addresses: nets(&["192.168.0.0/16"]),
            routes: nets(&["10.0.0.0/8", "172.16.0.0/12"]),
        };
        assert_eq!(choose(1, &full).unwrap_err().code, Code::SubnetTaken);
    }

    #[test]
    fn a_given_subnet_yields_to_other_interfaces_but_not_to_broad_routes() {
        let ours: Subnet = "10.87.21.0/24".parse().unwrap();
        let check = |addresses: &[&str], routes: &[&str]| {
            check_given(
                ours,
                &Taken {
                    addresses: nets(addresses),
                    routes: nets(routes),
                },
            )
            .map_err(|err| err.code)
        };
        assert_eq!(check(&[], &["10.0.0.0/8"]), Ok(()));
        assert_eq!(check(&[], &["10.87.21.128/25"]), Err(Code::SubnetTaken));
        assert_eq!(check(&["10.87.0.0/16"], &[]), Err(Code::SubnetTaken));
        assert_eq!(check(&["10.87.22.0/24"], &["10.87.20.0/24"]), Ok(()));
        let tiny: Subnet = "10.87.21.0/30".parse().unwrap();
        let err = check_given(tiny, &Taken::default()).unwrap_err();
        assert_eq!(err.code, Code::InvalidArgument);
    }

    proptest! {
        #[test]
        fn overlap_is_symmetric_and_what_contains_overlaps(a: u32, b: u32, p in 0_u8..=32, q in 0_u8..=32) {
            let (x, y) = (Subnet::containing(a.into(), p), Subnet::containing(b.into(), q));
            prop_assert_eq!(x.overlaps(y), y.overlaps(x));
            prop_assert!(x.contains(a.into()));
            prop_assert_eq!(x.overlaps(y), x.contains(y.network()) || y.contains(x.network()));
            prop_assert_eq!(x.to_string().parse::<Subnet>().unwrap(), x);
        }
    }
}
