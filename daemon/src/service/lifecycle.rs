//! Start, stop, restart, delete, recover, purge.

use std::sync::Arc;
use std::time::Duration;

use pileus_api::{
    Event, Instance as ApiInstance, InstanceState, Operation, OperationKind, StartRequest,
    StopRequest,
};
use pileus_base::{Phase, Reporter, Result, files};
use pileus_instances::machine::{BOOT_TIMEOUT, SHUTDOWN_TIMEOUT};

use super::admission::Start;
use super::registry::Instance;
use super::{Service, convert};
use crate::state;
use crate::state::instances::Stage;

pub(super) fn bound(seconds: Option<u64>, default: Duration) -> Duration {
    // A day is as good as for ever, and can't overflow anything.
    seconds.map_or(default, |s| Duration::from_secs(s.min(86_400)))
}

impl Service {
    pub async fn start(&self, name: &str, request: &StartRequest) -> Result<Operation> {
        let instance = self.parts.registry.get_usable(name)?;
        let machine = instance.machine_soon().await?.clone();
        let timeout = bound(request.timeout, BOOT_TIMEOUT);
        let (service, memory) = (self.clone(), instance.row().spec.memory);
        self.parts
            .operations
            .begin(OperationKind::Start, name, |report| async move {
                let _promise = match machine.snapshot().state {
                    InstanceState::Stopped => Some(service.admit(memory, Start::Cold).await?),
                    _ => None,
                };
                machine.start(timeout, Vec::new(), report).await
            })
            .await
    }

    pub async fn stop(&self, name: &str, request: &StopRequest) -> Result<Operation> {
        let instance = self.parts.registry.get_usable(name)?;
        let machine = instance.machine_soon().await?.clone();
        let timeout = bound(request.timeout, SHUTDOWN_TIMEOUT);
        let force = request.force;
        self.parts
            .operations
            .begin(OperationKind::Stop, name, |report| async move {
                machine.stop(force, timeout, report).await
            })
            .await
    }

    pub async fn restart(&self, name: &str, request: &StartRequest) -> Result<Operation> {
        let instance = self.parts.registry.get_usable(name)?;
        let machine = instance.machine_soon().await?.clone();
        let timeout = bound(request.timeout, BOOT_TIMEOUT);
        self.parts
            .operations
            .begin(OperationKind::Restart, name, |report| async move {
                machine.restart(timeout, report).await
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
                    return service.end(&instance, &report).await;
                }
                if instance.row().deleted {
                    return Ok(());
                }
                instance
                    .machine()?
                    .stop(false, SHUTDOWN_TIMEOUT, report)
                    .await?;
                instance.change(|row| row.deleted = true).await.map(drop)
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
                self.end(&instance, &Reporter::silent()).await?;
                names.push(row.name.to_string());
            }
        }
        Ok(names)
    }

    /// Deletes an instance for good. The intent is committed first: a start after a crash goes on.
    pub(super) async fn end(&self, instance: &Arc<Instance>, report: &Reporter) -> Result<()> {
        report.phase(Phase::Deleting);
        let row = instance.change(|row| row.stage = Stage::Purging).await?;
        if let Ok(machine) = instance.machine()
            && let Err(err) = machine
                .stop(true, SHUTDOWN_TIMEOUT, Reporter::silent())
                .await
        {
            // Its files must not go while something may write to them.
            instance
                .change(|row| row.stage = Stage::Is(InstanceState::Unknown))
                .await?;
            return Err(err);
        }
        if let Err(err) = self.parts.network.detach(&super::wiring::nic(&row)) {
            tracing::warn!(instance = %row.name, %err, "its network entry can't be removed");
        }
        // One whose launch broke off may have a VM that no task owns.
        super::wiring::kill_leftover(&self.parts.layout, row.id).await;
        files::remove_folder(&self.parts.layout.instance_run(row.id))?;
        files::remove_file(&super::wiring::disk(&self.parts.layout, &row))?;
        files::remove_folder(&self.parts.layout.instance(row.id))?;
        self.parts
            .state
            .run(move |tx| state::instances::remove(tx, row.id))
            .await?;
        self.parts.registry.remove(row.id);
        if let Err(err) = self.drop_unused(&row.spec.layers) {
            tracing::warn!(%err, "a layer that nobody needs can't be removed");
        }
        self.parts.hub.send(Event::InstancePurged {
            id: row.id,
            name: row.name,
        });
        Ok(())
    }
}
