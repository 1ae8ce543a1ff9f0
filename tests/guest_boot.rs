//! One guest that boots, and one that goes on from a template, with the same user data: both must come
//! to the same. Then what only boots show: restart, power off, start, for both at once.

use pileus_testkit::{Daemon, Need, Options, files_below, need, wait_until};

/// Everything that user data commonly does and that needs no network.
const USER_DATA: &str = r#"Content-Type: multipart/mixed; boundary="PART"
MIME-Version: 1.0

--PART
Content-Type: text/cloud-config

#cloud-config
hostname: web
fqdn: web.example.test
timezone: Europe/Lisbon
groups:
  - ops
  - devs
users:
  - default
  - name: alice
    gecos: Alice
    groups: [adm, ops, devs]
    shell: /bin/bash
    sudo: "ALL=(ALL) NOPASSWD:ALL"
    lock_passwd: true
    ssh_authorized_keys:
      - ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ alice@example
  - name: service
    system: true
    no_create_home: true
    shell: /usr/sbin/nologin
ssh_authorized_keys:
  - ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJdD7y3aLq454yWBdwLWbieU1ebz9/cu7/QEXn9OIeZJ user@example
chpasswd:
  expire: false
  users:
    - {name: alice, password: "$6$saltsalt$0RzL2oZV0e0k0T7kq0L1mQ0m3jv0V1FhCkUqk6e1H1PzWq", type: hash}
write_files:
  - path: /etc/given/plain
    content: |
      a line of text
    permissions: '0640'
    owner: root:adm
  - path: /etc/given/base64
    encoding: b64
    content: AAEC/w==
    permissions: '0600'
  - path: /etc/given/zipped
    encoding: gz+b64
    content: H4sIAAAAAAAC/8ssUShPLFaoyiwoSE3hAgDurn4SDgAAAA==
  - path: /etc/motd
    append: true
    content: |
      appended
  - path: /home/alice/late
    content: written after the users were made
    owner: alice:alice
    permissions: '0400'
    defer: true
runcmd:
  - echo "one $(id -un) $(hostname)" >> /var/log/order
  - [sh, -c, 'echo "two $0" >> /var/log/order', word]
  - [touch, /root/ran]
--PART
Content-Type: text/x-shellscript

#!/bin/sh
echo "script $(id -un)" >> /var/log/order
--PART--
"#;

/// What came of it, as text to be compared.
const LOOK: &str = r#"
section() { echo "== $1"; }
section passwd; grep -E '^(root|ubuntu|alice|service):' /etc/passwd
section group; grep -E 'alice|ubuntu|service|^ops|^devs' /etc/group
section shadow; awk -F: '/^(root|ubuntu|alice|service):/ {print $1, $2, $4, $5, $6, $7, $8}' /etc/shadow
section sudoers; grep -rv '^#' /etc/sudoers.d | sort
section keys; for f in /home/*/.ssh/authorized_keys /root/.ssh/authorized_keys; do
  [ -e $f ] && stat -c '%n %a %U:%G' $f && grep -o 'example$' $f; done
section files; for f in /etc/given/* /etc/motd /home/alice/late /root/ran; do
  stat -c '%n %a %U:%G %s' $f; sha256sum < $f; done
stat -c '%n %a %U:%G' /etc/given /home/alice
section names; hostname; hostname -f; cat /etc/hostname
grep -v '^#' /etc/hosts | sed 's/[[:space:]][[:space:]]*/ /g' | sort
section zone; cat /etc/timezone 2>/dev/null || true; readlink /etc/localtime; date +%Z
section netplan; for f in /etc/netplan/*; do stat -c '%n %a' $f
  sed -E 's/([0-9a-f]{2}:){5}[0-9a-f]{2}/MAC/' $f; done
section cloud; cloud-init status
section semaphores; ls /var/lib/cloud/instance/sem | sort
section order; cat /var/log/order
"#;

#[test]
fn guest_boot() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let daemon = Daemon::start(Options::warm());
    std::thread::scope(|scope| {
        let daemon = &daemon;
        scope.spawn(|| launch(daemon, "boots", &["--cold", "-c", "2"]));
        launch(daemon, "clone", &["-d", "8G"]);
    });
    assert_eq!(daemon.origin("boots"), "cold");
    the_cold_one(&daemon);
    let grown = the_warm_one(&daemon);
    let (cold, warm) = (daemon.script("boots", LOOK), daemon.script("clone", LOOK));
    same(&cold, &warm);
    for name in ["boots", "clone"] {
        let known = daemon.exec(name, &["cloud-init", "query", "instance_id"]);
        let told = daemon.script(name, "cat /var/lib/cloud/data/instance-id");
        assert_eq!(known, told, "{name}");
    }
    boots_again(&daemon);
    for (name, before) in [("boots", &cold), ("clone", &warm)] {
        same(before, &daemon.script(name, LOOK));
    }
    assert_eq!(root_kib(&daemon, "clone"), grown);
    shared_by_wish(&daemon);
    trash(&daemon);
}

/// The two share what their user data gives to both, and nothing else.
fn shared_by_wish(daemon: &Daemon) {
    let identities = daemon.run(&["verify-unique", "boots", "clone"]);
    assert_eq!(identities.code(), 1, "{}", identities.text());
    let shown = identities.text();
    let mut shared: Vec<&str> = shown
        .lines()
        .filter_map(|line| {
            line.split_once(": boots, clone share ")
                .map(|(item, _)| item)
        })
        .collect();
    shared.sort_unstable();
    let wished = [
        "authorized keys /home/alice/.ssh/authorized_keys",
        "authorized keys /home/ubuntu/.ssh/authorized_keys",
        "authorized keys /root/.ssh/authorized_keys",
        "hostname",
    ];
    assert_eq!(shared, wished, "{shown}");
}

fn launch(daemon: &Daemon, name: &str, more: &[&str]) {
    let args = [&["launch", "--name", name, "--cloud-init", "-"], more].concat();
    let launched = daemon.run_with(&args, USER_DATA.as_bytes());
    assert_eq!(launched.ok_with_words(), format!("Launched: {name}\n"));
}

/// The same lines, section by section.
#[track_caller]
fn same(one: &str, other: &str) {
    let sections = |text: &str| -> Vec<String> { text.split("== ").map(str::to_owned).collect() };
    let (all, others) = (sections(one), sections(other));
    let pairs = all.iter().zip(&others);
    let differ: Vec<_> = pairs.filter(|(one, other)| one != other).collect();
    assert!(differ.is_empty(), "{differ:#?}");
    assert_eq!(all.len(), others.len());
    assert!(
        one.contains("== order\nscript root\none root web\ntwo word\n"),
        "{one}"
    );
}

fn root_kib(daemon: &Daemon, name: &str) -> u64 {
    let size = daemon.exec(name, &["df", "--output=size", "/"]);
    size.lines().last().unwrap().trim().parse().unwrap()
}

fn the_cold_one(daemon: &Daemon) {
    assert_eq!(daemon.exec("boots", &["nproc"]), "2\n");
    let kib = root_kib(daemon, "boots");
    assert!((4 << 20..5 << 20).contains(&kib), "/ has {kib} KiB");
    let info = daemon.run(&["info", "boots"]).ok();
    for phase in ["starting", "booting", "initializing"] {
        assert!(info.contains(phase), "{info}");
    }
    let log = daemon.run(&["logs", "boots"]).ok();
    let start = &log[..log.len().min(500)];
    assert!(log.contains("Linux version"), "{start}");
}

/// Returns the size of the file system that has grown with its disk.
fn the_warm_one(daemon: &Daemon) -> u64 {
    let info = daemon.run(&["info", "clone"]).ok();
    assert_eq!(daemon.origin("clone"), "warm", "{info}");
    let kib = root_kib(daemon, "clone");
    assert!(kib > 7 << 20, "/ has {kib} KiB");
    daemon.script("clone", "echo kept > /root/kept; sync");
    // Its template goes; what it stands on stays.
    let id = daemon.template().id.clone();
    daemon.run(&["template", "delete", &id]).ok();
    assert!(daemon.template().layer.exists());
    assert!(!daemon.template().ram.exists());
    kib
}

/// One way down for each, then up again, both at the same time.
fn boots_again(daemon: &Daemon) {
    let boot_id = |name: &str| daemon.exec(name, &["cat", "/proc/sys/kernel/random/boot_id"]);
    let before = [boot_id("boots"), boot_id("clone")];
    std::thread::scope(|scope| {
        scope.spawn(|| daemon.run(&["restart", "boots"]).ok());
        daemon.run(&["exec", "clone", "--", "sudo", "poweroff"]);
        wait_until("the guest is off", 90, || {
            (daemon.state("clone") == "Stopped").then_some(())
        });
        let info = daemon.run(&["info", "clone"]).ok();
        assert!(!info.contains("unexpectedly"), "{info}");
        // exec starts a stopped instance.
        let args = ["exec", "clone", "--", "sudo", "cat", "/root/kept"];
        assert_eq!(daemon.run(&args).ok_with_words(), "kept\n");
    });
    assert_eq!(daemon.state("clone"), "Running");
    let after = [boot_id("boots"), boot_id("clone")];
    assert!(
        before.iter().all(|id| !after.contains(id)),
        "{before:?} {after:?}"
    );
}

fn trash(daemon: &Daemon) {
    daemon.run(&["delete", "boots", "clone"]).ok();
    assert!(daemon.machines().is_empty());
    daemon.run(&["recover", "clone"]).ok();
    assert_eq!(daemon.state("clone"), "Stopped");
    assert!(daemon.template().layer.exists());
    daemon.run(&["delete", "--purge", "--all"]).ok();
    daemon.run(&["purge"]).ok();
    let left = files_below(&daemon.storage().join("data/instances"));
    assert!(left.is_empty(), "{left:?}");
    assert!(!daemon.template().layer.exists(), "nobody stands on it");
}
