//! A manifest that was written is read back, and each rule for those from outside holds.

use super::*;
use serde_json::{Value, json};

pub(crate) fn example() -> Manifest {
    let digest = Digest::from_bytes([7; 32]);
    let instance = Instance {
        name: "web".parse().unwrap(),
        cpus: 2,
        memory: Size::gib(1),
        disk: Size::gib(5),
        layer: 2,
        machine_type: Some("pc-q35-10.0".into()),
        hardware: Hardware {
            keyboard_layout: Some("de-ch".into()),
            ..Hardware::default()
        },
        firmware_boot: false,
        timezone: Some("Europe/Berlin".into()),
        autostart: Autostart::Last,
        on_crash: OnCrash::Restart,
        snapshots_taken: 3,
        head: Some("b".parse().unwrap()),
        user_data: Some(10),
        network_config: Some(11),
    };
    let image = Image {
        digest: digest.clone(),
        source: "debian-13".into(),
        os: "Debian".into(),
        release: "13".into(),
        title: "Debian 13".into(),
        codename: "trixie".into(),
        version: "1".into(),
        arch: "x86_64".into(),
        size: Size::gib(2),
        min_disk: Size::gib(2),
        disk: digest.clone(),
        kernel: Some(File {
            bytes: 5,
            digest: digest.clone(),
        }),
        initrd: Some(File { bytes: 6, digest }),
        cmdline: Some("root=LABEL=x quiet".into()),
    };
    let mut manifest = Manifest::new(instance, image);
    let layer = |below| Layer {
        below,
        bytes: 1 << 20,
        size: Size::gib(5),
    };
    manifest.layers = vec![layer(None), layer(Some(0)), layer(Some(0))];
    let snapshot = |name: &str, parent: Option<&str>, layer| Snapshot {
        name: name.parse().unwrap(),
        comment: String::new(),
        parent: parent.map(|name| name.parse().unwrap()),
        created_at: Timestamp::UNIX_EPOCH,
        cpus: 1,
        memory: Size::gib(1),
        disk: Size::gib(5),
        layer,
        firmware_boot: false,
    };
    manifest.snapshots = vec![snapshot("a", None, 0), snapshot("b", Some("a"), 1)];
    manifest
}

#[test]
fn written_and_read_it_is_the_same() {
    let manifest = example();
    let text = manifest.write().unwrap();
    assert_eq!(Manifest::read(&text).unwrap(), manifest);
    assert_eq!(manifest.chain(2), [0, 2]);
    let names: Vec<_> = manifest
        .parts()
        .iter()
        .map(|(part, _)| part.name())
        .collect();
    let layers = ["layers/0.qcow2", "layers/1.qcow2", "layers/2.qcow2"];
    let want = [
        &["disk.img", "kernel", "initrd"][..],
        &layers,
        &["user-data", "network-config"],
    ]
    .concat();
    assert_eq!(names, want);
}

#[test]
fn each_rule_holds() {
    let good = serde_json::to_value(example()).unwrap();
    let long = "x".repeat(20_000);
    let rules: &[(&str, &str, Value)] = &[
        ("/format", "holds no instance", json!("pileus-image")),
        ("/version", "form 2", json!(2)),
        ("/version", "manifest.json", json!(-1)),
        ("/written_by", "a text", json!("a\u{1b}[2J")),
        ("/instance/name", "manifest.json", json!("../x")),
        ("/instance/cpus", "CPUs", json!(0)),
        ("/instance/cpus", "CPUs", json!(256)),
        ("/instance/memory", "memory", json!(1)),
        ("/instance/memory", "memory", json!((1_u64 << 30) + 1)),
        ("/instance/memory", "memory", json!(1_u64 << 51)),
        ("/instance/disk", "smaller", json!(1_u64 << 30)),
        ("/instance/disk", "smaller", json!(u64::MAX)),
        ("/instance/layer", "not there", json!(3)),
        ("/instance/layer", "nobody stands", json!(1)),
        (
            "/instance/machine_type",
            "machine type",
            json!("pc,accel=kvm"),
        ),
        (
            "/instance/machine_type",
            "machine type",
            json!("pc-q35-10.0,x=y"),
        ),
        ("/instance/hardware/nic", "manifest.json", json!("ne2k")),
        (
            "/instance/hardware/keyboard_layout",
            "hardware",
            json!("de,x=y"),
        ),
        ("/instance/timezone", "time zone", json!("../../etc/passwd")),
        ("/instance/timezone", "time zone", json!("a: b\n")),
        ("/instance/autostart", "manifest.json", json!("maybe")),
        ("/instance/snapshots_taken", "snapshots", json!(u32::MAX)),
        ("/instance/head", "is not there", json!("c")),
        ("/instance/user_data", "user data", json!(17 << 20)),
        ("/instance/network_config", "user data", json!(u64::MAX)),
        ("/image/digest", "manifest.json", json!("sha256:..")),
        ("/image/size", "makes no sense", json!(0)),
        ("/image/size", "makes no sense", json!(513)),
        ("/image/size", "makes no sense", json!(1_u64 << 42)),
        ("/image/min_disk", "makes no sense", json!(1_u64 << 42)),
        ("/image/title", "a text", json!(long)),
        ("/image/os", "a text", json!("a\nb")),
        ("/image/cmdline", "command line", json!("a\nb")),
        ("/image/cmdline", "command line", json!(long)),
        ("/image/kernel", "no kernel", json!(null)),
        ("/image/kernel/bytes", "kernel", json!(0)),
        ("/image/initrd/bytes", "kernel", json!(2_u64 << 30)),
        ("/layers", "none", json!([])),
        ("/layers/0/below", "comes later", json!(0)),
        ("/layers/0/below", "comes later", json!(1)),
        ("/layers/1/below", "comes later", json!(7)),
        ("/layers/0/size", "smaller", json!(1_u64 << 30)),
        ("/layers/1/size", "smaller", json!(4_u64 << 30)),
        ("/layers/1/size", "smaller", json!((5_u64 << 30) + 1)),
        ("/layers/1/bytes", "too large", json!(1_u64 << 50)),
        ("/snapshots/1/name", "one name", json!("A")),
        ("/snapshots/1/name", "manifest.json", json!("a.b")),
        ("/snapshots/0/parent", "parent", json!("b")),
        ("/snapshots/1/parent", "parent", json!("b")),
        ("/snapshots/1/comment", "comment", json!(long)),
        ("/snapshots/1/layer", "not there", json!(9)),
        ("/snapshots/1/disk", "smaller", json!(1)),
        ("/snapshots/1/memory", "memory", json!(1)),
        ("/snapshots/1/cpus", "CPUs", json!(0)),
    ];
    for (at, words, value) in rules {
        let mut changed = good.clone();
        *changed.pointer_mut(at).unwrap() = value.clone();
        let err = Manifest::read(&serde_json::to_vec(&changed).unwrap()).unwrap_err();
        assert_eq!(err.code, Code::BadArchive, "{at} {value}");
        assert!(err.message.contains(words), "{at} {value}: {err}");
    }
    for at in [
        "",
        "/instance",
        "/image",
        "/image/kernel",
        "/layers/0",
        "/snapshots/0",
    ] {
        let mut changed = good.clone();
        changed.pointer_mut(at).unwrap()["new"] = json!(1);
        assert!(
            Manifest::read(&serde_json::to_vec(&changed).unwrap()).is_err(),
            "{at}"
        );
    }
}

#[test]
fn many_and_deep_is_refused() {
    let refused = |manifest: &Manifest| {
        Manifest::read(&serde_json::to_vec(manifest).unwrap())
            .unwrap_err()
            .message
    };
    let mut deep = example();
    for n in 2..250 {
        deep.layers.push(Layer {
            below: Some(n),
            ..deep.layers[0].clone()
        });
    }
    assert!(refused(&deep).contains("on each other"));
    let mut many = example();
    many.layers.resize(MOST_LAYERS + 1, many.layers[0].clone());
    assert!(refused(&many).contains("too many layers"));
    let mut many = example();
    for n in 0..MOST_SNAPSHOTS {
        let name = format!("s{n}").parse().unwrap();
        many.snapshots.push(Snapshot {
            name,
            ..many.snapshots[0].clone()
        });
    }
    assert!(refused(&many).contains("too many snapshots"));
    let nested = [b"[".repeat(10_000), b"]".repeat(10_000)].concat();
    assert!(Manifest::read(&nested).is_err());
    let long = vec![b' '; MOST_BYTES as usize + 1];
    assert!(
        Manifest::read(&long)
            .unwrap_err()
            .message
            .contains("too long")
    );
}

#[test]
fn a_machine_type_is_one_that_this_host_has() {
    let host = "pc-q35-10.0";
    for (wanted, got) in [
        (Some("pc-q35-8.2"), "pc-q35-8.2"),
        (Some("pc-q35-10.0"), "pc-q35-10.0"),
        (Some("pc-q35-11.0"), host),
        (Some("pc-q35-10.1"), host),
        (Some("pc-i440fx-8.2"), "pc-i440fx-8.2"),
        (Some("pc-i440fx-11.0"), "pc-i440fx-10.0"),
        (None, host),
    ] {
        assert_eq!(machine_type(wanted, host), got, "{wanted:?}");
    }
    // A host whose own is of another kind knows best.
    assert_eq!(machine_type(Some("pc-q35-8.2"), "virt"), "virt");
}
