//! Requests that can't work: each with its own code and sentence, and nothing half-made left behind.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use pileus_testkit::{Daemon, Need, Output, files_below, need, wait_until};

/// The launch must fail, and leave no instance, file, machine or stage.
#[track_caller]
fn refused(daemon: &Daemon, output: &Output, code: i32, words: &str) {
    let stderr = output.fails_with(code);
    assert!(stderr.contains(words), "{}: {stderr}", output.what);
    assert_eq!(
        daemon.run(&["list"]).ok(),
        "No instances found.\n",
        "{}",
        output.what
    );
    assert!(daemon.machines().is_empty());
    let instances = files_below(&daemon.storage().join("data/instances"));
    assert!(instances.is_empty(), "{}: {instances:?}", output.what);
    let stages = files_below(&daemon.storage().join("data/images/stage"));
    assert!(stages.is_empty(), "{}: {stages:?}", output.what);
}

fn qemu_img(args: &[&str]) {
    let status = Command::new("qemu-img")
        .args(args)
        .stdout(std::process::Stdio::null())
        .status();
    assert!(status.unwrap().success(), "qemu-img {args:?}");
}

#[test]
fn fake_bad_requests() {
    if !need(&[Need::Root, Need::Tun, Need::Program("qemu-img")]) {
        return;
    }
    let daemon = Daemon::fake();
    let image = format!("file://{}", daemon.fake_image().display());
    let launch = |args: &[&str]| daemon.run(&[&["launch"], args].concat());

    refused(&daemon, &launch(&["nonesuch"]), 2, "nonesuch");
    refused(
        &daemon,
        &launch(&["file:///nonesuch.img"]),
        2,
        "nonesuch.img",
    );
    refused(&daemon, &launch(&[&image, "--name", "-x"]), 1, "");
    refused(&daemon, &launch(&[&image, "--name", "a_b"]), 2, "a_b");
    refused(
        &daemon,
        &launch(&[&image, "-m", "1CiG"]),
        1,
        "1CiG is not a valid memory size",
    );
    refused(
        &daemon,
        &launch(&[&image, "-m", "100M"]),
        2,
        "memory size value supplied: 100M",
    );
    refused(
        &daemon,
        &launch(&[&image, "-d", "512M"]),
        2,
        "disk size value supplied: 512M",
    );
    refused(&daemon, &launch(&[&image, "-c", "0"]), 1, "");
    let wrong = format!("sha256:{}", "0".repeat(64));
    refused(&daemon, &launch(&[&image, "--checksum", &wrong]), 2, "0000");

    // cloud-init that isn't any.
    let bad = daemon.run_with(&["launch", &image, "--cloud-init", "-"], b"a: [1, 2");
    refused(&daemon, &bad, 2, "cloud-init");
}

/// Whoever asks for something and goes at once gets it done or undone, never the half of it.
#[test]
fn fake_clients_that_go() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let daemon = Daemon::fake();
    let image = format!("file://{}", daemon.fake_image().display());
    let ask = |method: &str, path: &str, body: &str, patience: Duration| {
        let mut stream = UnixStream::connect(daemon.socket()).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: pileus\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        std::thread::sleep(patience);
    };
    daemon.launch_fake("kept").ok();
    for n in 0..24 {
        let patience = Duration::from_micros(n * 400);
        let body = format!(r#"{{"name":"a{n}","image":"{image}"}}"#);
        ask("POST", "/v1/instances", &body, patience);
        let name = format!("kept{n}");
        let (before, body) = (only_kept(&daemon), format!(r#"{{"name":"{name}"}}"#));
        ask(
            "POST",
            &format!("/v1/instances/{before}/rename"),
            &body,
            patience,
        );
    }
    wait_until("nothing is in between", 60, || {
        let all = daemon.api().instances().unwrap();
        let done = all.iter().all(|instance| instance["state"] == "running");
        done.then_some(())
    });
    // It can be asked for by the name that it is listed with (the last renaming may still go on), and every name
    // can be had again.
    wait_until("it is found by its name", 60, || {
        let kept = only_kept(&daemon);
        let found = daemon.api().instance(&kept).ok()?;
        (found["name"] == kept).then_some(())
    });
    let all = daemon.api().instances().unwrap();
    for n in 0..24 {
        let name = format!("a{n}");
        if all.iter().all(|instance| instance["name"] != name) {
            daemon.launch_fake(&name).ok();
        }
    }
    daemon.run(&["delete", "--all"]).ok();
    let mut patience = Duration::ZERO;
    wait_until("the trash is empty", 60, || {
        // What one of them has begun is finished by it, or by the next one.
        ask("POST", "/v1/purge", "", patience);
        patience += Duration::from_micros(500);
        let none = daemon.api().instances().unwrap().is_empty();
        let files = files_below(&daemon.storage().join("data/instances"));
        (none && files.is_empty()).then_some(())
    });
    daemon.launch_fake("kept").ok();
}

fn only_kept(daemon: &Daemon) -> String {
    let all = daemon.api().instances().unwrap();
    let names = all.iter().filter_map(|instance| instance["name"].as_str());
    let kept: Vec<_> = names.filter(|name| name.starts_with("kept")).collect();
    assert_eq!(kept.len(), 1, "{all:?}");
    kept[0].to_owned()
}

#[test]
fn fake_hostile_images() {
    if !need(&[Need::Root, Need::Tun, Need::Program("qemu-img")]) {
        return;
    }
    let daemon = Daemon::fake();
    let folder = daemon.folder().to_owned();
    let path = |name: &str| folder.join(name).display().to_string();
    let secret = path("secret");
    std::fs::write(&secret, vec![b's'; 1 << 20]).unwrap();

    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        &secret,
        "-F",
        "raw",
        &path("backing.qcow2"),
    ]);
    let data = format!("data_file={}", path("data.raw"));
    qemu_img(&[
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        &data,
        &path("data.qcow2"),
        "1M",
    ]);
    qemu_img(&["create", "-q", "-f", "qcow2", &path("good.qcow2"), "64M"]);
    let good = std::fs::read(path("good.qcow2")).unwrap();
    std::fs::write(path("cut.qcow2"), &good[..4096]).unwrap();
    qemu_img(&["create", "-q", "-f", "qcow2", &path("large.qcow2"), "8G"]);

    for (name, words) in [
        ("backing.qcow2", "backing"),
        ("data.qcow2", "data"),
        ("cut.qcow2", ""),
    ] {
        let url = format!("file://{}", path(name));
        refused(&daemon, &daemon.run(&["launch", &url]), 2, words);
    }
    // The image is fine, the disk that was asked for is too small for it.
    let url = format!("file://{}", path("large.qcow2"));
    let small = daemon.run(&["launch", &url, "-d", "2G"]);
    refused(&daemon, &small, 2, "below minimum for this image");
    daemon.run(&["launch", &url, "--name", "large"]).ok();
    assert_eq!(daemon.field("large", "/state"), "Running");
}

#[test]
fn fake_host_lacks() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let mut daemon = Daemon::fake();
    // No QEMU, and one that is too old.
    let image = format!("file://{}", daemon.fake_image().display());
    daemon.stop();
    let script = daemon.folder().join("old-qemu");
    std::fs::write(&script, "#!/bin/sh\necho 'QEMU emulator version 7.2.0'\n").unwrap();
    Command::new("chmod")
        .arg("755")
        .arg(&script)
        .status()
        .unwrap();
    for (program, words) in [
        (script.display().to_string(), "7.2"),
        ("/nonesuch/qemu".to_owned(), "nonesuch"),
    ] {
        let mut other = daemon.with_args(&["--qemu", &program]);
        other.start_again();
        refused(&other, &other.run(&["launch", &image]), 2, words);
        other.stop();
        daemon = other;
    }
}

/// A member of the daemon's group launches from files that the member may read, and from no others.
#[test]
fn fake_files_of_others() {
    if !need(&[Need::Root, Need::Tun, Need::Program("setpriv")]) {
        return;
    }
    let daemon = Daemon::start(pileus_testkit::Options {
        args: vec!["--group".into(), "nogroup".into()],
        ..pileus_testkit::Options::fake()
    });
    let mine = daemon.write_disk("mine.raw", 1 << 20, 1);
    let roots = daemon.write_disk("roots.raw", 1 << 20, 2);
    let mode = |path: &std::path::Path, mode: u32| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(path, mode).unwrap();
    };
    mode(&mine, 0o644);
    mode(&roots, 0o600);
    let launch = |path: &std::path::Path| {
        let url = format!("file://{}", path.display());
        let output = daemon
            .inside(std::path::Path::new("setpriv"))
            .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"])
            .arg(pileus_testkit::program("pileus"))
            .arg("--socket")
            .arg(daemon.socket())
            .args(["launch", &url, "--name", "foo"])
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    };
    let (code, words) = launch(&roots);
    assert_eq!(code, Some(2), "{words}");
    assert!(words.contains("may not read"), "{words}");
    assert_eq!(daemon.run(&["list"]).ok(), "No instances found.\n");
    let (code, words) = launch(&mine);
    assert_eq!(code, Some(0), "{words}");
    assert_eq!(daemon.state("foo"), "Running");
}

/// The same for a pull; what a member sends needs nobody's leave to be read.
#[test]
fn fake_images_of_others() {
    if !need(&[Need::Root, Need::Tun, Need::Program("setpriv")]) {
        return;
    }
    let daemon = Daemon::start(pileus_testkit::Options {
        args: vec!["--group".into(), "nogroup".into()],
        ..pileus_testkit::Options::fake()
    });
    let file = daemon.write_disk("mine.raw", 1 << 20, 1);
    let mode = |mode: u32| {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
        std::fs::set_permissions(&file, mode).unwrap();
    };
    let url = format!("file://{}", file.display());
    let member = |args: &[&str], input: std::process::Stdio| {
        let output = daemon
            .inside(std::path::Path::new("setpriv"))
            .args(["--reuid=nobody", "--regid=nogroup", "--clear-groups"])
            .arg(pileus_testkit::program("pileus"))
            .arg("--socket")
            .arg(daemon.socket())
            .args(args)
            .stdin(input)
            .output()
            .unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.code(),
            text(&output.stdout) + &text(&output.stderr),
        )
    };
    let null = std::process::Stdio::null;
    mode(0o600);
    let (code, words) = member(&["image", "pull", &url], null());
    assert_eq!(code, Some(2), "{words}");
    assert!(words.contains("may not read"), "{words}");
    let (code, words) = member(&["image", "import", &file.display().to_string()], null());
    assert_eq!(code, Some(2), "{words}");
    assert!(words.contains("Permission denied"), "{words}");
    assert_eq!(daemon.run(&["image"]).ok(), "No images in the store.\n");
    // Opened by somebody who may.
    let open = std::fs::File::open(&file).unwrap();
    let (code, words) = member(&["image", "import", "-"], open.into());
    assert_eq!(code, Some(0), "{words}");
    daemon.run(&["image", "prune"]).ok();
    mode(0o644);
    let (code, words) = member(&["image", "pull", &url], null());
    assert_eq!(code, Some(0), "{words}");
    let shown = daemon.run(&["image", "info", &url]).ok();
    assert!(shown.contains("Title:          mine.raw\n"), "{shown}");
}

#[test]
fn fake_full_disk() {
    if !need(&[Need::Root, Need::Tun, Need::Program("mount")]) {
        return;
    }
    // A storage on a file system of its own that is nearly full.
    let daemon = Daemon::on_small_disk(540 << 20);
    let image = format!("file://{}", daemon.fake_image().display());
    let big = daemon.write_disk("big.raw", 60 << 20, 7);
    let url = format!("file://{}", big.display());
    let full = daemon.run(&["launch", &url]);
    refused(&daemon, &full, 2, "");
    let words = full.stderr.to_lowercase();
    assert!(words.contains("space") || words.contains("room"), "{words}");
    // What fits still works.
    daemon.run(&["launch", &image, "--name", "small"]).ok();
}
