//! Start, stop, restart, suspend, delete, recover, purge. Each takes the instance's turn, and then asks its
//! task.

use std::sync::Arc;
use std::time::Duration;

use pileus_api::{
    Event, Instance as ApiInstance, InstanceState, Operation, OperationKind, Pending, StartRequest,
    StopRequest,
};
use pileus_base::{Code, Error, Phase, Reporter, Result, files};
use pileus_instances::driver;
use pileus_instances::machine::{BOOT_TIMEOUT, SHUTDOWN_TIMEOUT, SavedFile};

use super::admission::Start;
use super::registry::Instance;
use super::{Service, convert, extra_nics};
use crate::state;
use crate::state::instances::{InstanceRow, Stage};

pub(super) fn bound(seconds: Option<u64>, default: Duration) -> Duration {
    // A day is as good as for ever, and can't overflow anything.
    seconds.map_or(default, |s| Duration::from_secs(s.min(86_400)))
}

impl Service {
    /// Boots a stopped instance, goes on with a suspended one; takes back a shutdown with a delay.
    pub async fn start(&self, name: &str, request: &StartRequest) -> Result<Operation> {
        let instance = self.parts.registry.get_usable(name)?;
        instance.machine_soon().await?;
        let timeout = bound(request.timeout, BOOT_TIMEOUT);
        let service = self.clone();
        self.parts
            .operations
            .begin(OperationKind::Start, name, |report| async move {
                let _turn = instance.usable_turn(&report).await?;
                service.start_now(&instance, timeout, &report).await
            })
            .await
    }

    /// The start itself; the caller has the turn.
    pub(super) async fn start_now(
        &self,
        instance: &Arc<Instance>,
        timeout: Duration,
        report: &Reporter,
    ) -> Result<()> {
        let machine = instance.machine()?.clone();
        let at_rest = machine.snapshot().state;
        if matches!(at_rest, InstanceState::Stopped | InstanceState::Suspended) {
            self.fit_disk(instance).await?;
        }
        let promise = match at_rest {
            InstanceState::Stopped => {
                self.apply_pending(instance).await?;
                // An instance that an older pileus made gets the agent that this one talks to.
                self.rewrite_seed(&instance.row(), at_rest).await?;
                Some(self.admit(instance.row().spec.memory, Start::Cold).await?)
            }
            InstanceState::Suspended => {
                Some(self.admit(instance.row().spec.memory, Start::Cold).await?)
            }
            _ => None,
        };
        instance
            .change(|row| {
                row.shutdown_at = None;
                row.history.cut_off = false;
            })
            .await?;
        let started = machine.start(timeout, Vec::new(), report.clone()).await;
        drop(promise);
        started
    }

    /// What was set while it ran holds from now on.
    async fn apply_pending(&self, instance: &Instance) -> Result<()> {
        instance
            .change(|row| {
                let pending = std::mem::take(&mut row.spec.pending);
                row.spec.cpus = pending.cpus.unwrap_or(row.spec.cpus);
                row.spec.memory = pending.memory.unwrap_or(row.spec.memory);
            })
            .await
            .map(drop)
    }

    /// Shuts an instance down, now or later, or cuts its power.
    pub async fn stop(&self, name: &str, request: &StopRequest) -> Result<Operation> {
        let instance = self.parts.registry.get_usable(name)?;
        instance.machine_soon().await?;
        let delay = super::supervise::delay(request)?;
        let timeout = bound(request.timeout, SHUTDOWN_TIMEOUT);
        let (service, request) = (self.clone(), request.clone());
        self.parts
            .operations
            .begin(OperationKind::Stop, name, |report| async move {
                if request.cancel {
                    return service.cancel_shutdown(&instance).await;
                }
                if let Some(delay) = delay {
                    return service.shut_down_later(&instance, delay).await;
                }
                let _turn = match request.force {
                    true => instance.turn_by_force(&report).await?,
                    false => instance.usable_turn(&report).await?,
                };
                instance
                    .machine()?
                    .stop(request.force, timeout, report)
                    .await?;
                instance
                    .change(|row| {
                        row.shutdown_at = None;
                        row.history.cut_off = false;
                    })
                    .await
                    .map(drop)
            })
            .await
    }

    /// Reboots a running instance; if something waits for its next boot, its VM starts anew.
    pub async fn restart(&self, name: &str, request: &StartRequest) -> Result<Operation> {
        let instance = self.parts.registry.get_usable(name)?;
        instance.machine_soon().await?;
        let timeout = bound(request.timeout, BOOT_TIMEOUT);
        let service = self.clone();
        self.parts
            .operations
            .begin(OperationKind::Restart, name, |report| async move {
                let _turn = instance.usable_turn(&report).await?;
                let machine = instance.machine()?.clone();
                let row = instance.row();
                let waits = row.spec.pending != Pending::default() || extra_nics::are_pending(&row);
                if waits && machine.snapshot().state == InstanceState::Running {
                    machine
                        .stop(false, SHUTDOWN_TIMEOUT, report.clone())
                        .await?;
                    return service.start_now(&instance, timeout, &report).await;
                }
                machine.restart(timeout, report).await
            })
            .await
    }

    /// Writes an instance's memory to disk and ends its VM.
    pub async fn suspend(&self, name: &str) -> Result<Operation> {
        let instance = self.parts.registry.get_usable(name)?;
        instance.machine_soon().await?;
        if instance.row().lease.is_some() {
            return Err(Error::new(
                Code::WrongState,
                format!("Instance '{name}' can't be suspended: it is a throw-away one"),
            ));
        }
        self.parts
            .operations
            .begin(OperationKind::Suspend, name, |report| async move {
                let _turn = instance.usable_turn(&report).await?;
                instance.machine()?.suspend(report).await?;
                instance
                    .change(|row| row.shutdown_at = None)
                    .await
                    .map(drop)
            })
            .await
    }

    /// Moves to the trash after a shutdown, or deletes for good at once.
    pub async fn delete(&self, name: &str, purge: bool) -> Result<Operation> {
        let instance = self.parts.registry.get(name)?;
        // Its launch still writes its files: that has to be cancelled, not pulled away. Otherwise one
        // that can't run can at least be purged.
        if !purge || instance.row().stage == Stage::Is(InstanceState::Creating) {
            instance.machine_soon().await?;
        }
        let service = self.clone();
        self.parts
            .operations
            .begin(OperationKind::Delete, name, |report| async move {
                if purge {
                    let _turn = instance.turn_by_force(&report).await?;
                    return match service.parts.registry.by_id(instance.id) {
                        Some(_) => service.end(&instance, &report).await,
                        // Somebody else has ended it.
                        None => Ok(()),
                    };
                }
                let _turn = instance.turn(&report).await?;
                if instance.row().deleted {
                    return Ok(());
                }
                let machine = instance.machine()?;
                // A suspended one keeps what was saved, and can go on when it is recovered.
                if machine.snapshot().state != InstanceState::Suspended {
                    machine.stop(false, SHUTDOWN_TIMEOUT, report).await?;
                }
                instance
                    .change(|row| {
                        row.deleted = true;
                        row.shutdown_at = None;
                    })
                    .await
                    .map(drop)
            })
            .await
    }

    pub async fn recover(&self, name: &str) -> Result<ApiInstance> {
        let instance = self.parts.registry.get(name)?;
        instance.change(|row| row.deleted = false).await?;
        Ok(convert::instance(&instance))
    }

    /// Ends everything in the trash; tells the names.
    pub async fn purge(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for instance in self.parts.registry.all() {
            let row = instance.row();
            if row.deleted {
                let silent = Reporter::silent();
                let _turn = instance.turn_by_force(&silent).await?;
                // Somebody may have recovered or ended it meanwhile.
                if !instance.row().deleted || self.parts.registry.by_id(instance.id).is_none() {
                    continue;
                }
                self.end(&instance, &silent).await?;
                names.push(row.name.to_string());
            }
        }
        Ok(names)
    }

    /// Deletes an instance for good; nobody else is changing it. The intent is committed first: a start after a crash goes on.
    pub(super) async fn end(&self, instance: &Arc<Instance>, report: &Reporter) -> Result<()> {
        report.phase(Phase::Deleting);
        let row = instance.change(|row| row.stage = Stage::Purging).await?;
        if let Err(err) = self.remove(instance, &row).await {
            // What is left of it is listed again: it can be deleted once more.
            instance
                .change(|row| row.stage = Stage::Is(InstanceState::Unknown))
                .await?;
            return Err(err);
        }
        self.parts.registry.remove(row.id);
        let layers: Vec<_> = row.all_layers().collect();
        if let Err(err) = self.drop_unused(&layers) {
            tracing::warn!(%err, "a layer that nobody needs can't be removed");
        }
        self.parts.hub.send(Event::InstancePurged {
            id: row.id,
            name: row.name,
        });
        Ok(())
    }

    /// Its machine, its files and, last, its row.
    async fn remove(&self, instance: &Arc<Instance>, row: &InstanceRow) -> Result<()> {
        if let Ok(machine) = instance.machine() {
            // Its files must not go while something may write to them.
            machine
                .stop(true, SHUTDOWN_TIMEOUT, Reporter::silent())
                .await?;
        }
        if let Err(err) = self.parts.network.detach(&super::wiring::nic(row)) {
            tracing::warn!(instance = %row.name, %err, "its network entry can't be removed");
        }
        // One whose launch broke off may have a VM that no task owns.
        super::wiring::kill_leftover(&self.parts.layout, row.id).await;
        let (layout, disk) = (
            self.parts.layout.clone(),
            super::wiring::disk(&self.parts.layout, row),
        );
        let id = row.id;
        super::blocking(move || {
            files::remove_folder(&layout.instance_run(id))?;
            let folder = layout.instance(id);
            files::discard(&disk)?;
            files::discard(&driver::saved(&folder, SavedFile::Suspended))?;
            files::remove_folder(&folder)
        })
        .await?;
        let removed = self
            .parts
            .state
            .run(move |tx| state::instances::remove(tx, id));
        removed.await.map(drop)
    }
}
