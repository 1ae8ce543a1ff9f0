//! From a qcow2 file in the stage to a raw, sparse disk: our header check, then qemu-img's check of
//! the tables (it sees data that lies beyond the end of a cut file), then qemu-img's conversion,
//! always with explicit formats and in bounds.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use pileus_base::{Code, Error, Phase, Reporter, Result, ResultExt};
use tokio::process::Command;

use super::header::{self, Header};
use crate::format::Work;
use crate::tool::{self, Bounds};

/// What qemu-img needs for its tables and buffers, with much to spare.
const MEMORY: u64 = 2 << 30;

/// Parses the header of a file in the stage.
pub(crate) fn inspect(path: &Path, max_size: u64) -> Result<Header> {
    let what = || format!("Reading {}", path.display());
    let file = File::open(path).io(what())?;
    let len = file.metadata().io(what())?.len();
    let mut head = Vec::new();
    file.take(header::HEAD as u64)
        .read_to_end(&mut head)
        .io(what())?;
    header::parse(&head, len, max_size).map_err(Error::from)
}

/// Writes the guest's view of `source` to `target`, which must not exist.
pub(crate) async fn convert(
    work: &Work<'_>,
    source: &Path,
    target: &Path,
    report: &Reporter,
) -> Result<()> {
    report.phase(Phase::VerifyingImage);
    let header = inspect(source, work.limits.virtual_size)?;
    let bounds = Bounds {
        time: Duration::from_secs(3600),
        grace: Duration::from_secs(2),
        memory: Some(MEMORY),
        // qemu-img rounds up to whole sectors.
        file: Some(header.virtual_size.saturating_add(4096)),
    };
    check(work, source, bounds, report).await?;

    report.phase(Phase::PreparingImage);
    let mut command = Command::new(&work.tools.qemu_img);
    command
        .args(["convert", "-p", "-f", "qcow2", "-O", "raw", "-S", "4k"])
        .arg(source)
        .arg(target);
    let size = header.virtual_size;
    let mut on_line = |line: &str| {
        if let Some(percent) = percent(line) {
            let done = (size as f64 * percent / 100.0) as u64;
            report.progress(done.min(size), Some(size));
        }
    };
    let done = tool::run(command, work.stage, bounds, report, &mut on_line, &|| {
        work.check_space()
    })
    .await?;
    if !done.status.success() {
        return Err(done.failed("Converting the image"));
    }
    Ok(())
}

async fn check(work: &Work<'_>, source: &Path, bounds: Bounds, report: &Reporter) -> Result<()> {
    let mut command = Command::new(&work.tools.qemu_img);
    command.args(["check", "-q", "-f", "qcow2"]).arg(source);
    let done = tool::run(command, work.stage, bounds, report, &mut |_| (), &|| Ok(())).await?;
    match done.status.code() {
        // 3: clusters that nobody uses, which harms no reader.
        Some(0 | 3) => Ok(()),
        Some(2) => {
            let mut err = Error::new(
                Code::BadImage,
                "The qcow2 image is refused: its tables are damaged or it was cut",
            )
            .advise("Fetch or make it again.");
            err.details = done.tail;
            Err(err)
        }
        _ => {
            let mut err = done.failed("Checking the image");
            err.code = Code::BadImage;
            Err(err)
        }
    }
}

/// Reads `    (12.34/100%)`.
fn percent(line: &str) -> Option<f64> {
    let (_, rest) = line.split_once('(')?;
    let (number, _) = rest.split_once("/100%)")?;
    number
        .trim()
        .parse()
        .ok()
        .filter(|n| (0.0..=100.0).contains(n))
}

#[cfg(test)]
mod tests {
    use super::percent;

    #[test]
    fn progress_lines() {
        assert_eq!(percent("    (12.34/100%)"), Some(12.34));
        assert_eq!(percent("(100.00/100%)"), Some(100.0));
        assert_eq!(percent("(900/100%)"), None);
        assert_eq!(percent("nothing"), None);
    }
}
