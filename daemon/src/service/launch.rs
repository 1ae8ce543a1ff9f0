//! Launch: where an image's way in and a command's way down meet.
//!
//! ```text
//! check the request ─▶ row `creating` (name, address, MAC, slot) ─▶ answer with an operation
//!   ─▶ image in the store ─▶ a template that fits? (warm.rs)
//!        ├─ yes ─▶ disk on its layer, seed, keys ─▶ restore, identity ─▶ task ─▶ row `running`
//!        └─ no, or that failed ─▶ disk, seed, keys in instances/ID ─▶ task ─▶ row `starting` ─▶ boot
//! ```
//!
//! Until the guest boots, whatever fails is undone: folder, row, name. After that the instance stays,
//! so that its console can be read; only a launch that the user cancels is undone at any time.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use pileus_api::{
    InstanceImage, InstanceState, LaunchRequest, Operation, OperationKind, Origin, PhaseTime,
};
use pileus_base::{Code, Phase, Reporter, Result, Size, files};
use pileus_images::{Image, overlay};
use pileus_instances::driver::{QemuDriver, RunningVm, SEED};
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::machine::{BOOT_TIMEOUT, Config, Machine, Snapshot};

use super::admission::{self, Promise, Start};
use super::given::seed_of;
use super::hardware::{Decided, decide};
use super::lifecycle::bound;
use super::order::{Order, check, default_disk};
use super::registry::{Instance, RowJournal};
use super::warm::Choice;
use super::wiring::{self, HostWiring};
use super::{Service, convert};
use crate::http::listener::Peer;
use crate::state;
use crate::state::demand::Shape;
use crate::state::instances::InstanceRow;

/// A launch under way.
pub(super) struct Work<'a> {
    pub order: &'a Order,
    pub image: Arc<Image>,
    pub report: &'a Reporter,
    /// The machine that the instance gets.
    pub machine: Decided,
    /// How long each phase took that is over.
    pub phases: Vec<PhaseTime>,
}

impl Work<'_> {
    pub(super) fn shape(&self) -> Shape {
        Shape {
            image: self.image.digest().clone(),
            cpus: self.machine.cpus,
            memory: self.machine.memory,
        }
    }
}

impl Service {
    /// Begins a launch. What is wrong with the request itself is told at once.
    pub async fn launch(&self, request: LaunchRequest, peer: Peer) -> Result<Operation> {
        let mut order = check(request)?;
        order.wanted.open_as(&self.parts.mode, peer)?;
        // A host that can't run anything says so before anything is fetched.
        self.parts.hypervisor.get().await?;
        let nics = self.extra_nics(&order.request.networks).await?;
        let (spec, lease) = self.plan(&order, nics)?;
        let reserved = self.reserve_for(order.name.clone(), spec, lease).await?;
        let name = reserved.name().to_string();
        let service = self.clone();
        self.parts
            .operations
            .begin(OperationKind::Launch, name, move |report| async move {
                let instance = reserved.begin();
                service.carry_out(&order, &instance, &report).await
            })
            .await
    }

    pub(super) async fn carry_out(
        &self,
        order: &Order,
        instance: &Arc<Instance>,
        report: &Reporter,
    ) -> Result<()> {
        let _launching = self.parts.pool.launching();
        let mut instance = instance.clone();
        let watch = self.end_with_lease(&instance, report);
        let prepared = async {
            let mut work = self.fetch(order, &instance, report).await?;
            let (restored, promise) = self.restore_or_write(&mut work, &mut instance).await?;
            // Before anyone can ask for anything else.
            let turn = instance.turn(report).await?;
            let machine = self.own(&instance, work.image)?;
            Ok((machine, restored, work.phases, (promise, turn)))
        };
        let (machine, restored, phases, _held) = match prepared.await {
            Ok(prepared) => prepared,
            Err(err) => {
                self.undo(&instance).await;
                return Err(err);
            }
        };
        drop(watch);
        let instance = &instance;
        let _watch = self.end_with_lease(instance, report);
        let timeout = bound(order.request.timeout, BOOT_TIMEOUT);
        let booted = match restored {
            Some(vm) => {
                machine
                    .start_with(vm, timeout, phases, report.clone())
                    .await
            }
            None => machine.start(timeout, phases, report.clone()).await,
        };
        let Err(error) = booted else {
            self.after_launch(order, instance).await;
            return Ok(());
        };
        // A guest that began to boot may be worth a look; what never started, or what the user does
        // not want any more, goes.
        let unwanted = error.code == Code::Cancelled && report.check().is_err();
        if unwanted || !instance.row().spec.booted {
            self.end(instance, &Reporter::silent()).await?;
            return Err(error);
        }
        let name = instance.row().name;
        Err(match error.advice {
            Some(_) => error,
            // Somebody stopped it, or is about to delete it.
            None if error.code == Code::Cancelled => error.advise(format!(
                "Unless it was deleted, `pileus start {name}` boots it again."
            )),
            None => error.advise(format!(
                "The instance is kept: `pileus logs {name}` shows its console, \
                 `pileus delete --purge {name}` ends it."
            )),
        })
    }

    /// Gets the image and notes what the instance is made of.
    async fn fetch<'a>(
        &self,
        order: &'a Order,
        instance: &Arc<Instance>,
        report: &'a Reporter,
    ) -> Result<Work<'a>> {
        let began = Instant::now();
        report.phase(Phase::ResolvingImage);
        let checksum = order.request.checksum.as_ref();
        let image = self
            .obtain_image(&order.wanted.image, checksum, report)
            .await?;
        report.check()?;
        let disk = match order.disk {
            Some(disk) => disk,
            None => default_disk(image.info().virtual_size),
        };
        let host = self.parts.hypervisor.get().await?;
        self.warn_once(host.warning.as_deref(), report).await?;
        let of_image = image.info().machine.as_ref();
        let mut machine = decide(&order.wanted, of_image, admission::all())?;
        let machine_type = self.settle(instance, &mut machine, &host, report).await?;
        let source = order.wanted.source.clone();
        instance
            .change(|row| {
                row.spec.disk = disk;
                row.spec.cpus = machine.cpus;
                row.spec.memory = machine.memory;
                row.spec.hardware = machine.hardware.clone();
                row.spec.machine_type = Some(machine_type);
                row.spec.image = Some(InstanceImage {
                    digest: image.digest().clone(),
                    source,
                    os: image.info().os.clone(),
                    release: image.info().release.clone(),
                });
            })
            .await?;
        Ok(Work {
            order,
            image,
            report,
            machine,
            phases: vec![PhaseTime::new(Phase::ResolvingImage, began.elapsed())],
        })
    }

    /// Starts the instance from a template if that is possible; otherwise makes what a boot needs.
    async fn restore_or_write(
        &self,
        work: &mut Work<'_>,
        instance: &mut Arc<Instance>,
    ) -> Result<(Option<RunningVm>, Promise)> {
        let memory = work.machine.memory;
        let reason = match self.choose(work).await? {
            Choice::Warm(template) => {
                let promise = self.admit(memory, Start::Warm).await?;
                if let Some(vm) = self.start_standby(work, instance, &template).await? {
                    return Ok((Some(vm), promise));
                }
                let before = work.phases.len();
                match self.start_warm(work, instance, &template).await {
                    Ok(vm) => return Ok((Some(vm), promise)),
                    Err(err) => {
                        work.report.check()?;
                        work.phases.truncate(before);
                        Some(self.after_failed_restore(work, &template, err)?)
                    }
                }
            }
            Choice::Cold(reason) => reason,
        };
        let promise = self.admit(memory, Start::Cold).await?;
        let began = Instant::now();
        work.report.phase(Phase::Configuring);
        let row = instance
            .change(|row| {
                row.spec.layers.clear();
                row.spec.origin = Origin::Cold { reason };
            })
            .await?;
        self.write_files(work.order, &row, &work.image, None)
            .await?;
        work.phases
            .push(PhaseTime::new(Phase::Configuring, began.elapsed()));
        Ok((None, promise))
    }

    /// Tells what is wrong with the accelerator: once, not at each launch.
    async fn warn_once(&self, warning: Option<&str>, report: &Reporter) -> Result<()> {
        let Some(warning) = warning.map(str::to_owned) else {
            return Ok(());
        };
        let text = warning.clone();
        let is_new = self
            .parts
            .state
            .run(move |tx| {
                let key = state::settings::ACCELERATOR_WARNING;
                let told = state::settings::get(tx, key)?;
                state::settings::set(tx, key, &text)?;
                Ok(told.as_ref() != Some(&text))
            })
            .await?;
        if is_new {
            report.warn(warning);
        }
        Ok(())
    }

    /// Disk, keys and seed, in the instance's own folder. The disk stands on the image, or on a
    /// template's `layer`, and then has that one's size.
    pub(super) async fn write_files(
        &self,
        order: &Order,
        row: &InstanceRow,
        image: &Image,
        layer: Option<(PathBuf, Size)>,
    ) -> Result<()> {
        let folder = self.parts.layout.instance(row.id);
        let disk = wiring::disk(&self.parts.layout, row);
        if row.spec.disk_in_memory {
            files::create_own_folder(&self.parts.layout.memory, 0o700)?;
        }
        let base = image.disk();
        let row = row.clone();
        let given = order.given.clone();
        let write = move || {
            files::create_folder(&folder, 0o700)?;
            // A launch that could not start warm has made one already.
            files::remove_file(&disk)?;
            match layer {
                Some((layer, size)) => overlay::create_on_layer(&disk, size, &layer)?,
                None => overlay::create(&disk, row.spec.disk, &base)?,
            }
            let keys = InstanceKeys::generate()?;
            keys.store(&folder)?;
            let seed = seed_of(&row, &keys, &given)?;
            files::write_atomic(&folder.join(SEED), &seed, 0o600)?;
            given.store(&folder)?;
            files::sync_folder(&folder)
        };
        super::blocking(write).await
    }

    /// Gives the instance its task.
    pub(super) fn own(
        &self,
        instance: &Arc<Instance>,
        image: Arc<Image>,
    ) -> Result<Machine<QemuDriver>> {
        let mut config = self.machine_config(instance, image)?;
        // In the database it stays `creating` until it starts: what is cut off before is undone.
        config.snapshot.state = InstanceState::Stopped;
        let machine = Machine::spawn(config);
        instance.set_machine(machine.clone());
        Ok(machine)
    }

    /// What the instance's task begins with, from its row.
    pub(crate) fn machine_config(
        &self,
        instance: &Arc<Instance>,
        image: Arc<Image>,
    ) -> Result<Config<QemuDriver>> {
        let row = instance.row();
        let setup = wiring::setup(&self.parts.layout, &row, &image);
        let wiring = HostWiring {
            service: self.clone(),
            instance: Arc::downgrade(instance),
            nic: wiring::nic(&row),
            slot: row.slot,
            image,
        };
        let mut snapshot = Snapshot::stopped();
        snapshot.state = convert::state(&row);
        snapshot.process = row.process;
        snapshot.started_at = row.started_at;
        snapshot.phases = row.history.phases;
        snapshot.last_error = row.history.last_error;
        snapshot.firmware_boot = row.spec.firmware_boot;
        snapshot.crashed = row.history.crashed;
        snapshot.suspended = row.spec.suspended;
        Ok(Config {
            driver: Arc::new(QemuDriver::new(setup, Arc::new(wiring))),
            journal: Arc::new(RowJournal(Arc::downgrade(instance))),
            snapshot,
            address: row.address,
            clock: self.parts.clock,
        })
    }

    /// Takes back a launch that came to nothing.
    pub(crate) async fn undo(&self, instance: &Arc<Instance>) {
        if let Err(err) = self.end(instance, &Reporter::silent()).await {
            tracing::error!(instance = %instance.row().name, %err, "a launch can't be undone");
        }
    }
}
