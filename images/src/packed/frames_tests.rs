//! Frames: whole ones, several, cut ones, and what is none.

use super::*;

fn frame(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    encoder.include_checksum(true).unwrap();
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

/// What comes out if it comes in by pieces of `step` bytes and has room for `room` at once.
fn all(input: &[u8], step: usize, room: usize) -> Result<Vec<u8>> {
    let mut frames = Frames::new()?;
    let (mut out, mut buffer) = (Vec::new(), vec![0; room]);
    for mut piece in input.chunks(step) {
        loop {
            let len = frames.decompress(&mut piece, &mut buffer)?;
            out.extend_from_slice(&buffer[..len]);
            if len < room {
                assert!(piece.is_empty());
                break;
            }
        }
    }
    frames.finish()?;
    assert_eq!(frames.taken(), input.len() as u64);
    Ok(out)
}

fn rule(input: &[u8]) -> Option<Rule> {
    let rules: Vec<_> = [(1, 3), (7, 1 << 20), (1 << 20, 1), (1 << 20, 1 << 20)]
        .into_iter()
        .map(|(step, room)| all(input, step, room).err().and_then(|err| Rule::of(&err)))
        .collect();
    assert!(rules.iter().all(|rule| *rule == rules[0]), "{rules:?}");
    rules[0]
}

#[test]
fn whole_frames() {
    let text: Vec<u8> = (0..100_000_u32)
        .flat_map(|n| (n / 7).to_le_bytes())
        .collect();
    let skippable = [&b"\x50\x2a\x4d\x18\x05\0\0\0"[..], b"12345"].concat();
    let one = frame(&text);
    let two = [
        &skippable[..],
        &one,
        &frame(b""),
        &skippable,
        &frame(b"x"),
        &skippable,
    ]
    .concat();
    for (step, room) in [(1, 100), (3, 1), (1 << 20, 1 << 20), (1 << 20, 1000)] {
        assert_eq!(all(&one, step, room).unwrap(), text);
        assert_eq!(all(&two, step, room).unwrap(), [&text[..], b"x"].concat());
    }
    assert_eq!(rule(&skippable), None);
}

#[test]
fn cut_at_any_place() {
    let text: Vec<u8> = (0..300_u32).flat_map(|n| (n * n).to_le_bytes()).collect();
    let two = [frame(&text), frame(b"more")].concat();
    let first = frame(&text).len();
    for len in 1..two.len() {
        let want = (len != first).then_some(Rule::Truncated);
        assert_eq!(rule(&two[..len]), want, "{len} of {}", two.len());
    }
}

#[test]
fn what_is_no_zstd() {
    assert_eq!(rule(b""), Some(Rule::NotZstd));
    assert_eq!(
        rule(b"\x1f\x8b\x08\0\0\0\0\0\0\x03\x03\0\0\0\0\0\0\0\0\0"),
        Some(Rule::NotZstd)
    );
    assert_eq!(rule(b"\x1f\x8b"), Some(Rule::NotZstd));
    assert_eq!(
        rule(b"\xfd7zXZ\0\0\x04\xe6\xd6\xb4F\0\0\0\0"),
        Some(Rule::NotZstd)
    );
    assert_eq!(rule(b"something else"), Some(Rule::NotZstd));
    // Begins as a skippable frame does.
    assert_eq!(rule(b"PK\x03\x04\0\x88\0\0\0\x08"), Some(Rule::NotZstd));
    let whole = frame(b"text");
    assert_eq!(
        rule(&[&whole[..], b"garbage"].concat()),
        Some(Rule::ZstdTrailing)
    );
    assert_eq!(
        rule(&[&whole[..], &[0; 512]].concat()),
        Some(Rule::ZstdTrailing)
    );
    assert_eq!(rule(&[&whole[..], b"g"].concat()), Some(Rule::ZstdTrailing));
    // A beginning of a frame.
    assert_eq!(
        rule(&[&whole[..], b"\x28\xb5"].concat()),
        Some(Rule::Truncated)
    );
}

#[test]
fn damage_and_windows() {
    let mut whole = frame(&[7; 1000]);
    *whole.last_mut().unwrap() ^= 1;
    assert_eq!(rule(&whole), Some(Rule::ZstdDamaged));
    // A frame's header with a window of 2^27 and 2^28 bytes, and an empty last block.
    let window = |log: u8| [0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3, 1, 0, 0];
    assert_eq!(rule(&window(27)), None);
    assert_eq!(rule(&window(28)), Some(Rule::ZstdWindow));
}
