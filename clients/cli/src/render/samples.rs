//! Instances and images for the tests of the renderers.

use pileus_api::{
    CatalogEntry, CloudInit, CloudInitStatus, Code, Digest, ErrorBody, GuestReport, Identity,
    IdentityItem, Image, ImageDetails, Inspection, Instance, InstanceImage, InstanceState, Origin,
    Phase, PhaseTime, PruneReply, PrunedImage, Refusal, Setting, Size, Snapshot, Template,
    TemplateState, Usage,
};
use pileus_base::Error;

fn digest(byte: u8) -> Digest {
    Digest::from_bytes([byte; 32])
}

fn time(text: &str) -> pileus_api::Timestamp {
    text.parse().unwrap()
}

fn phase(phase: Phase, milliseconds: u64) -> PhaseTime {
    PhaseTime {
        phase,
        milliseconds,
    }
}

/// One that is stopped with an error, one that runs, one that will be shut down, one in the trash, a
/// suspended one.
pub fn instances() -> Vec<Instance> {
    let running = Instance {
        id: uuid::Uuid::from_u128(1),
        name: "foo".parse().unwrap(),
        state: InstanceState::Running,
        deleted: false,
        image: InstanceImage {
            digest: digest(0xab),
            source: "debian-13".into(),
            os: "Debian".into(),
            release: "13".into(),
        },
        cpus: 2,
        memory: Size::gib(1),
        disk: Size::gib(5),
        mac: "52:54:00:01:02:03".into(),
        hardware: pileus_api::InstanceHardware {
            machine_type: Some("pc-i440fx-10.0".into()),
            topology: Some(pileus_api::Topology {
                sockets: 1,
                cores: 1,
                threads: 2,
            }),
            network: "e1000".into(),
            usb: Some("piix3-usb-uhci".into()),
            graphics: Some("VGA".into()),
            inputs: vec!["usb-tablet".into()],
            keyboard_layout: Some("de".into()),
            uuid: Some(uuid::Uuid::from_u128(0x11)),
            display: Some("/run/pileus/i/1/display/vnc.sock".into()),
            sound: None,
        },
        networks: vec![pileus_api::InstanceNetwork {
            name: "br0".into(),
            mode: pileus_api::NetworkMode::Auto,
            mac: "52:54:00:01:02:04".into(),
        }],
        ipv4: vec!["10.1.2.3".parse().unwrap(), "192.168.5.6".parse().unwrap()],
        created_at: time("2026-11-21T20:00:00Z"),
        started_at: Some(time("2026-11-21T20:00:10Z")),
        origin: Origin::Warm {
            template: "0123456789abcdef".into(),
        },
        lease_expires_at: Some(time("2026-11-21T20:00:40Z")),
        shutdown_at: None,
        suspended: None,
        pending: None,
        snapshots: 2,
        autostart: pileus_api::Autostart::Last,
        on_crash: pileus_api::OnCrash::Stop,
        phases: vec![
            phase(Phase::Configuring, 120),
            phase(Phase::Starting, 340),
            phase(Phase::Booting, 21_050),
            phase(Phase::Initializing, 9_900),
        ],
        cloud_init: Some(CloudInit {
            status: CloudInitStatus::Done,
            errors: vec![],
        }),
        last_error: None,
        report: Some(GuestReport {
            os: "Debian GNU/Linux 13 (trixie)".into(),
            kernel: "6.12.43".into(),
            cpus: 2,
            load: [0.45, 0.5, 0.15],
            memory: Usage {
                used: 60_817_408,
                total: 1_503_238_554,
            },
            disk: Usage {
                used: 1_288_490_188,
                total: 5_153_960_756,
            },
            uptime_seconds: 61,
        }),
    };
    let stopped = Instance {
        id: uuid::Uuid::from_u128(2),
        name: "bar".parse().unwrap(),
        state: InstanceState::Stopped,
        snapshots: 0,
        ipv4: vec![],
        networks: vec![],
        hardware: pileus_api::InstanceHardware {
            machine_type: Some("pc-q35-10.0".into()),
            network: "virtio-net-pci".into(),
            ..pileus_api::InstanceHardware::default()
        },
        started_at: None,
        origin: Origin::Cold {
            reason: Some("no template for 3 CPUs".into()),
        },
        lease_expires_at: None,
        phases: vec![phase(Phase::Starting, 300), phase(Phase::Booting, 1_000)],
        cloud_init: Some(CloudInit {
            status: CloudInitStatus::Error,
            errors: vec!["scripts_user: exit 1".into()],
        }),
        last_error: Some(ErrorBody::from(Error::new(
            Code::GuestStopped,
            "The guest powered off",
        ))),
        report: None,
        ..running.clone()
    };
    let deleted = Instance {
        id: uuid::Uuid::from_u128(3),
        name: "old".parse().unwrap(),
        deleted: true,
        image: InstanceImage {
            os: String::new(),
            release: String::new(),
            ..running.image.clone()
        },
        phases: vec![],
        cloud_init: None,
        last_error: None,
        origin: Origin::Fork {
            of: "foo".parse().unwrap(),
        },
        ..stopped.clone()
    };
    let suspended = Instance {
        id: uuid::Uuid::from_u128(4),
        name: "sleepy".parse().unwrap(),
        state: InstanceState::Suspended,
        suspended: Some(pileus_api::Suspended {
            at: time("2026-11-21T20:30:00Z"),
            bytes: 315 << 20,
            machine_type: "pc-q35-10.0".into(),
        }),
        pending: Some(pileus_api::Pending {
            cpus: Some(4),
            memory: Some(Size::gib(2)),
        }),
        autostart: pileus_api::Autostart::Always,
        on_crash: pileus_api::OnCrash::Restart,
        last_error: None,
        ..stopped.clone()
    };
    let leaving = Instance {
        id: uuid::Uuid::from_u128(5),
        name: "leaving".parse().unwrap(),
        shutdown_at: Some(time("2026-11-21T21:00:00Z")),
        ipv4: vec!["10.1.2.4".parse().unwrap()],
        lease_expires_at: None,
        snapshots: 0,
        ..running.clone()
    };
    vec![stopped, running, leaving, deleted, suspended]
}

/// Two of `foo`, the second on top of the first; one of `bar`.
pub fn snapshots() -> Vec<Snapshot> {
    let first = Snapshot {
        id: uuid::Uuid::from_u128(11),
        instance: "foo".parse().unwrap(),
        name: "snapshot1".parse().unwrap(),
        comment: "before, the \"upgrade\"\nsecond line".into(),
        parent: None,
        children: vec!["second".parse().unwrap()],
        head: false,
        created_at: time("2026-11-01T08:00:00Z"),
        cpus: 2,
        memory: Size::gib(1),
        disk: Size::gib(5),
        with_memory: false,
        size: Size::mib(128),
    };
    let second = Snapshot {
        id: uuid::Uuid::from_u128(12),
        name: "second".parse().unwrap(),
        comment: String::new(),
        parent: Some("snapshot1".parse().unwrap()),
        children: vec![],
        head: true,
        created_at: time("2026-11-21T20:00:00Z"),
        with_memory: true,
        ..first.clone()
    };
    let other = Snapshot {
        id: uuid::Uuid::from_u128(13),
        instance: "bar".parse().unwrap(),
        children: vec![],
        ..first.clone()
    };
    vec![other, first, second]
}

pub fn catalog() -> Vec<CatalogEntry> {
    let entry = |name: &str, remote: &str, aliases: &[&str]| CatalogEntry {
        name: name.into(),
        aliases: aliases.iter().map(|a| (*a).to_owned()).collect(),
        os: "Debian".into(),
        release: "13".into(),
        version: "20261121".into(),
        remote: remote.into(),
        cached: false,
    };
    vec![
        entry("debian-13", "build", &["trixie", "debian", "d", "default"]),
        entry("24.04", "release", &[]),
    ]
}

pub fn images() -> Vec<Image> {
    let used = Image {
        digest: digest(0xab),
        os: "Debian".into(),
        release: "13".into(),
        version: "20261121".into(),
        source: "build:debian-13".into(),
        virtual_size: Size::gib(3),
        disk_usage: Size::mib(427),
        direct_boot: true,
        created_at: time("2026-11-21T20:00:00Z"),
        used_at: Some(time("2026-11-21T21:00:00Z")),
        used_by: vec!["foo".into(), "bar".into()],
        tags: vec!["web".into(), "base/web-1".into()],
    };
    let unused = Image {
        digest: digest(0xcd),
        os: String::new(),
        release: String::new(),
        version: String::new(),
        source: "https://example.org/a,b.qcow2".into(),
        direct_boot: false,
        used_at: None,
        used_by: vec![],
        tags: vec![],
        ..used.clone()
    };
    vec![used, unused]
}

/// One that came packed, one of which little is known.
pub fn image_details() -> Vec<ImageDetails> {
    let mut images = images().into_iter();
    let (Some(packed), Some(plain)) = (images.next(), images.next()) else {
        return vec![];
    };
    let machine = r#"{"version":1,"uuid":"52bab607-10f4-4412-b5e8-e9c8a4b4f2bc","memory":512}"#;
    let rich = ImageDetails {
        image: packed,
        title: "Debian 13 (trixie)".into(),
        codename: "trixie".into(),
        arch: "x86_64".into(),
        min_disk: Size::gib(3),
        cmdline: Some("root=LABEL=root console=ttyS0".into()),
        initrd: true,
        disk_digest: Some(digest(0xef)),
        machine: serde_json::from_str(machine).ok(),
        made_of: Some("build:debian-13\nby pileus 0.1.0".into()),
        templates: vec!["0123456789abcdef".into()],
    };
    let poor = ImageDetails {
        image: plain,
        title: "a,b.qcow2".into(),
        codename: String::new(),
        arch: String::new(),
        cmdline: None,
        initrd: false,
        disk_digest: None,
        machine: None,
        made_of: None,
        templates: vec![],
        ..rich.clone()
    };
    vec![rich, poor]
}

/// One that is fine, one that is refused.
pub fn inspections() -> Vec<Inspection> {
    let machine = r#"{"version":1,"memory":512}"#;
    let fine = Inspection {
        kind: "packed".into(),
        digest: Some(digest(0xab)),
        size: Some(Size::mib(163)),
        virtual_size: Some(Size::gib(3)),
        disk_usage: Some(Size::mib(427)),
        disk_digest: Some(digest(0xef)),
        machine: serde_json::from_str(machine).ok(),
        manifest: None,
        warnings: vec!["the layer holds data and was merged".into()],
        stored: true,
        refused: None,
    };
    let error = Error::new(Code::BadImage, "layer.qcow2 has an external data file");
    let refused = Inspection {
        kind: String::new(),
        digest: None,
        size: None,
        virtual_size: None,
        disk_usage: None,
        warnings: vec![],
        disk_digest: None,
        machine: None,
        stored: false,
        refused: Some(Refusal {
            rule: Some("layer-data-file".into()),
            error: error.into(),
        }),
        ..fine.clone()
    };
    vec![fine, refused]
}

pub fn pruned() -> PruneReply {
    PruneReply {
        removed: vec![PrunedImage {
            digest: digest(0xcd),
            source: "https://example.org/a,b.qcow2".into(),
            freed: Size::mib(427),
        }],
    }
}

/// One that is ready, one that is being made.
pub fn templates() -> Vec<Template> {
    let ready = Template {
        id: "0123456789abcdef".into(),
        state: TemplateState::Ready,
        image: instances().remove(1).image,
        cpus: 2,
        memory: Size::gib(1),
        disk: Size::gib(5),
        machine_type: "pc-q35-10.0".into(),
        accelerator: "tcg".into(),
        qemu: "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-1)".into(),
        created_at: time("2026-11-21T20:00:00Z"),
        last_used_at: Some(time("2026-11-21T21:00:00Z")),
        memory_used: Size::mib(315),
        disk_used: Size::mib(15),
        in_memory: true,
        instances: 3,
    };
    let building = Template {
        id: "fedcba9876543210".into(),
        state: TemplateState::Building,
        cpus: 1,
        last_used_at: None,
        memory_used: Size(0),
        disk_used: Size(0),
        in_memory: false,
        instances: 0,
        ..ready.clone()
    };
    vec![ready, building]
}

pub fn settings() -> Vec<Setting> {
    let setting = |key: &str, value: &str, values: &str| Setting {
        key: key.into(),
        value: value.into(),
        values: values.into(),
    };
    vec![
        setting("local.warm", "auto", "auto, manual or off"),
        setting("local.warm-pool", "1", "0 to 16"),
    ]
}

/// Three, of which the first and the last share a key.
pub fn identities() -> Vec<Identity> {
    let item = |name: &str, values: &[&str]| IdentityItem {
        name: name.into(),
        values: values.iter().map(|v| (*v).to_owned()).collect(),
    };
    let identity = |name: &str, keys: &[&str], mac: &[&str]| Identity {
        name: name.parse().unwrap(),
        items: vec![
            item("machine-id", &[&format!("{name}{name}")]),
            item("ssh-host-key", keys),
            item("dbus-id", &[]),
            item("mac", mac),
        ],
    };
    vec![
        identity("a", &["SHA256:x", "SHA256:a"], &["52:54:00:00:00:01"; 2]),
        identity("b", &["SHA256:b"], &[]),
        identity("c", &["SHA256:c", "SHA256:x"], &[""]),
    ]
}
