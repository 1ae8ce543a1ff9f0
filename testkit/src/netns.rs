//! A network namespace of the test's own, so that bridges, DHCP servers and firewalls of tests meet
//! neither each other nor the machine's network.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

static NEXT: AtomicU32 = AtomicU32::new(0);

#[derive(Debug)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Where servers of a test listen that guests reach as if they were somewhere outside.
    pub const OUTSIDE: &str = "203.0.113.1";

    /// Makes a namespace with loopback up, and nothing else.
    ///
    /// # Panics
    /// Without root, or when `ip` fails.
    pub fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("pileus-test-{}-{number}", std::process::id());
        ip(&["netns", "add", &name]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        Self { name }
    }

    /// Gives the namespace a network card with a default route into nothing, as programs expect that
    /// look for the way out. [`Self::OUTSIDE`] is an address where a server can stand for the world.
    pub fn with_uplink(self) -> Self {
        let ns = self.name.as_str();
        ip(&[
            "-n", ns, "link", "add", "uplink", "type", "veth", "peer", "name", "far",
        ]);
        ip(&[
            "-n",
            ns,
            "address",
            "add",
            "203.0.113.2/24",
            "dev",
            "uplink",
        ]);
        let outside = format!("{}/32", Self::OUTSIDE);
        ip(&["-n", ns, "address", "add", &outside, "dev", "far"]);
        ip(&["-n", ns, "link", "set", "far", "up"]);
        ip(&["-n", ns, "link", "set", "uplink", "up"]);
        ip(&["-n", ns, "route", "add", "default", "via", "203.0.113.9"]);
        self
    }

    /// Processes that are inside.
    pub fn pids(&self) -> Vec<String> {
        let output = Command::new("ip")
            .args(["netns", "pids", &self.name])
            .output();
        let text = output.map(|o| o.stdout).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// A command that will run inside.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Processes that are still inside keep it alive, nameless, until they end.
        let _ = Command::new("ip")
            .args(["netns", "delete", &self.name])
            .status();
    }
}

fn ip(args: &[&str]) {
    let status = Command::new("ip").args(args).status();
    let ok = status.as_ref().is_ok_and(std::process::ExitStatus::success);
    assert!(ok, "ip {}: {status:?}", args.join(" "));
}
