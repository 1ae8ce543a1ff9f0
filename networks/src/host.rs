//! The host's own interfaces: those that an instance can be plugged into besides the private network,
//! and what went over a tap. Only questions, answered from /sys and /proc.

use std::collections::HashMap;
use std::path::Path;

use pileus_base::Result;

/// ARPHRD_ETHER: what `type` says of everything that looks like Ethernet.
const ETHERNET: &str = "1";

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum InterfaceKind {
    Bridge,
    Ethernet,
}

impl InterfaceKind {
    pub fn as_str(self) -> &'static str {
        match self {
            InterfaceKind::Bridge => "bridge",
            InterfaceKind::Ethernet => "ethernet",
        }
    }
}

/// An interface of the host that instances can be connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    pub name: String,
    pub kind: InterfaceKind,
    /// `Network bridge with eth0`, for a person.
    pub description: String,
}

/// The host's bridges and Ethernet cards by name: neither Wi-Fi, which can't be bridged, nor virtual
/// ones, nor the bridge `own`. Blocks for a moment.
pub fn interfaces(own: &str) -> Vec<Interface> {
    // /sys may be that of another network namespace than this process's.
    let here = traffic();
    let mut found = look(Path::new("/sys/class/net"), own);
    found.retain(|interface| here.contains_key(&interface.name));
    found
}

fn look(sys: &Path, own: &str) -> Vec<Interface> {
    let Ok(entries) = std::fs::read_dir(sys) else {
        return Vec::new();
    };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let names: Vec<String> = names.filter(|name| name != own).collect();
    let is_card = |name: &str| is_card(&sys.join(name));
    let mut found: Vec<Interface> = names
        .iter()
        .filter_map(|name| {
            let (kind, description) = match sys.join(name).join("bridge").is_dir() {
                true => (
                    InterfaceKind::Bridge,
                    bridge_of(&ports(sys, name, &is_card)),
                ),
                false if is_card(name) => (InterfaceKind::Ethernet, "Ethernet device".to_owned()),
                false => return None,
            };
            Some(Interface {
                name: name.clone(),
                kind,
                description,
            })
        })
        .collect();
    found.sort_by(|a, b| a.name.cmp(&b.name));
    found
}

/// Whether it is a real Ethernet card.
fn is_card(path: &Path) -> bool {
    let says = |file: &str| std::fs::read_to_string(path.join(file)).unwrap_or_default();
    let wireless = ["wireless", "phy80211"]
        .iter()
        .any(|sign| path.join(sign).exists());
    let real = std::fs::canonicalize(path).is_ok_and(|target| {
        !target
            .components()
            .any(|part| part.as_os_str() == "virtual")
    });
    real && !wireless && says("type").trim() == ETHERNET
}

/// The cards that are ports of a bridge.
fn ports(sys: &Path, bridge: &str, is_card: &dyn Fn(&str) -> bool) -> Vec<String> {
    let ports = std::fs::read_dir(sys.join(bridge).join("brif"));
    let names = ports
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let mut cards: Vec<String> = names.filter(|name| is_card(name)).collect();
    cards.sort();
    cards
}

fn bridge_of(cards: &[String]) -> String {
    match cards {
        [] => "Network bridge".to_owned(),
        cards => format!("Network bridge with {}", cards.join(", ")),
    }
}

/// An error unless taps can be made here.
pub fn check_tun() -> Result<()> {
    crate::tap::open_device().map(drop)
}

/// Bytes that went over an interface, as this side of it counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    pub received: u64,
    pub sent: u64,
}

/// What went over each interface of this process's network namespace since it was made. What a tap
/// received is what its guest sent.
pub fn traffic() -> HashMap<String, Traffic> {
    // Of the calling thread: /sys would be that of whoever mounted it.
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    parse(&text)
}

fn parse(text: &str) -> HashMap<String, Traffic> {
    let line = |line: &str| {
        let (name, counters) = line.rsplit_once(':')?;
        let mut counters = counters.split_ascii_whitespace();
        let traffic = Traffic {
            received: counters.next()?.parse().ok()?,
            // Eight columns received, then those that were sent.
            sent: counters.nth(7)?.parse().ok()?,
        };
        Some((name.trim().to_owned(), traffic))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder as the kernel shows interfaces: links into a tree of devices.
    fn sys(dir: &Path) -> std::path::PathBuf {
        let sys = dir.join("class/net");
        std::fs::create_dir_all(&sys).unwrap();
        let add = |name: &str, bus: &str, kind: &str, inside: &[&str]| {
            let device = dir.join("devices").join(bus).join("net").join(name);
            std::fs::create_dir_all(&device).unwrap();
            std::fs::write(device.join("type"), format!("{kind}\n")).unwrap();
            for folder in inside {
                std::fs::create_dir_all(device.join(folder)).unwrap();
            }
            std::os::unix::fs::symlink(&device, sys.join(name)).unwrap();
        };
        add("eth0", "pci0/virtio0", "1", &[]);
        add("enp3s0", "pci0/x", "1", &[]);
        add("wlan0", "pci0/y", "1", &["wireless"]);
        add("wlp2", "pci0/z", "1", &["phy80211"]);
        add("ib0", "pci0/w", "32", &[]);
        add("lo", "virtual", "772", &[]);
        add("tap3", "virtual", "1", &[]);
        add("pileus0", "virtual", "1", &["bridge", "brif/pil0"]);
        add("docker0", "virtual", "1", &["bridge", "brif/tap3"]);
        add("br0", "virtual", "1", &["bridge", "brif/eth0", "brif/tap3"]);
        sys
    }

    #[test]
    fn bridges_and_real_cards_are_shown() {
        let dir = tempfile::tempdir().unwrap();
        let found = look(&sys(dir.path()), "pileus0");
        let shown: Vec<_> = found
            .iter()
            .map(|i| (i.name.as_str(), i.kind.as_str(), i.description.as_str()))
            .collect();
        assert_eq!(
            shown,
            [
                ("br0", "bridge", "Network bridge with eth0"),
                ("docker0", "bridge", "Network bridge"),
                ("enp3s0", "ethernet", "Ethernet device"),
                ("eth0", "ethernet", "Ethernet device"),
            ]
        );
        assert!(look(&dir.path().join("none"), "").is_empty());
    }

    #[test]
    fn counters_of_this_namespace() {
        let text = "Inter-|   Receive  | Transmit\n face |bytes packets\n\
            \u{20}   lo: 10 1 0 0 0 0 0 0 20 2 0 0 0 0 0 0\n\
            eth0:1:5 1 0 0 0 0 0 0 6 2 0 0 0 0 0 0\n\
            \u{20} bad: 1 2\n";
        let traffic = parse(text);
        assert_eq!(traffic.len(), 2);
        let lo = traffic["lo"];
        assert_eq!((lo.received, lo.sent), (10, 20));
        assert_eq!(traffic["eth0:1"].sent, 6);
        assert!(super::traffic().contains_key("lo"));
    }
}
