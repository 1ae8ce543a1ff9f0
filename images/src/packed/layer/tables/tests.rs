//! The walk of the tables by itself, with a file in memory.

use proptest::prelude::*;

use super::*;

const CLUSTER: usize = 512;
const CLUSTERS: usize = 8;

fn header(extended_l2: bool) -> Header {
    Header {
        version: 3,
        // What two L2 tables have room for.
        virtual_size: 2 * (CLUSTER * CLUSTER / if extended_l2 { 16 } else { 8 }) as u64,
        cluster_bits: 9,
        zstd: false,
        extended_l2,
        l1_offset: CLUSTER as u64,
        l1_entries: 4,
    }
}

fn walk(file: &[u8], extended_l2: bool) -> Result<u64> {
    data(&header(extended_l2), file.len() as u64, |to, at| {
        to.copy_from_slice(&file[at as usize..][..to.len()]);
        Ok(())
    })
}

fn file(entries: &[(usize, u64)]) -> Vec<u8> {
    let mut file = vec![0; CLUSTER * CLUSTERS];
    for (at, entry) in entries {
        file[*at..at + 8].copy_from_slice(&entry.to_be_bytes());
    }
    file
}

#[test]
fn what_counts_as_data() {
    let table = 2 * CLUSTER as u64;
    let cluster = 3 * CLUSTER as u64;
    let at = table as usize;
    for (l2, extended, want) in [
        (&[][..], false, 0),
        (&[(at, cluster)], false, 1),
        (&[(at, cluster | COPIED), (at + 8, ZERO)], false, 2),
        (&[(at, cluster | ZERO)], false, 1),
        (&[(at, cluster), (at + 8, 1)], true, 1),
        (&[(at + 8, 1 << 32)], true, 1),
        (&[(at + 504, ZERO)], false, 1),
    ] {
        let entries = [&[(CLUSTER, table | COPIED)], l2].concat();
        assert_eq!(
            walk(&file(&entries), extended).unwrap(),
            want * CLUSTER as u64
        );
    }
    // Subclusters of no cluster, and an entry for what lies behind the disk's end.
    let none = file(&[(CLUSTER, table), (at + 8, 1)]);
    assert_eq!(
        Rule::of(&walk(&none, true).unwrap_err()),
        Some(Rule::LayerTables)
    );
    let behind = file(&[(CLUSTER + 16, table)]);
    assert_eq!(
        Rule::of(&walk(&behind, false).unwrap_err()),
        Some(Rule::LayerTables)
    );
}

#[test]
fn a_last_cluster_that_is_cut_reads_as_zeros() {
    let mut cut = file(&[
        (CLUSTER, 2 * CLUSTER as u64),
        (2 * CLUSTER, 3 * CLUSTER as u64),
    ]);
    cut.truncate(3 * CLUSTER + 1);
    assert_eq!(walk(&cut, false).unwrap(), CLUSTER as u64);
    cut.truncate(3 * CLUSTER);
    assert_eq!(
        Rule::of(&walk(&cut, false).unwrap_err()),
        Some(Rule::LayerTables)
    );
}

proptest! {
    /// Reads beyond the end would panic in `walk`.
    #[test]
    fn no_table_leads_outside(
        entries in prop::collection::vec(
            (0_usize..3 * CLUSTER / 8, prop_oneof![0_u64..5000, any::<u64>(), (0_u64..9).prop_map(|n| n * 512)]),
            0..20,
        ),
        extended: bool,
        len in 2 * CLUSTER..CLUSTER * CLUSTERS,
    ) {
        let entries: Vec<_> = entries.into_iter().map(|(at, entry)| (CLUSTER + at * 8, entry)).collect();
        let mut file = file(&entries);
        file.truncate(len);
        if let Ok(bytes) = walk(&file, extended) {
            prop_assert!(bytes <= header(extended).virtual_size);
        }
    }
}
