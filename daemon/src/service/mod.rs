//! The use cases: what a client can ask for, in terms of the parts below. Nothing here knows HTTP.
//!
//! `launch.rs` is where the two ways meet: an image's way in, and a command's way down.
//!
//! Next step on the way of the data: `instances/src/machine/` and `images/src/`.

pub(crate) mod admission;
pub(crate) mod archive;
pub(crate) mod archive_import;
mod archive_manifest;
mod clone;
mod console;
mod convert;
mod extra_nics;
mod fork;
mod given;
mod guest;
mod hardware;
mod host;
mod image_making;
pub(crate) mod images;
mod instance_settings;
mod launch;
pub(crate) mod layers;
mod leases;
mod lifecycle;
mod log;
mod merge;
mod networks;
mod order;
pub(crate) mod passphrase;
pub(crate) mod pool;
pub(crate) mod registry;
pub(crate) mod remotes;
mod reserve;
pub(crate) mod settings;
mod snapshots;
pub(crate) mod supervise;
pub(crate) mod templates;
mod usage;
mod warm;
pub(crate) mod wiring;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use pileus_api::{Hypervisor, Instance as ApiInstance, ServerInfo};
use pileus_base::{Layout, Result};
use pileus_images::Store;
use pileus_images::hosts::simplestreams::Mirror;
use pileus_instances::driver::Host;
use pileus_networks::{Network, user_mode};

use crate::hub::Hub;
use crate::operations::Operations;
use crate::state::State;
use crate::state::instances::{BrokenRow, Stage};
use registry::Registry;

/// A guest's report that is older is asked for anew.
const REPORT_AGE: Duration = Duration::from_secs(1);

/// Everything that the use cases need. Cheap to clone.
#[derive(Clone)]
pub struct Service {
    parts: Arc<Parts>,
}

pub struct Parts {
    pub layout: Layout,
    pub mode: Mode,
    pub state: State,
    pub hub: Hub,
    pub operations: Operations,
    pub store: Arc<Store>,
    /// The image hosts' mirror, as the setting says.
    pub mirror: Mirror,
    pub network: Arc<Network>,
    pub hypervisor: wiring::Finder,
    pub registry: Registry,
    pub templates: Arc<templates::Shelf>,
    /// Held while a template is made: one at a time.
    pub building: tokio::sync::Mutex<()>,
    pub pool: pool::Pool,
    pub settings: settings::Keeper,
    pub admission: admission::Admission,
    pub broken: Vec<BrokenRow>,
    pub attempts: passphrase::Attempts,
    pub clock: fn() -> pileus_api::Timestamp,
}

/// Who the daemon is on this host.
#[derive(Debug, Clone)]
pub enum Mode {
    /// Root, in the host's own network.
    System,
    /// An ordinary user, in a namespace of that user's own.
    User(user_mode::Entered),
}

impl Mode {
    pub fn as_str(&self) -> &'static str {
        match self {
            Mode::System => "system",
            Mode::User(_) => "user",
        }
    }
}

impl Service {
    pub fn new(parts: Parts) -> Self {
        Self {
            parts: Arc::new(parts),
        }
    }

    pub fn hub(&self) -> &Hub {
        &self.parts.hub
    }

    pub fn operations(&self) -> &Operations {
        &self.parts.operations
    }

    pub(crate) fn parts(&self) -> &Parts {
        &self.parts
    }

    /// What the daemon says of itself, with all that doesn't work as it should.
    pub async fn server_info(&self) -> ServerInfo {
        let parts = &self.parts;
        let mut warnings = Vec::new();
        let hypervisor = match parts.hypervisor.get().await {
            Ok(host) => {
                warnings.extend(host.warning.clone());
                describe(&host)
            }
            Err(err) => {
                warnings.push(err.message);
                Hypervisor {
                    version: String::new(),
                    accelerator: String::new(),
                }
            }
        };
        warnings.extend(parts.network.health().await.into_iter().map(|e| e.message));
        if let Mode::User(entered) = &parts.mode {
            warnings.extend(entered.health().into_iter().map(|e| e.message));
        }
        for row in &parts.broken {
            warnings.push(format!(
                "The record of instance \"{}\" can't be read ({}); its files are kept in {}",
                row.name,
                row.why,
                parts.layout.instances().join(&row.id).display()
            ));
        }
        ServerInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            api: 1,
            pid: std::process::id(),
            mode: parts.mode.as_str().to_owned(),
            hypervisor,
            storage: parts.layout.data.display().to_string(),
            warnings,
        }
    }

    /// All instances by name.
    pub fn instances(&self) -> Vec<ApiInstance> {
        let all = self.parts.registry.all();
        // One whose deletion has begun can't be asked for by name any more either.
        let there = all.iter().filter(|i| i.row().stage != Stage::Purging);
        let mut list: Vec<_> = there.map(|i| self.told(i)).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }

    /// One instance, with a report of its guest that is at most a second old.
    pub async fn instance(&self, name: &str) -> Result<ApiInstance> {
        let instance = self.parts.registry.get(name)?;
        self.refresh_report(&instance).await;
        Ok(self.told(&instance))
    }

    /// What clients are told of an instance.
    fn told(&self, instance: &registry::Instance) -> ApiInstance {
        convert::with_display(convert::instance(instance), &self.parts.layout)
    }

    async fn refresh_report(&self, instance: &registry::Instance) {
        let Ok(machine) = instance.machine() else {
            return;
        };
        if machine.snapshot().state != pileus_api::InstanceState::Running {
            return;
        }
        // A guest that doesn't answer must not hold up those who only want to look.
        let refresh = async {
            if let Ok(guest) = machine.guest() {
                guest.refresh_report(REPORT_AGE).await;
            }
        };
        let _ = tokio::time::timeout(Duration::from_secs(2), refresh).await;
    }

    /// Digests of the images that instances and templates stand on.
    fn digests_in_use(&self) -> HashSet<pileus_base::Digest> {
        let instances = self.parts.registry.all();
        let templates = self.parts.templates.all();
        let mut in_use: HashSet<_> = instances
            .iter()
            .filter_map(|instance| instance.row().spec.image.map(|image| image.digest))
            .chain(templates.iter().map(|template| template.key.image.clone()))
            .collect();
        if !self.parts.broken.is_empty() {
            // What a row that can't be read stands on is not known: it may be any of them.
            let all = self.parts.store.digests();
            in_use.extend(all.unwrap_or_default());
        }
        in_use
    }
}

/// Work that blocks, off the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|err| pileus_base::Error::internal("Work broke off").with_source(err))?
}

fn describe(host: &Host) -> Hypervisor {
    let (major, minor, micro) = host.qemu.version;
    Hypervisor {
        version: format!("{major}.{minor}.{micro}"),
        accelerator: host.accelerator.as_str().to_owned(),
    }
}
