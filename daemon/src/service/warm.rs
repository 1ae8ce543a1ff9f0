//! Warm launch: which template fits a launch, how an instance starts from it, and what happens if that
//! fails (the guest boots, and the user reads why in one line).
//!
//! Next step on the way of the data: `instances/src/warm.rs`.

use std::sync::Arc;
use std::time::Instant;

use pileus_api::{Origin, PhaseTime, Warm};
use pileus_base::{Code, Error, Phase, Result};
use pileus_instances::driver::{RunningVm, SEED};
use pileus_instances::guest::clone::{CloneMode, CloneNic, IdentitySpec, NameSpec};
use pileus_instances::guest::cloud_init;
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::guest::seed;
use pileus_instances::machine::{Driver, Vm};
use pileus_instances::qemu::hardware;
use pileus_instances::warm::{self, Saved};

use super::given::seed_of;
use super::launch::Work;
use super::order::Order;
use super::pool::{Kind, Standby};
use super::registry::Instance;
use super::settings::WarmMode;
use super::templates::Template;
use super::{Service, wiring};
use crate::state;
use crate::state::demand::Shape;
use crate::state::instances::{InstanceRow, Spec};

/// A seed has 1 MiB, and the agent needs some of it.
const LARGE: usize = 512 << 10;

/// How a launch is to start.
pub(super) enum Choice {
    Warm(Arc<Template>),
    /// With the reason, if somebody may have expected a warm launch.
    Cold(Option<String>),
}

impl Service {
    /// Looks for a template that fits.
    pub(super) async fn choose(&self, work: &Work<'_>) -> Result<Choice> {
        let (order, image, report) = (work.order, &work.image, work.report);
        let wish = order.request.warm.unwrap_or_default();
        if wish == Warm::Never {
            return Ok(Choice::Cold(None));
        }
        if self.parts.settings.get().warm == WarmMode::Off {
            return match wish {
                Warm::Require => Err(no_template("local.warm is off")
                    .advise("`pileus set local.warm=auto` turns warm launches on.")),
                _ => Ok(Choice::Cold(None)),
            };
        }
        let host = self.parts.hypervisor.get().await?;
        if let Some(reason) = work.machine.obstacle() {
            return match wish {
                Warm::Require => {
                    Err(no_template(&reason).advise("Launch it without --warm: then it boots."))
                }
                _ => Ok(Choice::Cold(Some(reason))),
            };
        }
        let shape = work.shape();
        let key = self.template_key(&host, &shape, image.info().virtual_size);
        let Some(template) = self.parts.templates.ready(&key) else {
            let reason = "there is no template for this image and shape yet";
            return match wish {
                Warm::Require => Err(no_template(reason)
                    .advise("Make one with `pileus template create IMAGE -c CPUS -m MEMORY`.")),
                _ => Ok(Choice::Cold(Some(reason.to_owned()))),
            };
        };
        let obstacle = order
            .given
            .user_data
            .as_ref()
            .and_then(|data| cloud_init::warm_obstacle(data))
            .map(|why| format!("the user data needs a boot ({why})"));
        let obstacle = obstacle.or_else(|| {
            let large = order
                .given
                .user_data
                .as_ref()
                .is_some_and(|data| data.len() > LARGE);
            large.then(|| "the user data does not fit on a clone's seed disk".to_owned())
        });
        let obstacle = obstacle.or_else(|| {
            let own = order.given.network_config.is_some();
            own.then(|| "a network configuration needs a boot".to_owned())
        });
        let obstacle = obstacle.or_else(|| {
            let more = !order.request.networks.is_empty();
            more.then(|| "further networks need a boot".to_owned())
        });
        let small = order.disk.is_some_and(|disk| disk < template.key.disk);
        let obstacle = obstacle.or_else(|| {
            small.then(|| format!("the template's disk is larger ({})", template.key.disk))
        });
        match (obstacle, wish) {
            (None, _) => Ok(Choice::Warm(template)),
            (Some(reason), Warm::Require) => {
                Err(no_template(&reason).advise("Launch it without --warm: then it boots."))
            }
            (Some(reason), _) => {
                report.warn(format!("Booting instead of a warm start: {reason}."));
                Ok(Choice::Cold(Some(reason)))
            }
        }
    }

    /// Gives a clone that stands by to the instance, if there is one. The instance gets the clone's id,
    /// address and card, so it is another one afterwards. If the clone is of no use the instance is
    /// as before, and nothing runs.
    pub(super) async fn start_standby(
        &self,
        work: &mut Work<'_>,
        instance: &mut Arc<Instance>,
        template: &Arc<Template>,
    ) -> Result<Option<RunningVm>> {
        let (order, report) = (work.order, work.report);
        let row = instance.row();
        if row.spec.disk_in_memory {
            return Ok(None);
        }
        let kind = Kind {
            template: template.id.clone(),
            tied: row.lease.is_some(),
        };
        let Some(standby) = self.parts.pool.take(&kind) else {
            return Ok(None);
        };
        let began = Instant::now();
        report.phase(Phase::Identifying);
        if let Err(err) = self.replace_row(instance, &standby).await {
            self.dispose(standby).await;
            return Err(err);
        }
        let named = report.or_cancelled(self.name_standby(order, instance, &standby));
        match named.await {
            Ok(()) => {
                work.phases
                    .push(PhaseTime::new(Phase::Identifying, began.elapsed()));
                template.touch();
                Ok(Some(standby.vm.watched_from_now()))
            }
            Err(err) => {
                tracing::warn!(%err, "a clone that stood by is of no use");
                standby.vm.kill().await;
                standby.driver.release().await;
                report.check()?;
                Ok(None)
            }
        }
    }

    /// Makes the standby's id, slot, card and address the instance's.
    async fn replace_row(&self, instance: &mut Arc<Instance>, standby: &Standby) -> Result<()> {
        let (before, given) = (instance.row(), standby.instance.row());
        let mut row = before.clone();
        row.id = given.id;
        row.mac = given.mac;
        row.address = given.address;
        row.slot = given.slot;
        row.spec.layers = given.spec.layers;
        row.spec.origin = given.spec.origin;
        let record = row.clone();
        self.parts
            .state
            .run(move |tx| {
                state::instances::remove(tx, before.id)?;
                state::instances::insert(tx, &record)
            })
            .await?;
        self.parts.pool.unreserve(&row);
        self.parts.registry.remove(instance.id);
        *instance = Instance::new(row, self.parts.state.clone(), self.parts.hub.clone());
        self.parts.registry.add(instance.clone());
        Ok(())
    }

    async fn name_standby(
        &self,
        order: &Order,
        instance: &Arc<Instance>,
        standby: &Standby,
    ) -> Result<()> {
        let row = instance.row();
        let folder = self.parts.layout.instance(row.id);
        let (written, given) = (row.clone(), order.given.clone());
        let write = move || {
            let keys = InstanceKeys::load(&folder)?;
            let seed = seed_of(&written, &keys, &given)?;
            // In place: QEMU has this very file open.
            seed::overwrite(&folder.join(SEED), &seed)?;
            given.store(&folder)
        };
        super::blocking(write).await?;
        self.parts.network.register(&wiring::nic(&row))?;
        let size = standby.template.key.disk;
        let grow_to = (row.spec.disk > size).then_some(row.spec.disk);
        let spec = NameSpec {
            hostname: row.name.to_string(),
            // These are filled in at the last moment (`instances/src/warm.rs`).
            entropy: Vec::new(),
            time: 0.0,
            grow: false,
            timezone: order.request.timezone.clone(),
            cloud_init: order.given.user_data.is_some(),
        };
        warm::name(&standby.vm, spec, grow_to).await
    }

    /// Starts the instance from the template. On error nothing runs; files may be left.
    pub(super) async fn start_warm(
        &self,
        work: &mut Work<'_>,
        instance: &Arc<Instance>,
        template: &Arc<Template>,
    ) -> Result<RunningVm> {
        let (order, image, report) = (work.order, &work.image, work.report);
        let began = Instant::now();
        report.phase(Phase::Configuring);
        let checked = template.clone();
        let ready = super::blocking(move || checked.folder.open_checked(&checked.key)).await?;
        let row = instance
            .change(|row| {
                row.spec.layers = vec![template.layer];
                row.spec.origin = Origin::Warm {
                    template: template.id.clone(),
                };
            })
            .await?;
        let layer = Some((template.disk(), template.key.disk));
        self.write_files(order, &row, image, layer).await?;
        work.phases
            .push(PhaseTime::new(Phase::Configuring, began.elapsed()));
        let grow_to = (row.spec.disk > template.key.disk).then_some(row.spec.disk);
        let keys = InstanceKeys::load(&self.parts.layout.instance(row.id))?;
        let mut identity = self.identity_of(&row, keys, CloneMode::Warm);
        identity.timezone.clone_from(&order.request.timezone);
        identity.grow = grow_to.is_some();
        identity.cloud_init = order.given.user_data.is_some();
        let saved = Saved {
            ram: template.folder.ram(),
            state: ready.state,
            grow_to,
            identity,
        };
        let driver = self.machine_config(instance, image.clone())?.driver;
        let (vm, more) = warm::restore(&driver, saved, report).await?;
        work.phases.extend(more);
        template.touch();
        Ok(vm)
    }

    /// All that a restored guest is to become.
    pub(super) fn identity_of(
        &self,
        row: &InstanceRow,
        keys: InstanceKeys,
        mode: CloneMode,
    ) -> IdentitySpec {
        let network = &self.parts.network;
        IdentitySpec {
            instance: row.id.to_string(),
            hostname: row.name.to_string(),
            machine_id: row.id.simple().to_string(),
            // Both are filled in at the last moment (`instances/src/warm.rs`).
            entropy: Vec::new(),
            time: 0.0,
            keys,
            authorized: Vec::new(),
            timezone: None,
            nic: Some(CloneNic {
                mac: row.mac,
                address: row.address,
                prefix: network.subnet().prefix(),
                gateway: network.gateway(),
                dns: network.gateway(),
            }),
            grow: false,
            cloud_init: false,
            standby: false,
            mode,
        }
    }

    /// A restore came to nothing. Tells the reason for the cold launch that follows, unless the user
    /// wants no other; a template that is damaged is not tried again.
    pub(super) fn after_failed_restore(
        &self,
        work: &Work<'_>,
        template: &Arc<Template>,
        err: Error,
    ) -> Result<String> {
        tracing::warn!(
            template = template.id, code = %err.code, %err, details = ?err.details,
            "a warm launch failed"
        );
        if err.code == Code::NoTemplate {
            let (service, id, shape) = (self.clone(), template.id.clone(), template.shape());
            tokio::spawn(async move {
                // The launch that found it lets go of it soon.
                for _ in 0..60 {
                    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
                    if service.discard(&id).await.is_ok() {
                        break;
                    }
                }
                if service.parts.settings.get().warm == WarmMode::Auto {
                    service.build_in_background(shape);
                }
            });
        }
        if work.order.request.warm == Some(Warm::Require) {
            return Err(err);
        }
        let reason = format!(
            "starting from template {} failed: {}",
            template.id, err.message
        );
        work.report
            .warn(format!("Booting instead of a warm start: {reason}"));
        Ok(reason)
    }

    /// A launch that a template could have served is counted.
    pub(super) async fn after_launch(&self, order: &Order, instance: &Arc<Instance>) {
        let row = instance.row();
        let Some(image) = &row.spec.image else { return };
        let cold = matches!(row.spec.origin, Origin::Cold { .. });
        // A template has the usual machine.
        let usual = row.spec.hardware.is_usual() && !is_old(&row.spec);
        if cold && usual && order.request.warm != Some(Warm::Never) {
            self.note_demand(Shape {
                image: image.digest.clone(),
                cpus: row.spec.cpus,
                memory: row.spec.memory,
            })
            .await;
        }
    }
}

fn is_old(spec: &Spec) -> bool {
    spec.machine_type.as_deref().is_some_and(hardware::is_old)
}

fn no_template(why: &str) -> Error {
    Error::new(
        Code::NoTemplate,
        format!("The instance can't start warm: {why}"),
    )
}
