//! A packed image on its way into the store (checked, unpacked, digested, published): against what the ancestor did
//! and did not do for it (`zstd | tar`, and `sha256sum`). Needs no daemon.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pileus_base::Reporter;
use pileus_images::packed::manifest::Provenance;
use pileus_images::packed::pack::{PackSource, pack_to_file};
use pileus_images::packed::{DISK, Machine};
use pileus_images::{ImageRef, Store, StoreConfig};
use tokio::runtime::Runtime;

use crate::measure::{Times, mib, ratio, show, timed};
use crate::pack::{Shape, mixed_disk};
use crate::table::{Row, Table};

/// Of the time of `zstd | tar` and `sha256sum` together.
const SHARE: f64 = 0.8;
/// What the watcher of the stage may see besides the disk: small files, and what the file system gives in advance.
const SLACK: u64 = 8 << 20;

pub fn import(rounds: u32, quick: bool, table: &mut Table) -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let folder = folder.path();
    let (archive, shape) = (folder.join("image.tar.zst"), Shape::of(quick));
    make_archive(folder, &archive, shape)?;
    let (mut ours, mut theirs, mut synced) = <(Times, Times, Times)>::default();
    let mut parts = Vec::new();
    let (mut peak, mut extracted) = (0, 0);
    for _ in 0..rounds {
        timed(&mut Command::new("sync"))?;
        let took = into_store(folder, &archive)?;
        ours.add(took.time);
        peak = peak.max(took.peak);
        extracted = took.extracted;
        timed(&mut Command::new("sync"))?;
        let [tar, sync, hash] = with_tools(folder, &archive)?;
        theirs.add(tar + hash);
        synced.add(tar + sync + hash);
        parts.push(format!("{} + {}", show(tar), show(hash)));
    }
    let share = ratio(ours.median(), theirs.median());
    table.add(Row {
        what: format!(
            "import {} of mixed data in a disk of {}; `zstd -dqc | tar -xS`, then `sha256sum`",
            mib(shape.data),
            mib(shape.size)
        ),
        ours: ours.show(),
        alternative: format!("{} ({})", theirs.show(), parts.join("; ")),
        ratio: format!("{share:.2} of the time"),
        bound: format!("≤ {SHARE}"),
        met: Some(share <= SHARE),
    });
    table.note(
        "… against the same and `sync`, as ours lies on the disk when it is done",
        ours.show(),
        synced.show(),
    );
    table.add(Row {
        what: "the most that it took besides the archive, of what comes out".to_owned(),
        ours: mib(peak),
        alternative: mib(extracted),
        ratio: format!("{:.2}", peak as f64 / extracted as f64),
        bound: "≤ 1".to_owned(),
        met: Some(peak <= extracted + SLACK),
    });
    Ok(())
}

fn make_archive(folder: &Path, archive: &Path, shape: Shape) -> Result<()> {
    let disk = folder.join(DISK);
    mixed_disk(&disk, shape)?;
    let file = File::open(&disk)?;
    let source = PackSource {
        disk: &file,
        machine: &Machine::default(),
        provenance: Provenance::default(),
    };
    let threads = std::thread::available_parallelism()?.get();
    pack_to_file(&source, archive, threads, &Reporter::silent())?;
    std::fs::remove_file(disk)?;
    Ok(())
}

struct Took {
    time: Duration,
    /// Bytes on the file system: the most of the stage, and those of the image.
    peak: u64,
    extracted: u64,
}

fn into_store(folder: &Path, archive: &Path) -> Result<Took> {
    let root = folder.join("images");
    let store = Store::open(StoreConfig::new(&root))?;
    let (stop, most) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let watcher = {
        let (stop, most, stage) = (stop.clone(), most.clone(), root.join("stage"));
        std::thread::spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(taken(&stage), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        })
    };
    let reference = ImageRef::File(PathBuf::from(archive));
    let began = Instant::now();
    let image = Runtime::new()?.block_on(store.obtain(&reference, None, &Reporter::silent()));
    let time = began.elapsed();
    stop.store(true, Ordering::Relaxed);
    ensure!(watcher.join().is_ok(), "the watcher of the stage panicked");
    let extracted = image?.allocated().bytes();
    drop(store);
    std::fs::remove_dir_all(root)?;
    Ok(Took {
        time,
        peak: most.load(Ordering::Relaxed),
        extracted,
    })
}

/// Bytes that the files below a folder take; files may go while we look.
fn taken(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let below = std::fs::read_dir(folder).into_iter().flatten().flatten();
    below
        .map(|entry| match entry.metadata() {
            Ok(found) if found.is_dir() => taken(&entry.path()),
            Ok(found) => found.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

/// The times of unpacking, of bringing that to the disk, and of a digest.
fn with_tools(folder: &Path, archive: &Path) -> Result<[Duration; 3]> {
    let out = folder.join("out");
    std::fs::create_dir(&out)?;
    let mut unpack = Command::new("sh");
    unpack
        .args(["-ec", "zstd -dqc \"$1\" | tar -xSC \"$2\"", "sh"])
        .arg(archive)
        .arg(&out);
    let (tar, _) = timed(&mut unpack).context("zstd and tar")?;
    let (sync, _) = timed(&mut Command::new("sync"))?;
    let (hash, _) = timed(Command::new("sha256sum").arg(archive))?;
    std::fs::remove_dir_all(out)?;
    Ok([tar, sync, hash])
}
