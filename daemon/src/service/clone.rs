//! Clone: a new, stopped instance on the same layers as another one, or as one of its snapshots; and what an
//! instance is called. Nothing is copied but the user data; the clone's first boot gives it an identity
//! of its own (`Spec::identify`).

use std::sync::Arc;

use pileus_api::{
    CloneReply, CloneRequest, Instance as ApiInstance, InstanceState, OperationKind, Origin,
    RenameRequest,
};
use pileus_base::{Code, Error, InstanceName, Phase, Reporter, Result, Size, files};
use pileus_instances::driver::SEED;
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::guest::seed;

use super::given::{Given, seed_of};
use super::registry::Instance;
use super::snapshots::find;
use super::{Service, convert, wiring};
use crate::state::instances::{InstanceRow, Layer, Stage};

impl Service {
    pub async fn clone_instance(&self, name: &str, request: CloneRequest) -> Result<CloneReply> {
        let source = self.parts.registry.get_usable(name)?;
        source.machine_soon().await?;
        let row = source.row();
        self.can_be_frozen(&row)?;
        if let Some(snapshot) = &request.snapshot {
            find(&row, snapshot.as_str())?;
        }
        let number = row.spec.clones_made + 1;
        let wanted = match &request.name {
            Some(name) => name.clone(),
            None => self.clone_name(&row, number)?,
        };
        let clone = self
            .reserve_for(Some(wanted.clone()), row.spec.for_another(), None)
            .await?;
        let service = self.clone();
        let operation = self
            .parts
            .operations
            .begin(OperationKind::Clone, name, move |report| async move {
                let clone = clone.begin();
                let done = service.clone_now(&source, &clone, &request, &report).await;
                if done.is_err() {
                    service.undo(&clone).await;
                }
                done
            })
            .await?;
        Ok(CloneReply {
            operation,
            name: wanted,
        })
    }

    fn clone_name(&self, source: &InstanceRow, first: u32) -> Result<InstanceName> {
        for number in first..first.saturating_add(10_000) {
            let name: InstanceName = format!("{}-clone{number}", source.name).parse()?;
            if self.parts.registry.get(name.as_str()).is_err() {
                return Ok(name);
            }
        }
        Err(Error::internal("No number is free for a clone"))
    }

    async fn clone_now(
        &self,
        source: &Arc<Instance>,
        clone: &Arc<Instance>,
        request: &CloneRequest,
        report: &Reporter,
    ) -> Result<()> {
        let _turn = source.usable_turn(report).await?;
        report.phase(Phase::Configuring);
        let (layers, disk, from) = self.layers_for_clone(source, request, report).await?;
        let Some(image) = from.spec.image.as_ref() else {
            return Err(wiring::no_image(&from));
        };
        let image = self
            .parts
            .store
            .get(&image.digest)
            .ok_or_else(|| wiring::no_image(&from))?;
        let row = clone
            .change(|row| {
                row.spec.layers = layers;
                row.spec.disk = disk;
                row.spec.cpus = from.spec.cpus;
                row.spec.memory = from.spec.memory;
                row.spec.firmware_boot = from.spec.firmware_boot;
                row.spec.identify = true;
                row.spec.origin = Origin::Clone {
                    of: from.name.clone(),
                    snapshot: request.snapshot.clone(),
                };
            })
            .await?;
        self.write_copy(&from, &row).await?;
        source.change(|row| row.spec.clones_made += 1).await?;
        // From here on it stays, whatever happens.
        clone
            .change(|row| {
                row.spec.booted = true;
                row.stage = Stage::Is(InstanceState::Stopped);
            })
            .await?;
        self.own(clone, image).map(drop)
    }

    /// The layers that the clone stands on, its disk's size, and what it is a copy of.
    pub(super) async fn layers_for_clone(
        &self,
        source: &Arc<Instance>,
        request: &CloneRequest,
        report: &Reporter,
    ) -> Result<(Vec<Layer>, Size, InstanceRow)> {
        let mut from = source.row();
        if let Some(name) = &request.snapshot {
            let snapshot = find(&from, name.as_str())?.clone();
            from.spec.cpus = snapshot.cpus;
            from.spec.memory = snapshot.memory;
            from.spec.firmware_boot = snapshot.firmware_boot;
            return Ok((snapshot.layers, snapshot.disk, from));
        }
        match source.machine()?.snapshot().state {
            InstanceState::Stopped | InstanceState::Suspended => {
                self.freeze_still(source).await?;
            }
            InstanceState::Running => {
                self.freeze_running(source, None, report).await?;
            }
            state => {
                return Err(Error::new(
                    Code::WrongState,
                    format!(
                        "Instance '{}' can't be cloned while it is {}",
                        from.name,
                        state.as_str()
                    ),
                ));
            }
        }
        let from = source.row();
        Ok((from.spec.layers.clone(), from.spec.disk, from))
    }

    /// Gives an instance another name, in its guest too if that runs.
    pub async fn rename(&self, name: &str, request: &RenameRequest) -> Result<ApiInstance> {
        let instance = self.parts.registry.get_usable(name)?;
        instance.machine_soon().await?;
        let _turn = instance.usable_turn(&Reporter::silent()).await?;
        let state = instance.machine()?.snapshot().state;
        if !matches!(state, InstanceState::Stopped | InstanceState::Running) {
            return Err(Error::new(
                Code::WrongState,
                format!(
                    "Instance '{name}' can't be renamed while it is {}",
                    state.as_str()
                ),
            )
            .advise(format!("Start or stop it first: `pileus start {name}`.")));
        }
        let new = request.name.clone();
        instance.change(|row| row.name = new.clone()).await?;
        self.parts.registry.renamed(instance.id, &new);
        let row = instance.row();
        self.rewrite_seed(&row, state).await?;
        if state == InstanceState::Running {
            self.parts.network.register(&wiring::nic(&row))?;
            let guest = instance.machine()?.guest()?;
            // If it does not listen now, its next boot reads the name from the seed.
            if let Err(err) = guest.rename(&new, RENAME_BOUND).await {
                tracing::warn!(instance = %new, %err, "its guest did not take the new name yet");
            }
        }
        Ok(convert::instance(&instance))
    }

    /// Makes the seed anew: with the name that the instance has, and this pileus's agent.
    pub(super) async fn rewrite_seed(&self, row: &InstanceRow, state: InstanceState) -> Result<()> {
        let folder = self.parts.layout.instance(row.id);
        let row = row.clone();
        super::blocking(move || {
            let keys = InstanceKeys::load(&folder)?;
            let seed = seed_of(&row, &keys, &Given::load(&folder)?)?;
            let path = folder.join(SEED);
            match state {
                // In place: QEMU has this very file open.
                InstanceState::Running => seed::overwrite(&path, &seed),
                _ => files::write_atomic(&path, &seed, 0o600),
            }
        })
        .await
    }
}

const RENAME_BOUND: std::time::Duration = std::time::Duration::from_secs(20);
