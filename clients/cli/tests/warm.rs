//! Templates, forks, identities and settings against a daemon that plays by a script.

mod support;

use pileus_api::{Code, ErrorBody, Phase, PhaseTime, Size, Warm};
use pileus_base::Error;
use serde_json::json;
use support::{Daemon, Ran, instance};

fn daemon() -> Daemon {
    Daemon::start(vec![instance("foo", "running"), instance("bar", "running")])
}

fn template(id: &str) -> serde_json::Value {
    json!({
        "id": id, "state": "ready", "cpus": 1, "memory": 1_u64 << 30, "disk": 5_u64 << 30,
        "image": {"digest": format!("sha256:{}", "ab".repeat(32)), "source": "debian-13",
                  "os": "Debian", "release": "13"},
        "machine_type": "pc-q35-10.0", "accelerator": "tcg", "qemu": "QEMU 10.0.2",
        "created_at": "2026-11-21T20:00:00Z", "last_used_at": null, "memory_used": 1 << 20,
        "disk_used": 1 << 20, "in_memory": false, "instances": 0,
    })
}

#[test]
fn templates_are_made_shown_and_removed() {
    let daemon = daemon();
    daemon.script.lock().unwrap().templates =
        vec![template("0123456789abcdef"), template("fedcba9876543210")];
    daemon.script.lock().unwrap().templates[1]["cpus"] = json!(2);
    let ran = daemon.run("template create debian-13 -c2 --timeout 60");
    assert_eq!(ran, Ran::ok("Ready: fedcba9876543210\n"));
    {
        let script = daemon.script.lock().unwrap();
        let request = json!({"image": "debian-13", "cpus": 2, "timeout": 60});
        assert_eq!(script.template_requests, [request]);
    }
    let list = daemon.run("template ls");
    assert_eq!((list.code, list.out.lines().count()), (0, 3));
    let info = daemon.run("template info fedc --format json");
    let info: serde_json::Value = serde_json::from_str(&info.out).unwrap();
    assert_eq!(info["id"], "fedcba9876543210");
    assert_eq!(daemon.run("template info ffff").code, 2);
    daemon.calls();

    let removed = "Removed 0123456789abcdef (1.0MiB)\nFreed 1.0MiB\n";
    assert_eq!(daemon.run("template delete 0123"), Ran::ok(removed));
    let ran = daemon.run("template rm 0123 fedcba9876543210");
    assert_eq!(ran.code, 2);
    assert!(
        ran.out.starts_with("Removed fedcba9876543210"),
        "{}",
        ran.out
    );
    assert!(
        ran.err.starts_with("template failed: No template 0123\n"),
        "{}",
        ran.err
    );
    daemon.calls();

    let pruned = "Removed 0123456789abcdef (1.0MiB)\nFreed 1.0MiB\n";
    assert_eq!(daemon.run("template prune"), Ran::ok(pruned));
    assert_eq!(daemon.run("template prune --all").code, 0);
    let calls = daemon.calls();
    assert!(
        calls.contains(&"POST /v1/templates/prune?all=false".to_owned()),
        "{calls:?}"
    );
    assert!(
        calls.contains(&"POST /v1/templates/prune?all=true".to_owned()),
        "{calls:?}"
    );

    let err = Error::new(Code::NoSpace, "No room for its memory");
    daemon.script.lock().unwrap().end = Some(ErrorBody::from(err));
    let ran = daemon.run("template create");
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    assert!(
        ran.err.starts_with("template failed: No room"),
        "{}",
        ran.err
    );
    assert_eq!(daemon.run("template create -m 1M").code, 2);
}

#[test]
fn launch_says_how_it_is_to_start() {
    let daemon = daemon();
    for line in ["launch", "launch --warm", "launch --cold"] {
        assert_eq!(daemon.run(line).code, 0);
    }
    let script = daemon.script.lock().unwrap();
    let asked: Vec<_> = script.launches.iter().map(|launch| launch.warm).collect();
    assert_eq!(asked, [None, Some(Warm::Require), Some(Warm::Never)]);
    assert!(script.launches.iter().all(|launch| launch.lease.is_none()));
}

#[test]
fn fork_prints_the_names() {
    let daemon = daemon();
    daemon.script.lock().unwrap().phases = vec![PhaseTime {
        phase: Phase::Halted,
        milliseconds: 1_042,
    }];
    let names = "foo-fork1\nfoo-fork2\n";
    assert_eq!(daemon.run("fork foo -n 2"), Ran::ok(names));
    let ran = daemon.run("fork foo -v -n 3 --name x --name y");
    assert_eq!((ran.code, ran.out.as_str()), (0, names));
    assert_eq!(ran.err, "foo stood still for 1.042s\n");
    // Others tell what took how long, if it is asked for.
    let times = [(Phase::Suspending, 250), (Phase::Halted, 31)];
    daemon.script.lock().unwrap().phases = times
        .map(|(phase, milliseconds)| PhaseTime {
            phase,
            milliseconds,
        })
        .to_vec();
    assert_eq!(daemon.run("suspend foo"), Ran::ok(""));
    let ran = daemon.run("suspend -v foo");
    let text = "foo: suspending 0.250s\nfoo stood still for 0.031s\n";
    assert_eq!((ran.code, ran.err.as_str()), (0, text));
    let script = daemon.script.lock().unwrap();
    assert_eq!(
        script.forks,
        [
            json!({"count": 2}),
            json!({"count": 3, "names": ["x", "y"]})
        ]
    );
    drop(script);
    assert_eq!(daemon.run("fork none").code, 2);
    for bad in [
        "fork foo -n 0",
        "fork foo -n 101",
        "fork foo -n x",
        "fork foo -n 1 --name a --name b",
    ] {
        assert_eq!(daemon.run(bad).code, 1, "{bad}");
    }
}

#[test]
fn what_is_shared_is_told_and_is_no_success() {
    let daemon = daemon();
    let identity = |name: &str, id: &str| {
        json!({"name": name, "items": [
            {"name": "machine-id", "values": [id]}, {"name": "host-id", "values": []},
        ]})
    };
    daemon.script.lock().unwrap().identities = vec![identity("foo", "1"), identity("bar", "2")];
    let table =
        "Item                    Unique\nmachine-id              yes\nhost-id                 -\n";
    assert_eq!(daemon.run("verify-unique foo bar"), Ran::ok(table));
    daemon.script.lock().unwrap().identities[1] = identity("bar", "1");
    let ran = daemon.run("verify-unique foo bar");
    assert_eq!((ran.code, ran.err.as_str()), (1, ""));
    assert!(
        ran.out.ends_with("\nmachine-id: foo, bar share 1\n"),
        "{}",
        ran.out
    );
    let json = daemon.run("verify-unique foo bar --format json");
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json["unique"], false);
    assert_eq!(
        json["items"][0]["shared"][0]["instances"],
        json!(["foo", "bar"])
    );

    let ran = daemon.run("verify-unique foo none");
    assert_eq!((ran.code, ran.out.as_str()), (2, ""));
    for bad in [
        "verify-unique foo foo",
        "verify-unique foo",
        "verify-unique",
    ] {
        assert_eq!(daemon.run(bad).code, 1, "{bad}");
    }
}

#[test]
fn settings_are_the_daemons() {
    let daemon = daemon();
    let setting = ("local.warm".to_owned(), "auto".to_owned());
    daemon.script.lock().unwrap().settings = vec![setting];
    assert_eq!(daemon.run("get local.warm"), Ran::ok("auto\n"));
    assert_eq!(
        daemon.run("get --keys"),
        Ran::ok("client.primary-name\nlocal.warm\n")
    );
    assert_eq!(daemon.run("set local.warm=off"), Ran::ok(""));
    assert_eq!(daemon.run("get local.warm"), Ran::ok("off\n"));
    assert_eq!(daemon.run("set local.new -1"), Ran::ok(""));
    assert_eq!(daemon.run("set local.other a=b"), Ran::ok(""));
    let csv = "Key,Value,Values\n\
               client.primary-name,primary,\"an instance's name, or nothing\"\nlocal.warm,off,anything\nlocal.new,-1,anything\n\
               local.other,a=b,anything\n";
    assert_eq!(daemon.run("get --format csv"), Ran::ok(csv));
    let ran = daemon.run("get nope");
    assert_eq!(ran.code, 2);
    assert!(ran.err.contains("hint: pileus get --keys"), "{}", ran.err);
    for bad in [
        "set",
        "set local.warm",
        "set a=b c",
        "set =x",
        "get a --keys",
    ] {
        assert_eq!(daemon.run(bad).code, 1, "{bad}");
    }
}

#[test]
fn info_tells_the_origin() {
    let daemon = daemon();
    {
        let mut script = daemon.script.lock().unwrap();
        script.instances[0].origin = serde_json::from_value(json!({
            "kind": "warm", "template": "0123456789abcdef"
        }))
        .unwrap();
        script.instances[0].memory = Size::gib(1);
    }
    let ran = daemon.run("info foo");
    assert!(
        ran.out
            .contains("\nOrigin:         warm 0123456789abcdef\n"),
        "{}",
        ran.out
    );
}
