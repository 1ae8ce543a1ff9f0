//! What an instance's driver needs of the host: the hypervisor, a tap, the rights that its QEMU keeps.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::{Arc, Weak};

use pileus_api::Origin;
use pileus_base::{Error, Layout, Mac, Result};
use pileus_images::Image;
use pileus_instances::driver::{DISK, DirectBoot, Host, Setup, Wiring};
use pileus_instances::guest::clone::{CloneMode, IdentitySpec};
use pileus_instances::guest::keys::InstanceKeys;
use pileus_instances::qemu::host::{KvmFacts, choose};
use pileus_instances::qemu::{
    Accelerator, AcceleratorChoice, Confinement, Growth, Paths, Qemu, process,
};
use pileus_networks::{Network, Nic};
use tokio::sync::Mutex;

use super::Mode;
use super::registry::Instance;
use crate::state::instances::InstanceRow;
pub use crate::state::instances::random_mac;

/// The first of the user ids that QEMUs run as, one an instance. No entry in /etc/passwd is needed;
/// systemd's documentation keeps this range free of containers and services.
const FIRST_UID: u32 = 0x7000_0000;
/// The same inside a user's namespace, which has 65536 ids.
const FIRST_UID_INSIDE: u32 = 40_000;
const MOST_INSIDE: u32 = 20_000;
/// The slot of the machine that a template is made of. Instances take the lowest ones.
pub const TEMPLATE_SLOT: u32 = MOST_INSIDE - 1;

/// Finds QEMU when it is first needed, and again until it is there: installing it needs no restart.
pub struct Finder {
    pub program: Option<PathBuf>,
    pub search: OsString,
    pub choice: AcceleratorChoice,
    found: Mutex<Option<Arc<Host>>>,
}

impl Finder {
    pub fn new(program: Option<PathBuf>, search: OsString, choice: AcceleratorChoice) -> Self {
        Self {
            program,
            search,
            choice,
            found: Mutex::new(None),
        }
    }

    pub async fn get(&self) -> Result<Arc<Host>> {
        let mut found = self.found.lock().await;
        if let Some(host) = &*found {
            return Ok(host.clone());
        }
        let qemu = Qemu::find(self.program.as_deref(), &self.search).await?;
        let chosen = choose(self.choice, &KvmFacts::of_host())?;
        let host = Arc::new(Host {
            qemu,
            accelerator: chosen.accelerator,
            warning: chosen.warning,
            growth: Growth::of_host(),
        });
        *found = Some(host.clone());
        Ok(host)
    }
}

/// The instance's place in the network.
pub fn nic(row: &InstanceRow) -> Nic {
    Nic {
        ifname: format!("pil{}", row.slot),
        mac: row.mac,
        address: row.address,
        hostname: row.name.clone(),
    }
}

/// What a start of the instance needs.
pub fn setup(layout: &Layout, row: &InstanceRow, image: &Image) -> Setup {
    Setup {
        name: row.name.clone(),
        id: row.id,
        cpus: row.spec.cpus,
        memory: row.spec.memory,
        machine_type: row.spec.machine_type.clone(),
        base: image.disk(),
        direct_boot: direct_boot(image),
        ends_with_daemon: row.lease.is_some(),
        machine_id: matches!(row.spec.origin, Origin::Clone { .. } | Origin::Import)
            .then_some(row.id),
        folder: layout.instance(row.id),
        run: layout.instance_run(row.id),
        mac: row.mac,
        hardware: row.spec.hardware.clone(),
        extra_nics: row.spec.extra_nics.iter().map(|nic| nic.mac).collect(),
        address: row.address,
    }
}

/// Kernel and initrd beside an image.
pub fn direct_boot(image: &Image) -> Option<DirectBoot> {
    let (Some(kernel), Some(cmdline)) = (image.kernel(), image.cmdline()) else {
        return None;
    };
    Some(DirectBoot {
        kernel,
        initrd: image.initrd(),
        cmdline: cmdline.to_owned(),
    })
}

/// The instance's own layer.
pub fn disk(layout: &Layout, row: &InstanceRow) -> PathBuf {
    match row.spec.disk_in_memory {
        true => layout.memory.join(format!("{}.qcow2", row.id)),
        false => layout.instance(row.id).join(DISK),
    }
}

/// Ends a VM that no task owns: its launch or its deletion was interrupted.
pub async fn kill_leftover(layout: &Layout, id: uuid::Uuid) {
    let paths = Paths::of(&layout.instance_run(id), &layout.instance(id));
    if let Some(found) = process::find(&paths, id) {
        if let Err(err) = process::kill(found) {
            tracing::error!(%id, %err, "a VM that nobody owns can't be ended");
        }
        let _ = process::wait_exit(found).await;
    }
}

/// One instance's wiring.
pub struct HostWiring {
    pub service: super::Service,
    pub instance: Weak<Instance>,
    /// What it was when its task began.
    pub nic: Nic,
    pub slot: u32,
    /// Also kept in the store while the instance's task lives.
    pub image: Arc<Image>,
}

type Later<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

impl HostWiring {
    fn network(&self) -> &Network {
        &self.service.parts().network
    }

    /// With the name that the instance has now.
    fn nic(&self) -> Nic {
        let instance = self.instance.upgrade();
        instance.map_or_else(|| self.nic.clone(), |instance| nic(&instance.row()))
    }
}

impl Wiring for HostWiring {
    fn host(&self) -> Later<'_, Result<Arc<Host>>> {
        Box::pin(self.service.parts().hypervisor.get())
    }

    fn plug(&self) -> Later<'_, Result<OwnedFd>> {
        Box::pin(async { self.network().attach(&self.nic()).await })
    }

    fn plug_extra(&self, number: usize, mac: Mac) -> Later<'_, Result<Option<OwnedFd>>> {
        Box::pin(async move {
            let row = self.instance.upgrade().map(|instance| instance.row());
            let nics = row.map_or(Vec::new(), |row| row.spec.extra_nics);
            let Some(nic) = nics.into_iter().find(|nic| nic.mac == mac) else {
                return Ok(None);
            };
            let ifname = format!("pil{}x{number}", self.slot);
            let tap = self.network().attach_extra(&ifname, &nic.network).await?;
            Ok(Some(tap))
        })
    }

    fn unplug(&self) -> Later<'_, ()> {
        Box::pin(async {
            let nic = self.nic();
            if let Err(err) = self.network().detach(&nic) {
                tracing::warn!(instance = %nic.hostname, %err, "its network entry can't be removed");
            }
        })
    }

    fn setup(&self) -> Option<Setup> {
        let row = self.instance.upgrade()?.row();
        Some(setup(&self.service.parts().layout, &row, &self.image))
    }

    fn identity(&self) -> Result<Option<IdentitySpec>> {
        let Some(row) = self.instance.upgrade().map(|i| i.row()) else {
            return Ok(None);
        };
        if !row.spec.identify {
            return Ok(None);
        }
        let keys = InstanceKeys::load(&self.service.parts().layout.instance(row.id))?;
        let identity = self.service.identity_of(&row, keys, CloneMode::Booted);
        Ok(Some(identity))
    }

    fn identified(&self) -> Later<'_, Result<()>> {
        Box::pin(async {
            let Some(instance) = self.instance.upgrade() else {
                return Ok(());
            };
            let done = instance.change(|row| row.spec.identify = false);
            done.await.map(drop)
        })
    }

    fn layers(&self) -> Vec<PathBuf> {
        // The instance holds the task that asks: it is there.
        let Some(instance) = self.instance.upgrade() else {
            return Vec::new();
        };
        let (row, layout) = (instance.row(), &self.service.parts().layout);
        let below = row.spec.layers.iter().map(|layer| layout.layer(layer.0));
        below.chain([disk(layout, &row)]).collect()
    }

    fn confinement(&self, accelerator: Accelerator) -> Option<Confinement> {
        confinement(&self.service.parts().mode, self.slot, accelerator)
    }
}

/// The user that the QEMU with this slot runs as.
pub fn confinement(mode: &Mode, slot: u32, accelerator: Accelerator) -> Option<Confinement> {
    let first = match mode {
        Mode::System => FIRST_UID,
        Mode::User(entered) if entered.full_uid_map && slot < MOST_INSIDE => FIRST_UID_INSIDE,
        // Only the user's own id exists: QEMU stays what the user is.
        Mode::User(_) => return None,
    };
    let uid = first + slot;
    let groups = match accelerator {
        Accelerator::Kvm => kvm_group().into_iter().collect(),
        Accelerator::Tcg => Vec::new(),
    };
    Some(Confinement {
        uid,
        gid: uid,
        groups,
    })
}

fn kvm_group() -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/dev/kvm").ok().map(|meta| meta.gid())
}

/// For errors that only a bug can cause.
pub fn no_image(row: &InstanceRow) -> Error {
    Error::internal(format!("The record of '{}' names no image", row.name))
}
