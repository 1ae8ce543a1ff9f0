//! Warm launch: which template fits a launch, how an instance starts from it, and what happens if that
//! fails (the guest boots, and the user reads why in one line).
//!
//! Next step on the way of the data: `instances/src/warm.rs`.

use std::sync::Arc;
use std::time::Instant;

use pileus_api::{Origin, PhaseTime, Warm};
use pileus_base::{Code, Error, Phase, Reporter, Result};
use pileus_images::Image;
use pileus_instances::driver::RunningVm;
use pileus_instances::guest::clone::{CloneMode, CloneNic, IdentitySpec};
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::warm::{self, Saved};

use super::Service;
use super::launch::{Order, phase_time};
use super::registry::Instance;
use super::settings::WarmMode;
use super::templates::Template;
use crate::state::demand::Shape;
use crate::state::instances::InstanceRow;

/// How a launch is to start.
pub(super) enum Choice {
    Warm(Arc<Template>),
    /// With the reason, if somebody may have expected a warm launch.
    Cold(Option<String>),
}

impl Service {
    /// Looks for a template that fits.
    pub(super) async fn choose(
        &self,
        order: &Order,
        image: &Image,
        report: &Reporter,
    ) -> Result<Choice> {
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
        let shape = order.shape(image);
        let key = self.template_key(&host, &shape, image.info().virtual_size);
        let Some(template) = self.parts.templates.ready(&key) else {
            let reason = "there is no template for this image and shape yet";
            return match wish {
                Warm::Require => Err(no_template(reason)
                    .advise("Make one with `pileus template create IMAGE -c CPUS -m MEMORY`.")),
                _ => Ok(Choice::Cold(Some(reason.to_owned()))),
            };
        };
        let obstacle = match &order.user_data {
            Some(_) => Some("the user data needs a boot".to_owned()),
            None => None,
        };
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

    /// Starts the instance from the template. On error nothing runs; files may be left.
    pub(super) async fn start_warm(
        &self,
        order: &Order,
        instance: &Arc<Instance>,
        image: &Arc<Image>,
        template: &Arc<Template>,
        phases: &mut Vec<PhaseTime>,
        report: &Reporter,
    ) -> Result<RunningVm> {
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
        phases.push(phase_time(Phase::Configuring, began));
        let grow_to = (row.spec.disk > template.key.disk).then_some(row.spec.disk);
        let keys = InstanceKeys::load(&self.parts.layout.instance(row.id))?;
        let mut identity = self.identity_of(&row, keys, CloneMode::Warm);
        identity.timezone.clone_from(&order.request.timezone);
        identity.grow = grow_to.is_some();
        identity.cloud_init = order.user_data.is_some();
        let saved = Saved {
            ram: template.folder.ram(),
            state: ready.state,
            grow_to,
            identity,
        };
        let driver = self.machine_config(instance, image.clone())?.driver;
        let (vm, more) = warm::restore(&driver, saved, report).await?;
        phases.extend(more);
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
            mode,
        }
    }

    /// A restore came to nothing. Tells the reason for the cold launch that follows, unless the user
    /// wants no other; a template that is damaged is not tried again.
    pub(super) fn after_failed_restore(
        &self,
        order: &Order,
        template: &Arc<Template>,
        err: Error,
        report: &Reporter,
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
        if order.request.warm == Some(Warm::Require) {
            return Err(err);
        }
        let reason = format!(
            "starting from template {} failed: {}",
            template.id, err.message
        );
        report.warn(format!("Booting instead of a warm start: {reason}"));
        Ok(reason)
    }

    /// A launch that a template could have served is counted.
    pub(super) async fn after_launch(&self, order: &Order, instance: &Arc<Instance>) {
        let row = instance.row();
        let Some(image) = &row.spec.image else { return };
        let cold = matches!(row.spec.origin, Origin::Cold { .. });
        if cold && order.request.warm != Some(Warm::Never) {
            self.note_demand(Shape {
                image: image.digest.clone(),
                cpus: row.spec.cpus,
                memory: row.spec.memory,
            })
            .await;
        }
    }
}

fn no_template(why: &str) -> Error {
    Error::new(
        Code::NoTemplate,
        format!("The instance can't start warm: {why}"),
    )
}
