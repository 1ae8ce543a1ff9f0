//! What a guest's file server sends may be anything: it is cut into packets that are whole, and what is
//! taken of them is bounded and never more than came.
#![no_main]

#[path = "../../clients/cli/src/sftp/wire.rs"]
#[allow(dead_code)]
mod wire;

use libfuzzer_sys::fuzz_target;
use wire::{Answer, Frames, MAX_PACKET};

fuzz_target!(|input: &[u8]| {
    // The first byte says how the rest is cut.
    let Some((cut, bytes)) = input.split_first() else {
        return;
    };
    let mut frames = Frames::default();
    for piece in bytes.chunks(usize::from(*cut).max(1)) {
        frames.add(piece);
        loop {
            let packet = match frames.next() {
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                Err(_) => return,
            };
            let len = packet.len();
            assert!((1..=MAX_PACKET).contains(&len));
            let _ = wire::version(packet.clone());
            let Ok((_, answer)) = wire::answer(packet) else {
                continue;
            };
            let held = match answer {
                Answer::Status { message, .. } => message.chars().count(),
                Answer::Handle(bytes) | Answer::Data(bytes) => bytes.len(),
                Answer::Names(names) => names.iter().map(|found| found.name.len() + 12).sum(),
                Answer::Attrs(attrs) => {
                    let _ = attrs.kind();
                    4
                }
            };
            assert!(held <= len);
        }
    }
});
