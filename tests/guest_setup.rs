//! Real guests whose set-up is special: cloud-init that fails, user data that only a boot can follow,
//! images that boot by firmware, guests without our agent.

use pileus_testkit::{Daemon, GUEST_IMAGE, Need, Options, guest_image, need};

/// User data with users of its own, and a command that fails: the launch tells what failed, the
/// instance runs, and pileus is not locked out. It boots, because the template has the default user.
#[test]
fn guest_cloud_init_that_fails() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let daemon = Daemon::start(Options::warm());
    only_a_boot(&daemon);
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
    assert_eq!(daemon.origin("foo"), "cold");
    let why =
        "Booting instead of a warm start: the user data needs a boot (users without default).";
    assert!(words.contains(why), "{words}");
    let exec = |words: &[&str]| daemon.run(&[&["exec", "foo", "--"], words].concat()).ok();
    assert_eq!(exec(&["cat", "/etc/motd-of-user"]), "hello from user data");
    assert_eq!(exec(&["id", "-un"]), "ubuntu\n");
    assert_eq!(exec(&["sudo", "-n", "id", "-un", "somebody"]), "somebody\n");
    let status = daemon.run(&["info", "foo"]).ok();
    assert!(status.contains("error"), "{status}");
    daemon.run(&["delete", "--purge", "foo"]).ok();
}

/// What has to be done before the rest of the boot is not done late, and not left out.
fn only_a_boot(daemon: &Daemon) {
    for (what, user_data) in [
        ("bootcmd", "#cloud-config\nbootcmd: [echo early]\n"),
        (
            "disk_setup",
            "#cloud-config\ndisk_setup: {/dev/vdc: {table_type: gpt}}\n",
        ),
        (
            "vendor_data",
            "#cloud-config\nvendor_data: {enabled: false}\n",
        ),
        ("boothook", "#cloud-boothook\n#!/bin/sh\necho early\n"),
    ] {
        let args = ["launch", "--warm", "--name", "foo", "--cloud-init", "-"];
        let refused = daemon.run_with(&args, user_data.as_bytes()).fails_with(2);
        assert!(refused.contains("can't start warm"), "{what}: {refused}");
        assert!(refused.contains(what), "{what}: {refused}");
        assert_eq!(daemon.state("foo"), "none");
    }
    let args = [
        "run",
        "--warm",
        "--cloud-init",
        "-",
        GUEST_IMAGE,
        "--",
        "true",
    ];
    let bootcmd = b"#cloud-config\nbootcmd: [echo early]\n";
    daemon.run_with(&args, bootcmd).fails_with(125);
}

/// The same disk as a plain file, compressed: no kernel beside it, so its own boot loader starts it.
/// Its user refused our vendor data, so that it has no agent: it is reached over the network.
#[test]
fn guest_by_firmware_and_without_an_agent() {
    if !need(&[Need::Root, Need::Tun, Need::Guest, Need::Program("zstd")]) {
        return;
    }
    let daemon = Daemon::start(Options {
        warm: "manual",
        ..Options::default()
    });
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
    let user_data = b"#cloud-config\nvendor_data: {enabled: false}\n";
    let args = [
        "launch",
        &url,
        "--name",
        "foo",
        "-d",
        "3G",
        "--cloud-init",
        "-",
    ];
    let launch = daemon.run_with(&args, user_data);
    assert_eq!(launch.ok_with_words(), "Launched: foo\n");
    let exec = |words: &[&str]| daemon.exec("foo", words);
    let cmdline = exec(&["cat", "/proc/cmdline"]);
    assert!(
        cmdline.contains("BOOT_IMAGE"),
        "not by the boot loader: {cmdline}"
    );
    assert_eq!(exec(&["nproc"]), "1\n");
    let agent = daemon.run(&["exec", "foo", "--", "ls", "/usr/local/lib/pileus"]);
    assert_ne!(agent.code(), 0, "it has an agent: {}", agent.text());
    let through = daemon.run_with(&["exec", "foo", "--", "cat"], b"over the network");
    assert_eq!(through.ok(), "over the network");
    assert_ne!(daemon.field("foo", "/ipv4/0"), serde_json::Value::Null);
    // A guest that is told to stop does so in good order.
    daemon.run(&["stop", "foo"]).ok();
    assert_eq!(daemon.state("foo"), "Stopped");
}
