//! What tests of real guests share: marks that are lost with the memory or with the disk, and figures of
//! the machine below a guest.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pileus_testkit::{Daemon, wait_until};

/// What only this very run of a guest knows: its boot, a process with a number of its own, a file in memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marks(String);

const COUNTER: &str = "token=$(cat /proc/sys/kernel/random/uuid); i=0
while :; do i=$((i+1)); echo \"$token $i\" > /dev/shm/next; mv /dev/shm/next /dev/shm/now; sleep 0.2; done";

impl Marks {
    /// Leaves marks in a guest: a file of so many MiB in its memory among them.
    pub fn leave(daemon: &Daemon, name: &str, mib: u32) -> Self {
        let script = format!(
            "head -c {mib}M /dev/urandom > /dev/shm/data\n\
             setsid -f sh -c '{COUNTER}' > /dev/null 2>&1 < /dev/null\n\
             while ! [ -s /dev/shm/now ]; do sleep 0.1; done"
        );
        daemon.exec(name, &["sh", "-eu", "-c", &script]);
        Self::read(daemon, name)
    }

    #[track_caller]
    pub fn read(daemon: &Daemon, name: &str) -> Self {
        let look = "cat /proc/sys/kernel/random/boot_id; cut -d' ' -f1 /dev/shm/now; sha256sum < /dev/shm/data";
        Self(daemon.exec(name, &["sh", "-c", look]))
    }

    /// The guest is the same run as before, and its process goes on.
    #[track_caller]
    pub fn hold(&self, daemon: &Daemon, name: &str) {
        assert_eq!(&Self::read(daemon, name), self, "the memory of {name}");
        let count = "a=$(cat /dev/shm/now); for i in $(seq 50); do sleep 0.1; \
                     [ \"$a\" != \"$(cat /dev/shm/now)\" ] && exit 0; done; exit 1";
        let counts = daemon.run(&["exec", name, "--", "sh", "-c", count]);
        assert_eq!(
            counts.code(),
            0,
            "the process in {name} stands still: {}",
            daemon.script(name, "ls -l /dev/shm; ps -ef | grep -v ]$ | tail -n 25")
        );
    }
}

/// The instance as the API shows it.
pub fn instance(daemon: &Daemon, name: &str) -> serde_json::Value {
    daemon.get(&format!("/v1/instances/{name}"))
}

/// The folder of an instance's files, among those of others.
pub fn folder(daemon: &Daemon, name: &str) -> PathBuf {
    let id = instance(daemon, name)["id"].as_str().unwrap().to_owned();
    daemon.storage().join("data/instances").join(id)
}

/// Pid of an instance's machine.
pub fn machine(daemon: &Daemon, name: &str) -> Option<i32> {
    daemon.machine_of(instance(daemon, name)["id"].as_str().unwrap())
}

pub fn kill_machine(pid: i32) {
    // One that has ended meanwhile is as good.
    let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// Bytes that a file has on the disk.
pub fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    path.metadata().map_or(0, |meta| meta.blocks() * 512)
}

/// Waits until an instance is in one of these states, and tells which.
pub fn settles(daemon: &Daemon, name: &str, states: &[&str], seconds: u64) -> String {
    wait_until(&format!("{name} is one of {states:?}"), seconds, || {
        let state = daemon.state(name);
        states.contains(&state.as_str()).then_some(state)
    })
}

fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or(Duration::ZERO).as_secs_f64()
}

/// How many seconds the guest's clock is ahead of the host's, as exactly as a command can tell.
pub fn clock_ahead(daemon: &Daemon, name: &str) -> f64 {
    let before = now();
    let told: f64 = daemon
        .exec(name, &["date", "+%s.%N"])
        .trim()
        .parse()
        .unwrap();
    let after = now();
    match told {
        early if early < before => early - before,
        late if late > after => late - after,
        _ => 0.0,
    }
}
