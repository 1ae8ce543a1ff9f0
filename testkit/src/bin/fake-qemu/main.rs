//! A stand-in for `qemu-system-x86_64`, so that tests of the daemon start machines in milliseconds.
//! It takes the arguments that `instances/src/qemu/argv.rs` makes, serves QMP (`control.rs`), plays
//! the guest's agent (`agent.rs`), and writes a console log. Nothing runs inside; there is no SSH.
//!
//! Its behaviour is set by words in a file `fake-qemu.NAME` (one machine) or `fake-qemu` (all), beside
//! the console log or up to three folders above it:
//!
//! * `fails-at-start`: says so on stderr and ends with code 1, before QMP answers;
//! * `never-boots`: the agent never says a word;
//! * `panics`, `powers-off`, `exits`, `crashes`: does that instead of coming up;
//! * `cloud-init-error`, `cloud-init-degraded`, `cloud-init-hangs`;
//! * `ignores-powerdown`: the power button does nothing;
//! * `quiesce-fails`, `save-fails`, `restore-fails`, `identify-fails`, `identify-hangs`: no template, or no
//!   clone of one, comes of it;
//! * `quiesce-ms=N`, `save-ms=N`, `restore-ms=N`, `identify-ms=N`: how long these take (20 each);
//! * `boot-ms=N`, `cloud-init-ms=N`: how long these take (20 each);
//! * `address=IP/PREFIX`: what the agent reports for `eth0`.

mod agent;
mod control;

use std::fs::File;
use std::io::Write;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::{Value, json};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--version"] => println!("QEMU emulator version 10.0.2 (pileus fake-qemu)"),
        ["-machine", "help"] => {
            println!("Supported machines are:");
            println!("q35                  Fake PC (alias of pc-q35-10.0)");
            println!("pc-q35-10.0          Fake PC");
        }
        _ => run(&args),
    }
}

/// What the threads share.
pub struct Machine {
    pub name: String,
    pub words: Vec<String>,
    log: Option<Mutex<File>>,
    /// The one client of the control socket.
    client: Mutex<Option<UnixStream>>,
    pub running: AtomicBool,
    /// Whether the guest is up, and which boot this is.
    pub up: AtomicBool,
    pub boots: AtomicU64,
    /// Started with `-incoming`: it goes on from a saved moment instead of booting.
    pub was_restored: bool,
    /// Until it is told who it is.
    pub is_template: AtomicBool,
}

pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Machine {
    pub fn has(&self, word: &str) -> bool {
        self.words.iter().any(|w| w == word)
    }

    pub fn value(&self, name: &str) -> Option<&str> {
        let find = |w: &'_ String| w.strip_prefix(name)?.strip_prefix('=').map(str::len);
        let word = self.words.iter().find(|w| find(w).is_some())?;
        word.split_once('=').map(|(_, value)| value)
    }

    pub fn pause_for(&self, name: &str) {
        let millis = self.value(name).and_then(|v| v.parse().ok()).unwrap_or(20);
        std::thread::sleep(Duration::from_millis(millis));
    }

    pub fn say(&self, line: &str) {
        if let Some(log) = &self.log {
            let _ = writeln!(locked(log), "{line}\r");
        }
    }

    /// Sends a line to whoever is connected to the control socket.
    pub fn tell(&self, message: &Value) {
        if let Some(client) = locked(&self.client).as_mut() {
            let _ = client.write_all(format!("{message}\r\n").as_bytes());
        }
    }

    pub fn event(&self, name: &str, data: &Value) {
        let timestamp = json!({"seconds": 1, "microseconds": 0});
        self.tell(&json!({"event": name, "data": data, "timestamp": timestamp}));
    }

    pub fn connected(&self, client: Option<UnixStream>) {
        *locked(&self.client) = client;
    }

    pub fn shut_down(&self, guest: bool, reason: &str) -> ! {
        self.say("reboot: Power down");
        self.event("SHUTDOWN", &json!({"guest": guest, "reason": reason}));
        std::process::exit(0)
    }

    pub fn reset(self: &Arc<Self>, guest: bool, reason: &str) {
        self.event("RESET", &json!({"guest": guest, "reason": reason}));
        self.up.store(false, Ordering::SeqCst);
        let machine = self.clone();
        std::thread::spawn(move || machine.boot());
    }

    /// A restored guest goes on at once.
    pub fn wakes_up(&self) {
        if self.was_restored && self.boots.load(Ordering::SeqCst) == 0 {
            self.boots.fetch_add(1, Ordering::SeqCst);
            self.up.store(true, Ordering::SeqCst);
        }
    }

    fn boot(&self) {
        self.boots.fetch_add(1, Ordering::SeqCst);
        self.say("Linux version 0.0-fake");
        self.pause_for("boot-ms");
        if self.has("panics") {
            self.say("Kernel panic - not syncing: fake");
            self.event("GUEST_PANICKED", &json!({"action": "poweroff"}));
            self.shut_down(true, "guest-panic");
        }
        if self.has("powers-off") {
            self.shut_down(true, "guest-shutdown");
        }
        if self.has("exits") {
            eprintln!("fake-qemu: told to end");
            std::process::exit(1);
        }
        if self.has("crashes") {
            std::process::abort();
        }
        if !self.has("never-boots") {
            self.say(&format!("{} login: ", self.name));
            self.up.store(true, Ordering::SeqCst);
        }
    }
}

fn run(args: &[String]) {
    let name = option(args, "-name")
        .find_map(|v| part(v, "guest"))
        .unwrap_or_default();
    let listener = |id: &str| {
        let chardev = option(args, "-chardev").find(|v| part(v, "id") == Some(id))?;
        let fd: RawFd = part(chardev, "fd")?.parse().ok()?;
        // SAFETY: the number was handed over for just this, and is used once.
        Some(unsafe { UnixListener::from_raw_fd(fd) })
    };
    let log = log_fd(args);
    let folder = log.and_then(|fd| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok());
    let restored = args.iter().any(|arg| arg == "-incoming");
    let machine = Arc::new(Machine {
        name: name.to_owned(),
        words: words(folder.as_deref(), name),
        // SAFETY: the number was handed over for just this, and is used once.
        log: log.map(|fd| Mutex::new(unsafe { File::from_raw_fd(fd) })),
        client: Mutex::default(),
        running: AtomicBool::new(!restored),
        up: AtomicBool::new(false),
        boots: AtomicU64::new(0),
        was_restored: restored,
        is_template: AtomicBool::new(restored),
    });
    if machine.has("fails-at-start") {
        eprintln!("fake-qemu: told to fail at the start");
        std::process::exit(1);
    }
    let Some(qmp) = listener("qmp") else {
        eprintln!("fake-qemu: no control socket was handed over");
        std::process::exit(1);
    };
    if let Some(port) = listener("agent") {
        let machine = machine.clone();
        std::thread::spawn(move || agent::serve(&machine, &port));
    }
    for id in ["ssh", "console"] {
        if let Some(port) = listener(id) {
            std::thread::spawn(move || swallow(&port));
        }
    }
    if !restored {
        let booting = machine.clone();
        std::thread::spawn(move || booting.boot());
    }
    control::serve(&machine, &qmp);
}

/// Takes connections and whatever comes over them.
fn swallow(port: &UnixListener) {
    while let Ok((mut stream, _)) = port.accept() {
        let _ = std::io::copy(&mut stream, &mut std::io::sink());
    }
}

/// The values of every option of that name.
fn option<'a>(args: &'a [String], name: &'a str) -> impl Iterator<Item = &'a str> {
    let pairs = args.windows(2).filter(move |pair| pair[0] == name);
    pairs.map(|pair| pair[1].as_str())
}

/// The value of one `key=value` in a comma-separated option.
fn part<'a>(option: &'a str, key: &str) -> Option<&'a str> {
    option
        .split(',')
        .filter_map(|part| part.split_once('='))
        .find(|(k, _)| *k == key)
        .map(|(_, value)| value)
}

fn log_fd(args: &[String]) -> Option<RawFd> {
    let file = option(args, "-chardev").find_map(|v| part(v, "logfile"))?;
    let set = file.strip_prefix("/dev/fdset/")?;
    let added = option(args, "-add-fd").find(|v| part(v, "set") == Some(set))?;
    part(added, "fd")?.parse().ok()
}

fn words(log: Option<&Path>, name: &str) -> Vec<String> {
    let Some(log) = log else { return Vec::new() };
    let files = log.ancestors().skip(1).take(4).flat_map(|folder| {
        let own: PathBuf = folder.join(format!("fake-qemu.{name}"));
        [own, folder.join("fake-qemu")]
    });
    let text = files
        .filter_map(|file| std::fs::read_to_string(file).ok())
        .next();
    let text = text.unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}
