//! One raw disk of an instance's layers: qemu-img reads through them, from the top to the image's disk, and
//! writes what is there, with holes where there is nothing. Each node is explicit; what a layer says of what it
//! stands on is not followed, and one with features that ours don't have is refused before.
//!
//! Next step: `content` (it becomes an image of the store).

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pileus_base::{Code, Error, Reporter, Result, ResultExt, Size};
use serde_json::{Value, json};
use tokio::process::Command;

use super::content::{Content, Incoming};
use super::layer;
use super::member::Moved;
use super::write::digest_of;
use crate::store::Store;
use crate::tool::{self, Bounds};

/// A table of each layer is kept in memory.
const MEMORY: u64 = 4 << 30;
const TIME: Duration = Duration::from_secs(6 * 3600);
pub(super) const BOUNDS: Bounds = Bounds {
    time: TIME,
    grace: Duration::from_secs(2),
    memory: Some(MEMORY),
    file: None,
};

impl Store {
    /// Makes the disk of what comes in of a raw disk and the layers above it, the lowest first. Nobody may write to
    /// them meanwhile. Returns what a guest sees.
    pub async fn flatten(
        &self,
        incoming: &Incoming,
        base: &Path,
        layers: &[PathBuf],
        report: &Reporter,
    ) -> Result<Size> {
        let size = match layers.last() {
            Some(top) => checked(layers, top)?,
            None => Size(length(base)?),
        };
        let target = incoming.disk();
        let bounds = Bounds {
            file: Some(size.bytes().saturating_add(4096)),
            ..BOUNDS
        };
        let mut command = Command::new(&self.config.tools.qemu_img);
        command
            .args(["convert", "-p", "-O", "raw", "-S", "4k"])
            .arg(chain(base, layers)?)
            .arg(&target);
        let mut on_line = |line: &str| {
            if let Some(percent) = percent(line) {
                let done = (size.bytes() as f64 * percent / 100.0) as u64;
                report.progress(done.min(size.bytes()), Some(size.bytes()));
            }
        };
        let stage = incoming.stage.id();
        let room = || self.check_room(&self.config.root, 0);
        let done = tool::run(command, &stage, bounds, report, &mut on_line, &room).await?;
        if !done.status.success() {
            return Err(done.failed("Making one disk of an instance's layers"));
        }
        let made = length(&target)?;
        if made != size.bytes() {
            return Err(Error::new(
                Code::ToolFailed,
                format!("qemu-img made a disk of {made} bytes where the guest saw {size}"),
            ));
        }
        Ok(size)
    }
}

impl Incoming {
    /// What it consists of: its disk alone. Reads all of it. Blocks.
    pub fn disk_content(&self, moved: Moved<'_>) -> Result<Content> {
        let path = self.disk();
        let file = File::open(&path).io(format_args!("Opening {}", path.display()))?;
        Ok(Content {
            size: Size(length(&path)?),
            disk: digest_of(&file, moved)?,
            kernel: None,
            initrd: None,
            cmdline: None,
        })
    }
}

fn length(path: &Path) -> Result<u64> {
    let meta = path.metadata();
    Ok(meta
        .io(format_args!("Looking at {}", path.display()))?
        .len())
}

/// QEMU wrote them for a guest: none may name another file, or have what only others' files have.
pub(super) fn checked(layers: &[PathBuf], top: &Path) -> Result<Size> {
    let mut size = 0;
    for path in layers {
        let file = File::open(path).io(format_args!("Opening {}", path.display()))?;
        let (header, _) = layer::to_travel(&file)?;
        if path == top {
            size = header.virtual_size;
        }
    }
    Ok(Size(size))
}

/// The nodes in QEMU's words.
pub(super) fn chain(base: &Path, layers: &[PathBuf]) -> Result<String> {
    let name = |path: &Path| {
        path.to_str().map(str::to_owned).ok_or_else(|| {
            let what = format!("The path {} is not valid UTF-8", path.display());
            Error::new(Code::InvalidArgument, what)
        })
    };
    // No locks: whoever calls knows that nobody writes, and a machine may be started on them meanwhile.
    let file = |path: &Path| {
        let name = name(path)?;
        Ok::<_, Error>(json!({"driver": "file", "filename": name, "locking": "off"}))
    };
    let mut node: Value = json!({"driver": "raw", "file": file(base)?});
    for layer in layers {
        node = json!({"driver": "qcow2", "file": file(layer)?, "backing": node});
    }
    Ok(format!("json:{node}"))
}

/// Reads `    (12.34/100%)`.
fn percent(line: &str) -> Option<f64> {
    let (_, rest) = line.split_once('(')?;
    let (number, _) = rest.split_once("/100%)")?;
    let number: f64 = number.trim().parse().ok()?;
    (0.0..=100.0).contains(&number).then_some(number)
}

#[cfg(test)]
pub(super) mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};
    use std::process::Command;

    use super::*;
    use crate::overlay;
    use crate::store::StoreConfig;

    pub fn write(layer: &Path, pattern: u8, at: &str) {
        let command = format!("write -P {pattern} {at}");
        // Without its backing file: only this layer is meant.
        let done = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", &command])
            .arg(layer)
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
    }

    fn byte(file: &File, at: u64) -> u8 {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0]
    }

    #[tokio::test]
    async fn what_lies_on_top_counts_and_nothing_takes_no_room() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(StoreConfig::new(dir.path().join("store"))).unwrap();
        let base = dir.path().join("it's, a \"base\".raw");
        let raw = File::create(&base).unwrap();
        raw.set_len(8 << 20).unwrap();
        raw.write_all_at(&[1; 4096], 0).unwrap();
        raw.write_all_at(&[1; 4096], 1 << 20).unwrap();
        let (low, top) = (dir.path().join("low.qcow2"), dir.path().join("top.qcow2"));
        overlay::create(&low, Size::mib(16), &base).unwrap();
        write(&low, 2, "1M 64k");
        overlay::create_on_layer(&top, Size::mib(32), &low).unwrap();
        write(&top, 3, "9M 64k");
        write(&top, 0, "0 64k");
        let incoming = store.begin_import().unwrap();
        let layers = [low, top.clone()];
        let size = store
            .flatten(&incoming, &base, &layers, &Reporter::silent())
            .await
            .unwrap();
        assert_eq!(size, Size::mib(32));
        let disk = File::open(incoming.disk()).unwrap();
        let seen = [0, 1 << 20, 9 << 20, 31 << 20].map(|at| byte(&disk, at));
        assert_eq!(seen, [0, 2, 3, 0]);
        let meta = disk.metadata().unwrap();
        assert_eq!(meta.len(), 32 << 20);
        assert!(meta.blocks() * 512 <= 192 << 10, "{}", meta.blocks());

        // A layer that wants another file is refused before anything opens it.
        let secret = dir.path().join("secret");
        std::fs::write(&secret, vec![7; 1 << 20]).unwrap();
        std::fs::remove_file(&top).unwrap();
        let data_file = format!("data_file={}", secret.display());
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", &data_file])
            .arg(&top)
            .arg("32M")
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
        let incoming = store.begin_import().unwrap();
        let refused = store
            .flatten(&incoming, &base, &layers, &Reporter::silent())
            .await;
        assert_eq!(refused.unwrap_err().code, Code::BadArchive);
        assert!(!incoming.disk().exists());
    }
}
