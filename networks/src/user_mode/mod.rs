//! The network of an ordinary user's daemon. Without root nobody may make a bridge on the host, so the
//! daemon moves into a user and network namespace of its own and does there what root does outside
//! (`Network::start`); `pasta` carries traffic between that namespace and the host.
//!
//! ```text
//!   host's network                          │ user + network namespace
//!   keeper ── watches ── pasta ── sockets ──┼── uplink0 ── NAT ── bridge ── taps ── guests
//!     └ holds ────────────────────────────► │ holder (sleeps)     pileusd, dnsmasq, QEMU
//! ```
//!
//! The namespace must outlive the daemon, or a restarted daemon would not find its bridge and its
//! guests' network. So a *holder* process keeps it, and a *keeper* outside starts pasta again when it
//! dies (a process inside can't: nobody gets back out of a namespace). Both are made by `keeper.rs`,
//! and recorded in `holder.json`.
//!
//! Once inside, the user is uid 0; files still belong to the user. A peer on a Unix socket that is
//! the same user is therefore seen as uid 0, and other users of the host as the overflow uid (65534).

mod keeper;
mod uids;

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use pileus_base::process::ProcessId;
use pileus_base::{Code, Error, Result, ResultExt, files};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::subnet::Subnet;
use crate::{tap, tools};

/// Where guests' name server asks when the host's resolver listens on loopback only, which is out of
/// reach from the namespace: pasta turns packets to this address to the host's resolver.
const DNS_FORWARD: Ipv4Addr = Ipv4Addr::new(169, 254, 53, 53);
/// How long another daemon may hold the lock, and how long the set-up may take.
const BOUND: Duration = Duration::from_secs(20);
/// The card in the namespace whose other end is pasta.
pub(crate) const UPLINK: &str = "uplink0";
const MAX_RECORD: u64 = 64 << 10;

/// What the namespace consists of; `holder.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    holder: ProcessId,
    keeper: ProcessId,
    pasta: Option<ProcessId>,
    full_uid_map: bool,
    /// Why there is no way to the outside, while there is none.
    problem: Option<String>,
}

impl Record {
    fn path(dir: &Path) -> PathBuf {
        dir.join("holder.json")
    }

    /// The record, if there is one that can be read.
    fn read(dir: &Path) -> Option<Self> {
        let bytes = files::read_bounded(&Self::path(dir), MAX_RECORD).ok()?;
        serde_json::from_slice(&bytes).ok()
    }

    fn write(&self, dir: &Path) -> Result<()> {
        let bytes = serde_json::to_vec(self).map_err(|err| Error::internal(err.to_string()))?;
        files::write_atomic(&Self::path(dir), &bytes, 0o600)
    }
}

/// Tells that this process is inside the user's namespace.
#[derive(Debug, Clone)]
pub struct Entered {
    /// Whether the namespace has 65536 ids (from /etc/subuid), as image building and processes that
    /// give up their rights need, or only the user's own.
    pub full_uid_map: bool,
    /// An earlier daemon's namespace was found and entered again.
    pub adopted: bool,
    /// For `NetworkConfig::upstream`.
    pub upstream: Vec<IpAddr>,
    /// For `NetworkConfig::avoid`: what the host's routes cover, which is not visible from inside.
    pub host_networks: Vec<Subnet>,
    dir: PathBuf,
}

impl Entered {
    /// What is wrong with the way to the outside at the moment.
    pub fn health(&self) -> Vec<Error> {
        let advice = format!(
            "See {}; restarting pileusd repairs it.",
            keeper::log_path(&self.dir).display()
        );
        let problem = match Record::read(&self.dir) {
            None => Some("the record of the user-mode network is gone".to_owned()),
            Some(record) if !record.keeper.is_alive() => {
                Some("the process that watches over pasta is gone".to_owned())
            }
            Some(record) => match record.problem {
                None if record.pasta.is_some_and(ProcessId::is_alive) => None,
                None => Some("pasta is being started".to_owned()),
                problem => problem,
            },
        };
        let error = |problem| {
            Error::new(
                Code::NetworkFailed,
                format!("Guests don't reach the outside: {problem}"),
            )
            .advise(advice)
        };
        problem.map(error).into_iter().collect()
    }

    /// Lets the namespace go: ends holder, pasta and keeper. Only for a daemon that is about to end
    /// while no instance runs; the daemon itself keeps the namespace until it has ended.
    pub fn release(&self) -> Result<()> {
        let Some(record) = Record::read(&self.dir) else {
            return Ok(());
        };
        // The keeper sees the holder's end, ends pasta and goes.
        end(record.holder);
        let begin = Instant::now();
        while record.keeper.is_alive() && begin.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
        end(record.keeper);
        // Read again: a keeper that was killed leaves its last pasta behind.
        if let Some(pasta) = Record::read(&self.dir).unwrap_or(record).pasta {
            end(pasta);
        }
        files::remove_file(&Record::path(&self.dir))
    }
}

/// Moves this process into the user's namespace, making it first if there is none.
///
/// `dir` is `Layout::network_run`. Must be called before any thread exists, because the kernel lets
/// only a single-threaded process change its user namespace.
pub fn enter(dir: &Path) -> Result<Entered> {
    require_single_thread()?;
    let pasta = tools::find("pasta", "passt")?;
    tap::open_device()?;
    let resolv = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let upstream = upstream(&resolv);
    let host_networks =
        networks(&std::fs::read_to_string("/proc/self/net/route").unwrap_or_default());

    files::create_folder(dir, 0o700)?;
    let _lock = lock(dir)?;
    let old = Record::read(dir).filter(|record| record.holder.is_alive());
    let adopted = old.is_some();
    let record = match old {
        Some(record) if record.keeper.is_alive() => record,
        old => {
            let forward = upstream
                .contains(&DNS_FORWARD.into())
                .then_some(DNS_FORWARD);
            keeper::start(dir, &pasta, forward, old, BOUND)?;
            Record::read(dir).ok_or_else(|| {
                Error::internal("The keeper of the user's namespace left no record")
            })?
        }
    };
    join(record.holder)?;
    Ok(Entered {
        full_uid_map: record.full_uid_map,
        adopted,
        upstream,
        host_networks,
        dir: dir.to_owned(),
    })
}

fn require_single_thread() -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status").io("Reading /proc/self/status")?;
    let threads = status
        .lines()
        .find_map(|line| line.strip_prefix("Threads:"));
    if threads.map(str::trim) == Some("1") {
        return Ok(());
    }
    Err(Error::internal(
        "The user's namespace can only be entered before any thread is started",
    ))
}

/// Keeps two daemons of one user from making two namespaces.
fn lock(dir: &Path) -> Result<File> {
    let path = dir.join("holder.lock");
    let file = File::create(&path).io(format_args!("Opening {}", path.display()))?;
    let begin = Instant::now();
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(_) if begin.elapsed() < BOUND => std::thread::sleep(Duration::from_millis(50)),
            Err(err) => {
                return Err(Error::io(format!("Locking {}", path.display()), err.into()));
            }
        }
    }
}

/// Enters the holder's namespaces.
fn join(holder: ProcessId) -> Result<()> {
    let open = |kind: &str| {
        let path = format!("/proc/{}/ns/{kind}", holder.pid);
        File::open(&path).io(format_args!("Opening {path}"))
    };
    // Both before the first step: /proc looks different afterwards.
    let (user, net) = (open("user")?, open("net")?);
    let refused = |err: nix::Error| {
        Error::new(
            Code::PermissionDenied,
            format!("The user's namespace can't be entered: {err}"),
        )
        .with_source(err)
    };
    setns(user.as_fd(), CloneFlags::CLONE_NEWUSER).map_err(refused)?;
    setns(net.as_fd(), CloneFlags::CLONE_NEWNET).map_err(refused)?;
    // Entering made this process undumpable, which would give its files in /proc to the host's root.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)
        .io("Making the process dumpable again")
}

/// Ends a process of ours; one that is gone is fine.
fn end(process: ProcessId) {
    if process.is_alive()
        && let Some(pid) = Pid::from_raw(process.pid)
    {
        let _ = kill_process(pid, Signal::TERM);
    }
}

/// Which name servers the namespace's DNS is to ask; empty means "those of resolv.conf as they are".
fn upstream(resolv: &str) -> Vec<IpAddr> {
    let servers: Vec<IpAddr> = resolv
        .lines()
        .filter_map(|line| line.trim().strip_prefix("nameserver"))
        .filter_map(|rest| rest.trim().parse().ok())
        .collect();
    let all_loopback = servers.iter().all(IpAddr::is_loopback);
    if all_loopback {
        vec![DNS_FORWARD.into()]
    } else {
        Vec::new()
    }
}

/// The destinations in a `/proc/net/route` (addresses are hexadecimal in the host's byte order).
fn networks(table: &str) -> Vec<Subnet> {
    let parse = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let destination = u32::from_str_radix(words.nth(1)?, 16).ok()?;
        let mask = u32::from_str_radix(words.nth(5)?, 16).ok()?;
        let prefix = u8::try_from(mask.count_ones()).ok()?;
        let address = Ipv4Addr::from(destination.to_ne_bytes());
        (prefix > 0).then(|| Subnet::containing(address, prefix))
    };
    table.lines().skip(1).filter_map(parse).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resolver_on_loopback_is_reached_through_pasta() {
        let forward = vec![IpAddr::from(DNS_FORWARD)];
        assert_eq!(upstream("nameserver 127.0.0.53\noptions edns0\n"), forward);
        assert_eq!(upstream(""), forward);
        assert!(upstream("nameserver 127.0.0.1\nnameserver 192.0.2.1\n").is_empty());
        assert!(upstream("# nameserver 127.0.0.1\nnameserver fd00::1\n").is_empty());
    }

    #[test]
    fn the_hosts_routes() {
        let table = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n\
                     eth0\t00000000\t017100CB\t0003\t0\t0\t0\t00000000\t0\t0\t0\n\
                     eth0\t007100CB\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n\
                     bad line\n";
        assert_eq!(networks(table), vec!["203.0.113.0/24".parse().unwrap()]);
    }

    #[test]
    fn threads_keep_a_process_out() {
        // The test harness has threads of its own.
        std::thread::scope(|scope| {
            let err = scope
                .spawn(require_single_thread)
                .join()
                .unwrap()
                .unwrap_err();
            assert_eq!(err.code, Code::Internal);
        });
    }
}
