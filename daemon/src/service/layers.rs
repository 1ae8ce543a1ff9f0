//! Layers: qcow2 files below the instances' own disks, shared and never written. An instance's disk is
//! frozen into one when it is forked.
//!
//! The row is committed before the files move, and each half-way state of the files can be told from
//! the others, so that a start after a crash goes on or goes back ([`settle`]):
//!
//! ```text
//!   row names L, no file L                     nothing moved yet: L is struck from the row
//!   file L, no disk.qcow2                      the new disk is given its name
//!   file L, disk.qcow2                         done
//! ```
//!
//! A restore puts an empty disk on other layers: it is made as `disk.restored`, the row says so
//! (`restoring`) together with what it now stands on, and then the file is renamed.
//!
//! Between the steps of a freeze and QEMU's own change to the new top the VM writes to L, which nobody else stands
//! on yet; the new disk is empty then, so the chain is right at every moment. If QEMU is never told (the daemon was
//! killed, or QEMU refused), that lasts until the next freeze or the VM's end. L may grow meanwhile: the empty disk
//! gets L's size before it is used ([`fit`]).

use std::path::{Path, PathBuf};

use pileus_base::{Code, Error, Layout, Result, ResultExt, Size, files};
use pileus_images::overlay;
use uuid::Uuid;

use super::Service;
use super::registry::Instance;
use super::wiring;
use crate::state::instances::{InstanceRow, Layer};

/// QEMU opens every layer, and a read may have to look into all.
const MOST_LAYERS: usize = 200;

fn next(disk: &Path) -> PathBuf {
    disk.with_extension("next")
}

/// The disk of an instance that is being brought back to a snapshot.
fn restored(disk: &Path) -> PathBuf {
    disk.with_extension("restored")
}

impl Service {
    /// Makes the disk of an instance without a VM a layer, unless it is as good as one: nothing was written
    /// to it since it was made. Its disk is an empty one then.
    pub(super) async fn freeze_still(&self, instance: &Instance) -> Result<()> {
        let row = instance.row();
        let disk = wiring::disk(&self.parts.layout, &row);
        let has_layer = !row.spec.layers.is_empty();
        if has_layer && super::blocking(move || overlay::is_empty(&disk)).await? {
            return Ok(());
        }
        self.freeze_disk(instance).await.map(drop)
    }

    /// Makes the instance's disk a layer and gives it an empty disk on top. Returns the new layer and the
    /// new disk's path, for the VM that has to change over.
    pub(super) async fn freeze_disk(&self, instance: &Instance) -> Result<(Layer, PathBuf)> {
        let layer = Layer(Uuid::new_v4());
        if instance.row().spec.layers.len() >= MOST_LAYERS {
            return Err(Error::new(
                Code::WrongState,
                format!(
                    "The disk of '{}' has {MOST_LAYERS} layers already",
                    instance.row().name
                ),
            )
            .advise(
                "Stop it for a minute or two: layers that no snapshot needs are merged then. Snapshots that are \
                 deleted make more of them so.",
            ));
        }
        let row = instance.change(|row| row.spec.layers.push(layer)).await?;
        let layout = self.parts.layout.clone();
        let disk = wiring::disk(&layout, &row);
        let (size, moved) = (row.spec.disk, disk.clone());
        let below = row.spec.layers.iter().rev().nth(1).copied();
        let work = move || {
            fit(&layout, &moved, below)?;
            // A disk never shrinks: a growth that was cut off may have been done all the same.
            let size = overlay::size(&moved).map_or(size, |has| has.max(size));
            freeze(&layout, &moved, layer, size).map(|()| size)
        };
        match super::blocking(work).await {
            Ok(has) if has == size => {}
            Ok(has) => drop(instance.change(|row| row.spec.disk = has).await?),
            Err(err) => {
                self.after_failed_freeze(instance, layer).await?;
                return Err(err);
            }
        }
        Ok((layer, disk))
    }

    /// As after a crash: it is undone, or finished if the guest's data lie in the layer already.
    async fn after_failed_freeze(&self, instance: &Instance, layer: Layer) -> Result<()> {
        let (layout, mut row) = (self.parts.layout.clone(), instance.row());
        let disk = wiring::disk(&layout, &row);
        let settled = super::blocking(move || {
            settle_freeze(&layout, &disk, &mut row)?;
            Ok(row.spec.layers)
        });
        if !settled.await?.contains(&layer) {
            let struck = instance.change(|row| row.spec.layers.retain(|l| *l != layer));
            struck.await?;
        }
        Ok(())
    }
}

impl Service {
    /// Gives a stopped instance an empty disk on other layers; `change` says what else it becomes. What
    /// was on its disk is lost.
    pub(super) async fn replace_disk(
        &self,
        instance: &Instance,
        layers: Vec<Layer>,
        size: Size,
        change: impl FnOnce(&mut InstanceRow),
    ) -> Result<()> {
        let layout = self.parts.layout.clone();
        let disk = wiring::disk(&layout, &instance.row());
        let top = layers.last().map(|top| layout.layer(top.0));
        let top = top.ok_or_else(|| Error::internal("A snapshot has no layer"))?;
        let new = restored(&disk);
        let made = move || {
            files::remove_file(&new)?;
            overlay::create_on_layer(&new, size, &top)?;
            sync_beside(&new)
        };
        super::blocking(made).await?;
        let before: Vec<_> = instance.row().spec.layers;
        instance
            .change(|row| {
                row.spec.layers = layers;
                row.spec.disk = size;
                row.spec.restoring = true;
                change(row);
            })
            .await?;
        super::blocking(move || {
            files::discard(&disk)?;
            std::fs::rename(restored(&disk), &disk)
                .io(format_args!("Replacing {}", disk.display()))?;
            sync_beside(&disk)
        })
        .await?;
        instance.change(|row| row.spec.restoring = false).await?;
        self.drop_unused(&before)?;
        Ok(())
    }
}

impl Service {
    /// Before an instance's VM is started: see [`fit`].
    pub(super) async fn fit_disk(&self, instance: &Instance) -> Result<()> {
        let (layout, row) = (self.parts.layout.clone(), instance.row());
        let fitted = move || {
            let disk = wiring::disk(&layout, &row);
            fit(&layout, &disk, row.spec.layers.last().copied())
        };
        super::blocking(fitted).await
    }
}

/// A disk is as large as the layer below it, or larger. An empty one that is not was never QEMU's, which wrote to
/// the layer and made it grow: it is made anew.
fn fit(layout: &Layout, disk: &Path, below: Option<Layer>) -> Result<()> {
    let Some(below) = below.map(|layer| layout.layer(layer.0)) else {
        return Ok(());
    };
    // What can't be read is told of by whoever needs it.
    let (Ok(size), Ok(has)) = (overlay::size(&below), overlay::size(disk)) else {
        return Ok(());
    };
    if has >= size || !overlay::is_empty(disk)? {
        return Ok(());
    }
    tracing::info!(disk = %disk.display(), %size, "it gets the size of the layer that grew below it");
    let next = next(disk);
    files::remove_file(&next)?;
    overlay::create_on_layer(&next, size, &below)?;
    std::fs::rename(&next, disk).io(format_args!("Renaming {}", next.display()))?;
    sync_beside(disk)
}

fn sync_beside(file: &Path) -> Result<()> {
    match file.parent() {
        Some(folder) => files::sync_folder(folder),
        None => Ok(()),
    }
}

fn freeze(layout: &Layout, disk: &Path, layer: Layer, size: Size) -> Result<()> {
    let frozen = layout.layer(layer.0);
    let next = next(disk);
    files::remove_file(&next)?;
    overlay::create_on_layer(&next, size, &frozen)?;
    std::fs::rename(disk, &frozen).io(format_args!("Freezing {}", disk.display()))?;
    files::sync_folder(&layout.layers())?;
    std::fs::rename(&next, disk).io(format_args!("Renaming {}", next.display()))?;
    sync_beside(disk)
}

/// Puts right what a crash left of a freeze, a restore or a growth. Returns whether the row has changed.
pub(crate) fn settle(layout: &Layout, row: &mut InstanceRow) -> Result<bool> {
    let before = row.spec.clone();
    let disk = wiring::disk(layout, row);
    settle_restore(&disk, row)?;
    settle_freeze(layout, &disk, row)?;
    fit(layout, &disk, row.spec.layers.last().copied())?;
    // A growth is noted before it is done.
    match overlay::size(&disk) {
        Ok(size) if size != row.spec.disk => {
            tracing::warn!(instance = %row.name, "its disk did not grow: it was cut off");
            row.spec.disk = size;
        }
        Ok(_) => {}
        // Its start will say more.
        Err(err) => tracing::warn!(instance = %row.name, %err, "its disk can't be looked at"),
    }
    Ok(row.spec != before)
}

fn settle_freeze(layout: &Layout, disk: &Path, row: &mut InstanceRow) -> Result<()> {
    let next = next(disk);
    let Some(top) = row.spec.layers.last().copied() else {
        return Ok(());
    };
    if !layout.layer(top.0).exists() && disk.exists() {
        tracing::warn!(instance = %row.name, "a freeze was cut off before it began: it is undone");
        row.spec.layers.pop();
        return files::remove_file(&next);
    }
    if !disk.exists() && next.exists() {
        tracing::warn!(instance = %row.name, "a freeze was cut off half-way: its disk is put right");
        std::fs::rename(&next, disk).io(format_args!("Renaming {}", next.display()))?;
    }
    files::remove_file(&next)
}

/// The same for a disk that was being replaced.
fn settle_restore(disk: &Path, row: &mut InstanceRow) -> Result<()> {
    let new = restored(disk);
    if !row.spec.restoring {
        return files::remove_file(&new);
    }
    if new.exists() {
        tracing::warn!(instance = %row.name, "a restore was cut off half-way: it is finished");
        std::fs::rename(&new, disk).io(format_args!("Replacing {}", disk.display()))?;
        sync_beside(disk)?;
    }
    row.spec.restoring = false;
    Ok(())
}

/// Removes the files that no row and no template knows: what a crash left.
pub(crate) fn sweep(layout: &Layout, needed: &dyn Fn(Layer) -> bool) -> Result<()> {
    let folder = layout.layers();
    let what = format!("Looking through {}", folder.display());
    for entry in std::fs::read_dir(&folder).io(&what)? {
        let path = entry.io(&what)?.path();
        let id = path
            .file_stem()
            .and_then(|stem| stem.to_str()?.parse().ok());
        if let Some(id) = id
            && !needed(Layer(id))
        {
            tracing::warn!(%id, "a layer that nobody stands on is removed");
            files::remove_file(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::instances::tests::row;

    /// A disk whose freeze is cut off after `steps` of its steps.
    fn cut_off(steps: u32) -> (tempfile::TempDir, Layout, InstanceRow, Layer) {
        let dir = tempfile::tempdir().unwrap();
        let layout = Layout::below(dir.path(), 0);
        files::create_folder(&layout.layers(), 0o700).unwrap();
        let mut row = row("foo", 1);
        row.spec.layers.clear();
        let folder = layout.instance(row.id);
        files::create_folder(&folder, 0o700).unwrap();
        let disk = wiring::disk(&layout, &row);
        std::fs::write(&disk, "the guest's data").unwrap();
        row.spec.disk = Size::gib(1);
        let layer = Layer(Uuid::new_v4());
        row.spec.layers.push(layer);
        let size = Size::gib(1);
        if steps >= 1 {
            overlay::create_on_layer(&next(&disk), size, &layout.layer(layer.0)).unwrap();
        }
        if steps >= 2 {
            std::fs::rename(&disk, layout.layer(layer.0)).unwrap();
        }
        if steps >= 3 {
            std::fs::rename(next(&disk), &disk).unwrap();
        }
        (dir, layout, row, layer)
    }

    #[test]
    fn a_freeze_that_was_cut_off_is_undone_or_finished() {
        for steps in 0..=3 {
            let (_dir, layout, mut row, layer) = cut_off(steps);
            let changed = settle(&layout, &mut row).unwrap();
            let disk = wiring::disk(&layout, &row);
            assert_eq!(changed, steps < 2, "{steps}");
            let data = match steps < 2 {
                true => {
                    assert!(row.spec.layers.is_empty());
                    disk.clone()
                }
                false => {
                    assert_eq!(row.spec.layers, [layer]);
                    layout.layer(layer.0)
                }
            };
            assert_eq!(std::fs::read_to_string(data).unwrap(), "the guest's data");
            assert!(disk.exists() && !next(&disk).exists(), "{steps}");
            // A second time nothing is left to do.
            assert!(!settle(&layout, &mut row).unwrap());
        }
    }

    #[test]
    fn a_restore_that_was_cut_off_is_undone_or_finished() {
        for committed in [false, true] {
            let (_dir, layout, mut row, _) = cut_off(3);
            let disk = wiring::disk(&layout, &row);
            let layer = Layer(Uuid::new_v4());
            std::fs::write(restored(&disk), "nothing yet").unwrap();
            std::fs::write(layout.layer(layer.0), "").unwrap();
            row.spec.restoring = committed;
            assert_eq!(settle(&layout, &mut row).unwrap(), committed);
            assert!(!restored(&disk).exists());
            assert!(!row.spec.restoring);
            let data = std::fs::read(&disk).unwrap();
            assert_eq!(data == b"nothing yet", committed);
            assert!(!settle(&layout, &mut row).unwrap());
        }
    }

    #[test]
    fn a_disk_gets_the_size_of_what_grew_below_it() {
        let (_dir, layout, mut row, layer) = cut_off(3);
        let (disk, below) = (wiring::disk(&layout, &row), layout.layer(layer.0));
        std::fs::remove_file(&below).unwrap();
        overlay::create(&below, Size::gib(2), Path::new("/dev/null")).unwrap();
        row.spec.disk = Size::gib(2);
        assert!(!settle(&layout, &mut row).unwrap());
        assert_eq!(overlay::size(&disk).unwrap(), Size::gib(2));
        assert!(overlay::is_empty(&disk).unwrap() && !next(&disk).exists());
        // A larger one, and one that was written to, stay what they are.
        for size in [3, 1] {
            std::fs::remove_file(&disk).unwrap();
            overlay::create_on_layer(&disk, Size::gib(size), &below).unwrap();
            if size == 1 {
                let mut bytes = std::fs::read(&disk).unwrap();
                let table = u64::from_be_bytes(bytes[40..48].try_into().unwrap());
                bytes[table as usize] = 0x80;
                std::fs::write(&disk, bytes).unwrap();
            }
            fit(&layout, &disk, Some(layer)).unwrap();
            assert_eq!(overlay::size(&disk).unwrap(), Size::gib(size));
        }
        fit(&layout, &disk, None).unwrap();
    }

    #[test]
    fn a_freeze_as_a_whole() {
        let (_dir, layout, row, _) = cut_off(0);
        let layer = Layer(Uuid::new_v4());
        let disk = wiring::disk(&layout, &row);
        freeze(&layout, &disk, layer, Size::gib(1)).unwrap();
        let frozen = std::fs::read_to_string(layout.layer(layer.0)).unwrap();
        assert_eq!(frozen, "the guest's data");
        assert!(std::fs::read(&disk).unwrap().starts_with(b"QFI\xfb"));
        sweep(&layout, &|_| false).unwrap();
        assert!(!layout.layer(layer.0).exists());
    }
}
