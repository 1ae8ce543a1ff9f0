//! Packing a disk into an image: against what the ancestor did (`tar -S` to a file, then `zstd -3`), and how fast
//! zeros are found that the file system doesn't report as holes. Neither needs a daemon.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pileus_base::Reporter;
use pileus_images::packed::manifest::Provenance;
use pileus_images::packed::pack::{PackSource, Packed, pack_to_file};
use pileus_images::packed::{DISK, LAYER, MACHINE, Machine};

use crate::measure::{Times, allocated, mib, ratio, show, timed};
use crate::table::{Row, Table};

const MIB: u64 = 1 << 20;
/// What the disk has in one piece, at most.
const PIECE: u64 = 16 * MIB;
/// Of the time of `tar` and `zstd` together.
const SHARE: f64 = 0.6;
/// Bytes of zeros a second.
const RATE: f64 = 1.5e9;

/// A disk of this size with so much data.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub size: u64,
    pub data: u64,
}

impl Shape {
    pub fn of(quick: bool) -> Self {
        match quick {
            true => Self {
                size: 4 << 30,
                data: 256 * MIB,
            },
            false => Self {
                size: 20 << 30,
                data: 2 << 30,
            },
        }
    }
}

pub fn pack(rounds: u32, quick: bool, table: &mut Table) -> Result<()> {
    let folder = tempfile::tempdir_in("/var/tmp")?;
    against_tools(folder.path(), rounds, Shape::of(quick), table)?;
    zeros(
        folder.path(),
        rounds,
        if quick { 1 << 30 } else { 4 << 30 },
        table,
    )
}

fn against_tools(folder: &Path, rounds: u32, shape: Shape, table: &mut Table) -> Result<()> {
    let disk = folder.join(DISK);
    mixed_disk(&disk, shape)?;
    std::fs::write(folder.join(MACHINE), "{\"version\":1}")?;
    let options = "backing_file=disk.img,backing_fmt=raw,lazy_refcounts=on";
    let mut layer = Command::new("qemu-img");
    layer.args(["create", "-q", "-f", "qcow2", "-o", options, LAYER]);
    timed(layer.current_dir(folder))?;
    let (mut ours, mut theirs, mut parts) = (Times::default(), Times::default(), Vec::new());
    let (mut size, mut other) = (0, 0);
    let (mut our_work, mut their_work) = (Times::default(), Times::default());
    for _ in 0..rounds {
        settle()?;
        let target = folder.join("ours.tar.zst");
        let before = worked()?;
        let (took, packed) = packed(&disk, &target)?;
        ours.add(took);
        our_work.add(worked()? - before);
        size = packed.size;
        std::fs::remove_file(&target)?;
        settle()?;
        let before = worked()?;
        let began = Instant::now();
        let tar = Command::new("tar")
            .args(["-Scf", "image.tar", DISK, LAYER, MACHINE])
            .current_dir(folder)
            .status()?;
        let half = began.elapsed();
        let zstd = Command::new("zstd")
            .args(["-q", "-3", "image.tar", "-fo", "theirs.tar.zst"])
            .current_dir(folder)
            .status()?;
        theirs.add(began.elapsed());
        their_work.add(worked()? - before);
        ensure!(tar.success() && zstd.success(), "tar or zstd failed");
        parts.push(format!("{} + {}", show(half), show(began.elapsed() - half)));
        other = std::fs::metadata(folder.join("theirs.tar.zst"))?.len();
        std::fs::remove_file(folder.join("image.tar"))?;
        std::fs::remove_file(folder.join("theirs.tar.zst"))?;
    }
    let share = ratio(ours.median(), theirs.median());
    table.add(Row {
        what: format!(
            "pack {} of mixed data in a disk of {}; `tar -Scf` to a file, then `zstd -3`",
            mib(shape.data),
            mib(shape.size)
        ),
        ours: ours.show(),
        alternative: format!("{} ({})", theirs.show(), parts.join("; ")),
        ratio: format!("{share:.2} of the time"),
        bound: format!("≤ {SHARE}"),
        met: Some(share <= SHARE),
    });
    // On a machine that does other things besides, this tells more than the time that went by.
    table.note(
        "… time of processors, of all threads",
        our_work.show(),
        format!(
            "{}; {:.2} of it is ours",
            their_work.show(),
            ratio(our_work.median(), their_work.median())
        ),
    );
    table.note(
        "… bytes of the archive; of a temporary tar",
        format!(
            "{} ({:.3} of the other); none",
            mib(size),
            size as f64 / other as f64
        ),
        format!("{}; {}", mib(other), mib(allocated(folder))),
    );
    std::fs::remove_file(disk)?;
    Ok(())
}

/// A disk that was written with zeros from end to end: all of it is read, none of it is packed.
fn zeros(folder: &Path, rounds: u32, size: u64, table: &mut Table) -> Result<()> {
    let disk = folder.join("zeros");
    let mut file = File::create(&disk)?;
    let piece = vec![0; PIECE as usize];
    for _ in 0..size / PIECE {
        file.write_all(&piece)?;
    }
    file.sync_all()?;
    ensure!(
        allocated(folder) >= size,
        "this file system makes holes of zeros"
    );
    let mut times = Times::default();
    for _ in 0..rounds {
        let (took, packed) = packed(&disk, &folder.join("zeros.tar.zst"))?;
        ensure!(packed.manifest.members.disk.data == 0, "data was found");
        times.add(took);
    }
    let rate = size as f64 / times.median().as_secs_f64();
    table.add(Row {
        what: format!("pack {} of zeros that are no holes", mib(size)),
        ours: times.show(),
        ratio: format!("{:.1} GB/s", rate / 1e9),
        bound: format!("≥ {:.1} GB/s", RATE / 1e9),
        met: Some(rate >= RATE),
        ..Row::default()
    });
    std::fs::remove_file(disk)?;
    Ok(())
}

fn packed(disk: &Path, target: &Path) -> Result<(Duration, Packed)> {
    let file = File::open(disk)?;
    let source = PackSource {
        disk: &file,
        machine: &Machine::default(),
        provenance: Provenance::default(),
    };
    let threads = std::thread::available_parallelism()?.get();
    let began = Instant::now();
    let packed = pack_to_file(&source, target, threads, &Reporter::silent());
    let packed = packed.map_err(|err| anyhow::anyhow!("{err}"))?;
    Ok((began.elapsed(), packed))
}

/// Time that processors worked for this process and its children that have ended.
fn worked() -> Result<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let fields = stat.rsplit(')').next().context("no fields")?;
    // utime, stime, cutime, cstime: hundredths of a second.
    let times = fields.split_whitespace().skip(11).take(4);
    let times = times.map(str::parse).collect::<Result<Vec<u64>, _>>()?;
    Ok(Duration::from_millis(10 * times.iter().sum::<u64>()))
}

/// What was written before is on the disk, and nobody's time is spent on it any more.
fn settle() -> Result<()> {
    timed(&mut Command::new("sync")).map(|_| ())
}

/// A sparse disk with runs of what machines really have: four parts of files of this host, one of noise.
pub fn mixed_disk(path: &Path, shape: Shape) -> Result<()> {
    let disk = File::create(path)?;
    disk.set_len(shape.size)?;
    let mut sources = Vec::new();
    files_below(Path::new("/usr/bin"), &mut sources)?;
    files_below(Path::new("/usr/lib"), &mut sources)?;
    ensure!(!sources.is_empty(), "there are no files to take data from");
    let mut next = sources.iter().cycle();
    let mut noise = File::open("/dev/urandom")?;
    let pieces = shape.data / PIECE;
    let apart = shape.size / pieces / 4096 * 4096;
    for n in 0..pieces {
        let mut piece = Vec::with_capacity(PIECE as usize);
        if n % 5 == 4 {
            Read::by_ref(&mut noise)
                .take(PIECE)
                .read_to_end(&mut piece)?;
        }
        while piece.len() < PIECE as usize {
            let source = File::open(next.next().context("no file is left")?)?;
            source
                .take(PIECE - piece.len() as u64)
                .read_to_end(&mut piece)?;
            // Files begin at blocks.
            piece.resize(piece.len().next_multiple_of(4096), 0);
        }
        disk.write_all_at(&piece, n * apart)?;
    }
    disk.sync_all()?;
    Ok(())
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    let entries = std::fs::read_dir(folder)?.collect::<std::io::Result<Vec<_>>>()?;
    for entry in entries {
        let kind = entry.file_type()?;
        if kind.is_dir() {
            files_below(&entry.path(), found)?;
        } else if kind.is_file() && entry.metadata()?.len() > 0 {
            found.push(entry.path());
        }
    }
    Ok(())
}
