//! The alternative to a launch: the same image under a plain `qemu-system-x86_64`, as someone would
//! boot it by hand. Direct kernel boot, an overlay by qemu-img, a minimal NoCloud seed (one user, one
//! key, a fixed address, which is faster than DHCP), a tap in a namespace, and ssh to it.

use std::fs;
use std::io::Cursor;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use hadris_iso::read::PathSeparator;
use hadris_iso::write::options::{CreationFeatures, IsoFormatOptions};
use hadris_iso::write::{InputEntry, InputTree, IsoImageWriter};
use pileus_testkit::Namespace;
use serde_json::Value;

use crate::measure::{inside, poll, processor_time, timed};

const HOST: &str = "10.99.0.1/24";
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 99, 0, 2);
/// What both sides get.
pub const CPUS: &str = "2";
pub const MEMORY: &str = "1G";
const DISK: &str = "5G";
/// What a guest says of its own boot.
pub const EXPLAIN: &str = "sleep 5; systemd-analyze time; systemd-analyze critical-chain; \
     systemd-analyze blame | head -n 25; cloud-init analyze blame | head -n 30; \
     sudo dmesg | grep -E 'Freeing unused|Run /init|systemd.1' | head -n 5";
const BOUND: Duration = Duration::from_secs(400);

/// How long a boot took, from the first preparation (the overlay) on.
#[derive(Debug, Clone, Copy)]
pub struct BareTimes {
    /// sshd takes connections.
    pub port: Duration,
    /// A first command over ssh is done.
    pub command: Duration,
    /// `cloud-init status --wait` over ssh is done: what `launch` waits for.
    pub cloud_init: Duration,
    /// Processor time of QEMU until the first command was done: what a busy machine changes least.
    pub processor: Duration,
}

/// Boots the image and ends it. With `explain` the guest's own account goes to stderr.
pub fn boot(image: &Path, explain: bool) -> Result<BareTimes> {
    let folder = tempfile::tempdir()?;
    let namespace = Namespace::new();
    for words in [
        "tuntap add tap0 mode tap",
        "link set tap0 up",
        &format!("address add {HOST} dev tap0"),
    ] {
        timed(namespace.command("ip").args(words.split(' ')))?;
    }
    let key = folder.path().join("key");
    timed(
        Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-f"])
            .arg(&key),
    )?;
    let seed = seed(&fs::read_to_string(key.with_extension("pub"))?)?;

    let began = Instant::now();
    fs::write(folder.path().join("seed.iso"), seed)?;
    let overlay = folder.path().join("disk.qcow2");
    timed(
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .args([&image.join("disk.raw"), &overlay])
            .arg(DISK),
    )?;
    let mut machine = Qemu(qemu(&namespace, image, folder.path())?.spawn()?);
    let pid = machine.0.id().cast_signed();
    // `ip netns exec` becomes QEMU; only then it is in the namespace.
    poll("QEMU runs", Duration::from_secs(10), || {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        name.starts_with("qemu").then_some(())
    })?;
    let times = inside(pid, || reach(&key, pid, began, explain)).with_context(|| {
        let ended = machine.0.try_wait();
        let console = fs::read_to_string(folder.path().join("console.log")).unwrap_or_default();
        let tail: Vec<&str> = console.lines().rev().take(5).collect();
        format!("the bare QEMU ({ended:?}) can't be reached; its console ends (last line first) with {tail:?}")
    });
    drop(machine);
    times
}

/// Ends with its owner.
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qemu(namespace: &Namespace, image: &Path, folder: &Path) -> Result<Command> {
    let info: Value = serde_json::from_slice(&fs::read(image.join("image.json"))?)?;
    let cmdline = info["cmdline"]
        .as_str()
        .context("the image has no cmdline")?;
    let path = |name: &str| -> PathBuf { folder.join(name) };
    let mut command = namespace.command("qemu-system-x86_64");
    command
        .args(["-nodefaults", "-display", "none", "-machine", "q35"])
        .args(["-accel", "tcg,thread=multi", "-cpu", "max"])
        .args(["-smp", CPUS, "-m", MEMORY])
        .args(["-append", cmdline])
        .arg("-kernel")
        .arg(image.join("kernel"))
        .arg("-initrd")
        .arg(image.join("initrd"))
        .arg("-serial")
        .arg(format!("file:{}", path("console.log").display()))
        .arg("-drive")
        .arg(format!(
            "if=virtio,format=qcow2,file={}",
            path("disk.qcow2").display()
        ))
        .arg("-drive")
        .arg(format!(
            "if=virtio,format=raw,readonly=on,file={}",
            path("seed.iso").display()
        ))
        .args(["-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no"])
        .args(["-device", "virtio-net-pci,netdev=n"])
        .stdin(Stdio::null());
    Ok(command)
}

/// From inside the namespace: asks until ssh works.
fn reach(key: &Path, pid: i32, began: Instant, explain: bool) -> Result<BareTimes> {
    let server = SocketAddr::from((GUEST, 22));
    // Cheaper and finer than ssh again and again: the guest shares the processors with us.
    poll("sshd takes connections", BOUND, || {
        let pause = Duration::from_millis(200);
        let connected = TcpStream::connect_timeout(&server, pause);
        if connected.is_err() {
            std::thread::sleep(pause);
        }
        connected.ok()
    })?;
    let port = began.elapsed();
    poll("a command over ssh", BOUND, || {
        let done = timed(ssh(key, GUEST).args(["-o", "StrictHostKeyChecking=no", "true"]));
        if done.is_err() {
            std::thread::sleep(Duration::from_millis(300));
        }
        done.ok()
    })?;
    let command = began.elapsed();
    let processor = processor_time(pid)?;
    let waited = ssh(key, GUEST)
        .args(["-o", "StrictHostKeyChecking=no", "cloud-init status --wait"])
        .output()?;
    let said = String::from_utf8_lossy(&waited.stdout).into_owned();
    ensure!(said.contains("done"), "cloud-init did not end well: {said}");
    let times = BareTimes {
        port,
        command,
        cloud_init: began.elapsed(),
        processor,
    };
    if explain {
        let told = ssh(key, GUEST)
            .args(["-o", "StrictHostKeyChecking=no", EXPLAIN])
            .output()?;
        eprintln!("{}", String::from_utf8_lossy(&told.stdout));
    }
    Ok(times)
}

/// A new ssh connection as `ubuntu`, with a key and none of this machine's settings; the caller adds
/// what it knows of the host's key, and the command.
pub fn ssh(key: &Path, address: Ipv4Addr) -> Command {
    let mut command = Command::new("ssh");
    command
        .args(["-F", "/dev/null", "-q", "-o", "BatchMode=yes"])
        .args(["-o", "IdentitiesOnly=yes", "-o", "ConnectTimeout=30"])
        .args(["-o", "UserKnownHostsFile=/dev/null"])
        .arg("-i")
        .arg(key)
        .arg(format!("ubuntu@{address}"));
    command
}

fn seed(public_key: &str) -> Result<Vec<u8>> {
    let user_data = format!(
        "#cloud-config\nusers:\n  - name: ubuntu\n    shell: /bin/bash\n    \
         sudo: ALL=(ALL) NOPASSWD:ALL\n    ssh_authorized_keys:\n      - {public_key}"
    );
    let network = format!(
        "version: 2\nethernets:\n  all:\n    match: {{ name: \"e*\" }}\n    \
         addresses: [{GUEST}/24]\n"
    );
    let entries = vec![
        InputEntry::file("user-data", user_data),
        InputEntry::file("meta-data", "instance-id: bare\nlocal-hostname: bare\n"),
        InputEntry::file("network-config", network),
    ];
    let options = IsoFormatOptions {
        volume_name: "cidata".into(),
        system_id: None,
        volume_set_id: None,
        publisher_id: None,
        preparer_id: None,
        application_id: None,
        sector_size: 2048,
        path_separator: PathSeparator::ForwardSlash,
        strict_charset: false,
        features: CreationFeatures::rock_ridge(),
    };
    let tree = InputTree::new(PathSeparator::ForwardSlash, entries);
    let written = IsoImageWriter::create(Cursor::new(Vec::new()), tree, options);
    written
        .map(Cursor::into_inner)
        .map_err(|err| anyhow::anyhow!("the seed can't be written: {err}"))
}
