//! What happens at start-up, in order. Each step finishes or undoes what an earlier daemon left:
//!
//! 1. operations that were under way are marked as interrupted;
//! 2. rows `creating` (no VM ever), `purging` and those with a lease are removed with their files (and in
//!    step 4 rows `starting` for the first time, if no VM is found);
//! 3. what a fork, a snapshot or a restore left half-way is put right; folders, layers and templates that nobody knows or that
//!    are half made are removed;
//! 4. every other instance gets its task; a VM that still runs is adopted, a launch or start that
//!    was waiting for its guest goes on waiting; one whose memory is saved is `suspended`, one whose VM is
//!    gone `stopped`, and says why if it should be running;
//! 5. DHCP and DNS know exactly the instances that run.
//!
//! After that `service/supervise.rs` starts what is to run again.
//!
//! Steps 4 and 5 happen while the API already answers; `list` shows each instance as it was known.

use std::collections::HashSet;
use std::sync::Arc;

use pileus_api::{ErrorBody, InstanceState};
use pileus_base::{Code, Error, Result, ResultExt, files};
use pileus_instances::driver::{self, QemuDriver};
use pileus_instances::machine::{Config, Machine, SavedFile};

use crate::service::Service;
use crate::service::registry::Instance;
use crate::service::templates::Shelf;
use crate::service::{layers, wiring};
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
            wiring::kill_leftover(layout, row.id).await;
            files::remove_folder(&layout.instance_run(row.id))?;
            files::remove_file(&wiring::disk(layout, &row))?;
            files::remove_folder(&layout.instance(row.id))?;
            state
                .run(move |tx| state::instances::remove(tx, row.id))
                .await?;
        } else {
            kept.push(settled(state, layout, row).await?);
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
    sweep_folders(layout, &known).await?;
    sweep_run(layout, &known)?;
    Ok((kept, broken))
}

/// Nothing in it is of use to anyone: its disk was never ready, or it was to be deleted, or it was a
/// throw-away one.
fn is_half_made(row: &InstanceRow) -> bool {
    // A throw-away instance's VM has ended with the daemon that it belonged to.
    let leased = row.lease.is_some();
    leased
        || matches!(
            row.stage,
            Stage::Purging | Stage::Is(InstanceState::Creating)
        )
}

/// Sockets of machines that are gone: of a template that was being made, of a clone that stood by.
fn sweep_run(layout: &pileus_base::Layout, known: &HashSet<String>) -> Result<()> {
    let kept: HashSet<_> = known
        .iter()
        .filter_map(|id| Some(layout.instance_run(uuid::Uuid::parse_str(id).ok()?)))
        .collect();
    let folder = layout.run.join("i");
    for entry in std::fs::read_dir(&folder).into_iter().flatten() {
        let path = entry.io("Looking through the run folder")?.path();
        if !kept.contains(&path) {
            files::remove_folder(&path)?;
        }
    }
    Ok(())
}

/// A fork, a snapshot or a restore of it may have been cut off.
async fn settled(
    state: &state::State,
    layout: &pileus_base::Layout,
    mut row: InstanceRow,
) -> Result<InstanceRow> {
    sweep_memory(layout, &row)?;
    if layers::settle(layout, &mut row)? {
        let record = row.clone();
        state
            .run(move |tx| state::instances::update(tx, &record))
            .await?;
    }
    Ok(row)
}

/// Layers and disks in memory that belong to nobody.
pub fn sweep_layers(
    layout: &pileus_base::Layout,
    rows: &[InstanceRow],
    broken: &[BrokenRow],
    templates: &Shelf,
) -> Result<()> {
    // What a row that can't be read stands on is not known.
    if !broken.is_empty() {
        return Ok(());
    }
    let mut needed: HashSet<_> = rows
        .iter()
        .flat_map(|row| row.all_layers().collect::<Vec<_>>())
        .collect();
    needed.extend(templates.all().iter().map(|template| template.layer));
    layers::sweep(layout, &|layer| needed.contains(&layer))?;
    let disks: HashSet<_> = rows.iter().map(|row| wiring::disk(layout, row)).collect();
    let memories: HashSet<_> = templates.all().iter().map(|t| t.folder.ram()).collect();
    for entry in std::fs::read_dir(&layout.memory).into_iter().flatten() {
        let path = entry.io("Looking through the folder in memory")?.path();
        if !disks.contains(&path) && !memories.contains(&path) {
            tracing::warn!(path = %path.display(), "what nobody needs in memory is removed");
            files::remove_file(&path)?;
        }
    }
    Ok(())
}

async fn sweep_folders(layout: &pileus_base::Layout, known: &HashSet<String>) -> Result<()> {
    let folder = layout.instances();
    let what = format!("Looking through {}", folder.display());
    for entry in std::fs::read_dir(&folder).io(&what)? {
        let entry = entry.io(&what)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Only what is named like ours; whatever else a person put here stays.
        let id = uuid::Uuid::parse_str(&name).ok();
        if let Some(id) = id.filter(|_| !known.contains(&name)) {
            tracing::warn!(name, "a folder that belongs to no instance is removed");
            // A clone that stood by has a machine, and no row.
            wiring::kill_leftover(layout, id).await;
            files::remove_folder(&layout.instance_run(id))?;
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
    if is_saved(&row) {
        return rest_saved(service, instance, config).await;
    }
    if let Some(vm) = config.driver.adopt().await? {
        tracing::info!(instance = %row.name, "its VM was found running");
        // A growth that was under way when the daemon before ended may have been done since.
        match vm.disk_size().await {
            Ok(size) if size == row.spec.disk => {}
            Ok(size) => drop(instance.change(|row| row.spec.disk = size).await?),
            Err(err) => {
                tracing::warn!(instance = %row.name, %err, "it does not tell its disk's size");
            }
        }
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
        let cut_off = service.host_was_restarted().await?;
        let wanted = snapshot.state != InstanceState::Stopping;
        if wanted {
            let what = match cut_off {
                true => format!("'{}' ended with the host, which was restarted", row.name),
                false => format!("The VM of '{}' ended while no daemon ran", row.name),
            };
            snapshot.last_error = Some(Error::new(Code::GuestStopped, what).into());
        }
        snapshot.crashed = wanted && !cut_off;
        snapshot.state = InstanceState::Stopped;
        snapshot.process = None;
        snapshot.started_at = None;
        let known = snapshot.clone();
        instance
            .change(|row| {
                row.stage = Stage::Is(InstanceState::Stopped);
                row.process = None;
                row.started_at = None;
                row.history.last_error = known.last_error;
                row.history.crashed = known.crashed;
                row.history.cut_off = wanted && cut_off;
            })
            .await?;
    }
    instance.set_machine(Machine::spawn(config));
    Ok(false)
}

/// What was written of it is whole: it was being suspended, or began to go on.
fn is_saved(row: &InstanceRow) -> bool {
    row.spec.suspended.is_some() && row.stage != Stage::Is(InstanceState::Running)
}

/// A VM that is there has not run since its memory was written: it is not needed.
async fn rest_saved(
    service: &Service,
    instance: &Arc<Instance>,
    mut config: Config<QemuDriver>,
) -> Result<bool> {
    let row = instance.row();
    let layout = &service.parts().layout;
    wiring::kill_leftover(layout, row.id).await;
    files::remove_folder(&layout.instance_run(row.id))?;
    config.snapshot.state = InstanceState::Suspended;
    config.snapshot.process = None;
    config.snapshot.started_at = None;
    instance
        .change(|row| {
            row.stage = Stage::Is(InstanceState::Suspended);
            row.process = None;
            row.started_at = None;
        })
        .await?;
    instance.set_machine(Machine::spawn(config));
    Ok(false)
}

/// Memory that no row names: of a suspend or a snapshot that was cut off.
fn sweep_memory(layout: &pileus_base::Layout, row: &InstanceRow) -> Result<()> {
    let folder = layout.instance(row.id);
    let suspending = row.stage == Stage::Is(InstanceState::Suspending);
    // A VM that is being suspended may write to it still: then it is removed by the one who takes it up.
    if row.spec.suspended.is_none() && !suspending {
        files::remove_file(&driver::saved(&folder, SavedFile::Suspended))?;
    }
    let kept = row.snapshots.iter().filter(|s| s.saved.is_some());
    let kept: HashSet<_> = kept
        .map(|s| driver::saved(&folder, SavedFile::Snapshot(s.id)))
        .collect();
    for entry in std::fs::read_dir(folder.join(driver::SNAPSHOTS))
        .into_iter()
        .flatten()
    {
        let path = entry.io("Looking through an instance's snapshots")?.path();
        if !kept.contains(&path) {
            tracing::warn!(path = %path.display(), "the memory of no snapshot is removed");
            files::remove_file(&path)?;
        }
    }
    Ok(())
}
