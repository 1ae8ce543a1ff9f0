//! No bytes may make the qcow2 header parser panic, and what it accepts must keep its promises; nor may any make the
//! walk of a layer's tables panic or read outside of the file.
//!
//! The parser's files are taken in directly: they need nothing but `base`, so the fuzzer builds in
//! seconds and not with all that the image store depends on.
#![no_main]

#[path = "../../images/src/qcow2/header.rs"]
#[allow(dead_code)]
mod header;
#[path = "../../images/src/packed/rule.rs"]
#[allow(dead_code)]
mod rule;
#[path = "../../images/src/packed/layer/tables.rs"]
#[allow(dead_code)]
mod tables;

mod packed {
    pub(crate) use crate::rule;
}
mod qcow2 {
    pub(crate) use crate::header;
}

use header::Below;
use libfuzzer_sys::fuzz_target;
use rule::Rule;

const LIMIT: u64 = 1 << 41;
/// A layer's clusters, so that a small input has several.
const CLUSTER_BITS: u8 = 9;

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
    layer(&head);
    // With what every layer has, so that the tables are reached.
    if head.len() >= 512 {
        head[20..24].copy_from_slice(&[0, 0, 0, CLUSTER_BITS]);
        head[4..8].copy_from_slice(&[0, 0, 0, 3]);
        layer(&head);
    }
});

/// The bytes as a whole file.
fn layer(file: &[u8]) {
    let len = file.len() as u64;
    let size = file.get(24..32).map_or(0, |size| {
        u64::from_be_bytes(size.try_into().unwrap_or_default())
    });
    let below = Below {
        name: b"disk.img",
        format: b"raw",
        size,
    };
    let Ok(header) = header::parse_layer(file, len, below) else {
        return;
    };
    assert_eq!(header.virtual_size, size);
    assert!(file.windows(8).any(|name| name == b"disk.img"));
    assert!(file.windows(3).any(|format| format == b"raw"));
    let mut read = 0;
    let walked = tables::data(&header, len, |to, at| {
        // Panics outside of the file.
        to.copy_from_slice(&file[at as usize..][..to.len()]);
        read += to.len() as u64;
        Ok(())
    });
    match walked {
        Ok(data) => assert!(data <= size.next_multiple_of(1 << header.cluster_bits) + read * 2048),
        Err(err) => assert!(Rule::of(&err).is_some()),
    }
}
