//! Real clones of one template: what makes each of them itself, what they must not know, and forks.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use pileus_testkit::{Daemon, GUEST_IMAGE, Need, Options, files_below, need, wait_until};

/// Items that a guest must tell at least.
const ITEMS: [&str; 11] = [
    "machine-id",
    "machine-id of PID 1",
    "boot-id",
    "hostname",
    "MAC",
    "IPv4",
    "IPv6",
    "instance-id",
    "host key ssh_host_ed25519_key.pub",
    "random of the kernel",
    "generation",
];
const CLONES: usize = 20;
const AT_ONCE: usize = 3;

type Identity = BTreeMap<String, Vec<String>>;

fn identity(daemon: &Daemon, name: &str) -> Identity {
    let told = daemon.get(&format!("/v1/instances/{name}/identity"));
    let items = told["items"].as_array().unwrap();
    let texts = |values: &serde_json::Value| -> Vec<String> {
        let values = values.as_array().unwrap();
        values
            .iter()
            .map(|v| v.as_str().unwrap().to_owned())
            .collect()
    };
    items
        .iter()
        .map(|item| {
            (
                item["name"].as_str().unwrap().to_owned(),
                texts(&item["values"]),
            )
        })
        .collect()
}

/// Compares every item of every pair.
#[track_caller]
fn all_differ(identities: &[(String, Identity)]) {
    for (n, (one, its)) in identities.iter().enumerate() {
        for item in ITEMS {
            assert!(
                its.get(item).is_some_and(|v| !v.is_empty()),
                "{one} has no {item}: {its:#?}"
            );
        }
        for (other, others) in &identities[..n] {
            for (item, values) in its {
                let theirs = others.get(item).map_or(&[][..], Vec::as_slice);
                let shared = values.iter().find(|value| theirs.contains(value));
                assert_eq!(shared, None, "{one} and {other} share their {item}");
            }
        }
    }
}

#[test]
fn guest_clones_are_unique() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let daemon = Daemon::start(Options::warm());
    let names: Vec<String> = (1..=CLONES).map(|n| format!("c{n}")).collect();
    let mut identities = Vec::new();
    for batch in names.chunks(AT_ONCE) {
        std::thread::scope(|scope| {
            for name in batch {
                let daemon = &daemon;
                scope.spawn(move || {
                    daemon
                        .run(&["launch", "--warm", "--name", name])
                        .ok_with_words()
                });
            }
        });
        for name in batch {
            identities.push((name.clone(), identity(&daemon, name)));
        }
        if identities.len() == AT_ONCE {
            verify_unique(&daemon, batch);
        }
        // Stopped, not deleted: addresses of the dead are given to the living.
        let stop = [
            &["stop", "--force"],
            &batch.iter().map(String::as_str).collect::<Vec<_>>()[..],
        ];
        daemon.run(&stop.concat()).ok();
    }
    assert_eq!(identities.len(), CLONES);
    all_differ(&identities);
}

fn verify_unique(daemon: &Daemon, names: &[String]) {
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let verified = daemon.run(&[&["verify-unique"], &names[..]].concat());
    assert_eq!(verified.code(), 0, "{}{}", verified.text(), verified.stderr);
    for item in ITEMS {
        assert!(
            verified.text().contains(item),
            "{item}: {}",
            verified.text()
        );
    }
    // One that takes what is another's is found.
    let id = daemon.exec(names[0], &["cat", "/etc/machine-id"]);
    daemon.script(names[1], &format!("echo {} > /etc/machine-id", id.trim()));
    let found = daemon.run(&[&["verify-unique"], &names[..]].concat());
    assert_eq!(found.code(), 1, "{}", found.text());
    let told = format!("machine-id: {}, {} share {}", names[0], names[1], id.trim());
    assert!(found.text().contains(&told), "{}", found.text());
    assert_eq!(daemon.run(&["verify-unique", names[0], names[0]]).code(), 1);
    assert_eq!(daemon.run(&["verify-unique", names[0], "nobody"]).code(), 2);
}

/// What no template may know, in forms that a memory may have it in.
const SECRETS: [&str; 4] = [
    "secret-in-user-data-73b1",
    "secret-of-a-command-90f2",
    "secret-in-a-file-5e4c",
    "secret-from-standard-input-1d88",
];

/// A template that is made after others have used the daemon holds nothing of theirs.
#[test]
fn guest_templates_hold_no_secrets() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let daemon = Daemon::start(Options::warm());
    let user_data = format!(
        "#cloud-config\nwrite_files:\n  - path: /root/given\n    content: {}\n",
        SECRETS[0]
    );
    let launch = ["launch", "--name", "foo", "--cloud-init", "-"];
    daemon
        .run_with(&launch, user_data.as_bytes())
        .ok_with_words();
    daemon.exec(
        "foo",
        &[
            "sh",
            "-c",
            &format!("echo {} {} > file; sync", SECRETS[1], SECRETS[2]),
        ],
    );
    daemon
        .run_with(&["exec", "foo", "--", "cat"], SECRETS[3].as_bytes())
        .ok();
    let keys = daemon.instance_folder("foo");
    let key_lines = |name: &str| -> Vec<String> {
        let text = std::fs::read_to_string(keys.join(name)).unwrap();
        let inner = text
            .lines()
            .filter(|line| line.len() > 60 && !line.contains("KEY"));
        inner.skip(1).map(str::to_owned).collect()
    };
    let mut secrets: Vec<String> = SECRETS.iter().map(|s| (*s).to_owned()).collect();
    secrets.extend(key_lines("client_key"));
    secrets.extend(key_lines("host_key"));
    assert!(secrets.len() > SECRETS.len(), "no line of a key was found");
    // The instance's own files have them: the search works.
    assert!(holds(&keys.join("user-data"), &secrets[..1]));

    let made = daemon
        .run(&["template", "create", GUEST_IMAGE, "-m", "512M"])
        .ok();
    let id = made.trim().strip_prefix("Ready: ").unwrap();
    assert_ne!(id, daemon.template().id);
    let folder = daemon.storage().join("data/templates").join(id);
    assert!(holds(&folder.join("ram"), &["pileus-template".to_owned()]));
    for file in daemon.templates_and_layers() {
        let data = daemon.storage().join("data");
        for path in [
            data.join("templates").join(&file),
            data.join("layers").join(&file),
        ] {
            if path.exists() {
                assert!(!holds(&path, &secrets), "{} knows a secret", path.display());
            }
        }
    }
}

/// Whether one of the texts is in the file.
fn holds(file: &Path, texts: &[String]) -> bool {
    let mut grep = Command::new("grep");
    grep.env("LC_ALL", "C").args(["-q", "-a", "-F"]);
    for text in texts {
        grep.arg("-e").arg(text);
    }
    match grep.arg(file).status().unwrap().code() {
        Some(0) => true,
        Some(1) => false,
        code => panic!("grep {}: {code:?}", file.display()),
    }
}

/// Forks go on with what is in memory, as somebody else; so does the one that was forked.
#[test]
fn guest_forks() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let daemon = Daemon::start(Options::warm());
    daemon
        .run(&["launch", "--warm", "--name", "src"])
        .ok_with_words();
    // Its state is nowhere but in its memory.
    let counter = "token=$(cat /proc/sys/kernel/random/uuid); i=0\n\
                   while :; do i=$((i+1)); echo \"$token $i\" > /dev/shm/now; sleep 0.1; done";
    let start = format!("setsid -f sh -c '{counter}' > /dev/null 2>&1 < /dev/null");
    daemon.exec("src", &["sh", "-c", &start]);
    let count = |name: &str| -> (String, u64) {
        wait_until("the counter tells", 10, || {
            let told = daemon
                .run(&["exec", name, "--", "cat", "/dev/shm/now"])
                .text();
            let (token, number) = told.trim().split_once(' ')?;
            Some((token.to_owned(), number.parse().ok()?))
        })
    };
    let (token, before) = wait_until("the counter counts", 10, || {
        let (token, number) = count("src");
        (number > 3).then_some((token, number))
    });
    hook(
        &daemon,
        "echo $PILEUS_HOSTNAME $PILEUS_MODE $(hostname) > /var/tmp/hooked",
    );
    // What a machine that was booted has: drawn by chance, once.
    let drawn = "cd /var/lib/systemd && head -c 512 /dev/urandom > random-seed && echo drawn > credential.secret";
    daemon.exec("src", &["sudo", "sh", "-c", drawn]);
    let forked = daemon.run(&["-v", "fork", "src", "-n", "2"]);
    assert_eq!(forked.ok_with_words(), "src-fork1\nsrc-fork2\n");
    assert!(
        forked.stderr.contains("src stood still for 0."),
        "{}",
        forked.stderr
    );
    for name in ["src", "src-fork1", "src-fork2"] {
        assert_eq!(daemon.state(name), "Running");
        let (its, first) = count(name);
        assert_eq!(its, token, "{name} is another process");
        assert!(first > before, "{name} went back: {first} {before}");
        wait_until("it goes on", 20, || (count(name).1 > first).then_some(()));
        assert_eq!(daemon.exec(name, &["hostname"]), format!("{name}\n"));
        let hooked = daemon.exec(
            name,
            &["sh", "-c", "cat /var/tmp/hooked 2> /dev/null || true"],
        );
        let expected = match name {
            "src" => String::new(),
            fork => format!("{fork} full {fork}\n"),
        };
        assert_eq!(hooked, expected, "the owner's hook in {name}");
    }
    let identities: Vec<_> = ["src", "src-fork1", "src-fork2"]
        .map(|name| (name.to_owned(), identity(&daemon, name)))
        .into();
    all_differ(&identities);
    assert_eq!(daemon.origin("src-fork1"), "fork");
    // Each has a disk of its own from then on.
    daemon.exec("src-fork1", &["sh", "-c", "echo mine > mine; sync"]);
    assert_ne!(daemon.run(&["exec", "src", "--", "cat", "mine"]).code(), 0);
    // A fork of a fork, and names of one's own.
    daemon
        .run(&["fork", "src-fork1", "--name", "again"])
        .ok_with_words();
    assert_eq!(daemon.exec("again", &["cat", "mine"]), "mine\n");
    let taken = daemon
        .run(&["fork", "src", "--name", "again"])
        .fails_with(2);
    assert!(taken.contains("already exists"), "{taken}");
    // An owner's hook that fails: nobody is let in, nothing is left.
    hook(&daemon, "echo not here; exit 5");
    let failed = daemon.run(&["fork", "src", "--name", "never"]);
    assert_ne!(failed.code(), 0);
    let words = "ended with 5: not here";
    assert!(failed.stderr.contains(words), "{}", failed.stderr);
    assert_eq!(daemon.state("never"), "none");
    daemon.run(&["delete", "--purge", "src", "src-fork1"]).ok();
    assert_eq!(daemon.exec("again", &["cat", "mine"]), "mine\n");
    daemon.run(&["delete", "--purge", "--all"]).ok();
    let layers = files_below(&daemon.storage().join("data/layers"));
    assert_eq!(
        layers.len(),
        1,
        "only the template's layer stays: {layers:?}"
    );
}

/// Gives the guest "src" a hook that its clones run.
fn hook(daemon: &Daemon, body: &str) {
    let path = "/etc/pileus/on-clone.d/10-test";
    let script = format!(
        "mkdir -p /etc/pileus/on-clone.d; printf '%s\\n' '#!/bin/sh' '{body}' > {path}; chmod 755 {path}"
    );
    daemon.script("src", &script);
}

/// Clones that stand by serve a launch in less time, are somebody else, and go when they are not wanted.
#[test]
fn guest_standby_clones() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let mut daemon = Daemon::start(Options::warm());
    daemon.run(&["set", "local.warm-pool=1"]).ok();
    let mut identities = Vec::new();
    for name in ["a", "b"] {
        daemon
            .run(&["launch", "--warm", "--name", name])
            .ok_with_words();
        assert_eq!(daemon.exec(name, &["hostname"]), format!("{name}\n"));
        identities.push((name.to_owned(), identity(&daemon, name)));
        let running = identities.len();
        wait_until("a clone stands by", 60, || {
            (daemon.machines().len() == running + 1).then_some(())
        });
        let stands_by = || daemon.log().matches("a clone stands by").count();
        wait_until("it is ready", 60, || (stands_by() == running).then_some(()));
    }
    all_differ(&identities);
    assert!(!daemon.run(&["list"]).ok().contains("standby"));
    // Nothing of it survives the daemon.
    daemon.kill();
    daemon.start_again();
    wait_until("the one that stood by is gone", 20, || {
        (daemon.machines().len() == 2).then_some(())
    });
    daemon
        .run(&["launch", "--warm", "--name", "c"])
        .ok_with_words();
    wait_until("another one stands by", 60, || {
        (daemon.machines().len() == 4).then_some(())
    });
    daemon.run(&["set", "local.warm-pool=0"]).ok();
    wait_until("it is let go, with its folder", 20, || {
        let folders = std::fs::read_dir(daemon.storage().join("data/instances"));
        (daemon.machines().len() == 3 && folders.unwrap().count() == 3).then_some(())
    });
}
