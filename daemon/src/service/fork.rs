//! Fork: clones of a running instance with its memory. The instance stands still while its memory is
//! written to a file; then each clone loads it, lets the old NIC go and is given an identity of its own.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use pileus_api::{ForkReply, ForkRequest, InstanceState, OperationKind, Origin, PhaseTime};
use pileus_base::{Code, Error, InstanceName, Phase, Reporter, Result, ResultExt, files};
use pileus_images::overlay;
use pileus_instances::driver;
use pileus_instances::guest::clone::CloneMode;
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::machine::{BOOT_TIMEOUT, Freeze, Saved, SavedFile};
use pileus_instances::warm::{self, SavedWhole};

use super::admission::Start;
use super::given::{Given, seed_of};
use super::registry::Instance;
use super::reserve::Reserved;
use super::{Service, wiring};
use crate::state::instances::InstanceRow;

const MOST: u32 = 100;

impl Service {
    pub async fn fork(&self, name: &str, request: ForkRequest) -> Result<ForkReply> {
        let source = self.parts.registry.get_usable(name)?;
        let row = source.row();
        if source.machine_soon().await?.snapshot().state != InstanceState::Running {
            return Err(Error::new(
                Code::WrongState,
                format!("Instance '{name}' is not running"),
            )
            .advise(format!("Start it with `pileus start {name}`.")));
        }
        if row.spec.disk_in_memory {
            return Err(Error::new(
                Code::WrongState,
                format!("Instance '{name}' can't be forked: its disk lies in memory"),
            ));
        }
        if !row.spec.extra_nics.is_empty() {
            return Err(with_networks(name));
        }
        let names = names(&row.name, &request, &self.taken_names())?;
        let mut clones = Vec::new();
        for name in &names {
            let spec = row.spec.for_another();
            clones.push(self.reserve_for(Some(name.clone()), spec, None).await?);
        }
        let service = self.clone();
        let operation = self
            .parts
            .operations
            .begin(OperationKind::Fork, name, move |report| async move {
                let clones: Vec<_> = clones.into_iter().map(Reserved::begin).collect();
                service.carry_out_fork(&source, &clones, &report).await
            })
            .await?;
        Ok(ForkReply { operation, names })
    }

    fn taken_names(&self) -> Vec<String> {
        let all = self.parts.registry.all();
        all.iter().map(|i| i.row().name.to_string()).collect()
    }

    async fn carry_out_fork(
        &self,
        source: &Arc<Instance>,
        clones: &[Arc<Instance>],
        report: &Reporter,
    ) -> Result<()> {
        let frozen = async {
            let _turn = source.turn(report).await?;
            let (memory, saved) = self.freeze(source, report).await?;
            let from = source.row();
            // Now: the memory fits these layers alone, and what nobody names is removed.
            for clone in clones {
                let names = clone.change(|row| row.spec.layers.clone_from(&from.spec.layers));
                names.await?;
            }
            Ok((memory, saved, from))
        };
        let frozen = frozen.await;
        let (memory, saved, from) = match frozen {
            Ok(frozen) => frozen,
            Err(err) => {
                for clone in clones {
                    self.undo(clone).await;
                }
                return Err(err);
            }
        };
        let mut first_error = None;
        for (done, clone) in clones.iter().enumerate() {
            report.progress(done as u64, Some(clones.len() as u64));
            let wanted = report.check().is_ok();
            let forked = match wanted {
                true => self.fork_one(&from, clone, &memory.0, &saved, report).await,
                false => Err(Error::new(Code::Cancelled, "The operation was cancelled")),
            };
            if let Err(err) = forked {
                self.undo(clone).await;
                first_error.get_or_insert(err);
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Takes the instance's memory and disk. It stands still for as long as the memory is written.
    async fn freeze(
        &self,
        source: &Arc<Instance>,
        report: &Reporter,
    ) -> Result<(MemoryFile, Saved)> {
        let row = source.row();
        let folder = self.parts.layout.instance(row.id);
        driver::room_for(&folder, row.spec.memory)?;
        let (_, disk) = self.freeze_disk(source).await?;
        let memory = MemoryFile(folder.join("fork.memory"));
        files::discard(&memory.0)?;
        let file = files::create_private(&memory.0)?;
        report.phase(Phase::Saving);
        let freeze = Freeze {
            layer: disk,
            size: row.spec.disk,
            // Not a snapshot's; the name is not used.
            memory: Some((file, SavedFile::Suspended)),
        };
        let frozen = source.machine_soon().await?.freeze(freeze).await?;
        report.took(Phase::Halted, frozen.paused);
        let saved = frozen
            .saved
            .ok_or_else(|| Error::internal("A fork has no memory"))?;
        if !saved.extra_nics.is_empty() {
            return Err(with_networks(row.name.as_str()));
        }
        Ok((memory, saved))
    }

    async fn fork_one(
        &self,
        from: &InstanceRow,
        clone: &Arc<Instance>,
        memory: &std::path::Path,
        saved: &Saved,
        report: &Reporter,
    ) -> Result<()> {
        let _promise = self.admit(from.spec.memory, Start::Cold).await?;
        let Some(image) = &from.spec.image else {
            return Err(wiring::no_image(from));
        };
        let image = self
            .parts
            .store
            .get(&image.digest)
            .ok_or_else(|| wiring::no_image(from))?;
        let row = clone
            .change(|row| {
                row.spec.origin = Origin::Fork {
                    of: from.name.clone(),
                };
            })
            .await?;
        self.write_copy(from, &row).await?;
        let keys = InstanceKeys::load(&self.parts.layout.instance(row.id))?;
        let saved = SavedWhole {
            memory: File::open(memory).io("Opening a fork's memory")?,
            saved: saved.clone(),
            nic: from.mac,
            identity: self.identity_of(&row, keys, CloneMode::Full),
        };
        let driver = self.machine_config(clone, image.clone())?.driver;
        let (vm, phases) = warm::restore_whole(&driver, saved, report).await?;
        let machine = self.own(clone, image)?;
        let phases: Vec<PhaseTime> = phases;
        machine
            .start_with(vm, BOOT_TIMEOUT, phases, report.clone())
            .await
    }

    /// A disk on the layers that the row names, keys and a seed of its own, and what the source was
    /// given.
    pub(super) async fn write_copy(&self, from: &InstanceRow, row: &InstanceRow) -> Result<()> {
        let folder = self.parts.layout.instance(row.id);
        let disk = wiring::disk(&self.parts.layout, row);
        let top = row.spec.layers.last().map(|l| self.parts.layout.layer(l.0));
        let top = top.ok_or_else(|| Error::internal("A fork has no layer below it"))?;
        let source = self.parts.layout.instance(from.id);
        let row = row.clone();
        let write = move || {
            files::create_folder(&folder, 0o700)?;
            overlay::create_on_layer(&disk, row.spec.disk, &top)?;
            let keys = InstanceKeys::generate()?;
            keys.store(&folder)?;
            let given = Given::load(&source)?;
            let seed = seed_of(&row, &keys, &given)?;
            files::write_atomic(&folder.join(driver::SEED), &seed, 0o600)?;
            given.store(&folder)?;
            files::sync_folder(&folder)
        };
        super::blocking(write).await
    }
}

fn with_networks(name: &str) -> Error {
    Error::new(
        Code::WrongState,
        format!("Instance '{name}' can't be forked: it is connected to networks of the host"),
    )
    .advise(format!("A clone can be: `pileus clone {name}`."))
}

/// The file of a fork's memory; goes when the last clone has it.
struct MemoryFile(PathBuf);

impl Drop for MemoryFile {
    fn drop(&mut self) {
        if let Err(err) = files::discard(&self.0) {
            tracing::warn!(%err, "a fork's memory can't be removed");
        }
    }
}

/// The clones' names: those that were given, then NAME-fork1, NAME-fork2, … as far as they are free.
fn names(
    source: &InstanceName,
    request: &ForkRequest,
    taken: &[String],
) -> Result<Vec<InstanceName>> {
    let given = u32::try_from(request.names.len()).unwrap_or(u32::MAX);
    let count = request.count.unwrap_or(given.max(1));
    if count == 0 || count > MOST || count < given {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("{count} is no possible number of clones"),
        )
        .advise(format!("Give 1 to {MOST}, and not more names than clones.")));
    }
    let mut names = request.names.clone();
    let mut number = 0;
    while names.len() < count as usize {
        number += 1;
        let name: InstanceName = format!("{source}-fork{number}").parse()?;
        let is_taken = |other: &str| other.eq_ignore_ascii_case(name.as_str());
        if !taken.iter().any(|t| is_taken(t)) && !names.iter().any(|n| is_taken(n.as_str())) {
            names.push(name);
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clones_are_named_after_their_source() {
        let source: InstanceName = "foo".parse().unwrap();
        let ask = |count: Option<u32>, given: &[&str], taken: &[&str]| {
            let request = ForkRequest {
                count,
                names: given.iter().map(|n| n.parse().unwrap()).collect(),
            };
            let taken: Vec<String> = taken.iter().map(|t| (*t).to_owned()).collect();
            let names = names(&source, &request, &taken)?;
            Ok::<_, Error>(names.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(ask(None, &[], &[]).unwrap(), ["foo-fork1"]);
        assert_eq!(
            ask(Some(2), &[], &["FOO-FORK1"]).unwrap(),
            ["foo-fork2", "foo-fork3"]
        );
        assert_eq!(ask(None, &["a", "b"], &[]).unwrap(), ["a", "b"]);
        assert_eq!(
            ask(Some(3), &["a", "foo-fork1"], &[]).unwrap(),
            ["a", "foo-fork1", "foo-fork2"]
        );
        for (count, given) in [(0, vec![]), (101, vec![]), (1, vec!["a", "b"])] {
            assert!(ask(Some(count), &given, &[]).is_err());
        }
    }
}
