//! No manifest.json of a packed image may make its parser panic; what it takes can be written and read again, says
//! nothing that a terminal would obey, and is refused for no reason that has no name.
#![no_main]

#[path = "../../images/src/packed/manifest.rs"]
#[allow(dead_code)]
mod manifest;
#[path = "../../images/src/packed/rule.rs"]
#[allow(dead_code)]
mod rule;

// As in images/src/packed/mod.rs.
const DISK: &str = "disk.img";
const LAYER: &str = "layer.qcow2";
const MACHINE: &str = "machine.json";

use libfuzzer_sys::fuzz_target;
use manifest::Manifest;
use rule::Rule;

fuzz_target!(|bytes: &[u8]| {
    let manifest = match Manifest::parse(bytes) {
        Ok(manifest) => manifest,
        Err(err) => {
            assert_eq!(Rule::of(&err), Some(Rule::Manifest));
            return;
        }
    };
    assert!(bytes.len() <= manifest::MOST_BYTES);
    let text = manifest.to_json().unwrap();
    // Escapes in texts may make it longer than it was.
    if text.len() <= manifest::MOST_BYTES {
        assert_eq!(Manifest::parse(&text).unwrap(), manifest);
    }
    assert!(
        !text
            .iter()
            .any(|byte| byte.is_ascii_control() && *byte != b'\n')
    );
    manifest.check(&manifest.members).unwrap();
    assert!(manifest.members.disk.data <= manifest.members.disk.size);
});
