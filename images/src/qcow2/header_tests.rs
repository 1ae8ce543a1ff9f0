//! Each rule of the header parser, by changing one field of a good header; and that no bytes panic.

use proptest::prelude::*;

use super::*;

const CLUSTER: u64 = 65536;
const LIMIT: u64 = 1 << 40;
const FILE_LEN: u64 = 4 * CLUSTER;

fn good(version: u32) -> Vec<u8> {
    let mut head = vec![0; CLUSTER as usize];
    head[..4].copy_from_slice(&MAGIC);
    set32(&mut head, 4, version);
    set32(&mut head, 20, 16);
    set64(&mut head, 24, 1 << 30);
    set32(&mut head, 36, 2);
    set64(&mut head, 40, 3 * CLUSTER);
    set64(&mut head, 48, CLUSTER);
    set32(&mut head, 56, 1);
    if version == 3 {
        set32(&mut head, 96, 4);
        set32(&mut head, 100, 112);
    }
    head
}

fn set32(head: &mut [u8], at: usize, value: u32) {
    head[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn set64(head: &mut [u8], at: usize, value: u64) {
    head[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn with(change: impl Fn(&mut Vec<u8>)) -> Result<Header, Refusal> {
    let mut head = good(3);
    change(&mut head);
    parse(&head, FILE_LEN, LIMIT)
}

fn with32(at: usize, value: u32) -> Result<Header, Refusal> {
    with(|head| set32(head, at, value))
}

fn with64(at: usize, value: u64) -> Result<Header, Refusal> {
    with(|head| set64(head, at, value))
}

#[test]
fn good_headers_pass() {
    for version in [2, 3] {
        let header = parse(&good(version), FILE_LEN, LIMIT).unwrap();
        assert_eq!(header.virtual_size, 1 << 30);
        assert_eq!(header.version, version);
    }
    let zstd = with(|head| {
        set64(head, 72, COMPRESSION_TYPE);
        head[104] = 1;
    });
    assert!(zstd.unwrap().zstd);
    let extended = with(|head| {
        set64(head, 72, EXTENDED_L2);
        set32(head, 36, 4);
    });
    assert!(extended.unwrap().extended_l2);
    let names = with(|head| {
        set32(head, 112, EXT_FEATURE_NAMES);
        set32(head, 116, 48);
    });
    assert!(names.is_ok());
}

#[test]
fn each_rule_refuses() {
    let cases = [
        (with32(0, 0), Refusal::NotQcow2),
        (with32(4, 1), Refusal::Version(1)),
        (with32(4, 4), Refusal::Version(4)),
        (with64(8, 512), Refusal::BackingFile),
        (with32(16, 5), Refusal::BackingFile),
        (with32(20, 8), Refusal::ClusterBits(8)),
        (with32(20, 22), Refusal::ClusterBits(22)),
        (with32(20, u32::MAX), Refusal::ClusterBits(u32::MAX)),
        (with64(24, 0), Refusal::Empty),
        (with64(24, LIMIT + 1), Refusal::TooLarge(LIMIT + 1, LIMIT)),
        (with64(24, u64::MAX), Refusal::TooLarge(u64::MAX, LIMIT)),
        (with32(32, 1), Refusal::Encrypted),
        (with32(32, 2), Refusal::Encrypted),
        (with32(60, 1), Refusal::Snapshots(1)),
        (with64(72, DIRTY), Refusal::Dirty),
        (with64(72, CORRUPT), Refusal::Corrupt),
        (with64(72, DATA_FILE), Refusal::DataFile),
        (with64(72, 1 << 5), Refusal::UnknownFeature(1 << 5)),
        (with64(72, 1 << 63), Refusal::UnknownFeature(1 << 63)),
        (with64(72, COMPRESSION_TYPE), Refusal::CompressionType(0)),
        (with32(96, 7), Refusal::RefcountOrder(7)),
        (with32(100, 96), Refusal::HeaderLength(96)),
        (with32(100, 113), Refusal::HeaderLength(113)),
        (with32(100, 65536), Refusal::HeaderLength(65536)),
        (with(|head| head[104] = 1), Refusal::CompressionType(1)),
        // L1: too few entries, far too many, no offset, not aligned, outside.
        (with32(36, 1), Refusal::L1Table),
        (with32(36, u32::MAX), Refusal::L1Table),
        (with64(40, 0), Refusal::L1Table),
        (with64(40, 3 * CLUSTER + 8), Refusal::L1Table),
        (with64(40, 4 * CLUSTER), Refusal::L1Table),
        (with64(40, !(CLUSTER - 1)), Refusal::L1Table),
        (with32(56, 0), Refusal::RefcountTable),
        (with32(56, u32::MAX), Refusal::RefcountTable),
        (with64(48, 0), Refusal::RefcountTable),
        (with64(48, CLUSTER + 1), Refusal::RefcountTable),
        (with64(48, 4 * CLUSTER), Refusal::RefcountTable),
        (with32(112, EXT_BACKING_FORMAT), Refusal::BackingFile),
        (with32(112, EXT_DATA_FILE), Refusal::DataFile),
        (with32(112, EXT_ENCRYPTION), Refusal::Encrypted),
        (with32(112, EXT_BITMAPS), Refusal::Bitmaps),
        (with32(112, 0x1234), Refusal::Extension(0x1234)),
        (
            with(|head| {
                set32(head, 112, EXT_FEATURE_NAMES);
                set32(head, 116, u32::MAX);
            }),
            Refusal::Extension(EXT_FEATURE_NAMES),
        ),
        (
            with(|head| {
                set64(head, 72, EXTENDED_L2);
                set32(head, 20, 13);
            }),
            Refusal::ClusterBits(13),
        ),
    ];
    for (at, (got, want)) in cases.into_iter().enumerate() {
        assert_eq!(got, Err(want), "case {at}");
    }
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let whole = good(3);
    for len in 0..120 {
        assert!(parse(&whole[..len], len as u64, LIMIT).is_err(), "{len}");
    }
    assert_eq!(
        parse(&whole, 3 * CLUSTER, LIMIT),
        Err(Refusal::L1Table),
        "cut before the L1 table"
    );
}

#[test]
fn refusals_are_told_apart_by_code() {
    assert_eq!(
        Error::from(Refusal::TooLarge(2, 1)).code,
        Code::ImageTooLarge
    );
    assert_eq!(Error::from(Refusal::BackingFile).code, Code::BadImage);
}

proptest! {
    #[test]
    fn no_bytes_panic(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), len: u64, limit: u64) {
        let _ = parse(&bytes, len, limit);
        // The same with a good beginning, to get past the first checks.
        if bytes.len() > 8 {
            bytes[..4].copy_from_slice(&MAGIC);
            bytes[4..8].copy_from_slice(&[0, 0, 0, 3]);
            let _ = parse(&bytes, len, limit);
        }
    }

    #[test]
    fn no_change_of_a_good_header_panics(at in 0_usize..160, value: u64, len: u64) {
        let mut head = good(3);
        set64(&mut head, at, value);
        if let Ok(header) = parse(&head, len, LIMIT) {
            prop_assert!(header.virtual_size <= LIMIT && header.virtual_size > 0);
            prop_assert!((9..=21).contains(&header.cluster_bits));
        }
    }
}
