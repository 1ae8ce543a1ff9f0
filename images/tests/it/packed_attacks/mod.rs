//! Packed images that were made to do harm, that are damaged, or that came from another program. Each rule that an
//! archive can be refused for has at least one archive here that is refused for just that, and nothing is left of it.
//!
//! ```text
//! tar      tars byte by byte, as no program would write them
//! members  what a tar can be refused for
//! stream   what the bytes around it can: zstd, budgets, every single bit
//! layers   layer.qcow2: hostile ones, and data that is merged
//! real     archives of GNU tar and the zstd program
//! host     a full disk, cancelling, an input that fails
//! ```

mod host;
mod layers;
mod members;
mod real;
mod stream;
mod tar;

use std::collections::HashSet;
use std::path::Path;
use std::sync::OnceLock;

use pileus_base::{Code, Error, Reporter};
use pileus_images::packed::unpack::{Budgets, Layer, Unpacked, unpack};
use pileus_images::packed::{Rule, digest};
use tempfile::TempDir;

use tar::Tar;

const MIB: u64 = 1 << 20;
const DISK_SIZE: usize = 3 << 20;
const MACHINE: &[u8] = b"{\"version\": 1, \"memory\": 512}\n";

fn budgets() -> Budgets {
    Budgets {
        archive: 8 * MIB,
        disk: 64 * MIB,
        data: 16 * MIB,
        ratio: 200,
        ratio_from: 32 * MIB,
        skipped: MIB,
        members: 50,
        extents: 100,
        small: MIB,
        reserve: 0,
    }
}

/// A disk with data at its beginning, zeros, and data at its end.
fn disk() -> Vec<u8> {
    let mut disk = vec![0; DISK_SIZE];
    for (at, byte) in disk[512..70_000].iter_mut().enumerate() {
        *byte = (at * at % 251) as u8;
    }
    disk[DISK_SIZE - 3..].copy_from_slice(b"end");
    disk
}

/// The layer that the ancestor would have made for [`disk`].
fn layer() -> Vec<u8> {
    static LAYER: OnceLock<Vec<u8>> = OnceLock::new();
    LAYER
        .get_or_init(|| layers::made(&["-o", "lazy_refcounts=on"], &[]))
        .clone()
}

/// The three members that an image has.
fn good() -> Tar {
    Tar::default()
        .file("disk.img", &disk())
        .file("layer.qcow2", &layer())
        .file("machine.json", MACHINE)
}

fn zst(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::Encoder::new(Vec::new(), 3).unwrap();
    encoder.include_checksum(true).unwrap();
    std::io::Write::write_all(&mut encoder, bytes).unwrap();
    encoder.finish().unwrap()
}

/// Unpacks into a folder of its own.
fn try_it(archive: &[u8], budgets: &Budgets) -> (TempDir, Result<Unpacked, Error>) {
    let dir = tempfile::tempdir().unwrap();
    let got = unpack(archive, dir.path(), budgets, &Reporter::silent());
    (dir, got)
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name();
    let mut names: Vec<_> = entries
        .map(|e| name(e).to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// What an archive is refused for; nothing may be left of it.
fn refused(archive: &[u8], budgets: &Budgets) -> Error {
    let (dir, got) = try_it(archive, budgets);
    let err = got.expect_err("taken");
    assert_eq!(names(dir.path()), [""; 0], "{err}");
    err
}

/// An archive of just this disk is unpacked.
fn taken(archive: &[u8], want: &[u8]) -> Unpacked {
    let (dir, got) = try_it(archive, &budgets());
    let got = got.unwrap();
    assert_eq!(names(dir.path()), ["disk.img"]);
    let path = dir.path().join("disk.img");
    assert!(std::fs::read(&path).unwrap() == want, "another disk");
    let file = std::fs::File::open(&path).unwrap();
    assert_eq!(
        got.disk,
        digest::of_file(&file, 1, &mut |_| Ok(())).unwrap()
    );
    assert_eq!(
        (got.disk_size, got.layer),
        (want.len() as u64, Layer::Empty)
    );
    assert_eq!(
        (got.archive.clone(), got.archive_bytes),
        (crate::support::digest(archive), archive.len() as u64)
    );
    got
}

/// An archive, and why it is refused.
struct Attack {
    rule: Rule,
    what: &'static str,
    archive: Vec<u8>,
    budgets: Budgets,
}

fn attack(rule: Rule, what: &'static str, tar: Tar) -> Attack {
    Attack {
        rule,
        what,
        archive: zst(&tar.end()),
        budgets: budgets(),
    }
}

#[test]
fn each_rule_refuses_what_it_should() {
    let mut attacks = stream::attacks();
    attacks.extend(members::attacks());
    attacks.extend(layers::attacks());
    let mut seen = HashSet::new();
    for attack in attacks {
        println!("{}: {}", attack.rule.as_str(), attack.what);
        let err = refused(&attack.archive, &attack.budgets);
        assert_eq!(Rule::of(&err), Some(attack.rule), "{}: {err}", attack.what);
        assert_eq!(err.code, attack.rule.code());
        assert!(matches!(err.code, Code::BadImage | Code::ImageTooLarge));
        let named = format!("rule: {}", attack.rule.as_str());
        assert!(err.details.contains(&named), "{:?}", err.details);
        seen.insert(attack.rule);
    }
    let missing: Vec<_> = Rule::ALL
        .iter()
        .filter(|rule| !seen.contains(*rule))
        .collect();
    assert!(missing.is_empty(), "no archive for {missing:?}");
}

#[test]
fn a_good_archive_is_taken() {
    let got = taken(&zst(&good().end()), &disk());
    assert_eq!(got.machine, MACHINE);
    assert_eq!(got.manifest, None);
    // 70,000 bytes and the last block.
    assert_eq!(got.data, 18 * 4096 + 4096);
}

#[test]
fn zeros_become_holes_also_in_dense_members() {
    use std::os::unix::fs::MetadataExt;
    let (dir, got) = try_it(&zst(&good().end()), &budgets());
    let found = std::fs::metadata(dir.path().join("disk.img")).unwrap();
    assert!(
        found.blocks() * 512 <= got.unwrap().data + 8192,
        "{}",
        found.blocks()
    );
}
