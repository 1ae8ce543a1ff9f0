//! Every word of every field, good and bad; versions; merging; limits; and no bytes that break it.

use pileus_base::Code;
use serde_json::{Value, json};

use super::super::rule::Rule;
use super::values::Word;
use super::*;

fn parse(value: &Value) -> pileus_base::Result<Parsed> {
    Machine::parse(&serde_json::to_vec(value).unwrap())
}

fn good(value: &Value) -> Machine {
    match parse(value) {
        Ok(parsed) => {
            assert_eq!(parsed.warnings, Vec::<String>::new(), "{value}");
            parsed.machine
        }
        Err(err) => panic!("{value}: {:?}", err.details),
    }
}

/// The issues that are told.
fn issues(bytes: &[u8]) -> Vec<String> {
    let err = Machine::parse(bytes).unwrap_err();
    assert_eq!(err.code, Code::BadImage);
    assert_eq!(err.message, "Invalid machine definition in 'machine.json'");
    assert_eq!(Rule::of(&err), Some(Rule::Machine));
    assert!(!err.details.is_empty());
    err.details
}

fn bad(value: &Value) -> Vec<String> {
    issues(&serde_json::to_vec(value).unwrap())
}

/// A machine with every field.
fn full() -> Value {
    json!({
        "version": 1,
        "uuid": "52bab607-10f1-4049-a0f8-ee4725cb715b",
        "chipset": "pc-i440fx-2.8",
        "cpu": "host",
        "flags": [],
        "threads": 1,
        "cores": 2,
        "sockets": 3,
        "memory": 1024,
        "usb": "piix3-usb-uhci",
        "network": "rtl8139",
        "mac": "aa:54:1a:30:5c:de",
        "storage": "virtio-blk-pci",
        "graphics": "VGA",
        "sound": "hda-duplex/intel-hda",
        "keyboard": "PS/2",
        "keyboardLayout": "de-ch",
        "mouse": "PS/2",
        "tablet": "none",
    })
}

fn with(field: &str, value: &Value) -> Value {
    json!({"version": 1, field: value})
}

/// The words of section 2.1 of the reference, typed in once more: a word that is lost breaks images.
const WORDS: &[(&str, &str)] = &[
    ("chipset", "pc-i440fx-2.8"),
    ("cpu", "host"),
    ("usb", "piix3-usb-uhci piix4-usb-uhci nec-usb-xhci"),
    ("network", "rtl8139 e1000"),
    ("storage", "virtio-blk-pci"),
    ("graphics", "VGA vmware-svga qxl-vga virtio-vga"),
    (
        "sound",
        "none AC97 ES1370 hda-duplex/intel-hda hda-micro/intel-hda hda-output/intel-hda \
         hda-duplex/ich9-intel-hda hda-micro/ich9-intel-hda hda-output/ich9-intel-hda",
    ),
    ("keyboard", "usb-kbd PS/2"),
    (
        "keyboardLayout",
        "ar da de de-ch en-gb en-us es et fi fo fr fr-be fr-ca fr-ch hr hu is it ja lt lv mk nl \
         nl-be no pl pt pt-br ru sl sv th tr",
    ),
    ("mouse", "usb-mouse PS/2"),
    ("tablet", "usb-tablet none"),
];

#[test]
fn each_word_is_taken_kept_and_written_back() {
    for (field, words) in WORDS {
        for word in words.split_whitespace() {
            let said = with(field, &json!(word));
            let written: Value = serde_json::from_slice(&good(&said).to_json()).unwrap();
            assert_eq!(written, said);
        }
    }
    let count = |field: &str| {
        let words = WORDS.iter().find(|(name, _)| *name == field);
        words.unwrap().1.split_whitespace().count()
    };
    assert_eq!(count("keyboardLayout"), 33);
    assert_eq!(KeyboardLayout::ALL.len(), 33);
    assert_eq!(count("sound"), 9);
    assert_eq!(Sound::ALL.len(), 9);
}

#[test]
fn no_other_word_is() {
    for (field, words) in WORDS {
        let first = words.split_whitespace().next().unwrap();
        let mut others = vec![
            json!(""),
            json!(format!("{first} ")),
            json!(format!("{first}\0")),
            json!(format!("{first},accel=kvm")),
            json!("x"),
            json!(1),
            json!(null),
            json!([first]),
            json!({ "a": first }),
            json!(true),
        ];
        if first.to_uppercase() != first {
            others.push(json!(first.to_uppercase()));
        }
        for other in others {
            let told = bad(&with(field, &other));
            let path = format!("machine.{field} must be ");
            assert_eq!(told.len(), 1, "{told:?}");
            assert!(told[0].starts_with(&path), "{told:?}");
            assert!(told[0].contains(first), "{told:?}");
        }
    }
}

#[test]
fn numbers() {
    for (field, most) in [
        ("threads", 255),
        ("cores", 255),
        ("sockets", 255),
        ("memory", 1_048_576),
    ] {
        for number in [json!(1), json!(most), json!(7.0), json!(1e2)] {
            good(&with(field, &number));
        }
        for number in [
            json!(0),
            json!(-1),
            json!(most + 1),
            json!(1.5),
            json!(1e300),
            json!(u64::MAX),
            json!(i64::MIN),
            json!("1"),
            json!(null),
            json!([]),
        ] {
            let told = bad(&with(field, &number));
            let path = format!("machine.{field} must be a whole number from 1 to {most}");
            assert!(told[0].starts_with(&path), "{told:?}");
        }
    }
    assert_eq!(good(&with("memory", &json!(1e3))).memory, Some(1000));
}

#[test]
fn addresses_and_flags() {
    for mac in [
        "aa:54:1a:30:5c:de",
        "02:00:00:00:00:00",
        "fe:ff:ff:ff:ff:ff",
        "06:00:00:00:00:01",
    ] {
        assert_eq!(
            good(&with("mac", &json!(mac))).mac.unwrap().to_string(),
            mac
        );
    }
    for mac in [
        "AA:54:1a:30:5c:de",
        // Global, then group addresses.
        "00:54:1a:30:5c:de",
        "a8:54:1a:30:5c:de",
        "01:54:1a:30:5c:de",
        "a3:54:1a:30:5c:de",
        "af:54:1a:30:5c:de",
        "aa:54:1a:30:5c",
        "aa:54:1a:30:5c:de:00",
        "aa-54-1a-30-5c-de",
        "aa:54:1a:30:5c:dg",
        "aa:54:1a:30:5c:de\n",
        "",
    ] {
        assert_eq!(bad(&with("mac", &json!(mac))).len(), 1, "{mac}");
    }
    good(&with(
        "uuid",
        &json!("52bab607-10f1-1049-8000-ee4725cb715b"),
    ));
    for uuid in [
        "52BAB607-10f1-4049-a0f8-ee4725cb715b",
        // Neither version nor variant.
        "52bab607-10f1-6049-a0f8-ee4725cb715b",
        "52bab607-10f1-0049-a0f8-ee4725cb715b",
        "52bab607-10f1-4049-c0f8-ee4725cb715b",
        "52bab60710f14049a0f8ee4725cb715b",
        "{52bab607-10f1-4049-a0f8-ee4725cb715b}",
        "urn:uuid:52bab607-10f1-4049-a0f8-ee4725cb715b",
        "00000000-0000-0000-0000-000000000000",
        "",
    ] {
        assert_eq!(bad(&with("uuid", &json!(uuid))).len(), 1, "{uuid}");
    }
    good(&with("flags", &json!([])));
    for flags in [
        json!(["sse"]),
        json!([null]),
        json!({}),
        json!(null),
        json!(""),
    ] {
        assert_eq!(bad(&with("flags", &flags)).len(), 1, "{flags}");
    }
}

#[test]
fn every_issue_is_told_with_its_place() {
    let told = bad(&json!({
        "version": 1, "memory": 0, "network": "ne2k", "Memory": 5, "qemu args": 1, "mac": 7,
    }));
    for part in [
        "machine.memory must be a whole number from 1 to 1048576, not 0",
        "machine.network must be \"rtl8139\" or \"e1000\", not \"ne2k\"",
        "machine.Memory is not allowed",
        "machine[\"qemu args\"] is not allowed",
        "machine.mac must be a local unicast MAC address in lower case, not 7",
    ] {
        assert!(told.iter().any(|line| line == part), "{told:#?}");
    }
    assert_eq!(told.len(), 5);
}

#[test]
fn what_is_told_is_bounded_and_can_be_printed() {
    let mut many = serde_json::Map::new();
    many.insert("version".into(), json!(1));
    for n in 0..5000 {
        many.insert(format!("k{n}"), json!(1));
    }
    many.insert("x".repeat(9000), json!(1));
    many.insert("\u{1b}[31m\n".into(), json!(1));
    many.insert("mac".into(), json!("é".repeat(9000)));
    let told = bad(&Value::Object(many));
    assert_eq!(told.len(), 65);
    assert!(told.last().unwrap().ends_with("more"), "{told:?}");
    for line in &told {
        assert!(line.len() < 400, "{line}");
        assert!(!line.chars().any(char::is_control), "{line:?}");
    }
}

#[test]
fn versions() {
    for version in [json!(1), json!(1.0)] {
        assert_eq!(good(&json!({ "version": version })), Machine::default());
    }
    for version in [
        json!(-1),
        json!(-0.5),
        json!(0.5),
        json!(1.5),
        json!(2),
        json!(1e18),
        json!(1e300),
        json!(-1e300),
        json!(i64::MIN),
        json!(u64::MAX),
        json!("1"),
        json!("0"),
        json!(null),
        json!(true),
        json!([1]),
        json!({}),
    ] {
        let told = bad(&json!({"version": version, "memory": 1}));
        assert_eq!(told.len(), 1);
        assert!(
            told[0].starts_with("machine.version must be 1, not "),
            "{told:?}"
        );
    }
    for not_an_object in ["[]", "1", "null", "\"x\"", "true"] {
        let told = issues(not_an_object.as_bytes());
        assert!(told[0].starts_with("machine must be an object"), "{told:?}");
    }
}

#[test]
fn json_is_read_as_the_ancestor_read_it() {
    let twice = br#"{"version": 7, "memory": "no", "memory": 5, "version": 1}"#;
    assert_eq!(Machine::parse(twice).unwrap().machine.memory, Some(5));
    let twice = br#"{"version": 1, "memory": 5, "memory": "no"}"#;
    assert_eq!(issues(twice).len(), 1);
    assert!(Machine::parse(b" \n{\"version\":1}\t\r\n ").is_ok());
    for broken in [
        &b"{\"version\":1} x"[..],
        b"{\"version\":1}{}",
        b"{\"version\":1}\0",
        b"\xef\xbb\xbf{\"version\":1}",
        b"{\"version\":1,}",
        b"{'version':1}",
        b"{\"version\":01}",
        b"{\"version\":NaN}",
        b"{\"version\":1e999}",
        b"// x\n{\"version\":1}",
        b"{\"version\":1",
        b"",
        b"\xff\xfe",
    ] {
        let told = issues(broken);
        assert!(told[0].starts_with("machine is not JSON"), "{told:?}");
    }
    let deep = "[".repeat(500_000);
    assert_eq!(issues(deep.as_bytes()).len(), 1);
    let large = format!("{{\"version\":1}}{}", " ".repeat(MAX_BYTES));
    assert!(issues(large.as_bytes())[0].contains("larger than"));
    let just = format!("{{\"version\":1}}{}", " ".repeat(MAX_BYTES - 13));
    assert!(Machine::parse(just.as_bytes()).is_ok());
}

#[test]
fn what_is_written_is_what_is_set_and_a_version() {
    let full = full();
    let machine = good(&full);
    let written: Value = serde_json::from_slice(&machine.to_json()).unwrap();
    assert_eq!(written, full);
    assert_eq!(Machine::default().to_json(), b"{\n  \"version\": 1\n}\n");
    let mut fields: Vec<_> = full.as_object().unwrap().keys().cloned().collect();
    fields.retain(|key| key != "version");
    let mut known: Vec<_> = FIELDS.iter().map(|name| (*name).to_owned()).collect();
    fields.sort();
    known.sort();
    assert_eq!(fields, known);
    // Its serde form is the same, and as strict.
    let back: Machine = serde_json::from_value(full).unwrap();
    assert_eq!(back, machine);
    for refused in [
        json!({}),
        json!({"version": 1, "a": 1}),
        json!({"version": 0}),
    ] {
        assert!(serde_json::from_value::<Machine>(refused).is_err());
    }
}

fn v0() -> Value {
    json!({
        "uuid": "52bab607-10f1-4049-a0f8-ee4725cb715b",
        "network": {"device": "e1000", "mac": "aa:54:1a:30:5c:de"},
        "keyboard": {"layout": "da"},
    })
}

fn v0_with(field: &str, value: Value) -> Value {
    let mut v0 = v0();
    v0[field] = value;
    v0
}

#[test]
fn version_0_becomes_version_1() {
    let machine = good(&v0());
    let written: Value = serde_json::from_slice(&machine.to_json()).unwrap();
    let expected = json!({
        "version": 1,
        "uuid": "52bab607-10f1-4049-a0f8-ee4725cb715b",
        "chipset": "pc-i440fx-2.8",
        "cpu": "host",
        "flags": [],
        "threads": 1,
        "usb": "nec-usb-xhci",
        "network": "e1000",
        "mac": "aa:54:1a:30:5c:de",
        "storage": "virtio-blk-pci",
        "graphics": "vmware-svga",
        "sound": "none",
        "keyboard": "usb-kbd",
        "keyboardLayout": "da",
        "mouse": "usb-mouse",
        "tablet": "none",
    });
    assert_eq!(written, expected);
    assert_eq!(good(&v0_with("version", json!(0))), machine);
    assert_eq!(good(&v0_with("version", json!(0.0))), machine);
    let cpu = good(&v0_with(
        "cpu",
        json!({"threads": 2, "cores": 3, "sockets": 0}),
    ));
    assert_eq!(
        (cpu.threads, cpu.cores, cpu.sockets),
        (Some(2), Some(3), None)
    );
    assert_eq!(good(&v0_with("memory", json!(512))).memory, Some(512));
    assert_eq!(good(&v0_with("memory", json!(0))).memory, None);
    for (device, controller, sound) in [
        ("AC97", "pci", Sound::Ac97),
        ("none", "pci", Sound::None),
        ("hda-micro", "ich9-intel-hda", Sound::HdaMicroIch9),
        ("hda-duplex", "intel-hda", Sound::HdaDuplexIntel),
    ] {
        let said = json!({"device": device, "controller": controller});
        assert_eq!(good(&v0_with("sound", said)).sound, Some(sound));
    }
}

#[test]
fn what_version_0_ignores_is_told() {
    let mut old = v0_with("extra", json!(1));
    old["network"] = json!({"device": "rtl8139", "mac": "aa:54:1a:30:5c:de", "speed": 1});
    let parsed = parse(&old).unwrap();
    assert_eq!(parsed.machine.network, Some(Network::E1000));
    for part in [
        "machine.extra",
        "machine.network.device",
        "machine.network.speed",
    ] {
        let told = parsed.warnings.iter().any(|line| line.starts_with(part));
        assert!(told, "{part} {:?}", parsed.warnings);
    }
    assert_eq!(parsed.warnings.len(), 3);
    for n in 0..1000 {
        old[format!("k{n}")] = json!(1);
    }
    assert!(parse(&old).unwrap().warnings.len() <= 17);
}

#[test]
fn version_0_that_is_wrong() {
    let told = bad(&json!({}));
    assert!(told[0].contains("machine.version is missing"), "{told:?}");
    assert!(
        told[1..]
            .iter()
            .any(|line| line.starts_with("machine.uuid"))
    );
    for (field, value, path) in [
        ("uuid", json!(1), "machine.uuid"),
        ("memory", json!(-1), "machine.memory"),
        ("memory", json!("5"), "machine.memory"),
        ("memory", json!(1e30), "machine.memory"),
        ("cpu", json!(4), "machine.cpu"),
        ("cpu", json!({"cores": 256}), "machine.cpu.cores"),
        ("network", json!(null), "machine.network"),
        (
            "network",
            json!({"device": "ne2k", "mac": "aa:54:1a:30:5c:de"}),
            "machine.network.device",
        ),
        ("network", json!({"device": "e1000"}), "machine.network.mac"),
        ("keyboard", json!({}), "machine.keyboard.layout"),
        (
            "keyboard",
            json!({"layout": "xx"}),
            "machine.keyboard.layout",
        ),
        ("keyboard", json!([]), "machine.keyboard"),
        (
            "sound",
            json!({"device": "AC97"}),
            "machine.sound.controller",
        ),
        (
            "sound",
            json!({"device": "AC97", "controller": "intel-hda"}),
            "machine.sound.device",
        ),
        (
            "sound",
            json!({"device": "hda-duplex", "controller": "pci"}),
            "machine.sound.device",
        ),
    ] {
        let told = bad(&v0_with(field, value));
        assert!(told[0].contains("machine.version is missing"), "{told:?}");
        assert!(told[1].starts_with(path), "{told:?}");
        assert_eq!(told.len(), 2, "{told:?}");
    }
}

#[test]
fn who_goes_before_whom() {
    let said = |value: Value| good(&value);
    let task = said(json!({"version": 1, "memory": 1}));
    let image = said(json!({"version": 1, "memory": 2, "cores": 2}));
    let config = said(json!({"version": 1, "memory": 3, "cores": 3, "graphics": "VGA"}));
    let merged = task.with_defaults(&image).with_defaults(&config);
    let expected = json!({"version": 1, "memory": 1, "cores": 2, "graphics": "VGA"});
    assert_eq!(merged, said(expected));
    let full = said(full());
    assert_eq!(Machine::default().with_defaults(&full), full);
    assert_eq!(
        full.with_defaults(&said(with("tablet", &json!("usb-tablet")))),
        full
    );
}

fn topology(limits: MachineLimits, machine: &Value) -> pileus_base::Result<(u8, u8, u8)> {
    let machine = limits.apply(&good(machine))?;
    Ok((
        machine.threads.unwrap(),
        machine.cores.unwrap(),
        machine.sockets.unwrap(),
    ))
}

fn limits(max_cpus: u32, default_threads: u32) -> MachineLimits {
    MachineLimits {
        max_memory: 1000,
        max_cpus,
        default_threads,
    }
}

#[test]
fn limits_fill_up_what_is_open() {
    let v1 = |more: &Value| {
        let mut machine = json!({"version": 1});
        for (key, value) in more.as_object().unwrap() {
            machine[key] = value.clone();
        }
        machine
    };
    // Worked out by hand from section 2.2 of the reference.
    for (most, default, said, expected) in [
        (4, 2, json!({}), (2, 2, 1)),
        (4, 1, json!({}), (1, 4, 1)),
        (1, 2, json!({}), (1, 1, 1)),
        (3, 2, json!({}), (3, 1, 1)),
        (5, 2, json!({}), (2, 2, 1)),
        (8, 2, json!({"cores": 2}), (4, 2, 1)),
        (8, 2, json!({"cores": 3}), (2, 3, 1)),
        (8, 2, json!({"cores": 5}), (1, 5, 1)),
        (8, 2, json!({"sockets": 2}), (2, 2, 2)),
        (8, 2, json!({"threads": 1}), (1, 8, 1)),
        (8, 2, json!({"threads": 3}), (3, 2, 1)),
        (8, 2, json!({"threads": 3, "cores": 1}), (3, 1, 2)),
        (
            8,
            2,
            json!({"threads": 2, "cores": 2, "sockets": 2}),
            (2, 2, 2),
        ),
        (
            8,
            2,
            json!({"threads": 1, "cores": 1, "sockets": 1}),
            (1, 1, 1),
        ),
    ] {
        let found = topology(limits(most, default), &v1(&said)).unwrap();
        assert_eq!(found, expected, "{most} {default} {said}");
    }
    assert_eq!(
        limits(4, 2).apply(&Machine::default()).unwrap().memory,
        Some(1000)
    );
    // No less than what is said, and no more than a field can hold.
    let large = limits(u32::MAX, 1).apply(&Machine::default()).unwrap();
    assert_eq!(large.cores, Some(255));
}

#[test]
fn more_than_is_allowed_is_the_askers_fault() {
    let refused = |limits: MachineLimits, machine: Value| {
        let err = limits.apply(&good(&machine)).unwrap_err();
        assert_eq!(err.code, Code::InvalidArgument);
        err.message
    };
    assert!(
        limits(4, 1)
            .apply(&good(&with("memory", &json!(1000))))
            .is_ok()
    );
    let told = refused(limits(4, 1), with("memory", &json!(1001)));
    assert!(
        told.contains("1001 MiB") && told.contains("1000 MiB"),
        "{told}"
    );
    let told = refused(limits(4, 1), json!({"version": 1, "threads": 5}));
    assert!(told.contains("5 CPUs"), "{told}");
    let all = json!({"version": 1, "threads": 255, "cores": 255, "sockets": 255});
    assert!(refused(limits(255, 255), all).contains("16581375"));
}

#[test]
fn limits_that_allow_the_machine() {
    let machine = good(&json!({"version": 1, "cores": 3, "memory": 77}));
    let derived = MachineLimits::derive(&machine, 2);
    assert_eq!(
        (
            derived.max_memory,
            derived.max_cpus,
            derived.default_threads
        ),
        (77, 3, 1)
    );
    derived.apply(&machine).unwrap();
    let derived = MachineLimits::derive(&Machine::default(), 8);
    assert_eq!((derived.max_memory, derived.max_cpus), (2048, 8));
    // All of the host's CPUs.
    assert_eq!(derived.apply(&Machine::default()).unwrap().cores, Some(8));
    let json = json!({"maxMemory": 5, "maxCPUs": 6, "defaultThreads": 7});
    let read: MachineLimits = serde_json::from_value(json).unwrap();
    assert_eq!(
        (read.max_memory, read.max_cpus, read.default_threads),
        (5, 6, 7)
    );
}

/// The ancestor's loops, step by step.
fn grown_in_steps(limits: MachineLimits, machine: &Machine) -> (u64, u64, u64) {
    let most = u64::from(limits.max_cpus);
    let set = |value: Option<u8>| u64::from(value.unwrap_or(1));
    let (mut t, mut c, mut s) = (
        set(machine.threads),
        set(machine.cores),
        set(machine.sockets),
    );
    if machine.threads.is_none() && u64::from(limits.default_threads) * c * s <= most {
        t = u64::from(limits.default_threads);
    }
    while machine.cores.is_none() && t * (c + 1) * s <= most {
        c += 1;
    }
    while machine.threads.is_none() && (t + 1) * c * s <= most {
        t += 1;
    }
    while machine.sockets.is_none() && t * c * (s + 1) <= most {
        s += 1;
    }
    (t, c, s)
}

#[path = "properties.rs"]
mod properties;
