//! What is taken for a manifest, and what is not.

use pileus_base::Code;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn manifest() -> Manifest {
    let members = Members {
        disk: DiskMember {
            size: 10 << 30,
            data: 4096,
            digest: Digest::from_bytes([1; 32]),
        },
        layer: Member::of(b"layer"),
        machine: Member::of(b"{}"),
    };
    let provenance = Provenance {
        source: Some("debian 13".to_owned()),
        recipe: Some(Digest::from_bytes([2; 32])),
        ..Provenance::ours()
    };
    Manifest::new(members, provenance)
}

fn value() -> Value {
    serde_json::from_slice(&manifest().to_json().unwrap()).unwrap()
}

#[track_caller]
fn refused(text: &str, why: &str) {
    let err = Manifest::parse(text.as_bytes()).unwrap_err();
    assert_eq!(Rule::of(&err), Some(Rule::Manifest), "{text}");
    assert!(err.message.contains(why), "{}", err.message);
}

#[test]
fn what_is_written_is_read() {
    let text = manifest().to_json().unwrap();
    assert_eq!(Manifest::parse(&text).unwrap(), manifest());
    assert_eq!(
        value(),
        json!({
            "format": 1,
            "members": {
                "disk.img": {
                    "size": 10_737_418_240_u64,
                    "data": 4096,
                    "digest": format!("sha256:{}", "01".repeat(32)),
                },
                "layer.qcow2": {
                    "size": 5,
                    "sha256": Member::of(b"layer").sha256.to_string(),
                },
                "machine.json": {
                    "size": 2,
                    "sha256": "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
                },
            },
            "provenance": {
                "tool": "pileus",
                "toolVersion": env!("CARGO_PKG_VERSION"),
                "source": "debian 13",
                "recipe": format!("sha256:{}", "02".repeat(32)),
            },
        })
    );
    // All of the provenance is optional.
    let mut short = value();
    short.as_object_mut().unwrap().remove("provenance");
    let short = Manifest::parse(short.to_string().as_bytes()).unwrap();
    assert!(short.provenance.is_empty());
    assert!(
        !String::from_utf8(short.to_json().unwrap())
            .unwrap()
            .contains("provenance")
    );
}

#[test]
fn another_form_is_told_as_such() {
    for (format, why) in [
        (json!(2), "the form 2"),
        (json!(0), "the form 0"),
        (json!(u64::MAX), "the form 18446744073709551615"),
        (json!(-1), "integer"),
        (json!(1.0), "floating point"),
        (json!("1"), "string"),
        (Value::Null, "null"),
    ] {
        let mut all = value();
        all["format"] = format;
        all["news"] = json!("of tomorrow");
        refused(&all.to_string(), why);
    }
    refused("{}", "missing field `format`");
}

#[test]
fn nothing_is_unknown_missing_or_of_another_kind() {
    for path in [
        "",
        "/members",
        "/members/disk.img",
        "/members/layer.qcow2",
        "/provenance",
    ] {
        let mut all = value();
        all.pointer_mut(path).unwrap()["extra"] = json!(1);
        refused(&all.to_string(), "unknown field `extra`");
    }
    for (path, name) in [
        ("", "members"),
        ("/members", "disk.img"),
        ("/members", "machine.json"),
        ("/members/disk.img", "digest"),
        ("/members/disk.img", "data"),
        ("/members/machine.json", "size"),
    ] {
        let mut all = value();
        let parent = all.pointer_mut(path).unwrap();
        parent.as_object_mut().unwrap().remove(name).unwrap();
        refused(&all.to_string(), &format!("missing field `{name}`"));
    }
    for (path, wrong, why) in [
        ("/members/disk.img/size", json!(-1), "expected u64"),
        ("/members/disk.img/size", json!(1e3), "expected u64"),
        ("/members/disk.img/data", json!(u64::MAX), "more data"),
        ("/members/disk.img/digest", json!("md5:00"), "not a SHA-256"),
        (
            "/members/layer.qcow2",
            json!([5, format!("sha256:{}", "0".repeat(64))]),
            "a list or null",
        ),
        ("/provenance/os", Value::Null, "a list or null"),
        ("/provenance/recipe", json!("sha256:zz"), "not a SHA-256"),
        ("/provenance/source", json!(["x"]), "expected a string"),
        (
            "/provenance/source",
            json!("\u{1b}[2J"),
            "source is not one line",
        ),
        ("/provenance/tool", json!("a\nb"), "tool is not one line"),
        (
            "/provenance/tool",
            json!("x".repeat(513)),
            "tool is not one line",
        ),
    ] {
        let mut all = value();
        let (parent, name) = path.rsplit_once('/').unwrap();
        all.pointer_mut(parent).unwrap()[name] = wrong;
        refused(&all.to_string(), why);
    }
}

#[test]
fn nothing_is_there_twice_and_nothing_follows() {
    let text = value().to_string();
    for name in ["\"format\":1", "\"size\":5", "\"tool\":\"pileus\""] {
        assert!(text.contains(name), "{text}");
        let twice = text.replacen(name, &format!("{name},{name}"), 1);
        refused(&twice, "duplicate field");
    }
    refused(&format!("{text} x"), "trailing characters");
    refused(&text[..text.len() - 1], "EOF");
    refused("", "EOF");
    refused(&"[".repeat(10_000), "");
    let padded = format!("{text}{}", " ".repeat(MOST_BYTES - text.len()));
    assert!(Manifest::parse(padded.as_bytes()).is_ok());
    refused(&format!("{padded} "), "65536 bytes");
    let mut wild = text.into_bytes();
    wild[20] = 0xff;
    assert!(Manifest::parse(&wild).is_err());
}

#[test]
fn what_could_not_be_read_is_not_written() {
    let mut manifest = manifest();
    manifest.provenance.title = Some("a\tb".to_owned());
    assert_eq!(manifest.to_json().unwrap_err().code, Code::InvalidArgument);
}

#[test]
fn the_member_that_differs_is_named() {
    let found = manifest().members;
    manifest().check(&found).unwrap();
    let mut disk = found.clone();
    disk.disk.digest = Digest::from_bytes([9; 32]);
    let mut layer = found.clone();
    layer.layer.size += 1;
    let mut machine = found;
    machine.machine = Member::of(b"other");
    for (found, name) in [
        (disk, "disk.img"),
        (layer, "layer.qcow2"),
        (machine, "machine.json"),
    ] {
        let err = manifest().check(&found).unwrap_err();
        assert_eq!(Rule::of(&err), Some(Rule::ManifestMismatch));
        assert!(err.message.contains(name), "{}", err.message);
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Manifest::parse(&bytes);
    }

    #[test]
    fn no_change_of_a_byte_panics(at in 0..900_usize, byte: u8) {
        let mut text = manifest().to_json().unwrap();
        if let Some(place) = text.get_mut(at) {
            *place = byte;
        }
        if let Ok(read) = Manifest::parse(&text) {
            prop_assert_eq!(Manifest::parse(&read.to_json().unwrap()).unwrap(), read);
        }
    }
}
