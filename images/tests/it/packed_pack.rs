//! Packing: what the tools of the ancestor's readers make of our archives, that the same content gives the same
//! bytes, and that nothing is left of what fails.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use pileus_base::{Code, Reporter, Update};
use pileus_images::Limits;
use pileus_images::packed::manifest::{Member, Provenance};
use pileus_images::packed::pack::{PackSource, Packed, pack, pack_to_file};
use pileus_images::packed::unpack::{Budgets, Layer, unpack};
use pileus_images::packed::{DISK, LAYER, MACHINE, MANIFEST, Machine, Manifest};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::support::{digest, qemu_img, text};

const MIB: u64 = 1 << 20;
/// Far more than a tar's plain numbers can say.
const LARGE: u64 = 20 << 30;

fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

/// Where a large disk has data: single blocks with holes in between, more than two of a tar's headers can name;
/// some MiB of noise; zeros that are no hole; something near its end.
fn put_data(disk: &File) {
    for n in 0..60_u64 {
        disk.write_all_at(&noise(100, n), n * MIB / 2 + n).unwrap();
    }
    disk.write_all_at(&noise(5 << 20, 7), 100 * MIB + 12_345)
        .unwrap();
    disk.write_all_at(&vec![0; 3 << 20], 200 * MIB).unwrap();
    disk.write_all_at(b"the end", LARGE - 5000).unwrap();
}

fn large_disk(dir: &TempDir) -> File {
    let path = dir.path().join("source.raw");
    let mut options = File::options();
    options.read(true).write(true).create_new(true);
    let disk = options.open(path).unwrap();
    disk.set_len(LARGE).unwrap();
    put_data(&disk);
    disk
}

fn small_disk(bytes: &[u8]) -> File {
    let mut disk = tempfile::tempfile().unwrap();
    disk.write_all(bytes).unwrap();
    disk
}

fn machine() -> Machine {
    let given = json!({ "version": 1, "memory": 1024, "network": "e1000", "keyboardLayout": "de" });
    serde_json::from_value(given).unwrap()
}

fn provenance() -> Provenance {
    Provenance {
        source: Some("a test".to_owned()),
        ..Provenance::ours()
    }
}

fn packed(disk: &File, to: impl Write, threads: usize) -> pileus_base::Result<Packed> {
    let source = PackSource {
        disk,
        machine: &machine(),
        provenance: provenance(),
    };
    pack(&source, to, threads, &Reporter::silent())
}

fn packed_to(disk: &File, target: &Path, report: &Reporter) -> pileus_base::Result<Packed> {
    let source = PackSource {
        disk,
        machine: &machine(),
        provenance: provenance(),
    };
    pack_to_file(&source, target, 2, report)
}

/// What a program says; it must not fail, nor complain.
fn said(program: &str, args: &[&str]) -> String {
    let done = Command::new(program).args(args).output().unwrap();
    let complaint = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{program} {args:?}: {complaint}");
    assert_eq!(complaint, "", "{program} {args:?}");
    String::from_utf8(done.stdout).unwrap()
}

/// As the ancestor did it, word for word.
fn ancestors_way(archive: &Path, folder: &Path) {
    let script = format!(
        "zstd -dqc '{}' | tar -xoC '{}' --no-same-permissions -- {DISK} {LAYER} {MACHINE}",
        archive.display(),
        folder.display()
    );
    said("sh", &["-fec", &script]);
}

fn info(folder: &Path, format: &str, name: &str) -> Value {
    let done = Command::new("qemu-img")
        .args(["info", "-f", format, "--output", "json", "--", name])
        .current_dir(folder)
        .output()
        .unwrap();
    serde_json::from_slice(&done.stdout).unwrap()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn the_ancestors_tools_unpack_it() {
    let dir = tempfile::tempdir().unwrap();
    let disk = large_disk(&dir);
    let archive = dir.path().join("image.tar.zst");
    let told = packed_to(&disk, &archive, &Reporter::silent()).unwrap();
    let bytes = std::fs::read(&archive).unwrap();
    assert_eq!(
        (told.size, &told.digest),
        (bytes.len() as u64, &digest(&bytes))
    );

    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    ancestors_way(&archive, &out);
    assert_eq!(names(&out), [DISK, LAYER, MACHINE]);
    let whole = out.join(DISK);
    let source = dir.path().join("source.raw");
    qemu_img(&[
        "compare",
        "-q",
        "-f",
        "raw",
        "-F",
        "raw",
        text(&source),
        text(&whole),
    ]);
    let found = std::fs::metadata(&whole).unwrap();
    assert_eq!(found.len(), LARGE);
    assert!(found.blocks() * 512 < 16 * MIB, "{}", found.blocks());
    // The checks of the ancestor, 7 to 14.
    assert_eq!(info(&out, "raw", DISK)["format"], "raw");
    assert_eq!(info(&out, "raw", DISK)["virtual-size"], LARGE);
    let layer = info(&out, "qcow2", LAYER);
    assert_eq!(layer["format"], "qcow2");
    assert_eq!(layer["virtual-size"], LARGE);
    assert_eq!(layer["dirty-flag"], false);
    assert_eq!(layer["backing-filename"], "disk.img");
    assert_eq!(layer["backing-filename-format"], "raw");
    let read: Value = serde_json::from_slice(&std::fs::read(out.join(MACHINE)).unwrap()).unwrap();
    assert_eq!(read["memory"], 1024);
    assert_eq!(read["version"], 1);
    // A machine's view of it is the disk; and it can be written to, as the ancestor's instances are.
    let layer = out.join(LAYER);
    said("qemu-img", &["check", "-q", "-f", "qcow2", text(&layer)]);
    qemu_img(&[
        "compare",
        "-q",
        "-f",
        "qcow2",
        "-F",
        "raw",
        text(&layer),
        text(&whole),
    ]);
    let write = format!("write -P 0x41 {} 64k", LARGE - MIB);
    said("qemu-io", &["-f", "qcow2", "-c", &write, text(&layer)]);
    said("qemu-img", &["check", "-q", "-f", "qcow2", text(&layer)]);
}

#[test]
fn its_members_and_what_the_manifest_says_of_them() {
    let dir = tempfile::tempdir().unwrap();
    let disk = large_disk(&dir);
    let archive = dir.path().join("image.tar.zst");
    let told = packed_to(&disk, &archive, &Reporter::silent()).unwrap();
    let tar = dir.path().join("image.tar");
    // The window stays far below the 128 MiB that readers take.
    said(
        "zstd",
        &["-dq", "--memory=8MB", text(&archive), "-o", text(&tar)],
    );
    let listed = said(
        "tar",
        &[
            "--numeric-owner",
            "--utc",
            "--full-time",
            "-tvf",
            text(&tar),
        ],
    );
    let lines: Vec<_> = listed.lines().collect();
    for (line, name) in lines.iter().zip([MANIFEST, MACHINE, LAYER, DISK]) {
        assert!(line.starts_with("-rw-r--r-- 0/0 "), "{line}");
        assert!(
            line.ends_with(&format!(" 1970-01-01 00:00:00 {name}")),
            "{line}"
        );
    }
    assert_eq!(lines.len(), 4);
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    said("tar", &["-xf", text(&tar), "-C", text(&out)]);
    let read = |name: &str| std::fs::read(out.join(name)).unwrap();
    let manifest = Manifest::parse(&read(MANIFEST)).unwrap();
    assert_eq!(manifest, told.manifest);
    assert_eq!(manifest.provenance, provenance());
    assert_eq!(manifest.members.layer, Member::of(&read(LAYER)));
    assert_eq!(manifest.members.machine, Member::of(&read(MACHINE)));
    let said = &manifest.members.disk;
    assert_eq!(said.size, LARGE);
    // Sixty pieces (one lies across blocks), the noise, the end.
    let blocks = said.data / 4096;
    assert!((60 + 1280 + 2..60 + 1280 + 6).contains(&blocks), "{blocks}");
    assert_eq!(
        said.digest.to_string(),
        by_the_pages_program(&out.join(DISK))
    );
}

#[test]
fn our_own_reader_takes_it() {
    let dir = tempfile::tempdir().unwrap();
    let disk = large_disk(&dir);
    let mut archive = Vec::new();
    let told = packed(&disk, &mut archive, 2).unwrap();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let limits = Limits {
        reserve: 0,
        ..Limits::default()
    };
    let budgets = Budgets::of(&limits);
    let got = unpack(archive.as_slice(), &out, &budgets, &Reporter::silent()).unwrap();
    assert_eq!((&got.archive, got.archive_bytes), (&told.digest, told.size));
    let members = &told.manifest.members;
    assert_eq!(
        (&got.disk, got.data),
        (&members.disk.digest, members.disk.data)
    );
    assert_eq!(got.layer, Layer::Empty);
    let source = dir.path().join("source.raw");
    let whole = out.join(DISK);
    qemu_img(&[
        "compare",
        "-q",
        "-f",
        "raw",
        "-F",
        "raw",
        text(&source),
        text(&whole),
    ]);
    // Packed again, it is the same archive.
    let mut again = Vec::new();
    packed(&File::open(&whole).unwrap(), &mut again, 1).unwrap();
    assert!(again == archive);
}

/// The disk's digest by the program that docs/packed-images.md shows.
fn by_the_pages_program(disk: &Path) -> String {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/packed-images.md");
    let page = std::fs::read_to_string(page).unwrap();
    let program = page.split("```python\n").nth(1).unwrap();
    let program = program.split("```").next().unwrap();
    said("python3", &["-c", program, text(disk)])
        .trim()
        .to_owned()
}

#[test]
fn the_same_content_gives_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    // Some frames, and then some.
    let mut bytes = noise(20 << 20, 3);
    bytes[MIB as usize..3 * MIB as usize].fill(0);
    bytes[5 * MIB as usize + 1..9 * MIB as usize - 7].fill(0);
    bytes.resize(25 << 20, 0);
    let dense = small_disk(&bytes);
    let sparse = tempfile::tempfile().unwrap();
    sparse.set_len(bytes.len() as u64).unwrap();
    for (n, block) in bytes.chunks(4096).enumerate() {
        if block.iter().any(|byte| *byte != 0) {
            sparse.write_all_at(block, n as u64 * 4096).unwrap();
        }
    }
    assert!(sparse.metadata().unwrap().blocks() < dense.metadata().unwrap().blocks());
    let mut first = Vec::new();
    packed(&dense, &mut first, 1).unwrap();
    for (disk, threads) in [
        (&dense, 2),
        (&dense, 4),
        (&sparse, 1),
        (&sparse, 4),
        (&sparse, 0),
    ] {
        let mut again = Vec::new();
        packed(disk, &mut again, threads).unwrap();
        assert!(again == first, "{threads} threads");
    }
    let target = dir.path().join("as-a-file");
    packed_to(&dense, &target, &Reporter::silent()).unwrap();
    assert!(std::fs::read(&target).unwrap() == first);
    // One byte more or less is another image.
    dense.write_all_at(b"x", 2 * MIB).unwrap();
    let mut other = Vec::new();
    let told = packed(&dense, &mut other, 1).unwrap();
    assert_ne!(told.digest, digest(&first));
}

#[test]
fn disks_of_every_shape() {
    let full = noise(3 << 20, 1);
    for disk in [
        vec![0; 512],
        vec![0; MIB as usize],
        vec![1; 512],
        full.clone(),
        [vec![0; 70_000], vec![1; 240]].concat(),
        [full, vec![0; 1 << 20]].concat(),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let disk = [disk.clone(), vec![0; (512 - disk.len() % 512) % 512]].concat();
        let archive = dir.path().join("a");
        let told = packed_to(&small_disk(&disk), &archive, &Reporter::silent()).unwrap();
        ancestors_way(&archive, dir.path());
        assert!(std::fs::read(dir.path().join(DISK)).unwrap() == disk);
        assert_eq!(info(dir.path(), "qcow2", LAYER)["virtual-size"], disk.len());
        assert_eq!(
            told.manifest.members.disk.digest.to_string(),
            by_the_pages_program(&dir.path().join(DISK))
        );
    }
}

#[test]
fn what_can_not_be_packed() {
    let dir = tempfile::tempdir().unwrap();
    for len in [0, 511, 513] {
        let err = packed_to(
            &small_disk(&vec![1; len]),
            &dir.path().join("a"),
            &Reporter::silent(),
        );
        assert_eq!(err.unwrap_err().code, Code::InvalidArgument, "{len}");
    }
    let disk = small_disk(&[1; 512]);
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    for (target, code) in [
        (folder.as_path(), Code::InvalidArgument),
        (Path::new("/"), Code::InvalidArgument),
        (&folder.join("none/a"), Code::Io),
    ] {
        let err = packed_to(&disk, target, &Reporter::silent()).unwrap_err();
        assert_eq!(err.code, code, "{err}");
    }
    let mut source = provenance();
    source.title = Some("two\nlines".to_owned());
    let source = PackSource {
        disk: &disk,
        machine: &machine(),
        provenance: source,
    };
    let err = pack_to_file(&source, &dir.path().join("a"), 1, &Reporter::silent());
    assert_eq!(err.unwrap_err().code, Code::InvalidArgument);
    assert_eq!(names(dir.path()), ["folder"]);
}

#[test]
fn a_target_is_kept_until_the_new_one_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("image.tar.zst");
    std::fs::write(&target, "the old one").unwrap();
    let disk = small_disk(&noise(30 << 20, 5));
    let (mut looked, mut stopped_writing) = (false, false);
    // Cancelled at any time: while it looks, by each MiB, and while it writes, by each frame of 4 MiB.
    for after in [0, 1, 10, 30, 33, 36] {
        let cancel = CancellationToken::new();
        let (token, seen) = (cancel.clone(), std::sync::atomic::AtomicU32::new(0));
        let report = Reporter::new(
            move |update| {
                let is_progress = matches!(update, Update::Progress { .. });
                let before =
                    seen.fetch_add(u32::from(is_progress), std::sync::atomic::Ordering::Relaxed);
                if is_progress && before >= after {
                    token.cancel();
                }
            },
            cancel,
        );
        let err = packed_to(&disk, &target, &report).unwrap_err();
        assert_eq!(err.code, Code::Cancelled, "{err}");
        assert_eq!(std::fs::read(&target).unwrap(), b"the old one");
        assert_eq!(names(dir.path()), ["image.tar.zst"]);
        looked |= after < 30;
        stopped_writing |= after >= 30;
    }
    assert!(looked && stopped_writing);
    packed_to(&disk, &target, &Reporter::silent()).unwrap();
    assert!(std::fs::metadata(&target).unwrap().len() > 30 * MIB);
    assert_eq!(names(dir.path()), ["image.tar.zst"]);
}

#[test]
fn progress_rises_to_the_whole() {
    let (report, _, seen) = crate::support::recorder();
    let dir = tempfile::tempdir().unwrap();
    packed_to(
        &small_disk(&noise(9 << 20, 5)),
        &dir.path().join("a"),
        &report,
    )
    .unwrap();
    let seen = seen.lock().unwrap();
    let steps: Vec<_> = seen
        .iter()
        .filter_map(|update| match update {
            Update::Progress { done, total } => Some((*done, total.unwrap())),
            _ => None,
        })
        .collect();
    assert!(steps.len() > 10 && steps.is_sorted());
    let (done, total) = *steps.last().unwrap();
    assert_eq!(done, total);
}

/// A reader that goes away after some bytes, or does something then.
struct Odd<'a> {
    left: usize,
    then: &'a mut dyn FnMut() -> io::Result<()>,
}

impl Write for Odd<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.left {
            (self.then)()?;
            self.left = usize::MAX;
        }
        self.left -= bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_reader_that_goes_is_no_fault_of_the_host() {
    let disk = small_disk(&noise(20 << 20, 6));
    for (kind, code) in [
        (io::ErrorKind::BrokenPipe, Code::Cancelled),
        (io::ErrorKind::StorageFull, Code::NoSpace),
        (io::ErrorKind::PermissionDenied, Code::Io),
    ] {
        let to = Odd {
            left: 1 << 20,
            then: &mut || Err(kind.into()),
        };
        assert_eq!(packed(&disk, to, 2).unwrap_err().code, code);
    }
}

#[test]
fn a_disk_that_is_written_to_meanwhile_is_refused() {
    let disk = small_disk(&noise(20 << 20, 6));
    let to = Odd {
        left: 1 << 20,
        then: &mut || disk.write_all_at(b"x", 19 * MIB),
    };
    let err = packed(&disk, to, 2).unwrap_err();
    assert_eq!(err.code, Code::WrongState, "{err}");
    let to = Odd {
        left: 1 << 20,
        then: &mut || disk.set_len(MIB),
    };
    assert!(packed(&disk, to, 2).is_err());
}

#[test]
fn a_full_disk_is_the_hosts_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mount = dir.path().to_owned();
    let disk = small_disk(&noise(20 << 20, 8));
    // Mounts of a thread of its own.
    let done = std::thread::spawn(move || {
        if let Err(why) = private_tmpfs(&mount) {
            eprintln!("SKIPPED: a full disk: {why}");
            return;
        }
        let target = mount.join("image.tar.zst");
        std::fs::write(&target, "the old one").unwrap();
        let err = packed_to(&disk, &target, &Reporter::silent()).unwrap_err();
        assert_eq!(err.code, Code::NoSpace, "{err}");
        assert_eq!(names(&mount), ["image.tar.zst"]);
        assert_eq!(std::fs::read(&target).unwrap(), b"the old one");
        rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::empty()).unwrap();
    });
    done.join().unwrap();
}

/// A small tmpfs that only this thread and those that it starts see.
pub fn private_tmpfs(at: &Path) -> io::Result<()> {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: the thread was made for this and shares nothing with others that it relies on.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    mount("tmpfs", at, "tmpfs", MountFlags::empty(), c"size=4m")?;
    Ok(())
}
