//! Whatever archive a guest makes, `pileus run --copy-out` writes below its target and nowhere else: files,
//! folders and links that stay inside, no set-user bits, nothing half-written.
//!
//! Half of the inputs are the archive itself. The others are instructions for one, because a fuzzer
//! does not find the check sums of tar's headers.
#![no_main]

#[path = "../../clients/cli/src/run/unpack.rs"]
mod unpack;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tar::{Builder, EntryType, Header};
use unpack::Bounds;

const BOUNDS: Bounds = Bounds {
    bytes: 1 << 16,
    entries: 40,
};
const CANARY: &str = "not yours";
/// Names that have to do with each other, and with what lies around the target.
const NAMES: [&str; 16] = [
    "./",
    "a",
    "a/b",
    "a/b/c",
    "b",
    "out",
    "out/canary",
    "../outside/canary",
    "a/../b",
    "/etc/x",
    "..",
    "",
    "way",
    "way/canary",
    ".pileus-copy-1",
    "a/link",
];
const LINKS: [&str; 8] = [
    "b",
    "../b",
    "../../outside",
    "a/..",
    "/etc/passwd",
    "",
    ".",
    "../outside",
];
const KINDS: [EntryType; 12] = [
    EntryType::Regular,
    EntryType::Directory,
    EntryType::Symlink,
    EntryType::Link,
    EntryType::Char,
    EntryType::Fifo,
    EntryType::GNULongName,
    EntryType::GNULongLink,
    EntryType::XHeader,
    EntryType::XGlobalHeader,
    EntryType::GNUSparse,
    EntryType::Continuous,
];

/// ```text
///   box/outside/canary      must stay as it is
///   box/target/way ──▶ ../outside      a link that was there before
/// ```
static BOX: LazyLock<PathBuf> = LazyLock::new(|| {
    let name = format!("pileus-fuzz-copy-{}", std::process::id());
    let shm = PathBuf::from("/dev/shm");
    let folder = if shm.is_dir() {
        shm
    } else {
        std::env::temp_dir()
    }
    .join(name);
    fs::create_dir_all(folder.join("outside")).unwrap();
    fs::write(folder.join("outside/canary"), CANARY).unwrap();
    folder
});

/// Takes instructions byte by byte.
struct Steps<'a>(&'a [u8]);

impl<'a> Steps<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn bytes(&mut self, most: usize) -> Option<&'a [u8]> {
        let len = (self.byte()? as usize).min(most).min(self.0.len());
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        Some(taken)
    }

    /// One of the usual ones, or anything.
    fn text(&mut self, usual: &[&'a str]) -> Option<&'a [u8]> {
        match self.byte()? {
            own if own >= 0xf0 => self.bytes(100),
            n => Some(usual[n as usize % usual.len()].as_bytes()),
        }
    }
}

fn archive(steps: &mut Steps<'_>) -> Vec<u8> {
    let mut made = Builder::new(Vec::new());
    while let Some(()) = add(steps, &mut made) {}
    made.into_inner().unwrap()
}

fn add(steps: &mut Steps<'_>, to: &mut Builder<Vec<u8>>) -> Option<()> {
    let kind = KINDS[steps.byte()? as usize % KINDS.len()];
    let name = steps.text(&NAMES)?;
    let link = steps.text(&LINKS)?;
    let mode = u32::from(steps.byte()?) << 4 | 0o7;
    let data = steps.bytes(200)?;
    let mut header = Header::new_gnu();
    let fields = header.as_mut_bytes();
    fields[..name.len()].copy_from_slice(name);
    fields[157..157 + link.len()].copy_from_slice(link);
    header.set_entry_type(kind);
    header.set_mode(mode);
    // Now and then the size is not that of what follows.
    let size = data.len() as u64 + if steps.byte()? == 0xff { 7 } else { 0 };
    header.set_size(size);
    header.set_mtime(u64::from(steps.byte()?) << 56 | 1);
    header.set_cksum();
    to.append(&header, data).ok()
}

/// Everything below the target, except the link that was there.
fn look(folder: &Path, depth: usize) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let meta = path.symlink_metadata().unwrap();
        assert_eq!(meta.mode() & 0o6000, 0, "set-user bits: {path:?}");
        let name = path.file_name().unwrap().as_encoded_bytes();
        let partial = format!(".pileus-copy-{}", std::process::id());
        assert_ne!(name, partial.as_bytes(), "half a file");
        if meta.is_dir() {
            look(&path, depth + 1);
        } else if meta.is_symlink() {
            let to = fs::read_link(&path).unwrap();
            if depth == 0 && name == b"way" && to == Path::new("../outside") {
                continue;
            }
            stays(&to, depth);
        } else {
            assert!(meta.is_file(), "{path:?}");
            assert!(meta.len() <= BOUNDS.bytes);
        }
    }
}

/// Going along the link leads out at no step.
fn stays(to: &Path, depth: usize) {
    let mut depth = depth as i64;
    for part in to.components() {
        depth += match part {
            Component::Normal(_) => 1,
            Component::CurDir => 0,
            Component::ParentDir => -1,
            _ => panic!("a link leads out: {to:?}"),
        };
        assert!(depth >= 0, "a link leads out: {to:?}");
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, rest)) = bytes.split_first() else {
        return;
    };
    let target = BOX.join("target");
    // An archive of one file makes a file.
    let _ = fs::remove_dir_all(&target).or_else(|_| fs::remove_file(&target));
    assert!(target.symlink_metadata().is_err());
    if choice & 1 == 0 {
        fs::create_dir(&target).unwrap();
        symlink("../outside", target.join("way")).unwrap();
    }
    let made = match choice & 2 {
        0 => rest.to_vec(),
        _ => archive(&mut Steps(rest)),
    };
    let done = unpack::unpack(&made[..], &target, OsStr::new("name"), BOUNDS);
    if done.is_ok() {
        assert!(made.len() as u64 <= BOUNDS.bytes);
    }
    let names: Vec<_> = fs::read_dir(&*BOX)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert!(
        names.iter().all(|n| n == "outside" || n == "target"),
        "{names:?}"
    );
    assert_eq!(fs::read_dir(BOX.join("outside")).unwrap().count(), 1);
    assert_eq!(
        fs::read_to_string(BOX.join("outside/canary")).unwrap(),
        CANARY
    );
    match target.is_dir() {
        true => look(&target, 0),
        false => {
            assert!(target.symlink_metadata().is_ok_and(|meta| meta.is_file()) || done.is_err())
        }
    }
});
