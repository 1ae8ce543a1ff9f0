//! Real guests whose set-up is special: cloud-init that fails, images that boot by firmware.

use pileus_testkit::{Daemon, Need, Options, guest_image, need};

/// User data with users of its own, and a command that fails: the launch tells what failed, the
/// instance runs, and pileus is not locked out.
#[test]
fn guest_cloud_init_that_fails() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let daemon = Daemon::start(Options::real());
    let user_data = b"#cloud-config
users:
  - name: somebody
hostname: other
write_files:
  - path: /etc/motd-of-user
    content: hello from user data
runcmd:
  - [ sh, -c, 'exit 3' ]
";
    let launch = daemon.run_with(&["launch", "--name", "foo", "--cloud-init", "-"], user_data);
    let words = launch.fails_with(2);
    assert!(words.contains("cloud-init failed"), "{words}");
    assert!(
        words.contains("runcmd") || words.contains("runparts"),
        "{words}"
    );
    assert_eq!(daemon.state("foo"), "Running");
    let exec = |words: &[&str]| daemon.run(&[&["exec", "foo", "--"], words].concat()).ok();
    assert_eq!(exec(&["cat", "/etc/motd-of-user"]), "hello from user data");
    assert_eq!(exec(&["id", "-un"]), "ubuntu\n");
    assert_eq!(exec(&["sudo", "-n", "id", "-un", "somebody"]), "somebody\n");
    let status = daemon.run(&["info", "foo"]).ok();
    assert!(status.contains("error"), "{status}");
    daemon.run(&["delete", "--purge", "foo"]).ok();
}

/// The same disk as a plain file, compressed: no kernel beside it, so its own boot loader starts it.
#[test]
fn guest_from_a_compressed_file_by_firmware() {
    if !need(&[Need::Root, Need::Tun, Need::Guest, Need::Program("zstd")]) {
        return;
    }
    let daemon = Daemon::start(Options::default());
    let image = daemon.folder().join("disk.qcow2");
    let made = std::process::Command::new("qemu-img")
        .args(["convert", "-q", "-f", "raw", "-O", "qcow2"])
        .arg(guest_image().join("disk.raw"))
        .arg(&image)
        .status()
        .unwrap();
    assert!(made.success());
    let packed = std::process::Command::new("zstd")
        .args(["-q", "-1", "--rm"])
        .arg(&image)
        .status();
    assert!(packed.unwrap().success());
    let url = format!("file://{}.zst", image.display());
    daemon
        .run(&["launch", &url, "--name", "foo", "-d", "3G"])
        .ok_with_words();
    let exec = |words: &[&str]| daemon.run(&[&["exec", "foo", "--"], words].concat()).ok();
    let cmdline = exec(&["cat", "/proc/cmdline"]);
    assert!(
        cmdline.contains("BOOT_IMAGE"),
        "not by the boot loader: {cmdline}"
    );
    assert_eq!(exec(&["nproc"]), "1\n");
    // A guest that is told to stop does so in good order.
    daemon.run(&["stop", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Stopped");
}

/// A guest whose user refused our vendor data has no agent: it is reached over the network.
#[test]
fn guest_without_an_agent() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let daemon = Daemon::start(Options::real());
    let user_data = b"#cloud-config\nvendor_data: {enabled: false}\n";
    let launch = daemon.run_with(&["launch", "--name", "foo", "--cloud-init", "-"], user_data);
    assert_eq!(launch.ok_with_words(), "Launched: foo\n");
    let agent = daemon.run(&["exec", "foo", "--", "ls", "/usr/local/lib/pileus"]);
    assert_ne!(agent.code(), 0, "it has an agent: {}", agent.text());
    let through = daemon.run_with(&["exec", "foo", "--", "cat"], b"over the network");
    assert_eq!(through.ok(), "over the network");
    assert_ne!(daemon.field("foo", "/ipv4/0"), serde_json::Value::Null);
    daemon.run(&["stop", "foo"]).ok();
}
