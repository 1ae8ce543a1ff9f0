//! What the bytes around a tar can be refused for: zstd, budgets, and every single bit.

use std::io::{Read, Write};

use pileus_base::Reporter;
use pileus_images::packed::Rule;
use pileus_images::packed::unpack::{Budgets, unpack};

use super::tar::{Header, Tar};
use super::{
    Attack, MACHINE, MIB, attack, budgets, disk, good, layer, names, refused, taken, try_it, zst,
};
use crate::support;

/// The skippable frame that anybody may put between others.
const SKIPPABLE: &[u8] = b"\x50\x2a\x4d\x18\x05\0\0\0hello";

fn bytes(rule: Rule, what: &'static str, archive: Vec<u8>) -> Attack {
    Attack {
        rule,
        what,
        archive,
        budgets: budgets(),
    }
}

pub fn attacks() -> Vec<Attack> {
    let tar = good().end();
    let whole = zst(&tar);
    let cut = |len: usize| whole[..len].to_vec();
    let and = |rest: &[u8]| [&whole[..], rest].concat();
    let mut damaged = whole.clone();
    *damaged.last_mut().unwrap() ^= 1;
    let mut all = vec![
        bytes(Rule::NotZstd, "nothing", Vec::new()),
        bytes(Rule::NotZstd, "a tar", tar.clone()),
        bytes(Rule::NotZstd, "gzip", support::gz(&tar)),
        bytes(Rule::NotZstd, "xz", support::xz(&tar)),
        bytes(Rule::NotZstd, "a web page", b"<html>404</html>".to_vec()),
        bytes(Rule::ZstdDamaged, "another checksum", damaged),
        bytes(Rule::Truncated, "half of it", cut(whole.len() / 2)),
        bytes(
            Rule::Truncated,
            "without its checksum",
            cut(whole.len() - 4),
        ),
        bytes(
            Rule::Truncated,
            "without its last byte",
            cut(whole.len() - 1),
        ),
        bytes(Rule::ZstdTrailing, "text behind", and(b"something else")),
        bytes(Rule::ZstdTrailing, "zeros behind", and(&[0; 1024])),
        bytes(Rule::ZstdTrailing, "gzip behind", and(&support::gz(b"x"))),
        bytes(Rule::Truncated, "a cut frame behind", and(&zst(b"")[..5])),
        // A frame's header that wants 2^28 bytes.
        bytes(
            Rule::ZstdWindow,
            "a large window",
            vec![0x28, 0xb5, 0x2f, 0xfd, 0, 18 << 3, 1, 0, 0],
        ),
        bytes(Rule::Truncated, "no end", zst(&good().cut())),
        bytes(
            Rule::Truncated,
            "half an end",
            zst(&good().raw(&[0; 512]).cut()),
        ),
        bytes(Rule::Truncated, "a cut member", zst(&tar[..100_000])),
        bytes(
            Rule::TarTrailing,
            "a tar behind it",
            zst(&good().raw(&[0; 1024]).raw(&good().end()).cut()),
        ),
        bytes(
            Rule::TarTrailing,
            "text behind it",
            zst(&[&tar[..], b"x"].concat()),
        ),
        bytes(
            Rule::TarTrailing,
            "endless zeros",
            zst(&[&tar[..], &vec![0; 2 << 20]].concat()),
        ),
    ];
    all.extend(bombs());
    all
}

/// Small archives that give a lot.
fn bombs() -> Vec<Attack> {
    // Far larger than what `data` allows, all of it data; and zeros, which take nothing but time.
    let dense = |byte: u8| {
        Tar::default()
            .file("disk.img", &vec![byte; 40 << 20])
            .file("layer.qcow2", &layer())
            .file("machine.json", MACHINE)
    };
    let large = Budgets {
        archive: 100,
        ..budgets()
    };
    let any_ratio = Budgets {
        ratio: u64::MAX,
        ..budgets()
    };
    vec![
        Attack {
            budgets: large,
            ..attack(Rule::ArchiveTooLarge, "more bytes than it may have", good())
        },
        attack(Rule::Ratio, "40 MiB of zeros", dense(0)),
        Attack {
            budgets: any_ratio.clone(),
            ..attack(Rule::DataTooLarge, "40 MiB of ones", dense(1))
        },
        Attack {
            budgets: any_ratio,
            ..attack(Rule::DataTooLarge, "a layer of 20 MiB", {
                Tar::default().file("layer.qcow2", &vec![1; 20 << 20])
            })
        },
    ]
}

/// What was written before it was refused, at most: in the folder, while the archive comes.
#[test]
fn a_bomb_stops_where_its_budget_ends() {
    let bomb = zst(&Tar::default().file("disk.img", &vec![1; 60 << 20]).end());
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    let watch = {
        let path = path.clone();
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let ended = stop.clone();
        let watching = std::thread::spawn(move || {
            use std::os::unix::fs::MetadataExt;
            let mut most = 0;
            while !ended.load(std::sync::atomic::Ordering::Relaxed) {
                most = most.max(std::fs::metadata(&path).map_or(0, |found| found.blocks() * 512));
            }
            most
        });
        (stop, watching)
    };
    let within = Budgets {
        ratio: u64::MAX,
        ..budgets()
    };
    let got = unpack(&bomb[..], dir.path(), &within, &Reporter::silent());
    watch.0.store(true, std::sync::atomic::Ordering::Relaxed);
    let most = watch.1.join().unwrap();
    assert_eq!(Rule::of(&got.unwrap_err()), Some(Rule::DataTooLarge));
    assert_eq!(names(dir.path()), [""; 0]);
    assert!(most > 0 && most <= within.data, "{most} bytes on the disk");
}

/// Gives an endless archive, and counts what is taken of it.
struct Endless {
    head: Vec<u8>,
    given: u64,
}

impl Read for &mut Endless {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let head = self.head.get(self.given as usize..).unwrap_or_default();
        let len = match head.len() {
            0 => buffer.len(),
            len => len.min(buffer.len()),
        };
        match head.len() {
            // Skippable frames without end.
            0 => buffer
                .iter_mut()
                .zip(SKIPPABLE.iter().cycle())
                .for_each(|(to, from)| *to = *from),
            _ => buffer[..len].copy_from_slice(&head[..len]),
        }
        self.given += len as u64;
        Ok(len)
    }
}

#[test]
fn an_endless_input_is_not_read_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut endless = Endless {
        head: zst(&good().end()),
        given: 0,
    };
    let got = unpack(&mut endless, dir.path(), &budgets(), &Reporter::silent());
    let rule = Rule::of(&got.unwrap_err());
    // Frames that are cut by the reader's pieces are none; whichever comes first.
    assert!(
        matches!(rule, Some(Rule::ArchiveTooLarge | Rule::ZstdTrailing)),
        "{rule:?}"
    );
    assert!(
        endless.given <= budgets().archive + MIB,
        "{}",
        endless.given
    );
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn limits_are_inclusive() {
    let archive = zst(&good().end());
    let just = Budgets {
        archive: archive.len() as u64,
        disk: disk().len() as u64,
        ..budgets()
    };
    let (_dir, got) = try_it(&archive, &just);
    let data = got.unwrap().data + layer_data();
    let just = Budgets { data, ..just };
    assert!(try_it(&archive, &just).1.is_ok());
    for (rule, less) in [
        (
            Rule::ArchiveTooLarge,
            Budgets {
                archive: just.archive - 1,
                ..just.clone()
            },
        ),
        (
            Rule::DiskTooLarge,
            Budgets {
                disk: just.disk - 1,
                ..just.clone()
            },
        ),
        (
            Rule::DataTooLarge,
            Budgets {
                data: just.data - 1,
                ..just.clone()
            },
        ),
    ] {
        assert_eq!(Rule::of(&refused(&archive, &less)), Some(rule));
    }
}

/// Bytes of the layer that are not zero, in whole blocks.
fn layer_data() -> u64 {
    layer()
        .chunks(4096)
        .filter(|block| block.iter().any(|byte| *byte != 0))
        .map(|block| block.len() as u64)
        .sum()
}

#[test]
fn frames_of_many_kinds() {
    let tar = good().end();
    let (front, back) = tar.split_at(100_001);
    taken(
        &[
            SKIPPABLE,
            &zst(front),
            &zst(b""),
            SKIPPABLE,
            &zst(back),
            SKIPPABLE,
        ]
        .concat(),
        &disk(),
    );
    let mut plain = zstd::Encoder::new(Vec::new(), 1).unwrap();
    plain.write_all(&tar).unwrap();
    taken(&plain.finish().unwrap(), &disk());
    // One byte more than the record that a tar's end fills.
    taken(&zst(&[&tar[..], &vec![0; 1 << 20]].concat()), &disk());
}

/// A small archive with any one bit another: it is refused, or the same comes of it.
#[test]
fn every_single_bit() {
    let mut small = vec![0; 1 << 20];
    small[..64].copy_from_slice(&[7; 64]);
    let layer = super::layers::made(&[], &[small.len() as u64]);
    let archive = zst(&Tar::default()
        .put(
            Header::sparse("disk.img", 1 << 20, &[(0, 512)]),
            &small[..512],
        )
        .file("layer.qcow2", &layer)
        .file("machine.json", MACHINE)
        .end());
    let (_dir, whole) = try_it(&archive, &budgets());
    let whole = whole.unwrap();
    let (mut caught, mut harmless) = (0, 0);
    for bit in 0..archive.len() * 8 {
        let mut flipped = archive.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let (dir, got) = try_it(&flipped, &budgets());
        match got {
            Err(err) => {
                assert!(Rule::of(&err).is_some(), "bit {bit}: {err}");
                assert_eq!(names(dir.path()), [""; 0], "bit {bit}");
                caught += 1;
            }
            Ok(got) => {
                assert_eq!(
                    (&got.disk, &got.machine),
                    (&whole.disk, &whole.machine),
                    "bit {bit}"
                );
                harmless += 1;
            }
        }
    }
    println!("{caught} single bits were caught, {harmless} made no difference");
    assert!(caught > harmless * 20);
}
