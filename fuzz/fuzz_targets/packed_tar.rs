//! No bytes may make the walk of a packed image's tar panic, or give more than its bounds; and it doesn't depend on the
//! pieces in which they come.
//!
//! The first byte is the size of the pieces. Checksums are made right, so that what is behind them is reached.
#![no_main]

#[path = "../../images/src/archive/extents.rs"]
#[allow(dead_code)]
mod extents;
#[path = "../../images/src/packed/members/mod.rs"]
#[allow(dead_code)]
mod members;
#[path = "../../images/src/archive/parts.rs"]
#[allow(dead_code)]
mod parts;
#[path = "../../images/src/packed/rule.rs"]
#[allow(dead_code)]
mod rule;
#[path = "../../images/src/sparse.rs"]
#[allow(dead_code)]
mod sparse;

mod archive {
    pub(crate) use crate::{extents, parts};
}

pub const DISK: &str = "disk.img";
pub const LAYER: &str = "layer.qcow2";
pub const MACHINE: &str = "machine.json";
pub const MANIFEST: &str = "manifest.json";

use std::io::{BufRead, BufReader};

use libfuzzer_sys::fuzz_target;
use members::{Bounds, Member, Walk};
use rule::Rule;

const BOUNDS: Bounds = Bounds {
    disk: 1 << 40,
    small: 1 << 16,
    skipped: 1 << 16,
    members: 100,
    extents: 100,
};

/// The members, how many bytes each of them gave, and why it ended.
type Seen = (Vec<(Member, u64)>, Option<Rule>);

fuzz_target!(|bytes: &[u8]| {
    let Some((size, bytes)) = bytes.split_first() else {
        return;
    };
    let mut summed = bytes.to_vec();
    summed.chunks_exact_mut(512).for_each(sum);
    for tar in [bytes, &summed] {
        let whole = walk(tar);
        let pieces = walk(BufReader::with_capacity(usize::from(*size) * 4 + 1, tar));
        assert_eq!(whole, pieces);
    }
});

/// Gives what looks like a header the right checksum.
fn sum(block: &mut [u8]) {
    if block[156] < 128 && (block[..9] != [0; 9] || block[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

fn walk(input: impl BufRead) -> Seen {
    let mut walk = Walk::new(input, BOUNDS);
    let mut seen: Vec<(Member, u64)> = Vec::new();
    loop {
        let member = match walk.next_member() {
            Ok(Some(member)) => member,
            Ok(None) => return (seen, None),
            Err(err) => return (seen, Some(Rule::of(&err).expect("an error without a rule"))),
        };
        assert!(member.extents.len() <= BOUNDS.extents);
        assert!(member.size <= BOUNDS.disk + BOUNDS.disk / 16 + (1 << 20));
        assert!(seen.iter().all(|(other, _)| other.kind != member.kind));
        let (mut end, mut given) = (0, 0);
        let read = walk.read(&member, &mut |at, piece| {
            assert!(at >= end && !piece.is_empty());
            end = at + piece.len() as u64;
            given += piece.len() as u64;
            assert!(end <= member.size);
            Ok(())
        });
        if let Err(err) = read {
            return (seen, Some(Rule::of(&err).expect("an error without a rule")));
        }
        let stored: u64 = member.extents.iter().map(|extent| extent.len).sum();
        assert_eq!(given, stored);
        seen.push((member, given));
    }
}
