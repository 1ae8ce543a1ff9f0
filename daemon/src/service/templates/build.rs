//! Making a template: a machine of its own, without an instance, a NIC or a user's data. One at a time,
//! and in the background at low priority.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use pileus_api::{Event, Operation, OperationKind, TemplateRequest};
use pileus_base::{Code, Error, Mac, Phase, Reporter, Result, Size, files};
use pileus_images::{Image, overlay};
use pileus_instances::driver::{Host, QemuDriver, Setup, Wiring};
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::guest::seed::{self, SeedSpec};
use pileus_instances::machine::BOOT_TIMEOUT;
use pileus_instances::qemu::{Accelerator, Confinement, Hardware};
use pileus_instances::template::TemplateKey;
use pileus_instances::warm;

use crate::http::listener::Peer;
use crate::service::admission::Start;
use crate::service::hardware::decide;
use crate::service::lifecycle::bound;
use crate::service::order;
use crate::service::settings::WarmMode;
use crate::service::templates::Stage;
use crate::service::{Service, wiring};
use crate::state;
use crate::state::demand::Shape;

/// A shape whose template could not be made is not tried again for this long.
const RETRY_AFTER: Duration = Duration::from_secs(6 * 3600);
/// Launches of a shape before its template is made by itself.
const WORTH_IT: u32 = 2;
/// A background build waits this long, so that it does not slow down what the user does right now.
const SETTLE: Duration = Duration::from_secs(5);

/// Whether somebody waits for a template, and how long its guest may take for each phase.
#[derive(Debug, Clone, Copy)]
enum Haste {
    Foreground(Duration),
    Background,
}

impl Service {
    /// Makes a template because a person wants it.
    pub async fn create_template(&self, request: TemplateRequest, peer: Peer) -> Result<Operation> {
        let mut wanted = order::check_shape(request.image, request.cpus, request.memory)?;
        wanted.open_as(&self.parts.mode, peer)?;
        self.parts.hypervisor.get().await?;
        let service = self.clone();
        let timeout = bound(request.timeout, BOOT_TIMEOUT);
        let target = wanted.source.clone();
        self.parts
            .operations
            .begin(OperationKind::CreateTemplate, target, |report| async move {
                report.phase(Phase::ResolvingImage);
                let image = service.obtain_image(&wanted.image, None, &report).await?;
                let machine = decide(&wanted, image.info().machine.as_ref(), None)?;
                if let Some(why) = machine.obstacle() {
                    return Err(Error::new(
                        Code::NoTemplate,
                        format!("A template can't be made: {why}"),
                    )
                    .advise("Instances of this image always boot."));
                }
                let shape = Shape {
                    image: image.digest().clone(),
                    cpus: machine.cpus,
                    memory: machine.memory,
                };
                service
                    .build(&shape, &image, Haste::Foreground(timeout), &report)
                    .await
            })
            .await
    }

    /// Counts a launch that a template could have served, and makes one when it is worth it.
    pub(in crate::service) async fn note_demand(&self, shape: Shape) {
        if self.parts.settings.get().warm != WarmMode::Auto {
            return;
        }
        let now = (self.parts.clock)();
        let counted = shape.clone();
        let demand = self
            .parts
            .state
            .run(move |tx| {
                state::demand::count(tx, &counted, now)?;
                state::demand::get(tx, &counted)
            })
            .await;
        match demand {
            Ok(demand) => {
                let failed_lately = demand
                    .failed_at
                    .is_some_and(|at| now.duration_since(at).unsigned_abs() < RETRY_AFTER);
                if demand.launches >= WORTH_IT && !failed_lately {
                    self.build_in_background(shape);
                }
            }
            Err(err) => tracing::warn!(%err, "a launch can't be counted"),
        }
    }

    /// Makes a template when there is time; nobody waits for it.
    pub(in crate::service) fn build_in_background(&self, shape: Shape) {
        let service = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(SETTLE).await;
            let Some(image) = service.parts.store.get(&shape.image) else {
                return;
            };
            let target = image.info().source.clone();
            let worker = service.clone();
            let begun = service
                .parts
                .operations
                .begin(OperationKind::CreateTemplate, target, |report| async move {
                    let made = worker
                        .build(&shape, &image, Haste::Background, &report)
                        .await;
                    let failure = made.as_ref().err().map(|err| err.message.clone());
                    let now = (worker.parts.clock)();
                    let recorded = worker
                        .parts
                        .state
                        .run(move |tx| state::demand::record(tx, &shape, now, failure.as_deref()))
                        .await;
                    made.and(recorded)
                })
                .await;
            if let Err(err) = begun {
                tracing::warn!(%err, "a template can't be made");
            }
        });
    }

    /// Makes the template of a shape unless there is one.
    async fn build(
        &self,
        shape: &Shape,
        image: &Arc<Image>,
        haste: Haste,
        report: &Reporter,
    ) -> Result<()> {
        report.phase(Phase::Queued);
        let _turn = report
            .or_cancelled(async { Ok(self.parts.building.lock().await) })
            .await?;
        let host = self.parts.hypervisor.get().await?;
        let key = self.template_key(&host, shape, image.info().virtual_size);
        report.result(key.id());
        if self.parts.templates.ready(&key).is_some() {
            return Ok(());
        }
        let _promise = self.admit(shape.memory, Start::Cold).await?;
        let in_memory = self.parts.settings.get().warm_in_memory;
        self.make_room(shape.memory, in_memory).await?;
        let now = (self.parts.clock)();
        let stage = self.parts.templates.stage(&key, in_memory, now)?;
        self.parts.hub.send(Event::Templates);
        let done = async {
            self.make(&key, image, &stage, haste, report).await?;
            let shelf = self.parts.templates.clone();
            let (stage, made) = (stage.clone(), key.clone());
            crate::service::blocking(move || shelf.publish(&stage, &made, now)).await
        }
        .await;
        if done.is_err() {
            self.parts.templates.abandon(&stage, &key);
        }
        self.parts.hub.send(Event::Templates);
        done
    }

    /// The budget and the file system must both have room for all of the guest's memory.
    async fn make_room(&self, memory: Size, in_memory: bool) -> Result<()> {
        // A guest that has just booted has touched about a third of a small memory.
        self.keep_within_budget(Size(memory.bytes() / 2)).await;
        let place = match in_memory {
            true => std::path::Path::new("/dev/shm"),
            false => &self.parts.layout.data,
        };
        let free = files::free_space(place)?;
        if free < memory.bytes() {
            return Err(Error::new(
                Code::NoSpace,
                format!(
                    "A template needs up to {memory} in {}, and {} are free",
                    place.display(),
                    Size(free)
                ),
            )
            .advise("Free some space, or delete templates with `pileus template prune --all`."));
        }
        Ok(())
    }

    async fn make(
        &self,
        key: &TemplateKey,
        image: &Arc<Image>,
        stage: &Stage,
        haste: Haste,
        report: &Reporter,
    ) -> Result<()> {
        report.phase(Phase::Configuring);
        let stage = &stage.folder;
        let id = uuid::Uuid::new_v4();
        let (disk, base, size) = (stage.disk(), image.disk(), key.disk);
        let folder = stage.path().to_owned();
        let write = move || {
            overlay::create(&disk, size, &base)?;
            // Keys of nobody: they go with the machine, and clones get their own.
            let keys = InstanceKeys::generate()?;
            keys.store(&folder)?;
            let seed = seed::build(&SeedSpec::template(&keys))?;
            files::write_atomic(&folder.join(pileus_instances::driver::SEED), &seed, 0o600)
        };
        crate::service::blocking(write).await?;
        let setup = Setup {
            name: "template".parse()?,
            id,
            cpus: key.cpus,
            memory: key.memory,
            machine_type: Some(key.machine_type.clone()),
            base: image.disk(),
            direct_boot: wiring::direct_boot(image),
            folder: stage.path().to_owned(),
            run: self.parts.layout.instance_run(id),
            mac: Mac([0; 6]),
            hardware: Hardware::default(),
            extra_nics: Vec::new(),
            address: std::net::Ipv4Addr::UNSPECIFIED,
            ends_with_daemon: true,
            machine_id: None,
        };
        let driver = QemuDriver::new(
            setup,
            Arc::new(Unplugged {
                service: self.clone(),
                disk: stage.disk(),
            }),
        );
        let (timeout, in_background) = match haste {
            Haste::Foreground(timeout) => (timeout, false),
            // Others come first, so it may take its time.
            Haste::Background => (BOOT_TIMEOUT * 4, true),
        };
        let (ram, state) = (stage.ram(), stage.state());
        warm::make(&driver, &ram, &state, timeout, in_background, report).await?;
        // What only the machine needed.
        for name in [
            pileus_instances::driver::SEED,
            "client_key",
            "host_key",
            "console.log",
            "qemu.log",
        ] {
            files::remove_file(&stage.path().join(name))?;
        }
        Ok(())
    }
}

/// A template's machine has no place in the network.
struct Unplugged {
    service: Service,
    disk: PathBuf,
}

type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

impl Wiring for Unplugged {
    fn host(&self) -> Later<'_, Result<Arc<Host>>> {
        Box::pin(self.service.parts().hypervisor.get())
    }

    fn plug(&self) -> Later<'_, Result<OwnedFd>> {
        Box::pin(async { Err(Error::internal("A template has no NIC")) })
    }

    fn unplug(&self) -> Later<'_, ()> {
        Box::pin(async {})
    }

    fn layers(&self) -> Vec<PathBuf> {
        vec![self.disk.clone()]
    }

    fn confinement(&self, accelerator: Accelerator) -> Option<Confinement> {
        wiring::confinement(
            &self.service.parts().mode,
            wiring::TEMPLATE_SLOT,
            accelerator,
        )
    }
}
