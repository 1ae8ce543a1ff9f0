//! A link named `multipass` driven as scripts and tools in the wild do it, with real guests.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use pileus_testkit::{Daemon, GUEST_IMAGE, Options, files_below, need, wait_until};
use serde_json::{Value, json};

use crate::multipass::{Multipass, NEEDS, csv, keys, yaml};

#[test]
fn guest_multipass() {
    if !need(&NEEDS) {
        return;
    }
    let mut daemon = Daemon::start(Options::warm());
    let multipass = Multipass::new(&daemon);
    nothing_yet(&multipass);
    let launched = multipass.ok(&format!(
        "launch {GUEST_IMAGE} -c1 --name vm -d5G --memory=1073741824"
    ));
    assert_eq!(launched.lines().last(), Some("Launched: vm"));
    std::thread::scope(|scope| {
        // The old forms, and a shape that has no template: it boots.
        scope.spawn(|| {
            let line = format!("launch --mem 512MB --disk 6Gb -n two {GUEST_IMAGE} --cpus 2");
            assert!(multipass.ok(&line).ends_with("Launched: two\n"));
        });
        refused_launches(&multipass);
        the_guest(&multipass);
        exec_and_shell(&multipass);
        transfers(&multipass);
        trees(&multipass);
        running_shapes(&multipass);
        settings(&multipass);
        aliases(&multipass);
        not_there_yet(&multipass);
        stopped_only(&multipass);
    });
    assert_eq!(multipass.ok("exec two nproc"), "2\n");
    life(&multipass);
    the_end(&multipass);
    let link = multipass.link.clone();
    daemon.stop();
    nobody_there(&daemon, &link);
}

fn nothing_yet(multipass: &Multipass) {
    assert_eq!(multipass.ok("list"), "No instances found.\n");
    assert_eq!(multipass.ok("ls --snapshots"), "No snapshots found.\n");
    assert_eq!(multipass.ok("aliases"), "No aliases defined.\n");
    assert_eq!(multipass.json("list --format=json"), json!({ "list": [] }));
    let list = "Name,State,IPv4,IPv6,Release,AllIPv4\n";
    assert_eq!(multipass.ok("list --format csv"), list);
    let version = multipass.ok("version");
    let lines: Vec<Vec<&str>> = version
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines.len(), 2, "{version}");
    assert_eq!((lines[0][0], lines[1][0]), ("multipass", "multipassd"));
    for line in &lines {
        assert!(line[1].starts_with("1.16."), "{version}");
    }
    let version = multipass.json("version --format json");
    assert_eq!(keys(&version), ["multipass", "multipassd"].into());
    // As tools look for commands.
    let help = multipass.ok("help");
    for command in ["launch", "wait-ready", "umount", "restore"] {
        let line = format!("  {command} ");
        assert!(help.lines().any(|l| l.starts_with(&line)), "{help}");
    }
    multipass.ok("wait-ready --timeout 20");
}

fn refused_launches(multipass: &Multipass) {
    let image = GUEST_IMAGE;
    for (code, line, words) in [
        (2, "-n vm", "launch failed: instance \"vm\" already exists"),
        (1, "-n x -c 0", "invalid CPU count '0'"),
        (1, "-n x -m 1CiG", "1CiG is not a valid memory size"),
        (
            2,
            "-n x -m 128M",
            "Invalid memory size value supplied: 128M.",
        ),
        (2, "-n x -d 512M", "Invalid disk size value supplied: 512M."),
        (
            2,
            "-n under_score",
            "Invalid instance name supplied: under_score",
        ),
        (
            1,
            "-n x --cloud-init nonesuch.yaml",
            "Could not load cloud-init configuration",
        ),
        (
            1,
            "-n x --mount nonesuch",
            "Source path \"nonesuch\" does not exist",
        ),
        (
            1,
            "-n x --timeout 0",
            "--timeout value has to be a positive integer",
        ),
    ] {
        multipass.fails(code, &format!("launch {image} {line}"), words);
    }
    multipass.fails(
        1,
        "launch a:b:c",
        "Invalid remote and source image name supplied",
    );
    assert_eq!(multipass.state("x"), "none");
    multipass.fails(
        2,
        "info x vm",
        "info failed: The following errors occurred:\ninstance \"x\" does not exist\n",
    );
    multipass.fails(1, "info --format toml vm", "Invalid format type given.");
    multipass.fails(2, "stop", "instance \"primary\" does not exist");
}

fn the_guest(multipass: &Multipass) {
    let look = "id -un; id -u; hostname; sudo -n id -u; python3 -c print(6*7); \
                test -x /usr/lib/openssh/sftp-server && echo sftp; echo $HOME";
    let told = multipass.input(
        &[
            "exec",
            "vm",
            "--",
            "sh",
            "-c",
            &look.replace("print(6*7)", "'print(6*7)'"),
        ],
        b"",
    );
    assert_eq!(told.ok(), "ubuntu\n1000\nvm\n0\n42\nsftp\n/home/ubuntu\n");
    // The host reaches its first address.
    let info = multipass.json("info vm --format json");
    let address = info["info"]["vm"]["ipv4"][0].as_str().unwrap().to_owned();
    let greeting = "import socket, sys; print(socket.create_connection((sys.argv[1], 22), 20).recv(8).decode())";
    let mut failed = String::new();
    wait_until("its SSH server greets", 20, || {
        let mut python = multipass.daemon.inside(Path::new("python3"));
        let heard = python.args(["-c", greeting, &address]).output().unwrap();
        failed.push_str(
            String::from_utf8_lossy(&heard.stderr)
                .lines()
                .last()
                .unwrap_or_default(),
        );
        (heard.stdout == b"SSH-2.0-\n").then_some(())
    });
    if !failed.is_empty() {
        eprintln!("port 22 did not answer at once: {failed}");
    }
}

fn exec_and_shell(multipass: &Multipass) {
    let input = |line: &str, bytes: &[u8]| {
        multipass.input(&line.split_whitespace().collect::<Vec<_>>(), bytes)
    };
    assert_eq!(multipass.ok("exec vm -d /usr/lib -- pwd"), "/usr/lib\n");
    assert_eq!(
        multipass.ok("exec --working-directory /tmp vm -- pwd"),
        "/tmp\n"
    );
    assert_eq!(multipass.ok("exec -n vm -- echo -n a"), "a");
    assert_eq!(multipass.ok("exec vm echo a b"), "a b\n");
    assert_eq!(multipass.ok("exec vm -vvvv -- echo a").trim(), "a");
    let binary: Vec<u8> = (0..=255).cycle().take(100_000).collect();
    assert!(input("exec vm -- cat", &binary).stdout == binary);
    assert_eq!(input("exec vm -- wc -c", &binary).ok().trim(), "100000");
    assert_eq!(multipass.run("exec vm -- exit 33").code(), 33);
    assert_eq!(multipass.run("exec vm -- sh -c false").code(), 1);
    let hint = "Options to the inner command should come after \"--\", like this:\n\
                multipass exec <instance> -- <command> <arguments>";
    multipass.fails(1, "exec vm ls -l", hint);
    multipass.fails(
        2,
        "exec nobody -- true",
        "instance \"nobody\" does not exist",
    );
    // Lines on standard input run, and their last code is the shell's.
    let shell = input("shell vm", b"echo $((6*7))\nexit 4\n");
    assert!(shell.text().contains("42"), "{shell:?}");
    assert_eq!(shell.code(), 4);
    for synonym in ["sh", "connect"] {
        let shell = input(&format!("{synonym} vm"), b"hostname\n");
        assert!(shell.text().contains("vm"), "{shell:?}");
    }
}

/// 100 MiB in and out, as binary as they were.
fn transfers(multipass: &Multipass) {
    let mut bytes = vec![0_u8; 100 << 20];
    let mut state = 7_u32;
    for byte in &mut bytes {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    let put = multipass.input(&["transfer", "-", "vm:big file"], &bytes);
    assert_eq!(put.ok(), "");
    let got = multipass.input(&["transfer", "vm:big file", "-"], b"");
    assert!(got.ok_with_words().len() > 1000 && got.stderr.is_empty());
    assert!(got.stdout == bytes, "{} bytes came back", got.stdout.len());
    multipass.ok("exec vm -- rm /home/ubuntu/big\u{a0}file --force");
    for (line, words) in [
        ("- -", "Only one '-' allowed"),
        ("a b -", "Only two arguments allowed when using '-'"),
        ("- here", "Target must be inside an instance"),
        ("here -", "Source must be from inside an instance"),
        (
            "here there",
            "An instance name is needed for either source or destination",
        ),
        (
            "vm:a vm:b",
            "Cannot specify an instance name for both source and destination",
        ),
        ("vm:a", "Not enough arguments given"),
    ] {
        multipass.fails(1, &format!("transfer {line}"), words);
    }
    multipass.fails(2, "transfer vm:nonesuch here", "[error] [sftp]");
    multipass.fails(2, "transfer nonesuch vm:", "[error] [sftp]");
}

/// Folders with modes and links, both ways.
fn trees(multipass: &Multipass) {
    multipass.file("tree/run.sh", "#!/bin/sh\n");
    multipass.file("tree/below/data", [0, 255, 10, 13]);
    let mode = |path: &Path, mode: u32| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    };
    mode(&multipass.folder.join("tree/run.sh"), 0o750);
    mode(&multipass.folder.join("tree/below/data"), 0o600);
    symlink("below/data", multipass.folder.join("tree/link")).unwrap();
    multipass.fails(
        2,
        "transfer tree vm:",
        "omitting local directory \"tree\": recursive mode not specified",
    );
    multipass.ok("transfer -r tree vm:copy");
    let look =
        "cd copy; stat -c '%n %a %F' run.sh below/data link; readlink link; sha256sum < below/data";
    let told = multipass
        .input(&["exec", "vm", "--", "sh", "-c", look], b"")
        .ok();
    assert!(
        told.starts_with("run.sh 750 regular file\nbelow/data 600 regular file\nlink 777 symbolic link\nbelow/data\n"),
        "{told}"
    );
    // Into a folder that is there it is nested, as a folder that is not it takes the name.
    multipass.ok("transfer --recursive --parents tree vm:far/away/it");
    multipass.ok("transfer -r tree vm:copy");
    multipass.ok("exec vm -- test -f far/away/it/below/data -a -f copy/tree/run.sh");
    multipass.ok("copy-files -r vm:copy back");
    let back = multipass.folder.join("back");
    assert_eq!(fs::read(back.join("below/data")).unwrap(), [0, 255, 10, 13]);
    assert_eq!(
        fs::read_link(back.join("link")).unwrap(),
        Path::new("below/data")
    );
    let bits = fs::metadata(back.join("run.sh"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(bits & 0o777, 0o750);
    // Several into a folder.
    multipass.file("one", "1");
    multipass.file("two", "2");
    multipass.ok("transfer one two vm:copy");
    multipass.fails(2, "transfer one two vm:nowhere", "is not a directory");
    fs::create_dir(multipass.folder.join("in")).unwrap();
    multipass.ok("transfer vm:copy/one vm:copy/two in");
    assert_eq!(fs::read(multipass.folder.join("in/two")).unwrap(), b"2");
}

fn running_shapes(multipass: &Multipass) {
    let info = multipass.json("info vm --format json");
    assert_eq!(info["errors"], json!([]));
    let vm = &info["info"]["vm"];
    for key in [
        "cpu_count",
        "snapshot_count",
        "image_hash",
        "image_release",
        "release",
        "state",
    ] {
        assert!(vm[key].is_string(), "{key} of {vm}");
    }
    assert_eq!(vm["state"], "Running");
    assert_eq!(
        (&vm["cpu_count"], &vm["snapshot_count"]),
        (&json!("1"), &json!("0"))
    );
    assert_eq!(vm["image_hash"].as_str().unwrap().len(), 64);
    let disk = &vm["disks"]["sda1"];
    for figure in [&disk["used"], &disk["total"]] {
        figure.as_str().unwrap().parse::<u64>().unwrap();
    }
    assert!(vm["memory"]["used"].as_u64().unwrap() < vm["memory"]["total"].as_u64().unwrap());
    let load = vm["load"].as_array().unwrap();
    assert!(load.len() == 3 && load.iter().all(Value::is_f64), "{vm}");
    assert_eq!(vm["mounts"], json!({}));
    let expected = [
        "cpu_count",
        "disks",
        "image_hash",
        "image_release",
        "ipv4",
        "load",
        "memory",
        "mounts",
        "release",
        "snapshot_count",
        "state",
    ];
    assert_eq!(keys(vm), expected.into());
    let list = multipass.json("list --format json");
    let one = list["list"]
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["name"] == "vm")
        .unwrap();
    assert_eq!(keys(one), ["ipv4", "name", "release", "state"].into());
    assert_eq!(one["ipv4"], vm["ipv4"]);

    let rows = csv(&multipass.ok("list --format csv"));
    let row = rows
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["Name"] == "vm")
        .unwrap();
    assert_eq!(
        (&row["IPv4"], &row["AllIPv4"]),
        (&vm["ipv4"][0], &vm["ipv4"][0])
    );
    let text = multipass.ok("info vm --format csv");
    let header = "Name,State,Ipv4,Ipv6,Release,Image hash,Image release,Load,Disk usage,Disk total,\
                  Memory usage,Memory total,Mounts,AllIPv4,CPU(s),Snapshots\n";
    assert!(
        text.starts_with(header) || text.starts_with(&header.replace(",Snapshots", "")),
        "{text}"
    );
    let row = &csv(&text)[0];
    assert_eq!(
        (&row["State"], &row["CPU(s)"]),
        (&json!("Running"), &json!("1"))
    );
    assert!(
        row[""].is_null() && row["Memory total"].as_str().unwrap().parse::<u64>().is_ok(),
        "{row}"
    );

    let told = yaml(multipass, &multipass.ok("info vm --format yaml"));
    assert_eq!(told["errors"], json!([null]));
    assert_eq!(told["vm"][0]["state"], "Running");
    assert_eq!(told["vm"].as_array().unwrap().len(), 1);
    let told = yaml(multipass, &multipass.ok("list --format yaml"));
    assert_eq!(told["vm"][0]["state"], "Running");
    let told = yaml(multipass, &multipass.ok("version --format yaml"));
    assert_eq!(keys(&told), ["multipass", "multipassd"].into());

    let table = multipass.ok("list");
    let mut lines = table.lines();
    let words = |line: &str| {
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        words(lines.next().unwrap()),
        ["Name", "State", "IPv4", "Image"]
    );
    assert!(
        lines.any(|line| words(line)[..2] == ["vm", "Running"]),
        "{table}"
    );
    let table = multipass.ok("info vm");
    for label in [
        "Name:",
        "State:",
        "IPv4:",
        "Release:",
        "Image hash:",
        "CPU(s):",
        "Load:",
        "Disk usage:",
        "Memory usage:",
        "Mounts:",
    ] {
        assert!(
            table
                .lines()
                .any(|line| line.starts_with(label) && line.len() > 16),
            "{label} {table}"
        );
    }
    // Old forms are taken, and warn.
    let old = multipass.run("info --all --format json");
    assert_eq!(old.code(), 0);
    assert!(!old.stderr.is_empty());
    serde_json::from_slice::<Value>(&old.stdout).unwrap();
    assert_eq!(
        keys(&multipass.json("networks --format json")),
        ["list"].into()
    );
    multipass.ok("networks");
    let found = multipass.json("find --format=json build:debian-13");
    assert!(found["images"].is_object(), "{found}");
}

fn settings(multipass: &Multipass) {
    let all = multipass.ok("get --keys");
    for key in [
        "client.primary-name",
        "local.driver",
        "local.passphrase",
        "local.privileged-mounts",
        "local.vm.cpus",
        "local.vm.disk",
        "local.vm.memory",
    ] {
        assert!(all.lines().any(|line| line == key), "{key}: {all}");
    }
    assert_eq!(multipass.ok("get client.primary-name"), "primary\n");
    assert_eq!(multipass.ok("get local.driver"), "qemu\n");
    assert_eq!(multipass.ok("get local.vm.cpus"), "1\n");
    assert_eq!(multipass.ok("get local.vm.memory"), "1.0GiB\n");
    assert_eq!(multipass.ok("get local.bridged-network"), "<empty>\n");
    assert_eq!(multipass.ok("get local.bridged-network --raw"), "\n");
    multipass.ok("set client.primary-name=vm");
    assert_eq!(multipass.ok("get client.primary-name"), "vm\n");
    // The one that is meant if none is named.
    let shell = multipass.input(&["shell"], b"hostname\n");
    assert!(shell.text().contains("vm"), "{shell:?}");
    multipass.ok("set client.primary-name=primary");
    multipass.fails(1, "set a=b=c", "Bad key-value format.");
    multipass.fails(
        1,
        "get client.nonesuch",
        "Unrecognized settings key: 'client.nonesuch'",
    );
    multipass.fails(
        2,
        "get local.nonesuch",
        "Unrecognized settings key: 'local.nonesuch'",
    );
    let reason = "Cannot update instance settings; instance: vm; reason: Instance must be stopped for modification";
    multipass.fails(2, "set local.vm.cpus=2", reason);
}

fn aliases(multipass: &Multipass) {
    multipass.run("alias vm:whoami wai").ok_with_words();
    assert_eq!(multipass.ok("wai"), "ubuntu\n");
    multipass
        .run("alias vm:/usr/bin/printf say")
        .ok_with_words();
    assert_eq!(multipass.ok("say a%s b"), "ab");
    let told = multipass.json("aliases --format json");
    assert_eq!(told["active-context"], "default");
    let wai = &told["contexts"]["default"]["wai"];
    assert_eq!(
        (&wai["command"], &wai["instance"]),
        (&json!("whoami"), &json!("vm"))
    );
    let rows = csv(&multipass.ok("aliases --format csv"));
    assert_eq!(rows[1]["Alias"], "wai");
    // Its script does the same, wherever it is called.
    let home = multipass.daemon.folder().join("home");
    let scripts = files_below(&home);
    let script = scripts
        .iter()
        .find(|path| path.ends_with("bin/wai"))
        .unwrap();
    let mut called = multipass.daemon.inside(&home.join(script));
    let called = called
        .env("MULTIPASS_STORAGE", multipass.daemon.storage())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&called.stderr);
    let told = String::from_utf8_lossy(&called.stdout);
    assert_eq!((said.as_ref(), told.as_ref()), ("", "ubuntu\n"));
    multipass.ok("unalias wai");
    assert_ne!(multipass.run("wai").code(), 0);
}

fn not_there_yet(multipass: &Multipass) {
    let said = multipass.run(&format!("mount {} vm", multipass.folder.display()));
    assert!(said.fails_with(2).starts_with("mount failed: "), "{said:?}");
    multipass.fails(
        1,
        "mount nonesuch vm",
        "Source path \"nonesuch\" does not exist",
    );
    let folder = multipass.folder.display();
    let launch = format!("launch {GUEST_IMAGE} -n x --mount {folder}:/mnt");
    multipass.run(&launch).fails_with(2);
    assert_eq!(multipass.state("x"), "none");
}

/// Under this name the old restriction holds.
fn stopped_only(multipass: &Multipass) {
    multipass.fails(
        2,
        "snapshot vm",
        "Multipass can only take snapshots of stopped instances.",
    );
    multipass.fails(2, "clone vm", "Multipass can only clone stopped instances.");
    multipass.fails(
        2,
        "restore -d vm.nope",
        "Multipass can only restore snapshots of stopped instances.",
    );
}

fn life(multipass: &Multipass) {
    multipass.ok("suspend vm");
    assert_eq!(multipass.state("vm"), "Suspended");
    multipass.fails(2, "stop vm", "Cannot shut down suspended instance vm.");
    // A transfer starts nothing, a command does.
    assert_ne!(multipass.run("transfer vm:copy/one -").code(), 0);
    assert_eq!(multipass.state("vm"), "Suspended");
    assert_eq!(multipass.ok("exec vm -- cat copy/one"), "1");
    multipass.ok("suspend vm");
    multipass.ok("start vm");
    multipass.ok("stop vm");
    assert_eq!(multipass.state("vm"), "Stopped");
    stopped_shapes(multipass);
    assert_eq!(
        multipass.ok("snapshot vm"),
        "Snapshot taken: vm.snapshot1\n"
    );
    assert_eq!(
        multipass.ok("snapshot -m words vm --name second"),
        "Snapshot taken: vm.second\n"
    );
    multipass.fails(
        2,
        "snapshot vm -n second",
        "Snapshot already exists: vm.second",
    );
    let told = multipass.json("list --snapshots --format json");
    assert_eq!(
        told["info"]["vm"]["second"],
        json!({ "parent": "snapshot1", "comment": "words" })
    );
    let rows = csv(&multipass.ok("list --snapshots --format csv"));
    assert_eq!(rows.as_array().unwrap().len(), 2);
    let told = multipass.json("info vm.second --format json");
    let second = &told["info"]["vm"]["snapshots"]["second"];
    assert_eq!(second["parent"], "snapshot1");
    multipass.fails(2, "info vm.nope", "snapshot");
    multipass.fails(
        2,
        "restore vm.second",
        "Unable to query client for confirmation. Use '--destructive'",
    );
    assert_eq!(
        multipass.ok("restore --destructive vm.snapshot1"),
        "Snapshot restored: vm.snapshot1\n"
    );
    assert_eq!(multipass.ok("clone vm"), "Cloned from vm to vm-clone1.\n");
    assert_eq!(
        multipass.ok("clone vm -n copy"),
        "Cloned from vm to copy.\n"
    );
    multipass.fails(2, "clone vm -n copy", "instance \"copy\" already exists");
    multipass.ok("delete --purge vm.snapshot1");
    multipass.ok("set local.vm.cpus=2");
    assert_eq!(multipass.ok("get local.vm.cpus"), "2\n");
    std::thread::scope(|scope| {
        scope.spawn(|| multipass.ok("restart two"));
        // A command starts what is stopped.
        assert_eq!(multipass.ok("exec copy hostname"), "copy\n");
        assert_eq!(multipass.ok("exec copy -- cat copy/one"), "1");
    });
    assert_eq!(multipass.ok("exec two hostname"), "two\n");
}

fn stopped_shapes(multipass: &Multipass) {
    let info = multipass.json("info vm --format json");
    let vm = &info["info"]["vm"];
    assert_eq!(vm["memory"], json!({}));
    assert_eq!(vm["disks"], json!({ "sda1": {} }));
    assert_eq!((&vm["load"], &vm["ipv4"]), (&json!([]), &json!([])));
    assert_eq!((&vm["cpu_count"], &vm["release"]), (&json!(""), &json!("")));
    assert_eq!(vm["snapshot_count"], "0");
    let row = &csv(&multipass.ok("info vm --format csv"))[0];
    assert_eq!(
        (&row["State"], &row["Ipv4"]),
        (&json!("Stopped"), &json!(""))
    );
    let list = multipass.ok("list");
    assert!(
        list.lines()
            .any(|line| line.starts_with("vm ") && line.contains("Stopped") && line.contains("--")),
        "{list}"
    );
}

fn the_end(multipass: &Multipass) {
    multipass.ok("delete vm vm-clone1");
    assert_eq!(multipass.state("vm"), "Deleted");
    multipass.fails(2, "exec vm -- true", "instance \"vm\" is deleted");
    multipass.fails(2, "start vm", "Instance 'vm' is deleted. Use 'recover' to recover it or 'purge' to permanently delete it.");
    multipass.ok("recover vm");
    assert_eq!(multipass.state("vm"), "Stopped");
    multipass.ok("delete vm");
    multipass.ok("purge");
    multipass.fails(2, "info vm", "instance \"vm\" does not exist");
    multipass.ok("delete --all --purge");
    assert_eq!(multipass.ok("list"), "No instances found.\n");
    assert!(multipass.daemon.machines().is_empty());
}

fn nobody_there(daemon: &Daemon, link: &Path) {
    let run = |args: &[&str]| {
        let mut command = daemon.inside(link);
        command.env("MULTIPASS_STORAGE", daemon.storage());
        // Nor is there one to be started.
        command.args(args).output().unwrap()
    };
    let version = run(&["version"]);
    let text = String::from_utf8_lossy(&version.stdout).into_owned();
    assert!(
        version.status.success() && text.lines().count() == 1,
        "{text}"
    );
    let list = run(&["list"]);
    let said = String::from_utf8_lossy(&list.stderr).into_owned();
    assert_eq!(list.status.code(), Some(2), "{said}");
    assert!(
        said.starts_with("list failed: cannot connect to the multipass socket"),
        "{said}"
    );
}
