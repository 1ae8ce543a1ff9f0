//! What happens at start-up, in order. Each step finishes or undoes what an earlier daemon left:
//!
//! 1. operations that were under way are marked as interrupted;
//! 2. rows `creating` (no VM ever) and `purging` are removed with their files (and in step 4 rows
//!    `starting` for the first time, if no VM is found);
//! 3. folders that no row knows are removed;
//! 4. every other instance gets its task; a VM that still runs is adopted, a launch or start that
//!    was waiting for its guest goes on waiting; an instance whose VM is gone is `stopped`, and says
//!    why if it should be running;
//! 5. DHCP and DNS know exactly the instances that run.
//!
//! Steps 4 and 5 happen while the API already answers; `list` shows each instance as it was known.

use std::collections::HashSet;
use std::sync::Arc;

use pileus_api::{ErrorBody, InstanceState};
use pileus_base::{Code, Error, Result, files};
use pileus_instances::machine::Machine;

use crate::service::Service;
use crate::service::registry::Instance;
use crate::service::wiring;
use crate::state;
use crate::state::instances::{BrokenRow, InstanceRow, Stage};

/// Steps 1 to 3, before anything answers. Returns the instances that remain.
pub async fn clean_up(
    state: &state::State,
    layout: &pileus_base::Layout,
) -> Result<(Vec<InstanceRow>, Vec<BrokenRow>)> {
    let interrupted = state.run(state::operations::interrupt_all).await?;
    for operation in &interrupted {
        tracing::warn!(
            kind = operation.kind.as_str(),
            target = operation.target,
            "was interrupted by the daemon's end"
        );
    }
    let (rows, broken) = state.run(state::instances::all).await?;
    let mut kept = Vec::new();
    for row in rows {
        if is_half_made(&row) {
            tracing::warn!(instance = %row.name, "is removed: its launch or its deletion was interrupted");
            kill_leftover(layout, &row).await;
            files::remove_folder(&layout.instance_run(row.id))?;
            files::remove_folder(&layout.instance(row.id))?;
            state
                .run(move |tx| state::instances::remove(tx, row.id))
                .await?;
        } else {
            kept.push(row);
        }
    }
    for row in &broken {
        tracing::error!(
            id = row.id,
            name = row.name,
            why = row.why,
            "a row can't be read"
        );
    }
    let known: HashSet<String> = kept
        .iter()
        .map(|row| row.id.to_string())
        .chain(broken.iter().map(|row| row.id.clone()))
        .collect();
    sweep_folders(layout, &known)?;
    Ok((kept, broken))
}

/// Nothing in it is of use to anyone: its disk was never ready, or it was to be deleted.
fn is_half_made(row: &InstanceRow) -> bool {
    matches!(
        row.stage,
        Stage::Purging | Stage::Is(InstanceState::Creating)
    )
}

/// A deletion may have been interrupted before its VM was ended.
async fn kill_leftover(layout: &pileus_base::Layout, row: &InstanceRow) {
    use pileus_instances::qemu::{Paths, process};
    let paths = Paths::of(&layout.instance_run(row.id), &layout.instance(row.id));
    if let Some(found) = process::find(&paths, row.id) {
        if let Err(err) = process::kill(found) {
            tracing::error!(instance = %row.name, %err, "its VM can't be ended");
        }
        let _ = process::wait_exit(found).await;
    }
}

fn sweep_folders(layout: &pileus_base::Layout, known: &HashSet<String>) -> Result<()> {
    use pileus_base::ResultExt;
    let folder = layout.instances();
    let what = format!("Looking through {}", folder.display());
    for entry in std::fs::read_dir(&folder).io(&what)? {
        let entry = entry.io(&what)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Only what is named like ours; whatever else a person put here stays.
        if uuid::Uuid::parse_str(&name).is_ok() && !known.contains(&name) {
            tracing::warn!(name, "a folder that belongs to no instance is removed");
            files::remove_folder(&entry.path())?;
        }
    }
    Ok(())
}

/// Steps 4 and 5.
pub async fn resume(service: &Service, instances: Vec<Arc<Instance>>) {
    let mut plugged = Vec::new();
    for instance in instances {
        let name = instance.row().name;
        match resume_one(service, &instance).await {
            Ok(true) => plugged.push(wiring::nic(&instance.row())),
            Ok(false) => {}
            Err(err) => {
                tracing::error!(instance = %name, %err, "can't be taken up again");
                let trouble = ErrorBody::from(err);
                let told = trouble.clone();
                let _ = instance
                    .change(|row| {
                        row.stage = Stage::Is(InstanceState::Stopped);
                        row.history.last_error = Some(told);
                    })
                    .await;
                instance.set_trouble(trouble);
            }
        }
    }
    if let Err(err) = service.parts().network.reconcile(&plugged) {
        tracing::error!(%err, "the network's entries can't be set right");
    }
}

/// Gives one instance its task; returns whether its VM runs.
async fn resume_one(service: &Service, instance: &Arc<Instance>) -> Result<bool> {
    let row = instance.row();
    let Some(image) = &row.spec.image else {
        return Err(wiring::no_image(&row));
    };
    let digest = image.digest.clone();
    let image = service.parts().store.get(&digest).ok_or_else(|| {
        Error::new(
            Code::ImageNotFound,
            format!(
                "The image {} of '{}' is gone from the store",
                digest.short(),
                row.name
            ),
        )
        .advise(
            "Its own data can't be read without it. Get the image again, and restart the daemon.",
        )
    })?;
    let mut config = service.machine_config(instance, image)?;
    if let Some(vm) = config.driver.adopt().await? {
        tracing::info!(instance = %row.name, "its VM was found running");
        instance.set_machine(Machine::adopt(config, vm));
        return Ok(true);
    }
    if !row.spec.booted {
        tracing::warn!(instance = %row.name, "is removed: its launch was interrupted before its VM ran");
        instance.set_machine(Machine::spawn(config));
        service.undo(instance).await;
        return Ok(false);
    }
    let snapshot = &mut config.snapshot;
    if snapshot.state != InstanceState::Stopped {
        if snapshot.state != InstanceState::Stopping {
            snapshot.last_error = Some(
                Error::new(
                    Code::GuestStopped,
                    format!("The VM of '{}' ended while no daemon ran", row.name),
                )
                .into(),
            );
        }
        snapshot.state = InstanceState::Stopped;
        snapshot.process = None;
        snapshot.started_at = None;
        let last_error = snapshot.last_error.clone();
        instance
            .change(|row| {
                row.stage = Stage::Is(InstanceState::Stopped);
                row.process = None;
                row.started_at = None;
                row.history.last_error = last_error;
            })
            .await?;
    }
    instance.set_machine(Machine::spawn(config));
    Ok(false)
}
