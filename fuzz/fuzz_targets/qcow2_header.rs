//! No bytes may make the qcow2 header parser panic, and what it accepts must keep its promises.
//!
//! The parser's file is taken in directly: it needs nothing but `base`, so the fuzzer builds in
//! seconds and not with all that the image store depends on.
#![no_main]

#[path = "../../images/src/qcow2/header.rs"]
#[allow(dead_code)]
mod header;

use libfuzzer_sys::fuzz_target;

const LIMIT: u64 = 1 << 41;

fuzz_target!(|bytes: &[u8]| {
    // The file's length is another input: the first eight bytes, kept near the size of real files.
    let (len, bytes) = match bytes.split_first_chunk::<8>() {
        Some((len, rest)) => (u64::from_le_bytes(*len) >> 16, rest),
        None => (0, bytes),
    };
    let mut head = bytes.to_vec();
    for magic in [false, true] {
        if magic && head.len() >= 4 {
            head[..4].copy_from_slice(&header::MAGIC);
        }
        if let Ok(got) = header::parse(&head, len, LIMIT) {
            assert!((2..=3).contains(&got.version));
            assert!((9..=21).contains(&got.cluster_bits));
            assert!(got.virtual_size > 0 && got.virtual_size <= LIMIT);
        }
    }
});
