//! A disk's digest depends on its content alone.

use std::io::Write;

use pileus_base::Code;
use proptest::prelude::*;

use super::*;

const MIB: usize = CHUNK as usize;

/// As the folder's page says it, word for word.
fn reference(disk: &[u8]) -> Digest {
    let mut all = b"pileus disk 1\n".to_vec();
    all.extend((disk.len() as u64).to_be_bytes());
    for (index, chunk) in disk.chunks(MIB).enumerate() {
        if chunk.iter().any(|byte| *byte != 0) {
            all.extend((index as u64).to_be_bytes());
            all.extend(Sha256::digest(chunk));
        }
    }
    Digest::from_bytes(Sha256::digest(all).into())
}

fn file_digest(file: &File, threads: usize) -> Digest {
    of_file(file, threads, &mut |_| Ok(())).unwrap()
}

/// Runs of zeros and of bytes, of lengths around and beyond a chunk's.
fn disks() -> impl Strategy<Value = Vec<u8>> {
    let len = prop_oneof![
        0..5000_usize,
        4090..4100_usize,
        MIB - 2..MIB + 3,
        0..3 * MIB
    ];
    proptest::collection::vec((len, any::<bool>()), 0..6).prop_map(|runs| {
        let mut disk = Vec::new();
        for (len, data) in runs {
            let byte = if data { 1 + (len % 255) as u8 } else { 0 };
            disk.resize(disk.len() + len, byte);
        }
        disk
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_split_gives_the_same(
        disk in disks(),
        cuts in proptest::collection::vec(1..2 * MIB, 1..8),
        leave_out in any::<bool>(),
    ) {
        let mut digest = DiskDigest::new(disk.len() as u64);
        let mut at = 0;
        for len in cuts.iter().cycle() {
            let end = disk.len().min(at + len);
            let piece = &disk[at..end];
            if !leave_out || piece.iter().any(|byte| *byte != 0) {
                digest.update(at as u64, piece).unwrap();
            }
            at = end;
            if at == disk.len() {
                break;
            }
        }
        prop_assert_eq!(digest.finish(), reference(&disk));
    }

    #[test]
    fn dense_and_sparse_files_have_the_same(disk in disks(), threads in 1..5_usize) {
        let want = reference(&disk);
        let mut dense = tempfile::tempfile().unwrap();
        dense.write_all(&disk).unwrap();
        prop_assert_eq!(file_digest(&dense, threads), want.clone());
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(disk.len() as u64).unwrap();
        for (n, block) in disk.chunks(4096).enumerate() {
            if !is_zero(block) {
                sparse.write_all_at(block, n as u64 * 4096).unwrap();
            }
        }
        prop_assert_eq!(file_digest(&sparse, threads), want);
    }
}

#[test]
fn digests_that_stay_for_ever() {
    for (disk, want) in [
        (vec![], EMPTY),
        (vec![0; 3 * MIB + 512], ZEROS_ONLY),
        ([vec![0; MIB], vec![7; MIB + 512]].concat(), SEVENS),
    ] {
        assert_eq!(reference(&disk).hex(), want);
        let mut digest = DiskDigest::new(disk.len() as u64);
        digest.update(0, &disk).unwrap();
        assert_eq!(digest.finish().hex(), want);
    }
}

const EMPTY: &str = "d11b3e54c3b13e4dd5e6fdbc17f2773a84c222ded8e34f0ea9450d9cd65b6bfa";
const ZEROS_ONLY: &str = "831d1055a98c0364e5fcc726b4f160e34fb9d5c7a54a7446db9c51fa709f7350";
const SEVENS: &str = "7097e65c8223fa6de58aad9df414a156c3c8b77655a29476779c1449fe8f3f55";

#[test]
fn two_at_once_are_what_each_is_alone() {
    let bytes: Vec<u8> = (0..2000_u32).map(|n| (n % 251) as u8).collect();
    let lengths = [0, 1, 63, 64, 127, 128, 129, 512, 1000, 1024];
    for (first, second) in lengths.iter().flat_map(|a| lengths.map(|b| (*a, b))) {
        let (first, second) = (&bytes[..first], &bytes[900..900 + second]);
        let want = [hash_of(first), hash_of(second)];
        assert_eq!(hash_both(first, second), want);
    }
}

#[test]
fn a_large_hole_costs_nothing() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 40).unwrap();
    file.write_all_at(b"x", (1 << 39) + 5).unwrap();
    let mut seen = 0;
    let digest = of_file(&file, 2, &mut |bytes| {
        seen += bytes;
        Ok(())
    });
    assert_eq!(seen, CHUNK);
    let mut pieces = DiskDigest::new(1 << 40);
    pieces.update((1 << 39) + 5, b"x").unwrap();
    assert_eq!(digest.unwrap(), pieces.finish());
}

#[test]
fn pieces_out_of_order_are_refused() {
    let mut digest = DiskDigest::new(100);
    digest.update(10, &[1; 10]).unwrap();
    for (at, len) in [(19, 1), (0, 1), (20, 81), (u64::MAX, 2), (101, 0)] {
        let err = digest.update(at, &vec![0; len]).unwrap_err();
        assert_eq!(err.code, Code::Internal, "{at} {len}");
    }
    digest.update(20, &[1; 80]).unwrap();
}

#[test]
fn who_wants_no_more_ends_it() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&vec![1; 80 * MIB]).unwrap();
    let mut seen = 0;
    let stopped = of_file(&file, 3, &mut |_| {
        seen += 1;
        match seen {
            5 => Err(Error::new(Code::Cancelled, "enough")),
            _ => Ok(()),
        }
    });
    assert_eq!(stopped.unwrap_err().code, Code::Cancelled);
    assert_eq!(seen, 5);
}
