//! No bytes may make the reader of zstd frames panic; what it gives doesn't depend on the pieces in which they come, and
//! is what the zstd library's own reader gives of them, if that takes them.
//!
//! The first two bytes are the size of the pieces that come and of the room for what is given.
#![no_main]

#[path = "../../images/src/archive/extents.rs"]
#[allow(dead_code)]
mod extents;
#[path = "../../images/src/packed/frames.rs"]
#[allow(dead_code)]
mod frames;
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
    pub(crate) use crate::parts;
}

use std::io::Read;

use frames::Frames;
use libfuzzer_sys::fuzz_target;
use rule::Rule;

/// Bytes that are looked at of what comes out.
const MOST: usize = 1 << 16;

fuzz_target!(|bytes: &[u8]| {
    let [step, room, bytes @ ..] = bytes else {
        return;
    };
    let whole = all(bytes, usize::MAX, MOST);
    let pieces = all(bytes, usize::from(*step) + 1, usize::from(*room) * 16 + 1);
    // Whether zstd sees some damages at all depends on them: given all of a frame and room for all of it, it takes a
    // shorter way, which is stricter. What both ways take must be the same.
    if let ((whole, None), (pieces, None)) = (&whole, &pieces) {
        assert!(whole == pieces);
    }
    if let (given, None) = pieces {
        let mut other = zstd::Decoder::new(bytes).unwrap().take(MOST as u64);
        let mut want = Vec::new();
        if other.read_to_end(&mut want).is_ok() {
            assert!(given == want);
        }
    }
});

/// What comes out, and why it ended; nothing of that if it is too much.
fn all(input: &[u8], step: usize, room: usize) -> (Vec<u8>, Option<Rule>) {
    let rule = |err| Some(Rule::of(&err).expect("an error without a rule"));
    let mut frames = Frames::new().unwrap();
    let (mut out, mut buffer) = (Vec::new(), vec![0; room]);
    for mut piece in input.chunks(step.min(input.len().max(1))) {
        loop {
            let len = match frames.decompress(&mut piece, &mut buffer) {
                Ok(len) => len,
                // How much comes before the error is of no interest.
                Err(err) => return (Vec::new(), rule(err)),
            };
            out.extend_from_slice(&buffer[..len]);
            if out.len() >= MOST {
                out.truncate(MOST);
                return (out, None);
            }
            if len < room {
                assert!(piece.is_empty());
                break;
            }
        }
    }
    assert_eq!(frames.taken(), input.len() as u64);
    match frames.finish() {
        Ok(()) => (out, None),
        Err(err) => (Vec::new(), rule(err)),
    }
}
