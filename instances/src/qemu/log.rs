//! Keeps a log bounded that another process appends to: its tail is copied beside it and the file is
//! cut to nothing. QEMU writes with O_APPEND, so it goes on at the new end. What is written between
//! the copy and the cut is lost; a console's log may lose that.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use pileus_base::{Result, ResultExt, files};

use super::spec::Paths;

/// Sizes at which a machine's logs are cut.
const CONSOLE_LIMIT: u64 = 4 << 20;
pub(super) const QEMU_LIMIT: u64 = 1 << 20;

/// Keeps a machine's logs bounded; to be called every few seconds while it runs. Blocking.
pub fn trim_all(paths: &Paths) -> Result<()> {
    trim(&paths.console_log, CONSOLE_LIMIT)?;
    trim(&paths.qemu_log, QEMU_LIMIT)?;
    Ok(())
}

/// Where the older part of a log goes.
pub fn older(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".old");
    name.into()
}

/// Cuts `log` if it has more than `limit` bytes; the last `limit` of them go to [`older`]. So the
/// two together never have much more than twice the limit. A log that isn't there is fine.
pub fn trim(log: &Path, limit: u64) -> Result<bool> {
    let size = match std::fs::metadata(log) {
        Ok(meta) => meta.len(),
        Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(err) => return Err(err).io(format_args!("Looking at {}", log.display())),
    };
    if size <= limit {
        return Ok(false);
    }
    let what = || format!("Trimming {}", log.display());
    let mut tail = Vec::new();
    let mut file = File::open(log).io(what())?;
    file.seek(SeekFrom::Start(size - limit)).io(what())?;
    file.take(limit).read_to_end(&mut tail).io(what())?;
    files::write_atomic(&older(log), &tail, 0o600)?;
    OpenOptions::new()
        .write(true)
        .open(log)
        .and_then(|file| file.set_len(0))
        .io(what())?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn the_writer_goes_on_and_the_size_stays_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("console.log");
        assert!(!trim(&log, 10).unwrap());
        let mut writer = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .unwrap();
        writer.write_all(b"0123456789").unwrap();
        assert!(!trim(&log, 10).unwrap());
        writer.write_all(b"abc").unwrap();
        assert!(trim(&log, 10).unwrap());
        writer.write_all(b"new").unwrap();
        assert_eq!(std::fs::read(&log).unwrap(), b"new");
        assert_eq!(std::fs::read(older(&log)).unwrap(), b"3456789abc");
    }
}
