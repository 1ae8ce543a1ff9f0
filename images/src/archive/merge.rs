//! Several layers become one. Layers are never written, so the new one is a copy of the lowest, into which qemu-img
//! commits those above it, one after the other, with each node named; then it takes the place of all.
//!
//! Next step: `daemon/src/service/merge.rs` (when, and whose).

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use pileus_base::{Error, Reporter, Result, ResultExt, files};
use tokio::process::Command;

use super::extents::Source;
use super::flatten::{BOUNDS, chain, checked};
use super::layer;
use crate::sparse::SparseWriter;
use crate::store::Store;
use crate::tool;

const PIECE: usize = 1 << 20;

impl Store {
    /// Merges `run`, layers that stand on each other, into the new file `target`. Below them are `below`, the lowest
    /// first, and the raw disk `base`. On error no file is left.
    pub async fn merge(
        &self,
        base: &Path,
        below: &[PathBuf],
        run: &[PathBuf],
        target: &Path,
        report: &Reporter,
    ) -> Result<()> {
        let merged = self.merge_into(base, below, run, target, report).await;
        if merged.is_err() {
            files::remove_file(target)?;
        }
        merged
    }

    async fn merge_into(
        &self,
        base: &Path,
        below: &[PathBuf],
        run: &[PathBuf],
        target: &Path,
        report: &Reporter,
    ) -> Result<()> {
        let (Some((lowest, above)), Some(folder)) = (run.split_first(), target.parent()) else {
            return Err(Error::internal("There is nothing to merge"));
        };
        for layers in [below, run] {
            if let Some(top) = layers.last() {
                checked(layers, top)?;
            }
        }
        let all: u64 = run.iter().map(|layer| files::allocated(layer)).sum();
        self.check_room(folder, all)?;
        let (from, to, told) = (lowest.clone(), target.to_owned(), report.clone());
        tokio::task::spawn_blocking(move || copy(&from, &to, &told))
            .await
            .map_err(|err| Error::internal(format!("Copying a layer panicked: {err}")))??;
        let room_for_it = self.begin_import()?;
        let room = || self.check_room(folder, 0);
        for upper in above {
            let mut layers = below.to_vec();
            layers.extend([target.to_owned(), upper.clone()]);
            let mut command = Command::new(&self.config.tools.qemu_img);
            // -d: the upper one stays as it is.
            command
                .args(["commit", "-q", "-d"])
                .arg(chain(base, &layers)?);
            let done = tool::run(
                command,
                &room_for_it.stage.id(),
                BOUNDS,
                report,
                &mut |_| (),
                &room,
            )
            .await?;
            if !done.status.success() {
                return Err(done.failed("Merging an instance's layers"));
            }
        }
        let (path, below) = (target.to_owned(), below.last().cloned());
        let base = base.to_owned();
        tokio::task::spawn_blocking(move || {
            let file = File::options().read(true).write(true).open(&path);
            let file = file.io(format_args!("Opening {}", path.display()))?;
            match below {
                Some(below) => layer::settle(&file, &below, "qcow2"),
                None => layer::settle(&file, &base, "raw"),
            }
        })
        .await
        .map_err(|err| Error::internal(format!("Ending a merge panicked: {err}")))?
    }
}

/// Only what has data.
fn copy(from: &Path, to: &Path, report: &Reporter) -> Result<()> {
    let what = format!("Copying {}", from.display());
    let file = File::open(from).io(&what)?;
    let source = Source::whole(&file).io(&what)?;
    let out = files::create_private(to)?;
    let mut writer = SparseWriter::new(out, source.len);
    let extents = source.extents(&mut |_| Ok(())).io(&what)?;
    let mut piece = vec![0; PIECE];
    for extent in extents {
        let mut at = extent.offset;
        writer.skip_to(at);
        while at < extent.end() {
            report.check()?;
            let len = (extent.end() - at).min(PIECE as u64) as usize;
            source.read_at(&mut piece[..len], at).io(&what)?;
            writer.write_all(&piece[..len]).io(&what)?;
            at += len as u64;
        }
    }
    writer.skip_to(source.len);
    writer.finish().io(&what)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use pileus_base::Size;

    use super::super::flatten::tests::write;
    use super::*;
    use crate::overlay;
    use crate::store::StoreConfig;

    #[tokio::test]
    async fn what_three_layers_said_one_says() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(StoreConfig::new(dir.path().join("store"))).unwrap();
        let path = |name: &str| dir.path().join(name);
        let base = path("base.raw");
        let raw = File::create(&base).unwrap();
        raw.set_len(8 << 20).unwrap();
        raw.write_all_at(&[1; 1 << 20], 0).unwrap();
        let layers = ["a.qcow2", "b.qcow2", "c.qcow2", "d.qcow2"].map(path);
        overlay::create(&layers[0], Size::mib(16), &base).unwrap();
        for (n, size) in [(1, 16), (2, 24), (3, 24)] {
            overlay::create_on_layer(&layers[n], Size::mib(size), &layers[n - 1]).unwrap();
        }
        // Data, data over data, zeros over data, data behind what was the end, and data that is not aligned.
        write(&layers[0], 2, "1M 64k");
        write(&layers[1], 3, "2M 128k");
        write(&layers[1], 0, "0 64k");
        write(&layers[2], 4, "2M 64k");
        write(&layers[2], 5, "20M 4k");
        write(&layers[3], 6, "3M 64k");
        let before: Vec<_> = layers.iter().map(|l| std::fs::read(l).unwrap()).collect();
        let merged = path("m.qcow2");
        let report = Reporter::silent();
        let (below, run) = (&layers[..1], &layers[1..3]);
        store
            .merge(&base, below, run, &merged, &report)
            .await
            .unwrap();
        let after: Vec<_> = layers.iter().map(|l| std::fs::read(l).unwrap()).collect();
        assert!(before == after, "a layer was written");
        let seen = async |layers: &[PathBuf]| {
            let incoming = store.begin_import().unwrap();
            store
                .flatten(&incoming, &base, layers, &report)
                .await
                .unwrap();
            std::fs::read(incoming.disk()).unwrap()
        };
        let short = [layers[0].clone(), merged.clone(), layers[3].clone()];
        assert!(seen(&layers).await == seen(&short).await);
        let head = std::fs::read(&merged).unwrap();
        let name = layers[0].to_str().unwrap().as_bytes();
        assert!(head[..1024].windows(name.len()).any(|w| w == name));

        // A layer that can't be read leaves nothing.
        std::fs::write(&layers[2], "no layer").unwrap();
        let other = path("n.qcow2");
        store
            .merge(&base, below, run, &other, &report)
            .await
            .unwrap_err();
        assert!(!other.exists());
    }
}
