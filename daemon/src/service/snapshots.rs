//! Snapshots: taking, listing, restoring, deleting. A snapshot is a record in the instance's row and a
//! frozen layer (`layers.rs`); nothing is copied.
//!
//! ```text
//!   take:     turn ─▶ disk frozen ─▶ a running VM changes over (and writes its memory) ─▶ row
//!   restore:  turn ─▶ VM ended ─▶ empty disk on the snapshot's layers, row ─▶ suspended at that moment,
//!             if it has memory ─▶ started, if it ran before or has memory
//!   delete:   turn ─▶ row: children get its parent ─▶ layers and memory that nobody needs
//! ```
//!
//! What is cut off before the row is written never was; what is cut off after it is swept at the start.

use std::sync::Arc;

use pileus_api::{
    InstanceState, Operation, OperationKind, RestoreRequest, Snapshot, SnapshotReply,
    SnapshotRequest,
};
use pileus_base::{Code, Error, Phase, Reporter, Result, ResultExt, Size, SnapshotName, files};
use pileus_instances::driver;
use pileus_instances::machine::{BOOT_TIMEOUT, Freeze, SHUTDOWN_TIMEOUT, Saved, SavedFile};
use uuid::Uuid;

use super::Service;
use super::registry::Instance;
use crate::state::instances::{InstanceRow, SnapshotRow};

const MOST_COMMENT: usize = 10 << 10;
/// Every one of them is a file that QEMU opens.
const MOST: usize = 500;

impl Service {
    /// The snapshots of all instances, the trash included.
    pub fn all_snapshots(&self) -> Vec<Snapshot> {
        let mut all = self.parts.registry.all();
        all.sort_by_key(|instance| instance.row().name);
        all.iter().flat_map(|i| self.list_of(&i.row())).collect()
    }

    pub fn snapshots(&self, name: &str) -> Result<Vec<Snapshot>> {
        let instance = self.parts.registry.get(name)?;
        Ok(self.list_of(&instance.row()))
    }

    pub fn snapshot(&self, name: &str, snapshot: &str) -> Result<Snapshot> {
        let row = self.parts.registry.get(name)?.row();
        let found = find(&row, snapshot)?;
        Ok(self.shown(&row, found))
    }

    fn list_of(&self, row: &InstanceRow) -> Vec<Snapshot> {
        row.snapshots.iter().map(|s| self.shown(row, s)).collect()
    }

    fn shown(&self, row: &InstanceRow, of: &SnapshotRow) -> Snapshot {
        let name_of = |id: Uuid| Some(row.snapshots.iter().find(|s| s.id == id)?.name.clone());
        let children = row.snapshots.iter().filter(|s| s.parent == Some(of.id));
        let mut children: Vec<_> = children.map(|s| s.name.clone()).collect();
        children.sort();
        let layer = of.layers.last().map(|l| self.parts.layout.layer(l.0));
        let disk = layer.map_or(0, |layer| files::allocated(&layer));
        let memory = of.saved.as_ref().map_or(0, |saved| saved.bytes);
        Snapshot {
            id: of.id,
            instance: row.name.clone(),
            name: of.name.clone(),
            comment: of.comment.clone(),
            parent: of.parent.and_then(name_of),
            children,
            head: row.spec.head == Some(of.id),
            created_at: of.created_at,
            cpus: of.cpus,
            memory: of.memory,
            disk: of.disk,
            with_memory: of.saved.is_some(),
            size: Size(disk + memory),
        }
    }

    pub async fn take_snapshot(
        &self,
        name: &str,
        request: SnapshotRequest,
    ) -> Result<SnapshotReply> {
        let instance = self.parts.registry.get_usable(name)?;
        instance.machine_soon().await?;
        if request.comment.len() > MOST_COMMENT {
            return Err(Error::new(
                Code::InvalidArgument,
                format!("A comment has {MOST_COMMENT} bytes at most"),
            ));
        }
        let snapshot = choose_name(&instance.row(), request.name.as_ref())?;
        let (service, chosen) = (self.clone(), snapshot.clone());
        let operation = self
            .parts
            .operations
            .begin(OperationKind::Snapshot, name, |report| async move {
                let _turn = instance.usable_turn(&report).await?;
                let with_memory = request.with_memory;
                service
                    .snapshot_now(&instance, chosen, request.comment, with_memory, &report)
                    .await
            })
            .await?;
        Ok(SnapshotReply {
            operation,
            name: snapshot,
        })
    }

    async fn snapshot_now(
        &self,
        instance: &Arc<Instance>,
        name: SnapshotName,
        comment: String,
        with_memory: bool,
        report: &Reporter,
    ) -> Result<()> {
        // Another one may have taken the name, or the last place, while this one waited for its turn.
        let name = choose_name(&instance.row(), Some(&name))?;
        let id = Uuid::new_v4();
        report.phase(Phase::Snapshotting);
        let saved = self.take_state(instance, id, with_memory, report).await?;
        let now = (self.parts.clock)();
        instance
            .change(|row| {
                let taken = SnapshotRow {
                    id,
                    name,
                    comment,
                    parent: row.spec.head,
                    created_at: now,
                    cpus: row.spec.cpus,
                    memory: row.spec.memory,
                    disk: row.spec.disk,
                    layers: row.spec.layers.clone(),
                    firmware_boot: row.spec.firmware_boot,
                    identify: row.spec.identify,
                    saved,
                };
                Arc::make_mut(&mut row.snapshots).push(taken);
                row.spec.head = Some(id);
                row.spec.snapshots_taken += 1;
            })
            .await
            .map(drop)
    }

    /// Freezes the disk, and takes the memory if that is wanted.
    async fn take_state(
        &self,
        instance: &Arc<Instance>,
        id: Uuid,
        with_memory: bool,
        report: &Reporter,
    ) -> Result<Option<Saved>> {
        let row = instance.row();
        let machine = instance.machine()?.clone();
        let snapshot = machine.snapshot();
        self.can_be_frozen(&row)?;
        let file = driver::saved(&self.parts.layout.instance(row.id), SavedFile::Snapshot(id));
        match (snapshot.state, with_memory) {
            (InstanceState::Stopped, false) | (InstanceState::Suspended, false) => {
                self.freeze_still(instance).await?;
                Ok(None)
            }
            (InstanceState::Running, false) => {
                self.freeze_running(instance, None, report).await?;
                Ok(None)
            }
            (InstanceState::Suspended, true) => {
                let Some(mut saved) = snapshot.suspended else {
                    return Err(Error::internal("A suspended instance has nothing saved"));
                };
                create_parent(&file)?;
                let own = driver::saved(&self.parts.layout.instance(row.id), saved.file);
                link(&own, &file)?;
                saved.file = SavedFile::Snapshot(id);
                let frozen = self.freeze_still(instance).await;
                undo_file(&file, frozen.map(|()| Some(saved)))
            }
            (InstanceState::Running, true) => {
                driver::room_for(&self.parts.layout.instance(row.id), row.spec.memory)?;
                create_parent(&file)?;
                let memory = files::create_private(&file)?;
                let memory = (memory, SavedFile::Snapshot(id));
                let frozen = self.freeze_running(instance, Some(memory), report).await;
                undo_file(&file, frozen)
            }
            (InstanceState::Stopped, true) => Err(Error::new(
                Code::WrongState,
                format!(
                    "Instance '{}' has no memory to save: it is stopped",
                    row.name
                ),
            )
            .advise("Take the snapshot without its memory, or start it first.")),
            (state, _) => Err(Error::new(
                Code::WrongState,
                format!(
                    "No snapshot can be taken of instance '{}' while it is {}",
                    row.name,
                    state.as_str()
                ),
            )),
        }
    }

    /// Whether its disk can become a layer.
    pub(super) fn can_be_frozen(&self, row: &InstanceRow) -> Result<()> {
        if !row.spec.disk_in_memory {
            return Ok(());
        }
        Err(Error::new(
            Code::WrongState,
            format!("The disk of instance '{}' lies in memory", row.name),
        )
        .advise("Run it without --tmpfs."))
    }

    /// Freezes the disk of an instance that runs; it stands still for a moment.
    pub(super) async fn freeze_running(
        &self,
        instance: &Arc<Instance>,
        memory: Option<(std::fs::File, SavedFile)>,
        report: &Reporter,
    ) -> Result<Option<Saved>> {
        let (_, layer) = self.freeze_disk(instance).await?;
        let freeze = Freeze {
            layer,
            size: instance.row().spec.disk,
            memory,
        };
        let frozen = instance.machine()?.freeze(freeze).await?;
        report.took(Phase::Halted, frozen.paused);
        Ok(frozen.saved)
    }

    pub async fn restore(
        &self,
        name: &str,
        snapshot: &str,
        request: &RestoreRequest,
    ) -> Result<Operation> {
        let instance = self.parts.registry.get_usable(name)?;
        instance.machine_soon().await?;
        let meant = find(&instance.row(), snapshot)?.clone();
        let (service, disk_only) = (self.clone(), request.disk_only);
        self.parts
            .operations
            .begin(OperationKind::Restore, name, |report| async move {
                let _turn = instance.usable_turn(&report).await?;
                service
                    .restore_now(&instance, &meant, disk_only, &report)
                    .await
            })
            .await
    }

    async fn restore_now(
        &self,
        instance: &Arc<Instance>,
        meant: &SnapshotRow,
        disk_only: bool,
        report: &Reporter,
    ) -> Result<()> {
        let (row, id) = (instance.row(), meant.id);
        let to = row.snapshots.iter().find(|s| s.id == id).cloned();
        let to = to.ok_or_else(|| not_found(row.name.as_str(), meant.name.as_str()))?;
        let machine = instance.machine()?.clone();
        let ran = row.process.is_some();
        let saved = to.saved.clone().filter(|_| !disk_only);
        if let Some(saved) = &saved
            && !row
                .spec
                .extra_nics
                .iter()
                .map(|nic| nic.mac)
                .eq(saved.extra_nics.iter().copied())
        {
            // Its networks are no part of a snapshot; the machine's cards are.
            report.warn(format!(
                "'{}' has other networks than when it was saved: it has the cards of then until it is stopped and started",
                row.name
            ));
        }
        // What it is now is given up, its memory too.
        machine
            .stop(true, SHUTDOWN_TIMEOUT, Reporter::silent())
            .await?;
        report.phase(Phase::Restoring);
        self.replace_disk(instance, to.layers.clone(), to.disk, |row| {
            row.spec.cpus = to.cpus;
            row.spec.memory = to.memory;
            row.spec.pending = pileus_api::Pending::default();
            row.spec.head = Some(id);
            row.spec.identify = to.identify;
            row.shutdown_at = None;
        })
        .await?;
        let runs = ran || saved.is_some();
        let saved = match saved {
            Some(mut saved) => {
                let folder = self.parts.layout.instance(row.id);
                let (own, kept) = (
                    driver::saved(&folder, SavedFile::Suspended),
                    driver::saved(&folder, saved.file),
                );
                files::discard(&own)?;
                link(&kept, &own)?;
                saved.file = SavedFile::Suspended;
                Some(saved)
            }
            None => None,
        };
        machine.restored(saved, to.firmware_boot).await?;
        match runs {
            true => self.start_now(instance, BOOT_TIMEOUT, report).await,
            false => Ok(()),
        }
    }

    pub async fn delete_snapshot(&self, name: &str, snapshot: &str) -> Result<Operation> {
        let instance = self.parts.registry.get_usable(name)?;
        let meant = find(&instance.row(), snapshot)?.clone();
        let (service, target) = (self.clone(), format!("{name}.{snapshot}"));
        self.parts
            .operations
            .begin(OperationKind::DeleteSnapshot, target, |report| async move {
                let _turn = instance.turn(&report).await?;
                report.phase(Phase::Deleting);
                service.delete_snapshot_now(&instance, &meant).await
            })
            .await
    }

    async fn delete_snapshot_now(
        &self,
        instance: &Arc<Instance>,
        gone: &SnapshotRow,
    ) -> Result<()> {
        let (row, id) = (instance.row(), gone.id);
        // Others may have had their turn since: it is deleted once, and only under the name that was given.
        let gone = find(&row, gone.name.as_str())?.clone();
        if gone.id != id {
            return Err(not_found(row.name.as_str(), gone.name.as_str()));
        }
        instance
            .change(|row| {
                let snapshots = Arc::make_mut(&mut row.snapshots);
                snapshots.retain(|s| s.id != id);
                for child in snapshots.iter_mut().filter(|s| s.parent == Some(id)) {
                    child.parent = gone.parent;
                }
                if row.spec.head == Some(id) {
                    row.spec.head = gone.parent;
                }
            })
            .await?;
        let folder = self.parts.layout.instance(row.id);
        files::discard(&driver::saved(&folder, SavedFile::Snapshot(id)))?;
        self.drop_unused(&gone.layers).map(drop)
    }
}

/// Removes the file of something that failed.
fn undo_file<T>(file: &std::path::Path, done: Result<T>) -> Result<T> {
    if done.is_err()
        && let Err(err) = files::remove_file(file)
    {
        tracing::warn!(%err, "the memory of a snapshot that failed can't be removed");
    }
    done
}

/// Gives a file another name that is there after a power cut too: a row will say so.
fn link(file: &std::path::Path, name: &std::path::Path) -> Result<()> {
    std::fs::hard_link(file, name).io(format_args!("Linking {}", file.display()))?;
    name.parent().map_or(Ok(()), files::sync_folder)
}

fn create_parent(file: &std::path::Path) -> Result<()> {
    match file.parent() {
        Some(folder) => files::create_folder(folder, 0o700),
        None => Ok(()),
    }
}

/// The snapshot of that name.
pub(super) fn find<'a>(row: &'a InstanceRow, name: &str) -> Result<&'a SnapshotRow> {
    row.snapshot(name)
        .ok_or_else(|| not_found(row.name.as_str(), name))
}

fn not_found(instance: &str, name: &str) -> Error {
    Error::new(
        Code::SnapshotNotFound,
        format!("No such snapshot: {instance}.{name}"),
    )
    .advise("`pileus list --snapshots` shows them all.")
}

/// The new snapshot's name, if it is free.
fn choose_name(row: &InstanceRow, wanted: Option<&SnapshotName>) -> Result<SnapshotName> {
    if row.snapshots.len() >= MOST {
        return Err(Error::new(
            Code::WrongState,
            format!("Instance '{}' has {MOST} snapshots already", row.name),
        )
        .advise("Delete some of them."));
    }
    if let Some(name) = wanted {
        return match row.snapshot(name.as_str()) {
            None => Ok(name.clone()),
            Some(_) => Err(exists(row, name.as_str())),
        };
    }
    let numbers = row.spec.snapshots_taken.saturating_add(1)..;
    for number in numbers {
        let name = format!("snapshot{number}");
        if row.snapshot(&name).is_none() {
            return name.parse();
        }
    }
    Err(Error::internal("No number is free for a snapshot"))
}

pub(super) fn exists(row: &InstanceRow, name: &str) -> Error {
    Error::new(
        Code::SnapshotExists,
        format!("Snapshot already exists: {}.{name}", row.name),
    )
    .advise("Choose another name with --name.")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::instances::tests::row;

    #[test]
    fn names_are_numbered_by_all_that_were_ever_taken() {
        let mut row = row("foo", 1);
        assert_eq!(row.snapshots[0].name.as_str(), "snapshot1");
        row.spec.snapshots_taken = 4;
        assert_eq!(choose_name(&row, None).unwrap().as_str(), "snapshot5");
        row.spec.snapshots_taken = 0;
        assert_eq!(choose_name(&row, None).unwrap().as_str(), "snapshot2");
        for (name, good) in [("new", true), ("snapshot1", false), ("SNAPSHOT1", false)] {
            let wanted = name.parse().unwrap();
            let chosen = choose_name(&row, Some(&wanted));
            assert_eq!(chosen.is_ok(), good, "{name}");
            if let Err(err) = chosen {
                assert_eq!(err.code, Code::SnapshotExists);
            }
        }
    }
}
