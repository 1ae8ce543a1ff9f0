//! The program called by the name `multipass`: what scripts that drive Multipass rely on, to the letter.

mod support;

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
        snapshot_json("bar", "one", None),
        snapshot_json("bar", "two", Some("one")),
    ];
    daemon
}

fn failed(code: i32, err: &str) -> Ran {
    Ran {
        code,
        out: String::new(),
        err: err.to_owned(),
    }
}

#[test]
fn version_is_two_lines_and_one_without_a_daemon() {
    let daemon = daemon();
    let both = "multipass   1.16.3\nmultipassd  1.16.3\n";
    assert_eq!(daemon.multipass("version"), Ran::ok(both));
    assert_eq!(daemon.multipass("--version"), Ran::ok(both));
    let one = "multipass   1.16.3\n";
    assert_eq!(daemon.multipass("version --socket /nope"), Ran::ok(one));
    let json = daemon.multipass("version --format json");
    let json: serde_json::Value = serde_json::from_str(&json.out).unwrap();
    assert_eq!(json, json!({"multipass": "1.16.3", "multipassd": "1.16.3"}));
}

#[test]
fn help_lists_the_commands_as_tools_read_them() {
    let daemon = daemon();
    let none = daemon.multipass("");
    assert_eq!((none.code, none.err.as_str()), (2, ""));
    for line in ["help", "-h", "--help"] {
        let help = daemon.multipass(line);
        assert_eq!((help.code, help.err.as_str()), (0, ""), "{line}");
        assert_eq!(help.out, none.out, "{line}");
    }
    for (name, short) in [
        ("launch", "Create and start an Ubuntu instance"),
        ("list", "List all available instances or snapshots"),
        ("wait-ready", "Wait for the Multipass daemon to be ready"),
        ("umount", "Unmount a directory from an instance"),
    ] {
        let found = none.out.lines().any(|line| {
            let rest = line
                .strip_prefix("  ")
                .and_then(|rest| rest.strip_prefix(name));
            rest.is_some_and(|rest| rest.starts_with(' ') && rest.trim() == short)
        });
        assert!(found, "{name}: {}", none.out);
    }
    let help = daemon.multipass("help launch");
    assert_eq!((help.code, help.err.as_str()), (0, ""));
    assert!(help.out.contains("Usage: multipass launch"), "{}", help.out);
    for ours in ["pileus", "--cold", "--storage", "--no-wait"] {
        assert!(!help.out.contains(ours), "{ours}: {}", help.out);
    }
    for line in ["help nope", "help run"] {
        let word = line.split(' ').nth(1).unwrap();
        let text = format!("Error: Unknown Command: '{word}'\n");
        assert_eq!(daemon.multipass(line), failed(1, &text));
    }
    assert!(daemon.calls().is_empty());
    let completed = daemon
        .multipass_command("-- multipass susp")
        .env("COMPLETE", "bash")
        .env("_CLAP_COMPLETE_INDEX", "1")
        .env("_CLAP_COMPLETE_COMP_TYPE", "9")
        .env("_CLAP_COMPLETE_SPACE", "true")
        .env("_CLAP_IFS", "\n")
        .output()
        .unwrap();
    assert_eq!(Ran::of(&completed).out.trim(), "suspend");
}

#[test]
fn what_is_no_command_is_told_on_standard_output() {
    let daemon = daemon();
    for word in ["nope", "run", "fork", "rename", "images", "image"] {
        let ran = daemon.multipass(&format!("{word} a b"));
        let text = format!(
            "Error: Unknown command or alias '{word}' (try \"multipass help\" or \"multipass \
             aliases\")\n"
        );
        assert_eq!(
            (ran.code, ran.out, ran.err.as_str()),
            (1, text, ""),
            "{word}"
        );
    }
    assert_eq!(
        daemon.multipass("list --nope"),
        failed(1, "Unknown option 'nope'.\n")
    );
}

#[test]
fn without_a_daemon_its_own_socket_is_named() {
    let daemon = daemon();
    for line in ["list", "info foo", "launch", "start foo", "exec foo -- ls"] {
        let ran = daemon.multipass(&format!("--socket /nope/sock {line}"));
        let command = line.split(' ').next().unwrap();
        let text = format!(
            "{command} failed: cannot connect to the multipass socket\n\
             Please ensure multipassd is running and '/nope/sock' is accessible\n"
        );
        assert_eq!(ran, failed(2, &text));
    }
}

#[test]
fn its_storage_is_honoured() {
    let daemon = daemon();
    let storage = daemon.dir.path().join("storage");
    std::fs::create_dir_all(storage.join("run")).unwrap();
    std::os::unix::fs::symlink(daemon.socket(), storage.join("run/pileusd.sock")).unwrap();
    let run = |name: &str| {
        let output = daemon
            .multipass_command("list --format csv")
            .env_remove("PILEUS_SOCKET")
            .env("PILEUS_STORAGE", "/nope")
            .env(name, &storage)
            .output();
        Ran::of(&output.unwrap())
    };
    assert_eq!(run("MULTIPASS_STORAGE").code, 0);
    let by_address = daemon
        .multipass_command("list --format csv")
        .env("PILEUS_SOCKET", "/nope")
        .env(
            "MULTIPASS_SERVER_ADDRESS",
            format!("unix:{}", daemon.socket().display()),
        )
        .output();
    assert_eq!(Ran::of(&by_address.unwrap()).code, 0);
    let own = daemon
        .command("list --format csv")
        .env_remove("PILEUS_SOCKET")
        .env("PILEUS_STORAGE", &storage)
        .env("MULTIPASS_STORAGE", "/nope")
        .output();
    assert_eq!(Ran::of(&own.unwrap()).code, 0);
}

#[test]
fn errors_are_a_line_and_details_and_nothing_else() {
    let daemon = daemon();
    for command in ["info", "stop", "suspend", "delete", "recover"] {
        let text = format!(
            "{command} failed: The following errors occurred:\ninstance \"x\" does not exist\n"
        );
        assert_eq!(daemon.multipass(&format!("{command} x")), failed(2, &text));
    }
    assert_eq!(
        daemon.multipass("start x"),
        failed(
            2,
            "start failed: instance(s) missing\nInstance 'x' does not exist.\n"
        )
    );
    daemon.script.lock().unwrap().instances[1].deleted = true;
    assert_eq!(
        daemon.multipass("start bar"),
        failed(
            2,
            "start failed: instance(s) missing\nInstance 'bar' is deleted. Use 'recover' to \
             recover it or 'purge' to permanently delete it.\n"
        )
    );
    assert_eq!(
        daemon.multipass("stop bar"),
        failed(
            2,
            "stop failed: The following errors occurred:\ninstance \"bar\" is deleted\n"
        )
    );
    let err = Error::new(Code::InstanceExists, "instance \"foo\" already exists")
        .advise("pileus delete it.");
    daemon.script.lock().unwrap().end = Some(ErrorBody::from(err));
    assert_eq!(
        daemon.multipass("launch -n foo"),
        failed(2, "launch failed: instance \"foo\" already exists\n")
    );
    let err = Error::new(Code::WrongState, "Cannot shut down suspended instance nap.");
    daemon.script.lock().unwrap().end = Some(ErrorBody::from(err));
    assert_eq!(
        daemon.multipass("stop nap"),
        failed(
            2,
            "stop failed: Cannot shut down suspended instance nap.\nUse --force to power it off.\n"
        )
    );
}

#[test]
fn command_lines_that_can_not_work() {
    let daemon = daemon();
    let format = "Invalid format type given.\n";
    let required = "Name argument or --all is required\n";
    for (line, text) in [
        ("stop foo -t x", "Time must be in digit form\n"),
        (
            "stop foo -t 1 --cancel",
            "Cannot set 'time' and 'cancel' options at the same time\n",
        ),
        (
            "stop foo --force -c",
            "Cannot set 'force' along with 'time' or 'cancel' options at the same time\n",
        ),
        ("delete", required),
        ("recover", required),
        (
            "start --all foo",
            "Cannot specify name(s) when --all option set\n",
        ),
        (
            "start foo --timeout -1",
            "error: --timeout value has to be a positive integer\n",
        ),
        ("list --format xml", format),
        ("find a:b:c", "Invalid remote and search string supplied\n"),
        ("find --only-images", "Unknown option 'only-images'.\n"),
        (
            "launch a:b:c",
            "Invalid remote and source image name supplied\n",
        ),
        (
            "launch -c 0",
            "Error: invalid CPU count '0', need a positive integer value.\n",
        ),
        (
            "launch -m 1CiG",
            "1CiG is not a valid memory size - need a non-negative integer (in base 10) or a \
             decimal followed by K, M, or G (e.g. 1234B, 42MiB, 0.5G)\n",
        ),
        (
            "get",
            "Multiple settings not implemented yet. Please try again with one setting key or \
             just the `--keys` option for now.\n",
        ),
        ("set a=b=c", "Bad key-value format.\n"),
        (
            "get client.nope",
            "Unrecognized settings key: 'client.nope'\n",
        ),
        ("authenticate", "No passphrase given\n"),
    ] {
        let ran = daemon.multipass(line);
        assert_eq!((ran.code, ran.out.as_str()), (1, ""), "{line}: {}", ran.err);
        assert_eq!(ran.err, text, "{line}");
    }
    for (line, text) in [
        (
            "launch -d 512M",
            "launch failed: Invalid arguments supplied\nInvalid disk size value supplied: 512M.\n",
        ),
        (
            "launch -m 511M",
            "launch failed: Invalid arguments supplied\nInvalid memory size value supplied: 511M.\n",
        ),
        (
            "launch -n 1a",
            "launch failed: Invalid arguments supplied\nInvalid instance name supplied: 1a\n",
        ),
    ] {
        assert_eq!(daemon.multipass(line), failed(2, text), "{line}");
    }
    let ran = daemon.multipass("launch --cloud-init /nope");
    assert_eq!(ran.code, 1);
    assert!(
        ran.err
            .ends_with("\nPlease ensure that Multipass can read it.\n"),
        "{}",
        ran.err
    );
    assert!(daemon.calls().is_empty());
}

#[test]
fn success_says_nothing_on_standard_error() {
    let daemon = daemon();
    {
        let mut script = daemon.script.lock().unwrap();
        script.warnings = vec!["slow here".into()];
        script.instances.push(instance("old", "stopped"));
        script.instances[3].deleted = true;
        script.settings = vec![("local.driver".into(), "qemu".into())];
        script.catalog = vec![json!({
            "name": "24.04", "aliases": ["noble", "lts"], "os": "Ubuntu", "release": "24.04 LTS",
            "version": "20260101", "remote": "release", "cached": false,
        })];
    }
    for (line, out) in [
        ("launch -n web 24.04", Some("Launched: web\n")),
        ("start bar nap", Some("")),
        ("stop foo", Some("")),
        ("restart foo", Some("")),
        ("suspend foo", Some("")),
        ("recover old", Some("")),
        ("purge", Some("")),
        ("list", None),
        ("list --format json", None),
        ("info", None),
        ("info foo --format yaml", None),
        ("find", None),
        ("find 24.04 --format json", None),
        ("get local.driver", Some("qemu\n")),
        ("set local.driver=qemu", Some("")),
        ("exec foo -- both-is-not-there", None),
        ("wait-ready --timeout 5", Some("")),
        ("delete foo", Some("")),
    ] {
        let ran = daemon.multipass(line);
        let code = if line.starts_with("exec") { 127 } else { 0 };
        assert_eq!((ran.code, ran.err.as_str()), (code, ""), "{line}");
        assert!(!ran.out.contains('\x1b'), "{line}");
        if let Some(out) = out {
            assert_eq!(ran.out, out, "{line}");
        }
    }
}

#[test]
fn snapshots_are_for_stopped_instances() {
    let daemon = daemon();
    daemon
        .script
        .lock()
        .unwrap()
        .snapshots
        .push(snapshot_json("foo", "one", None));
    for (line, text) in [
        (
            "snapshot foo",
            "snapshot failed: Multipass can only take snapshots of stopped instances.\n",
        ),
        (
            "restore foo.one -d",
            "restore failed: Multipass can only restore snapshots of stopped instances.\n",
        ),
        (
            "clone foo",
            "clone failed: Multipass can only clone stopped instances.\n",
        ),
        (
            "clone nap",
            "clone failed: Multipass can only clone stopped instances.\n",
        ),
        (
            "snapshot x",
            "snapshot failed: instance \"x\" does not exist\n",
        ),
        ("clone x", "clone failed: instance \"x\" does not exist\n"),
        (
            "restore bar.x -d",
            "restore failed: No such snapshot: bar.x\n",
        ),
        (
            "restore bar.one",
            "restore failed: Unable to query client for confirmation. Use '--destructive' to \
             automatically discard current machine state.\n",
        ),
    ] {
        assert_eq!(daemon.multipass(line), failed(2, text), "{line}");
    }
    assert!(daemon.calls().iter().all(|call| call.starts_with("GET")));
    assert_eq!(
        daemon.multipass("snapshot bar --name s -c why"),
        Ran::ok("Snapshot taken: bar.s\n")
    );
    assert_eq!(
        daemon.multipass("restore bar.one --destructive"),
        Ran::ok("Snapshot restored: bar.one\n")
    );
    assert_eq!(
        daemon.multipass("clone bar --name copy"),
        Ran::ok("Cloned from bar to copy.\n")
    );
}

#[test]
fn only_stopped_instances_are_changed() {
    let daemon = daemon();
    let text = |reason: &str, name: &str| {
        let text = format!(
            "set failed: Cannot update instance settings; instance: {name}; reason: {reason}\n"
        );
        failed(2, &text)
    };
    assert_eq!(
        daemon.multipass("set local.foo.cpus=2"),
        text("Instance must be stopped for modification", "foo")
    );
    assert_eq!(
        daemon.multipass("set local.x.memory=2G"),
        text("No such instance", "x")
    );
    assert_eq!(daemon.multipass("set local.bar.cpus=2"), Ran::ok(""));
    assert_eq!(
        daemon.multipass("set local.foo.snapshot1.name=x"),
        Ran::ok("")
    );
    assert_eq!(
        daemon.multipass("get local.nope"),
        failed(2, "get failed: Unrecognized settings key: 'local.nope'\n")
    );
    let refused = ("local.bar.disk".to_owned(), Code::InvalidSetting);
    daemon.script.lock().unwrap().bad_setting =
        Some((refused.0, refused.1, "Disk can only be expanded".to_owned()));
    assert_eq!(
        daemon.multipass("set local.bar.disk=1G"),
        failed(
            2,
            "set failed: Invalid setting 'local.bar.disk=1G': Disk can only be expanded\n"
        )
    );
    let keys = "client.primary-name\nlocal.bridged-network\nlocal.driver\nlocal.image.mirror\n\
                local.passphrase\nlocal.privileged-mounts\nlocal.bar.cpus\n\
                local.foo.snapshot1.name\n";
    assert_eq!(daemon.multipass("get --keys"), Ran::ok(keys));
    // Both names share the client's own settings.
    assert_eq!(
        daemon.multipass("set client.primary-name=main"),
        Ran::ok("")
    );
    assert_eq!(daemon.run("get client.primary-name"), Ran::ok("main\n"));
}

#[test]
fn what_programs_read() {
    let daemon = daemon();
    let table = "\
Name                    State             IPv4             Image
bar                     Stopped           --               Debian 13
foo                     Running           10.1.2.3         Debian 13
nap                     Suspended         --               Debian 13
";
    assert_eq!(daemon.multipass("list"), Ran::ok(table));
    let list = daemon.multipass("list --format csv").out;
    assert!(
        list.starts_with("Name,State,IPv4,IPv6,Release,AllIPv4\n"),
        "{list}"
    );
    let info = daemon.multipass("info foo --format json").out;
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let fields: Vec<&String> = info["info"]["foo"].as_object().unwrap().keys().collect();
    let mut known = [
        "state",
        "image_hash",
        "image_release",
        "release",
        "cpu_count",
        "snapshot_count",
        "load",
        "disks",
        "memory",
        "ipv4",
        "mounts",
    ];
    known.sort_unstable();
    assert_eq!(fields, known);
    daemon.script.lock().unwrap().instances.clear();
    assert_eq!(daemon.multipass("list"), Ran::ok("No instances found.\n"));
    assert_eq!(
        daemon.multipass("list --snapshots --format csv").out,
        "Instance,Snapshot,Parent,Comment\nbar,one,,\"\"\nbar,two,one,\"\"\n"
    );
    assert_eq!(daemon.multipass("find"), Ran::ok("No images found.\n"));
    assert_eq!(
        daemon.multipass("find nope"),
        failed(
            2,
            "find failed: Unable to find an image matching \"nope\".\n"
        )
    );
}

#[test]
fn what_is_searched_for_is_the_daemons_to_find() {
    let daemon = daemon();
    let entry = |name: &str, remote: &str| {
        json!({
            "name": name, "aliases": ["noble", "n", "default"], "os": "Ubuntu", "release": "24.04 LTS",
            "version": "20260101", "remote": remote, "cached": false,
        })
    };
    daemon.script.lock().unwrap().catalog =
        vec![entry("24.04", "release"), entry("26.10", "daily")];
    let found = |line: &str| -> serde_json::Value {
        let ran = daemon.multipass(line);
        assert_eq!(ran.err, "", "{line}");
        let json: serde_json::Value = serde_json::from_str(&ran.out).unwrap();
        json["images"].clone()
    };
    let all = found("find --format json");
    assert_eq!(all["24.04"]["aliases"], json!(["noble"]));
    assert_eq!(all["daily:26.10"]["remote"], "daily");
    let one = found("find 24.04 --format json");
    assert_eq!(one["24.04"]["aliases"], json!([]));
    assert_eq!(one["24.04"]["remote"], "");
    assert_eq!(one.as_object().unwrap().len(), 1);
    daemon.bodies();
    for (line, asked) in [
        ("find", json!({"unsupported": false, "refresh": false})),
        (
            "find 24.04 --force-update",
            json!({"search": "24.04", "unsupported": false, "refresh": true}),
        ),
        (
            "find daily: --show-unsupported",
            json!({"search": "daily:", "unsupported": true, "refresh": false}),
        ),
    ] {
        daemon.multipass(line);
        let bodies = daemon.bodies();
        assert_eq!(bodies, [("GET /v1/catalog".to_owned(), asked)], "{line}");
    }
    let text = "Unable to find an image matching \"lts\": remote \"release\" is unreachable.";
    let err = Error::new(Code::FetchFailed, text);
    daemon.script.lock().unwrap().end = Some(ErrorBody::from(err));
    let expected = format!("find failed: {text}\n");
    assert_eq!(daemon.multipass("find lts"), failed(2, &expected));
}

#[test]
fn launches_without_an_image_and_with_networks() {
    let daemon = daemon();
    let launched = |multipass: bool, line: &str| {
        let ran = match multipass {
            true => daemon.multipass(line),
            false => daemon.run(line),
        };
        assert_eq!((ran.code, ran.err.as_str()), (0, ""), "{line}");
        daemon.script.lock().unwrap().launches.pop().unwrap()
    };
    assert_eq!(launched(true, "launch").image.as_deref(), Some("lts"));
    assert_eq!(
        launched(true, "launch noble").image.as_deref(),
        Some("noble")
    );
    assert_eq!(launched(false, "launch").image, None);
    // The primary instance is made like any other one.
    assert_eq!(launched(true, "start").image.as_deref(), Some("lts"));
    daemon
        .script
        .lock()
        .unwrap()
        .instances
        .retain(|i| i.name.as_str() != "primary");
    assert_eq!(launched(false, "start").image, None);

    for multipass in [false, true] {
        let mac = "52:54:00:aB:cd:ef";
        let line = format!("launch --network name=br0,mode=manual,mac={mac} --bridged --network x");
        let networks = serde_json::to_value(launched(multipass, &line).networks).unwrap();
        let expected = json!([
            {"name": "br0", "mode": "manual", "mac": mac},
            {"name": "x", "mode": "auto"},
            {"name": "bridged", "mode": "auto"},
        ]);
        assert_eq!(networks, expected);
    }
    let file = daemon.dir.path().join("net.yaml");
    std::fs::write(&file, b"version: 2 # \xff\n").unwrap();
    let request = launched(
        false,
        &format!("launch --network-config {}", file.display()),
    );
    assert_eq!(request.network_config.unwrap().0, b"version: 2 # \xff\n");
    let ran = daemon.run("launch --network-config /nope");
    assert_eq!(ran.code, 1);
    assert!(
        ran.err
            .starts_with("Could not load the network configuration: /nope"),
        "{}",
        ran.err
    );
    assert_eq!(
        daemon.run("launch --network-config - --cloud-init -").code,
        1
    );
}

#[test]
fn the_bridged_network_is_not_taken_away() {
    let daemon = daemon();
    let key = "local.bar.bridged";
    for (now, word, multipass) in [
        ("false", "false", Ran::ok("")),
        ("false", "true", Ran::ok("")),
        (
            "true",
            "off",
            failed(
                2,
                "set failed: Invalid setting 'local.bar.bridged=off': Removing the bridged network \
                 is currently not supported\n",
            ),
        ),
    ] {
        daemon.script.lock().unwrap().settings = vec![(key.into(), now.into())];
        let line = format!("set {key}={word}");
        assert_eq!(daemon.multipass(&line), multipass, "{now} {word}");
        assert_eq!(daemon.run(&line), Ran::ok(""), "{now} {word}");
    }
}

#[test]
fn exec_gives_the_commands_code_and_bytes() {
    let daemon = daemon();
    assert_eq!(daemon.multipass("exec foo -- exit 33").code, 33);
    assert_eq!(daemon.multipass("exec foo exit 34").code, 34);
    assert_eq!(daemon.multipass("exec -n foo -- exit 35").code, 35);
    assert_eq!(daemon.multipass("exec foo -d /x -- exit 36").code, 36);
    // What is stopped or suspended is started.
    assert_eq!(daemon.multipass("exec bar -- exit 0"), Ran::ok(""));
    assert_eq!(daemon.multipass("exec nap -- exit 0"), Ran::ok(""));
    assert_eq!(daemon.multipass("exec foo -- broken").code, 255);
    assert_eq!(
        daemon.multipass("exec foo ls -l"),
        failed(
            1,
            "Unknown option 'l'.\n\nOptions to the inner command should come after \"--\", like \
             this:\nmultipass exec <instance> -- <command> <arguments>\n"
        )
    );
}
