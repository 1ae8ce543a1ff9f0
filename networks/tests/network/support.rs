//! A small world for the network tests: namespaces for the host, for the outside and for guests,
//! joined by veth pairs, all made here and gone with the test (each is held by a child process that
//! dies with the test). Nothing touches the network of the machine.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The outside's addresses: the host's router (and DNS server), and a server further away.
pub const ROUTER: &str = "203.0.113.1";
pub const SERVER: &str = "198.51.100.7";
pub const HOST: &str = "203.0.113.2";
/// An ordinary user with subordinate ids, made by the test that needs it.
/// What the server's page says.
pub const PAGE: &str = "hello from outside\n";
pub const USER: &str = "pileus-test";

/// Says why a test can't run here. Returns whether it can.
pub fn can_run() -> bool {
    if !rustix::process::getuid().is_root() {
        eprintln!("SKIPPED: network namespaces and mounts need root");
        return false;
    }
    for tool in [
        "/usr/bin/nsenter",
        "/usr/bin/curl",
        "/usr/bin/busybox",
        "/usr/sbin/dnsmasq",
        "/usr/sbin/nft",
    ] {
        let merged = tool.replace("/usr/bin", "/bin");
        assert!(
            Path::new(tool).exists() || Path::new(&merged).exists(),
            "{tool} is missing: install util-linux, iproute2, curl, busybox, dnsmasq-base and nftables"
        );
    }
    true
}

/// A network namespace, held by a sleeping child.
pub struct Namespace(Child);

impl Namespace {
    pub fn new() -> Self {
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net", "sleep", "3600"])
            .spawn()
            .unwrap();
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        let path = format!("/proc/{}/ns/net", child.id());
        let is_sleep = || {
            std::fs::read_to_string(format!("/proc/{}/comm", child.id()))
                .is_ok_and(|c| c == "sleep\n")
        };
        until("a namespace", || {
            is_sleep() && std::fs::read_link(&path).is_ok_and(|ns| ns != own)
        });
        let namespace = Self(child);
        namespace.sh("ip link set lo up");
        namespace
    }

    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.pid().to_string(), "-n", program]);
        command
    }

    /// Runs a shell line inside. Returns whether it succeeded, and all that it printed.
    pub fn try_sh(&self, line: &str) -> (bool, String) {
        let output = self
            .command("timeout")
            .args(["20", "sh", "-c", line])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&text).into_owned(),
        )
    }

    pub fn sh(&self, line: &str) -> String {
        let (success, text) = self.try_sh(line);
        assert!(success, "{line}\n{text}");
        text
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for something that must come soon.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(
            begin.elapsed() < Duration::from_secs(15),
            "{what} did not come"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A server of the test, which ends with it.
pub struct Killed(Child);

impl Killed {
    pub fn spawn(command: &mut Command) -> Self {
        // No output of the test's own: who reads that would wait for the server's end.
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Host and outside. Field order is the order of the clean-up.
pub struct World {
    pub dir: tempfile::TempDir,
    _servers: Vec<Killed>,
    pub host: Namespace,
    pub outside: Namespace,
}

impl World {
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("pileus-net-")
            .tempdir_in("/tmp")
            .unwrap();
        let at = |name: &str| dir.path().join(name);
        chmod(dir.path(), "755");
        let (host, outside) = (Namespace::new(), Namespace::new());
        host.sh(&format!(
            "ip link add wan0 mtu 1400 type veth peer name lan0 mtu 1400 netns {}
             ip addr add {HOST}/24 dev wan0; ip link set wan0 up; ip route add default via {ROUTER}",
            outside.pid()
        ));
        outside.sh(&format!(
            "ip addr add {ROUTER}/24 dev lan0; ip link set lan0 up; ip addr add {SERVER}/32 dev lo"
        ));
        std::fs::create_dir(at("www")).unwrap();
        std::fs::write(at("www/hello"), PAGE).unwrap();
        std::fs::write(at("resolv.conf"), format!("nameserver {ROUTER}\n")).unwrap();
        std::fs::write(at("udhcpc.sh"), UDHCPC).unwrap();
        chmod(&at("udhcpc.sh"), "755");
        let mut web = outside.command("busybox");
        web.args(["httpd", "-f", "-p", &format!("{SERVER}:80"), "-h"])
            .arg(at("www"));
        let dns = dns_server(&outside, ROUTER);
        let servers = vec![Killed::spawn(&mut web), dns];
        outside.sh("sleep 0.2");
        Self {
            dir,
            _servers: servers,
            host,
            outside,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The daemon's state folder; below the user's folder if there is one.
    pub fn state(&self) -> PathBuf {
        let user = self.path("user");
        if user.exists() {
            user.join("net")
        } else {
            self.path("net")
        }
    }

    /// Adds a resolver on the host's loopback, as systemd-resolved is one, and makes it the host's.
    pub fn use_loopback_resolver(&mut self) {
        self._servers.push(dns_server(&self.host, "127.0.0.53"));
        std::fs::write(self.path("resolv.conf"), "nameserver 127.0.0.53\n").unwrap();
    }

    /// Starts a daemon on the host, with the world's resolv.conf; `before` is a shell line run before
    /// it in the same mount namespace. It is given no chance to clean up when it is dropped.
    pub fn daemon_with(
        &self,
        bridge: &str,
        subnet: &str,
        before: &str,
        wrapper: &str,
        mode: &str,
    ) -> Daemon {
        let line = format!(
            "mount --bind {resolv} /etc/resolv.conf && {before} exec {wrapper} {program} {state} {bridge} {subnet} {mode}",
            resolv = self.path("resolv.conf").display(),
            program = env!("CARGO_BIN_EXE_network-daemon"),
            state = self.state().display(),
        );
        let mut child = self
            .host
            .command("unshare")
            .args(["--mount", "sh", "-c", &line])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut daemon = Daemon {
            child,
            stdin,
            stdout,
            hello: Value::Null,
        };
        daemon.hello = daemon.read();
        daemon
    }

    pub fn daemon(&self) -> Daemon {
        self.daemon_with("pileus0", "10.87.21.0/24", "", "", "")
    }

    /// A guest's stand-in: a namespace whose eth0 is plugged into the bridge.
    pub fn guest(&self, port: &str, mac: &str) -> Namespace {
        self.guest_in(&self.host.pid().to_string(), port, mac)
    }

    /// The same with the bridge in the network namespace of process `pid`.
    pub fn guest_in(&self, pid: &str, port: &str, mac: &str) -> Namespace {
        let guest = Namespace::new();
        let line = format!(
            "ip link add {port} type veth peer name eth0 address {mac} netns {}; ip link set {port} master pileus0 up",
            guest.pid()
        );
        let output = Command::new("nsenter")
            .args(["-t", pid, "-n", "sh", "-c", &line])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        guest.sh("ip link set eth0 up");
        guest
    }

    /// Lets a guest ask for its lease; returns what it was given, as `key=value` lines.
    pub fn dhcp(&self, guest: &Namespace) -> (bool, String) {
        guest.try_sh(&format!(
            "busybox udhcpc -i eth0 -f -q -n -t 5 -T 1 -O mtu -O search -s {}",
            self.path("udhcpc.sh").display()
        ))
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A dnsmasq of the test would otherwise outlive it, as it should outlive a daemon.
        let pid = std::fs::read_to_string(self.state().join("dnsmasq.pid")).unwrap_or_default();
        let record = std::fs::read_to_string(self.state().join("holder.json")).unwrap_or_default();
        let record: Value = serde_json::from_str(&record).unwrap_or_default();
        let pids = ["holder", "keeper", "pasta"].map(|who| record[who]["pid"].to_string());
        for pid in pids.into_iter().chain([pid.trim().to_owned()]) {
            let cmdline =
                std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let state = self.state().display().to_string();
            if cmdline.contains(&state) || cmdline.contains("pasta") {
                let _ = Command::new("kill").args(["-9", &pid]).status();
            }
        }
    }
}

fn dns_server(namespace: &Namespace, address: &str) -> Killed {
    let mut command = namespace.command("dnsmasq");
    command.args([
        "--conf-file=/dev/null",
        "--keep-in-foreground",
        "--no-hosts",
        "--no-resolv",
        "--bind-interfaces",
        "--pid-file=",
        "--log-facility=/dev/null",
        "--user=root",
        "--group=root",
    ]);
    command.arg(format!("--listen-address={address}"));
    command.arg(format!("--address=/outside.example/{SERVER}"));
    Killed::spawn(&mut command)
}

const UDHCPC: &str = r#"#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add "$ip/$mask" dev "$interface"
ip route add default via "$router"
[ -z "$mtu" ] || ip link set "$interface" mtu "$mtu"
for key in ip mask router dns domain search mtu lease hostname; do eval echo "$key=\$$key"; done
"#;

pub fn chmod(path: &Path, mode: &str) {
    assert!(
        Command::new("chmod")
            .arg(mode)
            .arg(path)
            .status()
            .unwrap()
            .success()
    );
}

pub struct Daemon {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    /// Its first line: that the network is up, or the error.
    pub hello: Value,
}

impl Daemon {
    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|err| panic!("the daemon said {line:?}: {err}"))
    }

    pub fn ask(&mut self, line: &str) -> Value {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
        self.read()
    }

    /// Asks for something that must work, with nothing wrong in the network afterwards.
    pub fn ask_well(&mut self, line: &str) -> Value {
        let answer = self.ask(line);
        assert_eq!(answer["health"], serde_json::json!([]), "{line}: {answer}");
        answer
    }

    /// kill -9.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The server's page as a guest gets it.
pub fn fetch(guest: &Namespace) -> String {
    guest.sh(&format!(
        "curl -sS --noproxy '*' --max-time 10 http://{SERVER}/hello"
    ))
}
