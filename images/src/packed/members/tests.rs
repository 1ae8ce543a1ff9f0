//! The walk by itself: pieces of any size, and bytes of any kind. What it refuses is tried in `tests/it/packed_attacks`.

use std::io::BufReader;

use proptest::prelude::*;

use super::*;

const BOUNDS: Bounds = Bounds {
    disk: 1 << 30,
    small: 4096,
    skipped: 4096,
    members: 20,
    extents: 20,
};

fn header(name: &str, size: u64, kind: u8) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_size(size);
    header.set_mode(0o644);
    header.set_entry_type(tar::EntryType::new(kind));
    header.set_cksum();
    header.as_bytes().to_vec()
}

fn member(name: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = header(name, data.len() as u64, b'0');
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn all(input: impl BufRead) -> Result<Vec<(Kind, Vec<u8>)>> {
    let mut walk = Walk::new(input, BOUNDS);
    let mut got = Vec::new();
    while let Some(member) = walk.next_member()? {
        let mut bytes = vec![0; member.size.min(1 << 20) as usize];
        walk.read(&member, &mut |at, piece| {
            if let Some(to) = bytes.get_mut(at as usize..at as usize + piece.len()) {
                to.copy_from_slice(piece);
            }
            Ok(())
        })?;
        got.push((member.kind, bytes));
    }
    Ok(got)
}

#[test]
fn pieces_of_any_size() {
    let tar = [
        member("disk.img", &[7; 1024]),
        member("other", b"x"),
        member("machine.json", b"{}"),
        member("layer.qcow2", b"layer"),
        vec![0; 1024],
    ]
    .concat();
    let want = [
        (Kind::Disk, vec![7; 1024]),
        (Kind::Machine, b"{}".to_vec()),
        (Kind::Layer, b"layer".to_vec()),
    ];
    for size in [1, 2, 3, 511, 512, 513, 100_000] {
        assert_eq!(all(BufReader::with_capacity(size, &tar[..])).unwrap(), want);
        for len in (0..tar.len() - 1).step_by(97) {
            let err = all(BufReader::with_capacity(size, &tar[..len])).unwrap_err();
            assert_eq!(Rule::of(&err), Some(Rule::Truncated), "{len}: {err}");
        }
    }
}

#[test]
fn a_member_that_was_not_read_is_a_defect() {
    let tar = [
        member("disk.img", &[7; 1024]),
        member("machine.json", b"{}"),
    ]
    .concat();
    let mut walk = Walk::new(&tar[..], BOUNDS);
    walk.next_member().unwrap();
    let err = walk.next_member().unwrap_err();
    assert_eq!(Rule::of(&err), None);
}

#[test]
fn plain_names() {
    for (name, want) in [
        (&b"./disk.img"[..], &b"disk.img"[..]),
        (b"//a/.././/disk.img/", b"disk.img"),
        (b"../../disk.img", b"disk.img"),
        (b"a/disk.img", b"a/disk.img"),
        (b"..", b""),
    ] {
        assert_eq!(plain(name), want);
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(
        kind in prop::sample::select(&b"0SxgLK17"[..]),
        name in prop::sample::select(&["disk.img", "machine.json", "x"][..]),
        size in prop_oneof![0_u64..3000, any::<u64>().prop_map(|n| n >> 2)],
        patch in prop::collection::vec((0_usize..512, any::<u8>()), 0..4),
        text in prop::collection::vec(any::<u8>(), 0..3000),
    ) {
        let mut first = header(name, size, kind);
        for (at, byte) in patch {
            first[at] = byte;
        }
        let mut raw = tar::Header::new_old();
        raw.as_mut_bytes().copy_from_slice(&first);
        raw.set_cksum();
        let bytes = [raw.as_bytes(), &text[..], &member("disk.img", &[1; 512]), &[0; 1024]].concat();
        let _ = all(&bytes[..]);
    }

    #[test]
    fn no_records_panic(text in "([0-9]{1,3} )?[a-zA-Z.]{0,20}=?[0-9,]{0,30}\n?") {
        let _ = Pax::parse(text.as_bytes());
        let _ = Pax::parse(format!("{} {text}\n", text.len() + 4).as_bytes());
    }
}
