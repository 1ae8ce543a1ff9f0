//! No bytes may make the reader of an image host's lists panic, and what it takes must keep its promises:
//! paths that stay below the host's address, names that are names, one line of text each.
#![no_main]

#[path = "../../images/src/hosts/simplestreams/manifest.rs"]
#[allow(dead_code)]
mod manifest;

/// Stands in for `images/src/reference.rs`.
mod reference {
    pub fn is_name(text: &str) -> bool {
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._+-/".contains(&b);
        text.len() <= 128
            && text
                .bytes()
                .next()
                .is_some_and(|b| b.is_ascii_alphanumeric())
            && text.bytes().all(plain)
    }
}

use libfuzzer_sys::fuzz_target;

fn is_below(path: &str) -> bool {
    !path.split('/').next().unwrap_or_default().contains(':')
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(path) = manifest::index(bytes) {
        assert!(is_below(&path));
    }
    for entry in manifest::products(bytes, "amd64").unwrap_or_default() {
        assert!(is_below(&entry.path) && !entry.path.contains(['?', '#', '%']));
        assert!(entry.aliases.iter().all(|alias| reference::is_name(alias)));
        for text in [&entry.os, &entry.codename, &entry.title, &entry.version] {
            assert!(text.chars().count() <= 200 && !text.chars().any(char::is_control));
        }
    }
});
