//! One real guest under one of Ubuntu's names: our own image, served as an image host serves Ubuntu's,
//! booted by its firmware and looked at from outside: its console while it boots, an ordinary SSH
//! client, what it uses of the host.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use pileus_testkit::{Daemon, Need, Options, guest_image, need, wait_until};
use serde_json::json;
use sha2::{Digest, Sha256};

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn guest_of_an_image_host() {
    let needs = [
        Need::Root,
        Need::Tun,
        Need::Guest,
        Need::Program("busybox"),
        Need::Program("ssh"),
    ];
    if !need(&needs) {
        return;
    }
    let options = Options {
        args: vec!["--image-host".into(), "http://127.0.0.1:8088/".into()],
        ..Options::default()
    };
    let daemon = Daemon::start(options);
    let www = daemon.folder().join("www");
    publish(&www, &guest_image().join("disk.raw"));
    let mut httpd = daemon.namespace().command("busybox");
    httpd
        .args(["httpd", "-f", "-p", "127.0.0.1:8088", "-h"])
        .arg(&www);
    httpd.stdout(Stdio::null()).stderr(Stdio::null());
    let server = Ended(httpd.spawn().unwrap());

    let mut launch = daemon.command(&["launch", "noble", "--name", "foo"]);
    launch.stdout(Stdio::piped()).stderr(Stdio::piped());
    let launch = launch.spawn().unwrap();
    let (mut typed, seen) = attach_soon(&daemon);
    let launch = launch.wait_with_output().unwrap();
    assert!(launch.status.success(), "{launch:?}");
    drop(server);
    let foo = daemon.get("/v1/instances/foo");
    assert_eq!(foo["image"]["release"], "24.04 LTS", "{foo}");

    // The console showed the boot from its beginning, and takes what is typed.
    let text =
        |seen: &Arc<Mutex<Vec<u8>>>| String::from_utf8_lossy(&seen.lock().unwrap()).into_owned();
    wait_until("the console's login", 60, || {
        text(&seen).contains("login:").then_some(())
    });
    assert!(text(&seen).contains("Linux version"), "{}", text(&seen));
    seen.lock().unwrap().clear();
    typed.write_all(&[0x82, 0x81, 0, 0, 0, 0, b'\r']).unwrap();
    wait_until("an answer", 60, || {
        text(&seen).contains("login:").then_some(())
    });

    used(&daemon, &ssh_of(&daemon));
}

/// Attaches to the console as soon as there is one; what comes is gathered.
fn attach_soon(daemon: &Daemon) -> (UnixStream, Arc<Mutex<Vec<u8>>>) {
    let stream = wait_until("a console", 120, || {
        let mut socket = UnixStream::connect(daemon.socket()).unwrap();
        write!(
            socket,
            "GET /v1/instances/foo/console HTTP/1.1\r\nHost: pileus\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        .unwrap();
        let mut answer = [0; 12];
        let whole = socket.read_exact(&mut answer).is_ok();
        (whole && answer.ends_with(b" 101")).then_some(socket)
    });
    let mut reader = stream.try_clone().unwrap();
    let seen: Arc<Mutex<Vec<u8>>> = Arc::default();
    let sink = seen.clone();
    std::thread::spawn(move || {
        // The rest of the answer's head, byte by byte: what follows are frames.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            if reader.read_exact(&mut byte).is_err() {
                return;
            }
            head.push(byte[0]);
        }
        while let Some(payload) = next_frame(&mut reader) {
            sink.lock().unwrap().extend_from_slice(&payload);
        }
    });
    (stream, seen)
}

/// The content of the next message: a word of the guest may come in several.
fn next_frame(reader: &mut impl Read) -> Option<Vec<u8>> {
    let mut head = [0; 2];
    reader.read_exact(&mut head).ok()?;
    let mut length = usize::from(head[1] & 0x7f);
    if length == 126 {
        let mut more = [0; 2];
        reader.read_exact(&mut more).ok()?;
        length = usize::from(u16::from_be_bytes(more));
    } else if length == 127 {
        let mut more = [0; 8];
        reader.read_exact(&mut more).ok()?;
        length = usize::try_from(u64::from_be_bytes(more)).ok()?;
    }
    let mut payload = vec![0; length];
    reader.read_exact(&mut payload).ok()?;
    Some(payload)
}

/// An ordinary client with nothing but what the API tells; gives its arguments.
fn ssh_of(daemon: &Daemon) -> Vec<String> {
    let ssh = daemon.get("/v1/instances/foo/ssh");
    let text = |name: &str| ssh[name].as_str().unwrap().to_owned();
    let (key, known) = (daemon.folder().join("key"), daemon.folder().join("known"));
    std::fs::write(&key, text("private_key")).unwrap();
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    std::fs::write(
        &known,
        format!("{} {}\n", text("address"), text("host_key")),
    )
    .unwrap();
    let args = vec![
        "-F".into(),
        "none".into(),
        "-i".into(),
        key.display().to_string(),
        "-o".into(),
        format!("UserKnownHostsFile={}", known.display()),
        "-o".into(),
        "StrictHostKeyChecking=yes".into(),
        "-o".into(),
        "BatchMode=yes".into(),
        format!("{}@{}", text("user"), text("address")),
    ];
    let mut command = daemon.namespace().command("ssh");
    let output = command.args(&args).arg("id -un").output().unwrap();
    assert_eq!(output.stdout, b"ubuntu\n", "{output:?}");
    args
}

fn used(daemon: &Daemon, ssh: &[String]) {
    const SENT: usize = 8 << 20;
    let look = || daemon.get("/v1/usage")[0].clone();
    let before = look();
    let mut command = daemon.namespace().command("ssh");
    command
        .args(ssh)
        .arg("cat > big && sync")
        .stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(&vec![7; SENT])
        .unwrap();
    assert!(child.wait().unwrap().success());
    let after = look();
    let grown = |name: &str| after[name].as_u64().unwrap() - before[name].as_u64().unwrap();
    // What went in is what the guest received.
    assert!(grown("net_received") > SENT as u64, "{before} {after}");
    assert!(grown("net_sent") < SENT as u64 / 2, "{before} {after}");
    assert!(grown("disk_written") >= SENT as u64, "{before} {after}");
    assert!(grown("cpu_nanoseconds") > 50_000_000, "{before} {after}");
    assert!(after["memory"].as_u64().unwrap() > 100 << 20, "{after}");
    let began = Instant::now();
    for _ in 0..10 {
        look();
    }
    eprintln!("ten looks at one guest's usage: {:?}", began.elapsed());
}

/// Writes what an image host with this one disk serves.
fn publish(folder: &Path, disk: &Path) {
    let path = folder.join("releases/server/noble.img");
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let converted = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .args([disk, &path])
        .status();
    assert!(converted.unwrap().success());
    let mut hash = Sha256::new();
    let mut file = std::fs::File::open(&path).unwrap();
    let mut buffer = vec![0; 1 << 20];
    while let Ok(count @ 1..) = file.read(&mut buffer) {
        hash.update(&buffer[..count]);
    }
    let digest: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
    let lists = folder.join("releases/streams/v1");
    std::fs::create_dir_all(&lists).unwrap();
    let index = json!({ "index": { "d": {
        "datatype": "image-downloads", "path": "streams/v1/d.json" } } });
    std::fs::write(lists.join("index.json"), index.to_string()).unwrap();
    let products = json!({ "products": { "com.ubuntu.cloud:server:24.04:amd64": {
        "aliases": "24.04,default,lts,n,noble", "arch": "amd64", "os": "ubuntu",
        "release": "noble", "release_title": "24.04 LTS", "supported": true,
        "versions": { "20260101": { "items": { "disk1.img": {
            "ftype": "disk1.img", "path": "server/noble.img", "sha256": digest } } } } } } });
    std::fs::write(lists.join("d.json"), products.to_string()).unwrap();
}
