//! What instances use of the host, as the kernel counts it for each QEMU and its tap: a few small files
//! an instance, nothing that a guest is asked for.

use std::path::Path;

use pileus_api::InstanceUsage;
use pileus_base::process::ProcessId;
use pileus_base::{Result, files};
use pileus_networks::host::{self, Traffic};

use super::{Service, blocking, wiring};

/// The kernel's files about a process are small.
const MAX_FILE: u64 = 64 << 10;
/// In a second; the kernel's interface counts so on every processor that pileus runs on (USER_HZ).
const TICKS: u64 = 100;

/// What the kernel counts for one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Counted {
    cpu_nanoseconds: u64,
    memory: u64,
    read: u64,
    written: u64,
}

impl Service {
    /// What each running instance has used of the host since its VM started.
    pub async fn usage(&self) -> Result<Vec<InstanceUsage>> {
        let rows: Vec<_> = self.parts.registry.all().iter().map(|i| i.row()).collect();
        let look = move || {
            let traffic = host::traffic();
            let used = rows.iter().filter_map(|row| {
                let counted = count(row.process?)?;
                let tap = traffic.get(&wiring::nic(row).ifname);
                // What the tap received is what the guest sent.
                let Traffic { received, sent } = tap.copied().unwrap_or_default();
                Some(InstanceUsage {
                    name: row.name.clone(),
                    cpu_nanoseconds: counted.cpu_nanoseconds,
                    cpus: row.spec.cpus,
                    memory: counted.memory,
                    memory_total: row.spec.memory.bytes(),
                    disk_read: counted.read,
                    disk_written: counted.written,
                    net_received: sent,
                    net_sent: received,
                })
            });
            let mut used: Vec<_> = used.collect();
            used.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(used)
        };
        blocking(look).await
    }
}

/// Reads what is counted for a process; nothing if it is gone. What can't be read is 0.
fn count(process: ProcessId) -> Option<Counted> {
    let folder = format!("/proc/{}", process.pid);
    let read = |name: &str| {
        let bytes = files::read_bounded(&Path::new(&folder).join(name), MAX_FILE);
        String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
    };
    let io = read("io");
    let memory = pss(&read("smaps_rollup")).or_else(|| rss(&read("status")));
    let counted = Counted {
        cpu_nanoseconds: cpu(&read("stat")).unwrap_or_default(),
        memory: memory.unwrap_or_default(),
        // What reached the host's disks: what its page cache answered is no work for anybody.
        read: value(&io, "read_bytes:").unwrap_or_default(),
        written: value(&io, "write_bytes:").unwrap_or_default(),
    };
    // Asked last: the number may be another process's by now.
    process.is_alive().then_some(counted)
}

/// Processor time in nanoseconds, of all threads, from `stat`.
fn cpu(stat: &str) -> Option<u64> {
    // The name in parentheses may hold anything, also `)`.
    let fields = &stat[stat.rfind(')')? + 1..];
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let ticked = u128::from(user.checked_add(system)?);
    u64::try_from(ticked * 1_000_000_000 / u128::from(TICKS)).ok()
}

/// Its share of the memory: what it has with others counts for each in part.
fn pss(rollup: &str) -> Option<u64> {
    value(rollup, "Pss:")?.checked_mul(1024)
}

fn rss(status: &str) -> Option<u64> {
    value(status, "VmRSS:")?.checked_mul(1024)
}

/// The number behind a name at the beginning of a line.
fn value(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_writes() {
        let stat = "7 (a) b) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 9 9 20 0 4 0 100 1 1";
        assert_eq!(cpu(stat), Some(2_000_000_000));
        assert_eq!(cpu(""), None);
        let rollup = "55d0-7ffe ---p 00000000 00:00 0 [rollup]\nRss:    2000 kB\nPss:  1000 kB\n\
            Pss_Dirty:  1 kB\n";
        assert_eq!(pss(rollup), Some(1_024_000));
        assert_eq!(rss("Name: x\nVmRSS:\t  3 kB\n"), Some(3072));
        let io = "rchar: 1\nread_bytes: 4096\nwrite_bytes: 8192\ncancelled_write_bytes: 0\n";
        assert_eq!(value(io, "read_bytes:"), Some(4096));
        assert_eq!(value(io, "write_bytes:"), Some(8192));
        assert_eq!(value("", "x"), None);
    }

    #[test]
    fn this_very_process() {
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        // Some work, so that there is time to count.
        let began = std::time::Instant::now();
        while began.elapsed() < std::time::Duration::from_millis(60) {
            std::hint::spin_loop();
        }
        let counted = count(me).unwrap();
        assert!(counted.cpu_nanoseconds > 0);
        assert!(counted.memory > 1 << 20, "{counted:?}");
        let other = ProcessId {
            start_time: me.start_time + 1,
            ..me
        };
        assert_eq!(count(other), None);
    }

    #[test]
    fn ten_processes_are_looked_at_in_a_moment() {
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        // The best of a few: this machine may be busy. Idle it is two milliseconds.
        let tries = (0..5).map(|_| {
            let began = std::time::Instant::now();
            for _ in 0..10 {
                count(me).unwrap();
            }
            began.elapsed()
        });
        let took = tries.min().unwrap();
        assert!(took < std::time::Duration::from_millis(500), "{took:?}");
    }
}
