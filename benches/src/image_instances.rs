//! Instances of a cached image, by the image store alone: the time and the bytes that one takes, at the first as at the
//! thousandth, against what the ancestor did (a copy of the archive's layer) and what `qemu-img create` takes.
//! Needs no daemon.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pileus_base::Reporter;
use pileus_images::manager::gc::Minima;
use pileus_images::manager::{Config, Downloader, Instance, Manager, Payload, Tracker};

use crate::measure::{Times, ratio, show, timed};
use crate::table::{Row, Table};

const SIZE: u64 = 4 << 30;
const MOST_TIME: Duration = Duration::from_millis(5);
const MOST_BYTES: u64 = 300 << 10;

/// What some instances took.
#[derive(Debug, Default)]
struct Taken {
    times: Times,
    /// Bytes that the process handed to the file system, all together.
    written: u64,
    /// The largest disk of a new instance, in bytes on the file system.
    largest: u64,
}

pub fn instances(runs: u32, quick: bool, table: &mut Table) -> Result<()> {
    let many = if quick { 100 } else { 1000 };
    let folder = tempfile::tempdir_in("/var/tmp")?;
    let base = folder.path().join("disk.raw");
    let disk = File::create(&base)?;
    disk.set_len(SIZE)?;
    disk.write_all_at(&[0x55, 0xaa], 510)?;
    disk.write_all_at(&vec![7; 16 << 20], 1 << 20)?;
    let runtime = tokio::runtime::Runtime::new()?;
    let minima = Minima { disk: 0, memory: 0 };
    let tracker = Arc::new(Tracker::new(folder.path(), minima));
    let manager = Manager::new(folder.path().join("images"), tracker, Config::default())?;
    let first = runtime.block_on(one(&manager, Some(&base)))?;
    let few = runtime.block_on(measure(&manager, runs))?;
    let held = runtime.block_on(async {
        let mut held = vec![first];
        while held.len() < many {
            held.push(one(&manager, None).await?);
        }
        Ok::<_, anyhow::Error>(held)
    })?;
    let crowd = runtime.block_on(measure(&manager, runs))?;
    let (layer, tool) = alternatives(folder.path(), &base, runs)?;
    let number = held.len();
    for (beside, taken) in [(0, &few), (number, &crowd)] {
        table.add(Row {
            what: format!("A new instance of a cached image, beside {beside} others"),
            ours: taken.times.show(),
            alternative: format!(
                "{} copying a layer; {} `qemu-img create`",
                layer.show(),
                tool.show()
            ),
            ratio: format!("{:.2}", ratio(taken.times.median(), layer.median())),
            bound: format!("≤ {}", show(MOST_TIME)),
            met: Some(taken.times.median() <= MOST_TIME),
        });
        let each = taken.written / u64::from(runs);
        table.add(Row {
            what: format!("Bytes written for it, beside {beside} others"),
            ours: format!("{} KiB", each >> 10),
            alternative: format!("its disk takes {} KiB", taken.largest >> 10),
            bound: format!("≤ {} KiB", MOST_BYTES >> 10),
            met: Some(each <= MOST_BYTES && taken.largest <= MOST_BYTES),
            ..Row::default()
        });
    }
    Ok(())
}

/// An instance; of the disk `base`, if it isn't there yet.
async fn one(manager: &Manager, base: Option<&Path>) -> Result<Instance> {
    let file = base.map(File::open).transpose()?;
    let download = Downloader::new(move |_| async move {
        let missing = || pileus_base::Error::internal("A cached image was asked for");
        file.map(Payload::File).ok_or_else(missing)
    });
    let report = Reporter::silent();
    Ok(manager.instance("bench", download, &report).await?)
}

async fn measure(manager: &Manager, runs: u32) -> Result<Taken> {
    let mut taken = Taken::default();
    let before = written()?;
    for _ in 0..runs {
        let begin = Instant::now();
        let instance = one(manager, None).await?;
        taken.times.add(begin.elapsed());
        let disk = std::fs::metadata(instance.disk_file())?;
        taken.largest = taken.largest.max(disk.blocks() * 512);
        instance.release()?;
    }
    taken.written = written()? - before;
    Ok(taken)
}

/// Bytes that this process has made the file system write.
fn written() -> Result<u64> {
    let io = std::fs::read_to_string("/proc/self/io")?;
    let line = io
        .lines()
        .find_map(|line| line.strip_prefix("write_bytes: "));
    Ok(line.context("/proc/self/io has no write_bytes")?.parse()?)
}

/// A copy of a layer as an archive holds it, and a new overlay by QEMU's tool.
fn alternatives(folder: &Path, base: &Path, runs: u32) -> Result<(Times, Times)> {
    let (mut layer, mut tool) = (Times::default(), Times::default());
    let path = folder.join("layer.qcow2");
    let copy = folder.join("copy.qcow2");
    for _ in 0..runs.min(20) {
        let _ = std::fs::remove_file(&path);
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]);
        tool.add(timed(create.arg(base).arg(&path))?.0);
        let begin = Instant::now();
        let (mut from, mut to) = (File::open(&path)?, File::create(&copy)?);
        // Byte by byte: the ancestor's copy shared nothing.
        let mut buffer = Vec::new();
        std::io::Read::read_to_end(&mut from, &mut buffer)?;
        std::io::Write::write_all(&mut to, &buffer)?;
        layer.add(begin.elapsed());
        ensure!(!buffer.is_empty(), "the layer is empty");
    }
    Ok((layer, tool))
}
