//! Merging a layer that was judged into the disk below it: qemu-img in bounds, told which file is which node.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use pileus_base::{Code, Digest, Error, Phase, Reporter, Result, ResultExt, Size, files};
use serde_json::json;
use tokio::process::Command;

use super::super::digest;
use super::super::unpack::{Layer, Unpacked};
use super::super::{DISK, LAYER};
use crate::format::Work;
use crate::sparse::is_zero;
use crate::store::Tools;
use crate::tool::{self, Bounds, Watch};

/// What qemu-img needs for its tables and buffers, with much to spare.
const MEMORY: u64 = 2 << 30;
/// `data` counts blocks of this size.
const BLOCK: usize = 4096;

/// Puts what the layer of `unpacked` has into the disk, and removes the layer.
pub(crate) async fn merge(
    work: &Work<'_>,
    folder: &Path,
    unpacked: &mut Unpacked,
    report: &Reporter,
) -> Result<()> {
    merge_with(
        work.tools,
        work.stage,
        work.limits.reserve,
        folder,
        unpacked,
        report,
    )
    .await
}

/// The same for who has no store: `stage` marks qemu-img, `reserve` bytes stay free. After a failure both files are gone.
pub async fn merge_with(
    tools: &Tools,
    stage: &str,
    reserve: u64,
    folder: &Path,
    unpacked: &mut Unpacked,
    report: &Reporter,
) -> Result<()> {
    report.phase(Phase::PreparingImage);
    let folder = folder.canonicalize().io("Looking at a folder")?;
    let (disk, layer) = (folder.join(DISK), folder.join(LAYER));
    let merged = async {
        let room = || check_room(&folder, reserve);
        commit(tools, stage, (&disk, &layer), report, &room).await?;
        files::remove_file(&layer)?;
        let (path, told) = (disk.clone(), report.clone());
        tokio::task::spawn_blocking(move || look_at(&path, &told))
            .await
            .map_err(|err| Error::internal(format!("Hashing a disk panicked: {err}")))?
    };
    match merged.await {
        Ok((digest, data)) => {
            (unpacked.disk, unpacked.data) = (digest, data);
            unpacked.layer = Layer::Empty;
            Ok(())
        }
        Err(err) => {
            // A disk that is half merged is nobody's.
            for path in [&disk, &layer] {
                if let Err(err) = files::remove_file(path) {
                    tracing::warn!(%err, "not removed");
                }
            }
            Err(err)
        }
    }
}

async fn commit(
    tools: &Tools,
    stage: &str,
    (disk, layer): (&Path, &Path),
    report: &Reporter,
    room: Watch<'_>,
) -> Result<()> {
    let length = |path: &Path| {
        let found = std::fs::metadata(path).io(format_args!("Looking at {}", path.display()))?;
        Ok::<_, Error>(found.len())
    };
    let bounds = Bounds {
        time: Duration::from_secs(3600),
        grace: Duration::from_secs(2),
        memory: Some(MEMORY),
        file: Some(length(disk)?.max(length(layer)?)),
    };
    let mut command = Command::new(&tools.qemu_img);
    // -d: the layer goes anyway, it needs not be emptied.
    command
        .args(["commit", "-q", "-d"])
        .arg(format!("json:{}", nodes(disk, layer)?));
    room()?;
    let done = tool::run(command, stage, bounds, report, &mut |_| (), room).await?;
    match done.status.success() {
        true => Ok(()),
        false => Err(done.failed("Merging layer.qcow2 into the disk")),
    }
}

/// The two files as nodes, so that neither names another.
fn nodes(disk: &Path, layer: &Path) -> Result<serde_json::Value> {
    let file = |path: &Path| {
        let name = path.to_str().ok_or_else(|| {
            Error::new(
                Code::InvalidArgument,
                format!("The name of {} is no text", path.display()),
            )
        })?;
        Ok::<_, Error>(json!({ "driver": "file", "filename": name }))
    };
    Ok(json!({
        "driver": "qcow2",
        "file": file(layer)?,
        "backing": { "driver": "raw", "file": file(disk)? },
    }))
}

fn check_room(folder: &Path, reserve: u64) -> Result<()> {
    let free = files::free_space(folder)?;
    if free >= reserve {
        return Ok(());
    }
    Err(Error::new(
        Code::NoSpace,
        format!(
            "{} has {} left, and {} have to stay free",
            folder.display(),
            Size(free),
            Size(reserve)
        ),
    )
    .advise("Free some space, or remove unused images with `pileus image prune`."))
}

/// The merged disk's digest, and how many bytes of data it has.
fn look_at(disk: &Path, report: &Reporter) -> Result<(Digest, u64)> {
    let file = File::open(disk).io("Opening the disk")?;
    let size = file.metadata().io("Looking at the disk")?.len();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let found = digest::each_chunk(&file, size, threads, &mut |_| report.check(), &|bytes| {
        let data = bytes.chunks(BLOCK).filter(|block| !is_zero(block));
        let data: u64 = data.map(|block| block.len() as u64).sum();
        (data > 0).then_some(data)
    })?;
    let data = found.iter().map(|chunk| chunk.found).sum();
    Ok((digest::of_found(size, &found), data))
}
