//! Commands about an instance's life, its snapshots and settings: what is asked of the daemon, what is
//! shown, the exit code. Under the program's own name; `multipass.rs` has the other one.

mod support;

use std::io::Write;
use std::process::Stdio;

use pileus_api::{Code, ErrorBody};
use pileus_base::Error;
use serde_json::json;
use support::snapshots::snapshot_json;
use support::{Daemon, Ran, instance};

fn daemon() -> Daemon {
    let daemon = Daemon::start(vec![
        instance("foo", "running"),
        instance("bar", "stopped"),
        instance("nap", "suspended"),
    ]);
    daemon.script.lock().unwrap().snapshots = vec![
        snapshot_json("foo", "one", None),
        snapshot_json("foo", "two", Some("one")),
        snapshot_json("bar", "one", None),
    ];
    daemon
}

fn posts(daemon: &Daemon) -> Vec<String> {
    let calls = daemon.calls().into_iter();
    calls.filter(|call| !call.starts_with("GET")).collect()
}

fn input(daemon: &Daemon, line: &str, text: &str) -> Ran {
    let mut child = daemon
        .command(line)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that needs none may be gone already.
    let _ = child.stdin.take().unwrap().write_all(text.as_bytes());
    Ran::of(&child.wait_with_output().unwrap())
}

#[test]
fn stops_now_later_or_not_after_all() {
    let daemon = daemon();
    assert_eq!(daemon.run("stop foo bar -t +5"), Ran::ok(""));
    let later = json!({"force": false, "delay_minutes": 5, "cancel": false});
    let sent = ("POST /v1/instances/foo/stop".to_owned(), later);
    assert_eq!(daemon.bodies(), [sent]);
    // Nothing to take back.
    assert_eq!(daemon.run("stop foo --cancel"), Ran::ok(""));
    assert!(daemon.bodies().is_empty());
    let soon = "2199-01-01T00:00:00Z".parse().unwrap();
    daemon.script.lock().unwrap().instances[0].shutdown_at = Some(soon);
    assert_eq!(daemon.run("stop -c foo"), Ran::ok(""));
    assert_eq!(daemon.bodies()[0].1["cancel"], true);
    let list = daemon.run("list --format csv");
    assert!(list.out.contains("foo,Delayed Shutdown,"), "{}", list.out);
    // A start takes it back too.
    assert_eq!(daemon.run("start foo"), Ran::ok(""));
    assert_eq!(daemon.bodies()[0].0, "POST /v1/instances/foo/start");
    // A suspended one is not among all that is to be stopped, unless by force.
    daemon.calls();
    assert_eq!(daemon.run("stop --all"), Ran::ok(""));
    assert_eq!(posts(&daemon), ["POST /v1/instances/foo/stop"]);
    assert_eq!(daemon.run("stop --all --force"), Ran::ok(""));
    assert_eq!(posts(&daemon).len(), 2);
    let err = Error::new(Code::ShutdownTimeout, "It did not shut down");
    daemon.script.lock().unwrap().end = Some(ErrorBody::from(err));
    let ran = daemon.run("stop foo");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err.ends_with("hint: Use --force to power it off.\n"),
        "{}",
        ran.err
    );
}

#[test]
fn suspends_what_runs() {
    let daemon = daemon();
    assert_eq!(daemon.run("suspend foo bar nap"), Ran::ok(""));
    assert_eq!(posts(&daemon), ["POST /v1/instances/foo/suspend"]);
    let ran = daemon.run("suspend x");
    let text = "suspend failed: The following errors occurred:\ninstance \"x\" does not exist\n";
    assert_eq!((ran.code, ran.err.as_str()), (2, text));
    assert_eq!(daemon.run("start nap"), Ran::ok(""));
    assert_eq!(posts(&daemon), ["POST /v1/instances/nap/start"]);
}

#[test]
fn restarts_only_what_runs() {
    let daemon = daemon();
    let ran = daemon.run("restart bar");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err
            .starts_with("restart failed: Instance 'bar' is not running\n"),
        "{}",
        ran.err
    );
    assert_eq!(daemon.run("restart --all"), Ran::ok(""));
    assert_eq!(posts(&daemon), ["POST /v1/instances/foo/restart"]);
}

#[test]
fn snapshots_are_taken_of_running_instances_too() {
    let daemon = daemon();
    assert_eq!(
        daemon.run("snapshot foo"),
        Ran::ok("Snapshot taken: foo.snapshot1\n")
    );
    assert_eq!(
        daemon.run("snapshot foo -n now -m all-well --with-memory"),
        Ran::ok("Snapshot taken: foo.now\n")
    );
    let request = json!({"name": "now", "comment": "all-well", "with_memory": true});
    assert_eq!(daemon.bodies()[1].1, request);
    let ran = daemon.run("snapshot foo -n 1a");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err
            .starts_with("snapshot failed: Invalid snapshot name supplied: 1a\n"),
        "{}",
        ran.err
    );
    assert_eq!(daemon.run("snapshot").code, 1);
    assert_eq!(daemon.run("snapshot x").code, 2);
}

#[test]
fn a_restore_asks_or_is_told() {
    let daemon = daemon();
    let ran = daemon.run("restore foo.one");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err.starts_with(
            "restore failed: Unable to query client for confirmation. Use '--destructive' to \
             automatically discard current machine state.\n"
        ),
        "{}",
        ran.err
    );
    assert!(posts(&daemon).is_empty());
    assert_eq!(
        daemon.run("restore foo.one -d"),
        Ran::ok("Snapshot restored: foo.one\n")
    );
    assert_eq!(
        posts(&daemon),
        ["POST /v1/instances/foo/snapshots/one/restore"]
    );
    assert_eq!(daemon.bodies()[0].1, json!({"disk_only": false}));
    let ran = daemon.run("restore foo.nope -d");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err
            .starts_with("restore failed: No such snapshot: foo.nope\n"),
        "{}",
        ran.err
    );
    assert_eq!(daemon.run("restore foo -d").code, 1);
}

#[test]
fn clones_of_instances_and_snapshots() {
    let daemon = daemon();
    assert_eq!(
        daemon.run("clone foo"),
        Ran::ok("Cloned from foo to foo-clone1.\n")
    );
    assert_eq!(
        daemon.run("clone foo.one --name copy"),
        Ran::ok("Cloned from foo.one to copy.\n")
    );
    let bodies = daemon.bodies();
    assert_eq!(bodies[0].1, json!({}));
    assert_eq!(bodies[1].1, json!({"name": "copy", "snapshot": "one"}));
    let ran = daemon.run("clone foo -n 1a");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err
            .starts_with("clone failed: Invalid destination instance name: 1a\n"),
        "{}",
        ran.err
    );
    assert_eq!(daemon.run("rename foo web"), Ran::ok(""));
    assert_eq!(daemon.bodies()[0].1, json!({"name": "web"}));
    assert_eq!(daemon.run("rename foo 1a").code, 2);
}

#[test]
fn deletes_instances_and_snapshots() {
    let daemon = daemon();
    assert_eq!(
        daemon.run("delete bar foo.one foo.two foo.one -p"),
        Ran::ok("")
    );
    assert_eq!(
        posts(&daemon),
        [
            "DELETE /v1/instances/foo/snapshots/one",
            "DELETE /v1/instances/foo/snapshots/two",
            "DELETE /v1/instances/bar?purge=true",
        ]
    );
    // An instance takes its snapshots along.
    assert_eq!(daemon.run("delete -p foo foo.one"), Ran::ok(""));
    assert_eq!(posts(&daemon), ["DELETE /v1/instances/foo?purge=true"]);
    for line in ["delete foo.one", "delete bar foo.one"] {
        let ran = daemon.run(line);
        assert_eq!((ran.code, ran.out.as_str()), (2, ""));
        assert!(
            ran.err.starts_with(
                "delete failed: Snapshots can only be purged (after deletion, they cannot be \
                 recovered). Unable to query client for confirmation. Please use the `--purge` \
                 flag if that is what you want\n"
            ),
            "{}",
            ran.err
        );
    }
    let ran = daemon.run("delete foo.nope x y.z bar -p");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err.starts_with(
            "delete failed: The following errors occurred:\nNo such snapshot: foo.nope\n\
             instance \"y\" does not exist\ninstance \"x\" does not exist\n"
        ),
        "{}",
        ran.err
    );
    daemon.script.lock().unwrap().instances[0].deleted = true;
    let ran = daemon.run("delete foo.one -p");
    assert!(
        ran.err
            .starts_with("delete failed: Cannot delete snapshots of deleted instances: foo.one\n"),
        "{}",
        ran.err
    );
    assert!(posts(&daemon).is_empty());
}

#[test]
fn snapshots_are_shown() {
    let daemon = daemon();
    let list = "\
Instance   Snapshot   Parent   Comment
bar        one        --       --
foo        one        --       --
foo        two        one      --
";
    assert_eq!(daemon.run("list --snapshots"), Ran::ok(list));
    let ran = daemon.run("list --snapshots --no-ipv4");
    let text = "IP addresses are not applicable in conjunction with listing snapshots\n";
    assert_eq!((ran.code, ran.err.as_str()), (1, text));
    let json = |line: &str| -> serde_json::Value {
        let ran = daemon.run(line);
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{line}");
        serde_json::from_str(&ran.out).unwrap()
    };
    let one = json("info foo.two --format json");
    assert_eq!(one["info"]["foo"]["snapshots"]["two"]["parent"], "one");
    assert!(one["info"]["foo"]["state"].is_null());
    let mixed = json("info foo foo.two --format json");
    assert_eq!(mixed["info"]["foo"]["state"], "Running");
    let all = json("info --snapshots --format json");
    assert_eq!(all["info"].as_object().unwrap().len(), 2);
    let ran = daemon.run("info foo foo.two --format csv");
    let text = "Mixed snapshot and instance arguments are not supported with CSV format\n";
    assert_eq!((ran.code, ran.err.as_str()), (1, text));
    let ran = daemon.run("info foo.nope");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err.contains("No such snapshot: foo.nope"),
        "{}",
        ran.err
    );
    daemon.script.lock().unwrap().snapshots.clear();
    assert_eq!(
        daemon.run("info --snapshots"),
        Ran::ok("No snapshots found.\n")
    );
    let old = daemon.run("info --all --format csv");
    assert_eq!(old.code, 0);
    assert!(old.err.starts_with("warning: "), "{}", old.err);
}

#[test]
fn the_primary_instance_is_meant_if_none_is_named() {
    let daemon = daemon();
    for line in ["stop", "restart", "suspend"] {
        let ran = daemon.run(line);
        assert_eq!(ran.code, 2, "{line}");
        assert!(
            ran.err.contains("\ninstance \"primary\" does not exist\n"),
            "{}",
            ran.err
        );
    }
    assert_eq!(daemon.run("start"), Ran::ok("Launched: primary\n"));
    let launched = daemon.script.lock().unwrap().launches[0].clone();
    assert_eq!(launched.name.unwrap().as_str(), "primary");
    assert_eq!(daemon.run("set client.primary-name=nap"), Ran::ok(""));
    assert_eq!(daemon.run("get client.primary-name"), Ran::ok("nap\n"));
    let list = daemon.run("list --format csv");
    assert!(
        list.out.lines().nth(1).unwrap().starts_with("nap,"),
        "{}",
        list.out
    );
    daemon.calls();
    assert_eq!(daemon.run("start"), Ran::ok(""));
    assert_eq!(posts(&daemon), ["POST /v1/instances/nap/start"]);
    let shell = input(&daemon, "shell", "echo hello\n");
    assert_eq!((shell.code, shell.out.as_str()), (0, "echo hello\n"));
    assert_eq!(daemon.run("set client.primary-name="), Ran::ok(""));
    assert_eq!(daemon.run("get client.primary-name"), Ran::ok("<empty>\n"));
    assert_eq!(daemon.run("get client.primary-name --raw"), Ran::ok("\n"));
    for line in ["start", "stop", "restart", "suspend", "shell"] {
        let ran = daemon.run(line);
        let text = "Name argument or --all is required\nNote: the primary instance is disabled.\n";
        assert_eq!((ran.code, ran.err.as_str()), (1, text), "{line}");
    }
}

#[test]
fn a_shell_makes_the_primary_instance() {
    let daemon = daemon();
    let shell = input(&daemon, "shell primary", "x\n");
    assert_eq!((shell.code, shell.err.as_str()), (0, ""));
    assert_eq!(shell.out, "Launched: primary\nx\n");
    assert_eq!(daemon.run("shell other").code, 2);
}

#[test]
fn nobody_gets_a_shell_that_ends_at_once() {
    let daemon = daemon();
    let at = |seconds: i64| {
        let now = pileus_api::Timestamp::now().as_second();
        pileus_api::Timestamp::from_second(now + seconds).unwrap()
    };
    daemon.script.lock().unwrap().instances[0].shutdown_at = Some(at(30));
    let ran = daemon.run("shell foo");
    assert_eq!(ran.code, 2);
    let text = "shell failed: instance \"foo\" is scheduled to shut down in less than a minute, use \
                'pileus stop --cancel foo' to cancel the shutdown.\n";
    assert!(ran.err.starts_with(text), "{}", ran.err);
    daemon.script.lock().unwrap().instances[0].shutdown_at = Some(at(90));
    assert_eq!(daemon.run("shell foo").code, 0);
}

#[test]
fn settings_of_the_client_and_of_the_daemon() {
    let daemon = daemon();
    daemon.script.lock().unwrap().settings = vec![
        ("local.driver".into(), "qemu".into()),
        ("local.bridged-network".into(), String::new()),
    ];
    assert_eq!(daemon.run("get local.driver"), Ran::ok("qemu\n"));
    assert_eq!(
        daemon.run("get local.bridged-network"),
        Ran::ok("<empty>\n")
    );
    assert_eq!(
        daemon.run("get --keys"),
        Ran::ok("client.primary-name\nlocal.driver\nlocal.bridged-network\n")
    );
    assert_eq!(daemon.run("get").code, 0);
    assert_eq!(daemon.run("set local.foo.cpus=2"), Ran::ok(""));
    assert_eq!(daemon.bodies()[0].1, json!({"value": "2"}));
    assert_eq!(
        input(&daemon, "set local.passphrase", "secret\n"),
        Ran::ok("")
    );
    assert_eq!(
        daemon.bodies(),
        [(
            "PUT /v1/settings/local.passphrase".to_owned(),
            json!({"value": "secret"})
        )]
    );
    for line in ["get client.nope", "set client.nope=1"] {
        let ran = daemon.run(line);
        let text = "Unrecognized settings key: 'client.nope'\n";
        assert_eq!((ran.code, ran.err.as_str()), (1, text), "{line}");
    }
    assert_eq!(daemon.run("set local.driver").code, 1, "no value, no input");
}

#[test]
fn authentication_and_what_is_not_there_yet() {
    let daemon = daemon();
    assert_eq!(input(&daemon, "authenticate", "open sesame\n"), Ran::ok(""));
    let ran = input(&daemon, "auth", "");
    assert_eq!((ran.code, ran.err.as_str()), (1, "No passphrase given\n"));
    let ran = daemon.run("auth wrong");
    assert_eq!(ran.code, 2);
    assert!(
        ran.err
            .starts_with("authenticate failed: Passphrase is not correct. Please try again.\n"),
        "{}",
        ran.err
    );
    daemon.calls();
    for (line, code) in [
        ("mount /tmp foo", 2),
        ("mount /nope foo", 1),
        ("umount foo", 2),
        ("launch --network mode=auto", 1),
        ("launch --network name=", 1),
        ("launch --mount /tmp:/x", 2),
        ("launch --mount /nope", 1),
    ] {
        let ran = daemon.run(line);
        assert_eq!((ran.code, ran.out.as_str()), (code, ""), "{line}");
        assert!(!ran.err.is_empty(), "{line}");
    }
    assert!(daemon.calls().is_empty());
}

#[test]
fn a_launch_need_not_be_waited_for() {
    let daemon = daemon();
    daemon.script.lock().unwrap().hang = true;
    assert_eq!(
        daemon.run("launch -n web --no-wait"),
        Ran::ok("Launching: web\n")
    );
}
