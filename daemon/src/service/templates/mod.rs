//! Templates: saved machines that launches start from. This file has what is asked of them; `shelf.rs`
//! keeps their folders, `build.rs` makes them. How a launch uses one is in `service/warm.rs`.
//!
//! ```text
//!             made by `template create`, or after the second launch of a shape
//!                │
//!                ▼            its key changed, it is damaged,
//!   building ─▶ ready ──────── no room, deleted by a person ──────▶ gone
//!      │                                     (its disk layer: when no instance stands on it)
//!      └──▶ gone (failed: told in the operation, remembered in `demand`)
//! ```

mod build;
mod shelf;

pub use shelf::{Shelf, Stage, Template};

use pileus_api::{Event, InstanceImage, PrunedTemplate, Template as ApiTemplate, TemplateState};
use pileus_base::{Code, Error, Result, Size, files};
use pileus_instances::driver::Host;
use pileus_instances::template::TemplateKey;

use super::Service;
use super::settings::WarmMode;
use crate::state;
use crate::state::demand::Shape;
use crate::state::instances::Layer;

impl Service {
    pub fn templates(&self) -> Vec<ApiTemplate> {
        self.parts
            .templates
            .all()
            .iter()
            .map(|template| self.describe(template))
            .collect()
    }

    pub fn template(&self, id: &str) -> Result<ApiTemplate> {
        let template = self.parts.templates.find(id)?;
        Ok(self.describe(&template))
    }

    fn describe(&self, template: &Template) -> ApiTemplate {
        let key = &template.key;
        let stored = self.parts.store.get(&key.image);
        let info = stored.as_ref().map(|image| image.info());
        let text = |of: fn(&pileus_images::ImageInfo) -> &String| {
            info.map_or(String::new(), |info| of(info).clone())
        };
        ApiTemplate {
            id: template.id.clone(),
            state: template.state,
            image: InstanceImage {
                digest: key.image.clone(),
                source: text(|info| &info.source),
                os: text(|info| &info.os),
                release: text(|info| &info.release),
            },
            cpus: key.cpus,
            memory: key.memory,
            disk: key.disk,
            machine_type: key.machine_type.clone(),
            accelerator: key.accelerator.as_str().to_owned(),
            qemu: key.qemu.build.clone(),
            created_at: template.created_at,
            last_used_at: template.last_used(),
            memory_used: template.memory_used(),
            disk_used: template.disk_used(),
            in_memory: template.in_memory,
            instances: u32::try_from(self.standing_on(template.layer)).unwrap_or(u32::MAX),
        }
    }

    /// How many instances have the layer below their disk.
    fn standing_on(&self, layer: Layer) -> usize {
        let all = self.parts.registry.all();
        all.iter()
            .filter(|instance| instance.row().all_layers().any(|l| l == layer))
            .count()
    }

    /// Whether not just one instance stands on it.
    pub(super) fn is_shared(&self, layer: Layer) -> bool {
        let templates = self.parts.templates.all();
        self.standing_on(layer) > 1 || templates.iter().any(|t| t.layer == layer)
    }

    /// Deletes a template. Its disk stays as long as instances stand on it.
    pub async fn delete_template(&self, id: &str) -> Result<PrunedTemplate> {
        let template = self.parts.templates.find(id)?;
        let (id, shape) = (template.id.clone(), template.shape());
        if template.state == TemplateState::Building {
            return Err(
                Error::new(Code::WrongState, format!("template \"{id}\" is being made"))
                    .advise("Cancel that (Ctrl-C in `pileus template create`), or wait."),
            );
        }
        drop(template);
        // It should not come back by itself at the next launch.
        self.parts
            .state
            .run(move |tx| state::demand::forget(tx, &shape))
            .await?;
        let freed = self.discard(&id).await?;
        Ok(PrunedTemplate { id, freed })
    }

    /// Deletes what no launch would use any more; with `all`, everything that can go.
    pub async fn prune_templates(&self, all: bool) -> Result<Vec<PrunedTemplate>> {
        let mut pruned = self.discard_outdated().await?;
        if !all {
            return Ok(pruned);
        }
        for template in self.parts.templates.all() {
            if template.state == TemplateState::Building {
                continue;
            }
            let id = template.id.clone();
            drop(template);
            match self.discard(&id).await {
                Ok(freed) => pruned.push(PrunedTemplate { id, freed }),
                Err(err) => tracing::info!(id, %err, "a template stays"),
            }
        }
        Ok(pruned)
    }

    /// Removes a template, and its disk if nobody stands on it.
    pub(super) async fn discard(&self, id: &str) -> Result<Size> {
        let shelf = self.parts.templates.clone();
        let id = id.to_owned();
        self.empty_pool(|standby| standby.kind.template == id).await;
        let (layer, freed) = super::blocking(move || shelf.discard(&id)).await?;
        self.parts.hub.send(Event::Templates);
        let more = self.drop_unused(&[layer])?;
        Ok(Size(freed.bytes() + more.bytes()))
    }

    /// Removes those of the layers that no instance and no template stands on.
    pub(super) fn drop_unused(&self, layers: &[Layer]) -> Result<Size> {
        // What a row that can't be read stands on is not known.
        if !self.parts.broken.is_empty() {
            return Ok(Size(0));
        }
        let mut freed = 0;
        for &layer in layers {
            let templates = self.parts.templates.all();
            if self.standing_on(layer) > 0 || templates.iter().any(|t| t.layer == layer) {
                continue;
            }
            let path = self.parts.layout.layer(layer.0);
            freed += files::allocated(&path);
            files::discard(&path)?;
        }
        Ok(Size(freed))
    }

    /// Removes the templates whose key is no longer what a launch would ask for: another QEMU, another
    /// agent, an image that is gone. They are made anew in the background.
    pub(crate) async fn discard_outdated(&self) -> Result<Vec<PrunedTemplate>> {
        let host = self.parts.hypervisor.get().await?;
        let mut gone = Vec::new();
        for template in self.parts.templates.all() {
            if template.state != TemplateState::Ready {
                continue;
            }
            let image = self.parts.store.get(&template.key.image);
            let now = image.as_ref().map(|image| {
                let size = image.info().virtual_size;
                self.template_key(&host, &template.shape(), size)
            });
            if now.as_ref() == Some(&template.key) {
                continue;
            }
            let (id, shape) = (template.id.clone(), template.shape());
            tracing::info!(
                id,
                "a template is outdated: its image, QEMU or agent has changed"
            );
            drop(template);
            let freed = self.discard(&id).await?;
            gone.push(PrunedTemplate { id, freed });
            if image.is_some() && self.parts.settings.get().warm == WarmMode::Auto {
                self.build_in_background(shape);
            }
        }
        Ok(gone)
    }

    /// The key of the template that fits a shape on this host, now.
    pub(super) fn template_key(&self, host: &Host, shape: &Shape, image_size: Size) -> TemplateKey {
        TemplateKey::new(
            shape.image.clone(),
            pileus_instances::machine::Shape {
                cpus: shape.cpus,
                memory: shape.memory,
            },
            super::order::default_disk(image_size),
            &host.qemu,
            host.accelerator,
            host.growth,
        )
    }

    pub(super) fn settings_changed(&self) {
        let service = self.clone();
        self.parts.pool.wake();
        tokio::spawn(async move { service.keep_within_budget(Size(0)).await });
    }

    /// Lets the least recently used templates go until `more` bytes fit into the budget.
    pub(super) async fn keep_within_budget(&self, more: Size) {
        let budget = self.parts.settings.get().warm_budget.bytes();
        let mut ready: Vec<_> = self
            .parts
            .templates
            .all()
            .into_iter()
            .filter(|template| template.state == TemplateState::Ready)
            .collect();
        ready.sort_by_key(|template| template.last_used().unwrap_or(template.created_at));
        let mut used: u64 = ready.iter().map(|template| template.used().bytes()).sum();
        for template in ready {
            if used.saturating_add(more.bytes()) <= budget {
                return;
            }
            let (id, bytes) = (template.id.clone(), template.used().bytes());
            drop(template);
            match self.discard(&id).await {
                Ok(_) => {
                    tracing::info!(
                        id,
                        "a template goes: all together take more than the budget"
                    );
                    used = used.saturating_sub(bytes);
                }
                Err(err) => tracing::info!(id, %err, "a template can't go now"),
            }
        }
    }
}

pub(super) fn not_found(id: &str) -> Error {
    Error::new(
        Code::TemplateNotFound,
        format!("template \"{id}\" does not exist, or more than one begins so"),
    )
    .advise("`pileus template list` lists them.")
}
