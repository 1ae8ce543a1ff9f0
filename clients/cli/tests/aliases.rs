//! Aliases: all of it in the user's files, the command itself in a guest.

mod guest;
mod support;

use std::fs;
use std::process::Command;

use guest::Daemon;
use support::{Ran, instance};

fn daemon() -> Daemon {
    Daemon::start(vec![instance("foo", "running"), instance("bar", "running")])
}

fn failed(text: &str) -> Ran {
    Ran {
        code: 1,
        out: String::new(),
        err: format!("{text}\n"),
    }
}

const FILE: &str = "../user/.config/pileus/aliases.json";
const BIN: &str = "../user/.local/share/pileus/bin";

#[test]
fn an_alias_runs_its_command() {
    let daemon = daemon();
    let ran = daemon.run("alias foo:/usr/bin/whoami wai");
    assert_eq!((ran.code, ran.err.as_str()), (0, ""));
    // The first one tells of the folder.
    assert!(
        ran.out.contains(".local/share/pileus/bin\"\n"),
        "{}",
        ran.out
    );
    assert_eq!(daemon.run("alias -n bar:id"), Ran::ok(""));
    let ran = daemon.run("wai -- -a b");
    assert_eq!((ran.code, ran.out.as_str()), (7, "/usr/bin/whoami|-a|b\n"));
    let ran = daemon.run("-v nope");
    assert_eq!(ran.code, 1, "{ran:?}");
    let ran = daemon.run("default.id x");
    assert_eq!((ran.code, ran.out.as_str()), (7, "id|x\n"));
    let csv = "Alias,Instance,Command,Working directory,Context\n\
               id,bar,id,default,default*\nwai,foo,/usr/bin/whoami,map,default*\n";
    assert_eq!(daemon.run("aliases --format csv"), Ran::ok(csv));
    // The scripts call it; the program is found where it lies.
    let mut script = Command::new(daemon.host(BIN).join("wai"));
    script.arg("it's").env("PILEUS_SOCKET", daemon.socket());
    let output = script.env("HOME", daemon.host("../user")).output().unwrap();
    let ran = Ran::of(&output);
    assert_eq!(
        (ran.code, ran.out.as_str()),
        (7, "/usr/bin/whoami|it's\n"),
        "{ran:?}"
    );
}

#[test]
fn every_refusal_has_its_text() {
    let daemon = daemon();
    daemon.run("alias foo:whoami wai");
    for (line, text) in [
        ("alias", "Wrong number of arguments given"),
        ("alias a b c", "Wrong number of arguments given"),
        ("alias foo", "No command given"),
        ("alias foo:", "No command given"),
        ("alias :ls", "No instance name given"),
        ("alias foo:ls a/b", "Alias has to be a valid filename"),
        ("alias foo:ls ..", "Alias has to be a valid filename"),
        ("alias none:ls", "Instance 'none' does not exist"),
        (
            "alias foo:id wai",
            "Alias 'wai' already exists in current context",
        ),
        (
            "alias foo:/bin/list",
            "Alias name 'list' clashes with a command name",
        ),
        ("unalias", "Name argument or --all is required"),
        (
            "unalias x --all",
            "Cannot specify name(s) when --all option set",
        ),
        ("unalias x", "Nonexistent alias: x."),
        ("unalias wai x a.b", "Nonexistent aliases: x, a.b."),
        ("prefer", "Wrong number of arguments given"),
        ("prefer a b", "Wrong number of arguments given"),
    ] {
        let mut ran = daemon.run(line);
        ran.err = ran
            .err
            .lines()
            .filter(|l| !l.starts_with("hint: "))
            .map(|l| format!("{l}\n"))
            .collect();
        assert_eq!(ran, failed(text), "{line}");
    }
    // Nothing of it changed anything.
    assert_eq!(daemon.run("wai").out, "whoami\n");
}

#[test]
fn contexts_come_and_go() {
    let daemon = daemon();
    daemon.run("alias foo:whoami wai");
    assert_eq!(daemon.run("prefer work"), Ran::ok(""));
    assert_eq!(daemon.run("wai").code, 1);
    assert_eq!(daemon.run("default.wai").code, 7);
    daemon.run("alias bar:id wai");
    assert_eq!(daemon.run("wai").out, "id\n");
    let bin = |name: &str| daemon.host(BIN).join(name).exists();
    assert!(bin("work.wai") && bin("default.wai") && !bin("wai"));
    assert_eq!(daemon.run("unalias default.wai"), Ran::ok(""));
    assert!(bin("work.wai") && !bin("default.wai") && bin("wai"));
    daemon.run("unalias --all");
    assert_eq!(daemon.run("aliases"), Ran::ok("No aliases defined.\n"));
    let text = fs::read_to_string(daemon.host(FILE)).unwrap();
    let file: serde_json::Value = serde_json::from_str(&text).unwrap();
    let expected = serde_json::json!({"active-context": "work", "contexts": {"work": {}}});
    assert_eq!(file, expected);
}

#[test]
fn what_multipass_wrote_is_found_under_its_name() {
    let daemon = daemon();
    let file = daemon.host("../user/.config/multipass/multipass_aliases.json");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    let text = r#"{"active-context":"default","contexts":{"default":{"wai":
        {"command":"whoami","instance":"foo","working-directory":"map"}}}}"#;
    fs::write(&file, text).unwrap();
    let run = |line: &str| Ran::of(&daemon.named("multipass", line).output().unwrap());
    assert_eq!(run("wai").out, "whoami\n");
    assert_eq!(run("alias bar:ls ll"), Ran::ok(""));
    assert!(
        daemon
            .host("../user/.local/share/multipass/bin/ll")
            .exists()
    );
    assert!(fs::read_to_string(&file).unwrap().contains("\"ll\""));
    assert_eq!(daemon.run("aliases"), Ran::ok("No aliases defined.\n"));
}

#[test]
fn a_damaged_file_is_named_and_left_alone() {
    let daemon = daemon();
    daemon.run("alias foo:whoami wai");
    fs::write(daemon.host(FILE), "{\"active-context\"").unwrap();
    for line in ["aliases", "alias foo:id", "unalias wai", "prefer x", "wai"] {
        let ran = daemon.run(line);
        assert_ne!(ran.code, 0, "{line}");
        assert!(ran.err.contains("pileus/aliases.json"), "{line}: {ran:?}");
    }
    assert_eq!(
        fs::read_to_string(daemon.host(FILE)).unwrap(),
        "{\"active-context\""
    );
    // What else there is still works.
    assert_eq!(daemon.run("exec foo -- x").code, 7);
}

#[test]
fn aliases_go_with_their_instance() {
    let daemon = daemon();
    daemon.run("alias foo:whoami wai");
    daemon.run("alias bar:id me");
    let other = |line: &str| Ran::of(&daemon.named("multipass", line).output().unwrap());
    other("alias foo:top");
    assert_eq!(other("top").out, "top\n");
    assert_eq!(daemon.run("delete --purge foo"), Ran::ok(""));
    assert_eq!(other("aliases"), Ran::ok("No aliases defined.\n"));
    let names = daemon.run("aliases --format csv").out;
    assert!(
        names.contains("me,bar") && !names.contains("foo"),
        "{names}"
    );
    assert!(!daemon.host(BIN).join("wai").exists() && daemon.host(BIN).join("me").exists());
}
