//! DHCP and DNS of the private network, by a dnsmasq of our own. It reads nothing but the files
//! that are written here (never the system's dnsmasq configuration), serves only guests that have an
//! entry, and gives each its fixed address for ever.
//!
//! ```text
//! STATE/dnsmasq.conf    what dnsmasq runs with; its path on the command line says that it is ours
//! STATE/dnsmasq.pid     written by dnsmasq
//! STATE/dnsmasq.log
//! STATE/leases          dnsmasq's lease file
//! STATE/hosts/IFNAME    MAC, address, name: one file a guest (dhcp-hostsdir)
//! STATE/names/IFNAME    address, names: so that DNS knows a guest before it has asked for its lease
//! ```
//!
//! Next step: `process.rs` runs and supervises dnsmasq, `release.rs` makes it forget a lease.

pub(crate) mod process;
mod release;

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group, Uid, User};
use pileus_base::{Result, ResultExt, files};

use crate::subnet::Subnet;
use crate::{Mac, Nic};

/// A lease file is a line of some hundred bytes per guest; more than this is not one.
const MAX_LEASES: u64 = 8 << 20;

/// Everything that dnsmasq's configuration depends on.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) dir: PathBuf,
    pub(crate) bridge: String,
    pub(crate) subnet: Subnet,
    pub(crate) domain: String,
    /// MTU that guests are told, in bytes; `None` for the usual 1500.
    pub(crate) mtu: Option<u32>,
    /// Name servers to ask; empty: those of the host's resolv.conf.
    pub(crate) upstream: Vec<IpAddr>,
}

impl Settings {
    pub(crate) fn conf_path(&self) -> PathBuf {
        self.dir.join("dnsmasq.conf")
    }

    pub(crate) fn pid_path(&self) -> PathBuf {
        self.dir.join("dnsmasq.pid")
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.dir.join("dnsmasq.log")
    }

    fn hosts(&self) -> PathBuf {
        self.dir.join("hosts")
    }

    fn names(&self) -> PathBuf {
        self.dir.join("names")
    }

    /// Makes the folders that dnsmasq needs to be there.
    pub(crate) fn create_folders(&self) -> Result<()> {
        for folder in [self.hosts(), self.names()] {
            files::create_folder(&folder, 0o755)?;
            // The umask must not keep dnsmasq, which is not root any more, from reading.
            files::set_mode(&folder, 0o755)?;
        }
        Ok(())
    }

    /// The configuration file. `user` and `group` are what dnsmasq becomes; empty: it stays what it is.
    pub(crate) fn conf(&self, user: &str, group: &str) -> String {
        let dir = self.dir.display();
        let Self {
            bridge,
            subnet,
            domain,
            ..
        } = self;
        let (network, netmask, gateway) = (subnet.network(), subnet.netmask(), subnet.gateway());
        let mut conf = format!(
            "\
# Written by pileusd at each start; changes are lost.
interface={bridge}
except-interface=lo
bind-interfaces
user={user}
group={group}
pid-file={dir}/dnsmasq.pid
log-facility={dir}/dnsmasq.log
quiet-dhcp
no-hosts
hostsdir={dir}/names
domain={domain}
local=/{domain}/
expand-hosts
domain-needed
bogus-priv
cache-size=1000
dhcp-authoritative
dhcp-leasefile={dir}/leases
dhcp-hostsdir={dir}/hosts
dhcp-range={network},static,{netmask},infinite
dhcp-ignore-clid
dhcp-ignore-names
no-ping
dhcp-lease-max=65536
dhcp-option=option:router,{gateway}
dhcp-option=option:dns-server,{gateway}
dhcp-option=option:domain-search,{domain}
"
        );
        // Writing to a String can't fail.
        if let Some(mtu) = self.mtu {
            let _ = writeln!(conf, "dhcp-option-force=option:mtu,{mtu}");
        }
        if !self.upstream.is_empty() {
            conf.push_str("no-resolv\n");
        }
        for server in &self.upstream {
            let _ = writeln!(conf, "server={server}");
        }
        conf
    }

    /// Writes the entry of a guest, replacing the one that it had. dnsmasq reads new files by itself,
    /// but must be told (SIGHUP) of changed ones.
    pub(crate) fn write_entry(&self, nic: &Nic) -> Result<()> {
        let Nic {
            ifname,
            mac,
            address,
            hostname,
        } = nic;
        let name = hostname.as_str().to_ascii_lowercase();
        let host = format!("{mac},{address},{name},infinite\n");
        let names = format!("{address} {name}.{} {name}\n", self.domain);
        put(&self.hosts().join(ifname), &host)?;
        put(&self.names().join(ifname), &names)
    }

    pub(crate) fn remove_entry(&self, ifname: &str) -> Result<()> {
        files::remove_file(&self.hosts().join(ifname))?;
        files::remove_file(&self.names().join(ifname))
    }

    /// Interfaces that have an entry.
    pub(crate) fn entries(&self) -> Result<HashSet<OsString>> {
        let mut found = HashSet::new();
        for folder in [self.hosts(), self.names()] {
            let what = || format!("Reading {}", folder.display());
            for entry in std::fs::read_dir(&folder).io(what())? {
                found.insert(entry.io(what())?.file_name());
            }
        }
        Ok(found)
    }

    /// Makes dnsmasq give up leases that stand in the way of this guest's: its address held by another
    /// MAC. A lease is for ever, so without this an address could never be used by a second guest.
    pub(crate) fn free_lease(&self, nic: &Nic) {
        for (mac, address) in self.leases() {
            if address == nic.address && mac != nic.mac {
                release::send(&self.bridge, self.subnet.gateway(), mac, address);
            }
        }
    }

    /// Makes dnsmasq give up the leases of a MAC.
    pub(crate) fn forget_lease(&self, mac: Mac) {
        for (lease_mac, address) in self.leases() {
            if lease_mac == mac {
                release::send(&self.bridge, self.subnet.gateway(), mac, address);
            }
        }
    }

    /// MAC and address of each lease; what can't be read is left out.
    fn leases(&self) -> Vec<(Mac, Ipv4Addr)> {
        let Ok(bytes) = files::read_bounded(&self.dir.join("leases"), MAX_LEASES) else {
            return Vec::new();
        };
        String::from_utf8_lossy(&bytes)
            .lines()
            .filter_map(parse_lease)
            .collect()
    }
}

/// A line is `EXPIRY MAC ADDRESS NAME CLIENT-ID`.
fn parse_lease(line: &str) -> Option<(Mac, Ipv4Addr)> {
    let mut words = line.split_ascii_whitespace().skip(1);
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

/// In place of a rename: dnsmasq watches the folder and would read a temporary file as well.
/// A torn file does no harm, because entries are written again at each start and attach.
fn put(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).io(format_args!("Writing {}", path.display()))?;
    files::set_mode(path, 0o644)
}

/// The user and group that dnsmasq can become: one that has no rights, exists in this user namespace
/// and can reach the folder. Empty names when there is none: dnsmasq then keeps the daemon's own
/// rights (for an ordinary user's daemon these are that user's).
pub(crate) fn unprivileged(dir: &Path) -> (String, String) {
    let reachable = dir
        .ancestors()
        .all(|folder| folder.metadata().is_ok_and(|m| m.mode() & 0o001 != 0));
    let uids = std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    let gids = std::fs::read_to_string("/proc/self/gid_map").unwrap_or_default();
    let usable = |name: &&str| -> Option<(String, String)> {
        let user = User::from_name(name).ok().flatten()?;
        let group = Group::from_gid(user.gid).ok().flatten()?;
        let mapped = maps(&uids, user.uid.as_raw()) && maps(&gids, user.gid.as_raw());
        let plain = user.uid != Uid::from_raw(0) && user.gid != Gid::from_raw(0);
        (mapped && plain).then_some((user.name, group.name))
    };
    let found = reachable
        .then(|| ["dnsmasq", "nobody"].iter().find_map(usable))
        .flatten();
    if found.is_none() {
        tracing::info!(dir = %dir.display(), reachable, "dnsmasq keeps the daemon's rights: no other user can run it here");
    }
    found.unwrap_or_default()
}

/// Whether a `/proc/PID/uid_map` has this id inside.
fn maps(map: &str, id: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_ascii_whitespace().map(str::parse::<u64>);
        let (Some(Ok(first)), Some(Ok(_)), Some(Ok(count))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return false;
        };
        (first..first.saturating_add(count)).contains(&id.into())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(dir: &Path) -> Settings {
        Settings {
            dir: dir.into(),
            bridge: "pileus0".into(),
            subnet: "10.87.21.0/24".parse().unwrap(),
            domain: "pileus".into(),
            mtu: None,
            upstream: vec![],
        }
    }

    #[test]
    fn the_whole_configuration() {
        let mut settings = settings(Path::new("/run/pileus/net"));
        settings.mtu = Some(1400);
        settings.upstream = vec!["192.0.2.53".parse().unwrap()];
        assert_eq!(
            settings.conf("dnsmasq", "nogroup"),
            "\
# Written by pileusd at each start; changes are lost.
interface=pileus0
except-interface=lo
bind-interfaces
user=dnsmasq
group=nogroup
pid-file=/run/pileus/net/dnsmasq.pid
log-facility=/run/pileus/net/dnsmasq.log
quiet-dhcp
no-hosts
hostsdir=/run/pileus/net/names
domain=pileus
local=/pileus/
expand-hosts
domain-needed
bogus-priv
cache-size=1000
dhcp-authoritative
dhcp-leasefile=/run/pileus/net/leases
dhcp-hostsdir=/run/pileus/net/hosts
dhcp-range=10.87.21.0,static,255.255.255.0,infinite
dhcp-ignore-clid
dhcp-ignore-names
no-ping
dhcp-lease-max=65536
dhcp-option=option:router,10.87.21.1
dhcp-option=option:dns-server,10.87.21.1
dhcp-option=option:domain-search,pileus
dhcp-option-force=option:mtu,1400
no-resolv
server=192.0.2.53
"
        );
        settings.mtu = None;
        settings.upstream.clear();
        let plain = settings.conf("", "");
        assert!(
            !plain.contains("mtu") && !plain.contains("server=") && !plain.contains("no-resolv")
        );
    }

    #[test]
    fn an_entry_comes_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let settings = settings(dir.path());
        settings.create_folders().unwrap();
        let nic = Nic {
            ifname: "pl-1".into(),
            mac: "52:54:00:AA:bb:01".parse().unwrap(),
            address: "10.87.21.5".parse().unwrap(),
            hostname: "Proud-Heron".parse().unwrap(),
        };
        settings.write_entry(&nic).unwrap();
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
        assert_eq!(
            read(settings.hosts().join("pl-1")),
            "52:54:00:aa:bb:01,10.87.21.5,proud-heron,infinite\n"
        );
        assert_eq!(
            read(settings.names().join("pl-1")),
            "10.87.21.5 proud-heron.pileus proud-heron\n"
        );
        assert_eq!(settings.entries().unwrap().len(), 1);
        settings.remove_entry("pl-1").unwrap();
        settings.remove_entry("pl-1").unwrap();
        assert!(settings.entries().unwrap().is_empty());
    }

    #[test]
    fn lease_lines() {
        let (mac, address) =
            parse_lease("0 52:54:00:00:00:01 10.87.21.5 proud-heron 01:52:54:00:00:00:01").unwrap();
        assert_eq!(
            (mac.to_string().as_str(), address.to_string().as_str()),
            ("52:54:00:00:00:01", "10.87.21.5")
        );
        for bad in [
            "",
            "duid 00:01",
            "0 52:54:00:00:00 10.0.0.1",
            "0 52:54:00:00:00:01 x",
        ] {
            assert!(parse_lease(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn which_ids_a_namespace_has() {
        let map = "         0       1000          1\n         1     100000      65535\n";
        assert!(maps(map, 0) && maps(map, 65535) && !maps(map, 65536));
        assert!(!maps("0 1000 1", 1) && !maps("", 0) && !maps("a b c", 0));
    }
}
