//! What the daemon says of its host, and images with Ubuntu's names, against machines that boot in
//! milliseconds.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pileus_testkit::{Daemon, Need, Options, need};
use serde_json::{Value, json};
use sha2::Digest as _;

/// Status and body of the API's answer to a POST.
fn post(daemon: &Daemon, path: &str, body: &Value) -> (u16, Value) {
    let body = body.to_string();
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    write!(
        stream,
        "POST {path} HTTP/1.0\r\nHost: pileus\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn fake_what_the_host_has() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    let host = daemon.get("/v1/host");
    assert!(host["cpus"].as_u64().unwrap() > 0, "{host}");
    assert!(host["memory"].as_u64() > host["memory_available"].as_u64());
    assert!(host["space_available"].as_u64().unwrap() > 0);
    let checks = host["checks"].as_array().unwrap();
    let of = |name: &str| checks.iter().find(|check| check["name"] == name).unwrap();
    assert_eq!(of("qemu")["verdict"], "good", "{host}");
    assert_eq!(of("network")["verdict"], "good", "{host}");
    assert_eq!(of("records")["verdict"], "good", "{host}");
    assert!(
        checks
            .iter()
            .all(|check| check["message"].as_str().unwrap().ends_with('.'))
    );

    // The firewall's rules are taken away.
    let nft = |line: &str| {
        let mut command = daemon.namespace().command("nft");
        assert!(command.arg(line).status().unwrap().success());
    };
    nft("flush ruleset");
    let host = daemon.get("/v1/host");
    let bad = |check: &&Value| check["name"] == "network" && check["verdict"] == "bad";
    let check = host["checks"]
        .as_array()
        .unwrap()
        .iter()
        .find(bad)
        .unwrap()
        .clone();
    assert!(
        check["advice"].as_str().unwrap().contains("estart"),
        "{check}"
    );

    // Networks: not the private one, and cards that are virtual neither.
    assert_eq!(daemon.get("/v1/networks"), json!([]));
    let ip = |line: &str| {
        let mut command = daemon.namespace().command("ip");
        assert!(command.args(line.split(' ')).status().unwrap().success());
    };
    ip("link add br9 type bridge");
    assert_eq!(
        daemon.get("/v1/networks"),
        json!([{ "name": "br9", "type": "bridge", "description": "Network bridge" }])
    );
}

#[test]
fn fake_what_an_instance_uses_and_how_it_is_reached() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    assert_eq!(daemon.get("/v1/usage"), json!([]));
    daemon.launch_fake("foo").ok();
    daemon.launch_fake("bar").ok();
    let usage = daemon.get("/v1/usage");
    let names: Vec<_> = usage
        .as_array()
        .unwrap()
        .iter()
        .map(|u| &u["name"])
        .collect();
    assert_eq!(names, ["bar", "foo"]);
    assert!(usage[0]["memory"].as_u64().unwrap() > 100_000, "{usage}");
    assert_eq!(usage[0]["memory_total"], 1_u64 << 30);
    daemon.run(&["stop", "bar"]).ok();
    assert_eq!(daemon.get("/v1/usage").as_array().unwrap().len(), 1);

    // The address and the keys, also when it does not run.
    let ssh = daemon.get("/v1/instances/foo/ssh");
    assert_eq!((&ssh["user"], &ssh["port"]), (&json!("ubuntu"), &json!(22)));
    assert!(
        ssh["host_key"]
            .as_str()
            .unwrap()
            .starts_with("ssh-ed25519 AAAA"),
        "{ssh}"
    );
    let key = daemon.folder().join("key");
    std::fs::write(&key, ssh["private_key"].as_str().unwrap()).unwrap();
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let public = Command::new("ssh-keygen")
        .args(["-y", "-f"])
        .arg(&key)
        .output()
        .unwrap();
    assert!(public.stdout.starts_with(b"ssh-ed25519 "), "{public:?}");
    let other = daemon.get("/v1/instances/bar/ssh");
    assert_ne!(other["private_key"], ssh["private_key"]);
    assert_ne!(other["address"], ssh["address"]);
}

#[test]
fn fake_a_console_has_one_client() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    daemon.launch_fake("foo").ok();
    let (status, answer, first) = upgrade(&daemon, "foo");
    assert_eq!(status, 101, "{answer}");
    let (status, answer, _) = upgrade(&daemon, "foo");
    assert_eq!(status, 409, "{answer}");
    assert!(answer.contains("is in use"), "{answer}");
    let refused = daemon.run(&["console", "foo"]).fails_with(2);
    assert!(refused.contains("is in use"), "{refused}");
    // One that goes, however it goes, makes room.
    drop(first);
    let mut next = None;
    until("room for another", || {
        let (status, _, stream) = upgrade(&daemon, "foo");
        next = (status == 101).then_some(stream);
        next.is_some()
    });
    // The machine's end is the console's.
    daemon.run(&["stop", "--force", "foo"]).ok();
    let mut rest = Vec::new();
    next.unwrap().read_to_end(&mut rest).unwrap();
    // An empty binary message, and the close.
    assert_eq!(rest, [0x82, 0, 0x88, 0]);
    let (status, answer, _) = upgrade(&daemon, "foo");
    assert!(
        status == 409 && answer.contains("is not running"),
        "{answer}"
    );
    assert_eq!(upgrade(&daemon, "nobody").0, 404);
}

/// What the daemon answers to one who wants to attach.
fn upgrade(daemon: &Daemon, name: &str) -> (u16, String, UnixStream) {
    let mut stream = UnixStream::connect(daemon.socket()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    write!(
        stream,
        "GET /v1/instances/{name}/console HTTP/1.1\r\nHost: pileus\r\nConnection: Upgrade\r\n\
         Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
         Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    )
    .unwrap();
    let mut answer = vec![0; 4096];
    let count = stream.read(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..count]).into_owned();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer, stream)
}

#[test]
fn fake_the_passphrase() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    let try_it = |passphrase: &str| {
        let (status, answer) = post(
            &daemon,
            "/v1/authenticate",
            &json!({ "passphrase": passphrase }),
        );
        let message = answer["error"]["message"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        (status, message)
    };
    assert_eq!(
        try_it("x"),
        (403, "Incorrect passphrase. No passphrase is set.".into())
    );
    daemon.run(&["set", "local.passphrase=open sesame"]).ok();
    assert_eq!(daemon.run(&["get", "local.passphrase"]).ok(), "true\n");
    assert_eq!(try_it("open sesame"), (204, String::new()));
    assert_eq!(
        try_it("open"),
        (403, "Passphrase is not correct. Please try again.".into())
    );
    let kept = std::fs::read(daemon.storage().join("data/pileus.db")).unwrap();
    let text = String::from_utf8_lossy(&kept);
    assert!(!text.contains("sesame"));
    assert!(!daemon.log().contains("sesame"));
}

/// Writes what a small Ubuntu publishes: one release.
fn publish(folder: &Path, disk: &[u8]) {
    let digest: String = sha2::Sha256::digest(disk)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    let write = |path: &str, bytes: &[u8]| {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    };
    for (remote, products) in [
        (
            "releases",
            json!({ "com.ubuntu.cloud:server:24.04:amd64": {
                "aliases": "24.04,default,lts,n,noble", "arch": "amd64", "os": "ubuntu",
                "release": "noble", "release_codename": "Noble Numbat",
                "release_title": "24.04 LTS", "supported": true, "version": "24.04",
                "versions": { "20260101": { "items": { "disk1.img": { "ftype": "disk1.img",
                    "path": "server/noble.img", "sha256": digest, "size": disk.len() } } } } } }),
        ),
        ("daily", json!({})),
    ] {
        let index = json!({ "index": { "d": { "datatype": "image-downloads",
            "path": "streams/v1/d.json" } } });
        write(
            &format!("{remote}/streams/v1/index.json"),
            index.to_string().as_bytes(),
        );
        let list = json!({ "products": products });
        write(
            &format!("{remote}/streams/v1/d.json"),
            list.to_string().as_bytes(),
        );
    }
    write("releases/server/noble.img", disk);
}

#[test]
fn fake_ubuntus_names() {
    if !need(&[Need::Root, Need::Tun, Need::Program("busybox")]) {
        return;
    }
    let mut options = Options::fake();
    options.args = vec!["--image-host".into(), "http://127.0.0.1:8088/".into()];
    let mut daemon = Daemon::start(options);
    daemon.write_fake_image();
    let disk = std::fs::read(daemon.fake_image()).unwrap();

    // Nobody there yet: what needs no host is there all the same, and said to be.
    let lost = daemon
        .run(&["launch", "lts", "--name", "foo"])
        .fails_with(2);
    assert!(lost.contains("remote \"release\" is unreachable"), "{lost}");
    assert!(lost.contains("debian-13"), "{lost}");
    let names = |daemon: &Daemon| -> Vec<String> {
        let all = daemon.get("/v1/catalog");
        let all = all.as_array().unwrap().iter();
        all.map(|entry| {
            format!(
                "{}:{}",
                entry["remote"].as_str().unwrap(),
                entry["name"].as_str().unwrap()
            )
        })
        .collect()
    };
    assert_eq!(names(&daemon), ["build:debian-13", "build:debian-12"]);

    let www = daemon.folder().join("www");
    publish(&www, &disk);
    let mut httpd = daemon.namespace().command("busybox");
    httpd
        .args(["httpd", "-f", "-p", "127.0.0.1:8088", "-h"])
        .arg(&www);
    httpd.stdout(Stdio::null()).stderr(Stdio::null());
    let server = Ended(httpd.spawn().unwrap());
    until("the image host", || names(&daemon).len() == 3);
    let found = daemon.get("/v1/catalog?search=noble");
    assert_eq!(
        (
            &found[0]["name"],
            &found[0]["remote"],
            &found[0]["aliases"],
            &found[0]["release"]
        ),
        (&json!("noble"), &json!(""), &json!([]), &json!("24.04 LTS"))
    );
    daemon.run(&["launch", "lts", "--name", "foo"]).ok();
    let foo = daemon.get("/v1/instances/foo");
    assert_eq!(foo["image"]["os"], "Ubuntu", "{foo}");
    assert_eq!(foo["image"]["release"], "24.04 LTS");
    assert_eq!(daemon.get("/v1/catalog?search=24.04")[0]["cached"], true);
    for (image, text) in [
        ("plucky", "Unable to find an image matching \"plucky\"."),
        (
            "daily:noble",
            "Unable to find an image matching \"noble\" in remote \"daily\".",
        ),
        ("moon:noble", "Remote \"moon\" is unknown or unreachable."),
    ] {
        let refused = daemon.run(&["launch", image]).fails_with(2);
        assert!(refused.contains(text), "{refused}");
    }

    // Without the host, also after a restart, what is here can be launched.
    drop(server);
    daemon.stop();
    daemon.start_again();
    daemon.run(&["launch", "24.04", "--name", "bar"]).ok();
    assert_eq!(daemon.state("bar"), "Running");
}
