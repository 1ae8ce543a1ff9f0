//! The alternative to a warm launch: a script that does the same work with plain tools on the same
//! template. `ssh-keygen`, `cp`, `qemu-img`, `ip`; a QEMU with the same machine, which loads the state
//! and gets its NIC over QMP; the agent asked by hand to make the guest somebody; and OpenSSH's client
//! through the guest's port.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use pileus_testkit::Daemon;
use serde_json::{Value, json};

use crate::measure::{inside, poll, timed};

/// As the daemon's own clients are called in the guest (`instances/src/guest/mod.rs`).
const USER: &str = "ubuntu";
const BOUND: Duration = Duration::from_secs(60);
const TAP: &str = "bare0";
/// What a clone does after its start is over then.
const REST: Duration = Duration::from_secs(20);

/// A stopped warm instance: the bare clones take its place (one at a time), so that nobody else has
/// its MAC and address.
#[derive(Debug)]
pub struct Twin {
    /// QEMU's arguments, with `@FOLDER@` for where a clone's files lie.
    args: Vec<String>,
    layer: PathBuf,
    state: PathBuf,
    seed: PathBuf,
    /// dnsmasq's folder of guests.
    hosts: PathBuf,
    mac: String,
    address: String,
    prefix: u64,
    gateway: String,
    bridge: String,
    daemon: i32,
}

/// When each step was done, from the beginning on.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    /// Keys, seed, disk and tap are there.
    pub prepared: Duration,
    /// The guest runs.
    pub restored: Duration,
    /// The agent has made it somebody, with an address.
    pub identified: Duration,
    /// A command over ssh is done.
    pub command: Duration,
}

impl Twin {
    /// Learns all that is needed from an instance that runs; the caller stops it then.
    pub fn of(daemon: &Daemon, info: &Value) -> Result<Self> {
        let storage = daemon.storage();
        let text = |key: &str| -> Result<String> {
            let found = info[key].as_str();
            Ok(found
                .with_context(|| format!("the instance has no {key}"))?
                .to_owned())
        };
        let id = text("id")?;
        let folder = storage.join("data/instances").join(&id);
        let pid = process_of(daemon, &id)?;
        let template = info["origin"]["template"]
            .as_str()
            .context("the instance is not warm")?;
        let layer = open_files(pid)
            .into_iter()
            .find(|path| path.starts_with(storage.join("data/layers")))
            .context("the template's layer is not open")?;
        let image = storage.join("data/images").join(
            info["image"]["digest"]
                .as_str()
                .context("it has no image")?
                .trim_start_matches("sha256:"),
        );
        let nodes = [
            ("base-file", image.join("disk.raw").display().to_string()),
            ("layer0-file", layer.display().to_string()),
            ("disk-file", "@FOLDER@/disk.qcow2".into()),
            ("seed-file", "@FOLDER@/seed.iso".into()),
        ];
        let (bridge, gateway, prefix) = bridge(daemon)?;
        Ok(Self {
            args: arguments(pid, &nodes)?,
            layer,
            state: storage.join("data/templates").join(template).join("state"),
            seed: folder.join("seed.iso"),
            hosts: storage.join("run/net/hosts"),
            mac: text("mac")?,
            address: info["ipv4"][0]
                .as_str()
                .context("it has no address")?
                .to_owned(),
            prefix,
            gateway,
            bridge,
            daemon: daemon.pid().context("the daemon runs")?,
        })
    }

    /// Starts a clone, runs a command in it and ends it.
    pub fn clone_once(&self) -> Result<Steps> {
        // Beside the daemon's storage: the same file system.
        let folder = tempfile::tempdir()?;
        let entry = self.hosts.join("bare");
        let done = inside(self.daemon, || self.work(folder.path(), &entry));
        let _ = fs::remove_file(entry);
        // `ip` has made it to stay.
        let gone = inside(self.daemon, || {
            timed(Command::new("ip").args(["link", "delete", TAP]))
        });
        let steps = done?;
        gone?;
        Ok(steps)
    }

    /// Starts a clone and makes it somebody.
    fn run(&self, folder: &Path, entry: &Path) -> Result<Running> {
        let began = Instant::now();
        for key in ["client_key", "host_key"] {
            timed(
                Command::new("ssh-keygen")
                    .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                    .arg(folder.join(key)),
            )?;
        }
        timed(Command::new("cp").args([&self.seed, &folder.join("seed.iso")]))?;
        timed(
            Command::new("qemu-img")
                .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
                .args([&self.layer, &folder.join("disk.qcow2")]),
        )?;
        fs::write(
            entry,
            format!("{},{},bare,infinite\n", self.mac, self.address),
        )?;
        timed(Command::new("ip").args(["tuntap", "add", TAP, "mode", "tap"]))?;
        timed(Command::new("ip").args(["link", "set", TAP, "master", &self.bridge, "up"]))?;
        let prepared = began.elapsed();

        let machine = Qemu::start(&self.args, folder)?;
        let mut qmp = Qmp::connect(&folder.join("qmp.sock"))?;
        qmp.restore(&self.state)?;
        let restored = began.elapsed();

        let mut agent = Agent::connect(&folder.join("agent.sock"))?;
        agent.ask(2, "identify", self.identity(folder)?)?;
        qmp.plug(&self.mac)?;
        agent.answer(2)?;
        let identified = began.elapsed();
        Ok(Running {
            machine,
            qmp,
            agent,
            began,
            prepared,
            restored,
            identified,
        })
    }

    fn work(&self, folder: &Path, entry: &Path) -> Result<Steps> {
        let Running {
            machine,
            mut agent,
            began,
            prepared,
            restored,
            identified,
            ..
        } = self.run(folder, entry)?;
        let nonce = uuid::Uuid::new_v4().simple().to_string();
        agent.ask(
            3,
            "ssh-open",
            json!({ "port": "pileus.ssh.0", "nonce": nonce }),
        )?;
        agent.answer(3)?;
        timed(&mut ssh(folder)?)?;
        let command = began.elapsed();
        drop(machine);
        Ok(Steps {
            prepared,
            restored,
            identified,
            command,
        })
    }

    /// Starts a clone and saves it by QEMU's own `savevm` into its disk: how long that takes, and by how
    /// many bytes the disk grows.
    pub fn save_once(&self) -> Result<(Duration, u64)> {
        // Beside the daemon's storage: the same file system.
        let folder = tempfile::tempdir()?;
        let entry = self.hosts.join("bare");
        let done = inside(self.daemon, || self.save(folder.path(), &entry));
        let _ = fs::remove_file(entry);
        let gone = inside(self.daemon, || {
            timed(Command::new("ip").args(["link", "delete", TAP]))
        });
        let saved = done?;
        gone?;
        Ok(saved)
    }

    fn save(&self, folder: &Path, entry: &Path) -> Result<(Duration, u64)> {
        let mut running = self.run(folder, entry)?;
        std::thread::sleep(REST);
        let disk = folder.join("disk.qcow2");
        let size = || fs::metadata(&disk).map(|found| found.blocks() * 512);
        let before = size()?;
        let began = Instant::now();
        let command = json!({ "command-line": "savevm saved" });
        let said = running.qmp.run("human-monitor-command", &command)?;
        ensure!(said == "", "savevm says {said}");
        // It is over when it is on the disk, and the machine is gone.
        drop(running);
        fs::File::open(&disk)?.sync_all()?;
        Ok((began.elapsed(), size()?.saturating_sub(before)))
    }

    /// What the daemon asks the agent for (`instances/src/guest/clone.rs`).
    fn identity(&self, folder: &Path) -> Result<Value> {
        let read = |name: &str| -> Result<String> {
            Ok(fs::read_to_string(folder.join(name))?.trim().to_owned())
        };
        let mut entropy = [0; 64];
        fs::File::open("/dev/urandom")?.read_exact(&mut entropy)?;
        let entropy: String = entropy.iter().map(|byte| format!("{byte:02x}")).collect();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
        let id = uuid::Uuid::new_v4();
        Ok(json!({
            "instance": id.to_string(),
            "hostname": "bare",
            "machine_id": id.simple().to_string(),
            "entropy": entropy,
            "time": now.as_secs_f64(),
            "host_key": fs::read_to_string(folder.join("host_key"))?,
            "host_public": read("host_key.pub")?,
            "authorized": [read("client_key.pub")?],
            "user": USER,
            "uid": 1000,
            "grow": false,
            "cloud_init": false,
            "mode": "warm",
            "bound": BOUND.as_secs(),
            "nic": {
                "mac": self.mac,
                "address": format!("{}/{}", self.address, self.prefix),
                "gateway": self.gateway,
                "dns": self.gateway,
            },
        }))
    }
}

/// A clone that is somebody, and when it got so far.
struct Running {
    machine: Qemu,
    qmp: Qmp,
    agent: Agent,
    began: Instant,
    prepared: Duration,
    restored: Duration,
    identified: Duration,
}

/// The command, by a new connection. The client passes over the line that the agent says first, as the
/// protocol has it. Key exchange and cipher are the ones that the daemon prefers: a client's own choice
/// costs an emulated guest more.
fn ssh(folder: &Path) -> Result<Command> {
    let known = folder.join("known_hosts");
    let host_key = fs::read_to_string(folder.join("host_key.pub"))?;
    fs::write(&known, format!("clone {host_key}"))?;
    let socket = folder.join("ssh0.sock");
    let mut command = Command::new("ssh");
    command
        .args(["-F", "/dev/null", "-q", "-o", "BatchMode=yes"])
        .args([
            "-o",
            "IdentitiesOnly=yes",
            "-o",
            "StrictHostKeyChecking=yes",
        ])
        .args(["-o", "KexAlgorithms=curve25519-sha256"])
        .args(["-o", "Ciphers=aes128-gcm@openssh.com", "-o"])
        .arg(format!("UserKnownHostsFile={}", known.display()))
        .arg("-o")
        .arg(format!(
            "ProxyCommand=socat - UNIX-CONNECT:{}",
            socket.display()
        ))
        .arg("-i")
        .arg(folder.join("client_key"))
        .arg(format!("{USER}@clone"))
        .arg("true");
    Ok(command)
}

/// Ends with its owner.
struct Qemu(Child);

impl Qemu {
    fn start(args: &[String], folder: &Path) -> Result<Self> {
        let place = folder.display().to_string();
        let log = fs::File::create(folder.join("qemu.log"))?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(args.iter().map(|arg| arg.replace("@FOLDER@", &place)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        Ok(Self(command.spawn()?))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn connect(socket: &Path) -> Result<BufReader<UnixStream>> {
    let stream = poll("QEMU takes connections", Duration::from_secs(10), || {
        UnixStream::connect(socket).ok()
    });
    let stream = stream.with_context(|| {
        let log = socket.with_file_name("qemu.log");
        fs::read_to_string(log).unwrap_or_default()
    })?;
    stream.set_read_timeout(Some(BOUND))?;
    Ok(BufReader::new(stream))
}

fn tell(stream: &mut BufReader<UnixStream>, message: &Value) -> Result<()> {
    let line = format!("{message}\n");
    Ok(stream.get_mut().write_all(line.as_bytes())?)
}

fn hear(stream: &mut BufReader<UnixStream>) -> Result<Value> {
    let mut line = String::new();
    ensure!(stream.read_line(&mut line)? > 0, "the connection ended");
    // The guest may have torn one.
    Ok(serde_json::from_str(&line).unwrap_or_default())
}

struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn connect(socket: &Path) -> Result<Self> {
        let mut qmp = Self(connect(socket)?);
        hear(&mut qmp.0)?;
        qmp.run("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn run(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        tell(
            &mut self.0,
            &json!({ "execute": command, "arguments": arguments }),
        )?;
        loop {
            let answer = hear(&mut self.0)?;
            if let Some(error) = answer.get("error") {
                bail!("{command}: {error}");
            }
            if let Some(done) = answer.get("return") {
                return Ok(done.clone());
            }
        }
    }

    fn restore(&mut self, state: &Path) -> Result<()> {
        let shared = json!({ "capability": "x-ignore-shared", "state": true });
        self.run(
            "migrate-set-capabilities",
            &json!({ "capabilities": [shared] }),
        )?;
        let uri = format!("file:{}", state.display());
        self.run("migrate-incoming", &json!({ "uri": uri }))?;
        let until = Instant::now() + BOUND;
        loop {
            let status = self.run("query-migrate", &json!({}))?;
            match status["status"].as_str() {
                Some("completed") => break,
                Some("failed") => bail!("the state can't be loaded: {status}"),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
            ensure!(Instant::now() < until, "the state is not loaded in time");
        }
        self.run("cont", &json!({})).map(drop)
    }

    fn plug(&mut self, mac: &str) -> Result<()> {
        let netdev = json!({ "type": "tap", "id": "nic0", "ifname": TAP, "script": "no",
            "downscript": "no", "vhost": false });
        self.run("netdev_add", &netdev)?;
        let card = json!({ "driver": "virtio-net-pci", "id": "nic0", "netdev": "nic0", "mac": mac,
            "bus": "port-nic", "romfile": "" });
        self.run("device_add", &card).map(drop)
    }
}

struct Agent(BufReader<UnixStream>);

impl Agent {
    fn connect(socket: &Path) -> Result<Self> {
        Ok(Self(connect(socket)?))
    }

    fn ask(&mut self, id: u64, what: &str, mut request: Value) -> Result<()> {
        request["id"] = id.into();
        request["do"] = what.into();
        tell(&mut self.0, &request)
    }

    fn answer(&mut self, id: u64) -> Result<()> {
        loop {
            let answer = hear(&mut self.0)?;
            if answer["type"] == "reply" && answer["id"] == id {
                ensure!(answer["ok"] == true, "the agent says: {answer}");
                return Ok(());
            }
        }
    }
}

/// The QEMU of an instance.
fn process_of(daemon: &Daemon, id: &str) -> Result<i32> {
    let mut machines = daemon.machines().into_iter();
    let found = machines.find(|pid| command_line(*pid).iter().any(|arg| arg == id));
    found.context("the instance has no QEMU")
}

fn command_line(pid: i32) -> Vec<String> {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let line = String::from_utf8_lossy(&line).into_owned();
    line.trim_end_matches('\0')
        .split('\0')
        .map(str::to_owned)
        .collect()
}

fn open_files(pid: i32) -> Vec<PathBuf> {
    let links = fs::read_dir(format!("/proc/{pid}/fd"));
    links
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|link| fs::read_link(link.path()).ok())
        .collect()
}

/// The arguments of a running QEMU of the daemon's, with files and sockets in place of the descriptors
/// that it has inherited.
fn arguments(pid: i32, nodes: &[(&str, String)]) -> Result<Vec<String>> {
    let mut args = Vec::new();
    let mut given = command_line(pid).into_iter().skip(1);
    while let Some(arg) = given.next() {
        if arg == "-add-fd" {
            given.next();
            continue;
        }
        let words: Result<Vec<String>> = arg.split(',').map(|word| by_name(pid, word)).collect();
        let mut arg = words?.join(",");
        if let Some(id) = arg.strip_prefix("socket,id=") {
            let id = id.split(',').next().unwrap_or_default().to_owned();
            arg = arg.replace("path=@SOCKET@", &format!("path=@FOLDER@/{id}.sock"));
        }
        for (node, path) in nodes {
            if arg.contains(&format!("node-name={node},")) {
                arg = arg.replace("@NODE@", path);
            }
        }
        ensure!(
            !arg.contains("@NODE@") && !arg.contains("@SOCKET@"),
            "QEMU got something unknown: {arg}"
        );
        args.push(arg);
    }
    Ok(args)
}

fn by_name(pid: i32, word: &str) -> Result<String> {
    if let Some((key, number)) = word.split_once("/proc/self/fd/") {
        let file = fs::read_link(format!("/proc/{pid}/fd/{number}"))?;
        return Ok(format!("{key}{}", file.display()));
    }
    if word.starts_with("logfile=/dev/fdset/") {
        return Ok("logfile=@FOLDER@/console.log".into());
    }
    if let Some((key, _)) = word.split_once("/dev/fdset/") {
        return Ok(format!("{key}@NODE@"));
    }
    Ok(match word.starts_with("fd=") {
        true => "path=@SOCKET@".into(),
        false => word.to_owned(),
    })
}

/// Name, address and prefix of the daemon's bridge.
fn bridge(daemon: &Daemon) -> Result<(String, String, u64)> {
    let mut ip = daemon.namespace().command("ip");
    let (_, text) = timed(ip.args(["-j", "-4", "address", "show", "type", "bridge"]))?;
    let links: Value = serde_json::from_str(&text)?;
    // Interfaces of another type come as empty objects.
    let mut links = links.as_array().into_iter().flatten();
    let link = links.find(|link| link["ifname"].is_string());
    let link = link.context("the daemon has no bridge")?;
    let address = &link["addr_info"][0];
    let found = link["ifname"]
        .as_str()
        .zip(address["local"].as_str())
        .zip(address["prefixlen"].as_u64());
    let ((name, local), prefix) = found.context("the daemon has no bridge")?;
    Ok((name.to_owned(), local.to_owned(), prefix))
}
