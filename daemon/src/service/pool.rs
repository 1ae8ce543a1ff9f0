//! Standby clones: machines that were restored from a template and given an identity ahead of time, so
//! that a launch only has to give one its name. They take the start of QEMU, the loading of the state,
//! the NIC's hot-plug, DHCP and the first SSH connection out of a launch's way.
//!
//! ```text
//!   a warm launch ─▶ wanted: its template, and whether it ends with the daemon
//!      └─▶ when no launch is under way: restored, named `standby-…`, connected ─▶ idle
//!             ├─ taken by a launch of that kind ─▶ an instance (its row gets the standby's id)
//!             └─ other kind wanted, memory short, pool made smaller, daemon ends ─▶ gone
//! ```
//!
//! A standby has no row: what a killed daemon leaves of it is a folder that nobody knows, and
//! `recover.rs` ends its machine with it.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pileus_api::{InstanceState, Origin};
use pileus_base::{Error, InstanceName, Reporter, Result, Size, files};
use pileus_images::{Image, overlay};
use pileus_instances::driver::{QemuDriver, RunningVm, SEED};
use pileus_instances::guest::clone::CloneMode;
use pileus_instances::guest::keys::InstanceKeys;

use pileus_instances::machine::{Driver, Vm};
use pileus_instances::warm::{self, Saved};
use tokio::sync::Notify;

use super::admission::{self, Start};
use super::given::{Given, seed_of};
use super::registry::Instance;
use super::settings::WarmMode;
use super::templates::Template;
use super::{Mode, Service, leases, wiring};
use crate::state;
use crate::state::instances::{History, InstanceRow, Spec, Stage};

/// What must be free beside a standby's own memory; more for a user's own daemon.
const SPARE: Size = Size::gib(2);
const SPARE_OF_USER: Size = Size::gib(4);
/// After the last launch, before the pool is filled again.
const SETTLE: Duration = Duration::from_millis(500);
/// After a standby could not be made.
const RETRY: Duration = Duration::from_secs(60);

/// Which launches a standby can serve.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    pub template: String,
    /// Its machine ends with the daemon, as a throw-away one must.
    pub tied: bool,
}

/// A clone that waits for its name.
pub struct Standby {
    pub kind: Kind,
    pub template: Arc<Template>,
    /// Its row, in no table.
    pub instance: Arc<Instance>,
    pub driver: Arc<QemuDriver>,
    pub vm: RunningVm,
}

#[derive(Default)]
pub struct Pool {
    members: Mutex<Vec<Standby>>,
    /// Slots and addresses that no row has and that are taken all the same.
    pub reserved: Arc<Mutex<Reserved>>,
    wanted: Mutex<Option<Kind>>,
    launching: AtomicUsize,
    wake: Notify,
}

#[derive(Debug, Default)]
pub struct Reserved {
    pub slots: BTreeSet<u32>,
    pub addresses: BTreeSet<Ipv4Addr>,
}

/// A launch under way: the pool is not filled meanwhile.
pub struct Launching<'a>(&'a Pool);

impl Drop for Launching<'_> {
    fn drop(&mut self) {
        self.0.launching.fetch_sub(1, Ordering::Relaxed);
        self.0.wake.notify_one();
    }
}

impl Pool {
    pub fn launching(&self) -> Launching<'_> {
        self.launching.fetch_add(1, Ordering::Relaxed);
        Launching(self)
    }

    /// Takes a standby that serves such a launch.
    pub fn take(&self, kind: &Kind) -> Option<Standby> {
        *lock(&self.wanted) = Some(kind.clone());
        let mut members = lock(&self.members);
        let at = members.iter().position(|standby| standby.kind == *kind)?;
        Some(members.swap_remove(at))
    }

    /// Takes all that `unwanted` says.
    fn take_all(&self, unwanted: impl Fn(&Standby) -> bool) -> Vec<Standby> {
        let mut members = lock(&self.members);
        let (gone, kept) = members.drain(..).partition(|standby| unwanted(standby));
        *members = kept;
        gone
    }

    fn count(&self) -> usize {
        lock(&self.members).len()
    }

    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// A row has them now, or nobody.
    pub fn unreserve(&self, row: &InstanceRow) {
        let mut reserved = lock(&self.reserved);
        reserved.slots.remove(&row.slot);
        reserved.addresses.remove(&row.address);
    }
}

impl Service {
    /// Keeps the pool as it should be. Runs as long as the daemon.
    pub async fn keep_pool(&self) {
        let pool = &self.parts.pool;
        loop {
            pool.wake.notified().await;
            // Whoever launches has the host for himself.
            loop {
                tokio::time::sleep(SETTLE).await;
                if pool.launching.load(Ordering::Relaxed) == 0 {
                    break;
                }
            }
            if let Err(err) = self.fill_pool().await {
                tracing::warn!(%err, "a standby clone can't be made");
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn fill_pool(&self) -> Result<()> {
        let pool = &self.parts.pool;
        loop {
            let settings = self.parts.settings.get();
            let wanted = lock(&pool.wanted).clone();
            let size = match settings.warm {
                WarmMode::Off => 0,
                _ => settings.warm_pool as usize,
            };
            let (Some(kind), 1..) = (wanted, size) else {
                self.empty_pool(|_| true).await;
                return Ok(());
            };
            self.empty_pool(|standby| standby.kind != kind).await;
            let busy = pool.launching.load(Ordering::Relaxed) > 0;
            let Ok(template) = self.parts.templates.find(&kind.template) else {
                return Ok(());
            };
            if busy || pool.count() >= size || !self.has_room(template.key.memory) {
                return Ok(());
            }
            let standby = self.make_standby(kind, template).await?;
            lock(&pool.members).push(standby);
        }
    }

    fn has_room(&self, memory: Size) -> bool {
        let spare = match self.parts.mode {
            Mode::System => SPARE,
            Mode::User(_) => SPARE_OF_USER,
        };
        admission::available()
            .is_none_or(|free| free.bytes() >= spare.bytes().saturating_add(memory.bytes()))
    }

    /// Ends the standbys that are not wanted (any more).
    pub(super) async fn empty_pool(&self, unwanted: impl Fn(&Standby) -> bool) {
        for standby in self.parts.pool.take_all(unwanted) {
            self.dispose(standby).await;
        }
    }

    /// At the daemon's end.
    pub async fn end_pool(&self) {
        self.empty_pool(|_| true).await;
    }

    pub(super) async fn dispose(&self, standby: Standby) {
        let row = standby.instance.row();
        standby.vm.kill().await;
        standby.driver.release().await;
        self.parts.pool.unreserve(&row);
        if let Err(err) = files::remove_folder(&self.parts.layout.instance(row.id)) {
            tracing::warn!(%err, "what is left of a standby clone can't be removed");
        }
    }

    async fn make_standby(&self, kind: Kind, template: Arc<Template>) -> Result<Standby> {
        let image = self
            .parts
            .store
            .get(&template.key.image)
            .ok_or_else(|| Error::internal("A template's image is gone"))?;
        let row = self.standby_row(&kind, &template).await?;
        let folder = self.parts.layout.instance(row.id);
        let instance = Instance::new(row, self.parts.state.clone(), self.parts.hub.clone());
        let made = self.bring_up_standby(&instance, &template, &image).await;
        match made {
            Ok((driver, vm)) => Ok(Standby {
                kind,
                template,
                instance,
                driver,
                vm,
            }),
            Err(err) => {
                self.parts.pool.unreserve(&instance.row());
                files::remove_folder(&folder)?;
                Err(err)
            }
        }
    }

    /// A row as an instance has one, with a slot and an address of its own.
    async fn standby_row(&self, kind: &Kind, template: &Template) -> Result<InstanceRow> {
        let now = (self.parts.clock)();
        let network = self.parts.network.clone();
        let reserved = self.parts.pool.reserved.clone();
        let (slot, address) = self
            .parts
            .state
            .run(move |tx| {
                let mut reserved = lock(&reserved);
                let taken = state::instances::taken(tx)?;
                let slot = (0..)
                    .find(|slot| !taken.slots.contains(slot) && !reserved.slots.contains(slot))
                    .unwrap_or_default();
                let used = taken.addresses.iter().chain(&reserved.addresses).copied();
                let address = network.free_address(&used.collect())?;
                reserved.slots.insert(slot);
                reserved.addresses.insert(address);
                Ok((slot, address))
            })
            .await?;
        let id = uuid::Uuid::new_v4();
        let name: InstanceName = format!("standby-{}", &id.simple().to_string()[..8]).parse()?;
        Ok(InstanceRow {
            id,
            name,
            address,
            mac: wiring::random_mac(),
            slot,
            stage: Stage::Is(InstanceState::Creating),
            deleted: false,
            created_at: now,
            started_at: None,
            // Whatever its length: one that has a lease ends with the daemon.
            lease: kind.tied.then(|| leases::expiry(now, 60)).transpose()?,
            shutdown_at: None,
            spec: Spec {
                machine_type: Some(template.key.machine_type.clone()),
                origin: Origin::Warm {
                    template: template.id.clone(),
                },
                layers: vec![template.layer],
                ..Spec::new(template.key.cpus, template.key.memory, template.key.disk)
            },
            process: None,
            history: History::default(),
            snapshots: Arc::default(),
        })
    }

    async fn bring_up_standby(
        &self,
        instance: &Arc<Instance>,
        template: &Arc<Template>,
        image: &Arc<Image>,
    ) -> Result<(Arc<QemuDriver>, RunningVm)> {
        let _promise = self
            .parts
            .admission
            .admit(template.key.memory, Start::Warm)?;
        let row = instance.row();
        let folder = self.parts.layout.instance(row.id);
        let (below, size, written) = (template.disk(), template.key.disk, row.clone());
        let checked = template.clone();
        let work = move || {
            let ready = checked.folder.open_checked(&checked.key)?;
            files::create_folder(&folder, 0o700)?;
            let disk = folder.join(pileus_instances::driver::DISK);
            overlay::create_on_layer(&disk, size, &below)?;
            let keys = InstanceKeys::generate()?;
            keys.store(&folder)?;
            let seed = seed_of(&written, &keys, &Given::default())?;
            files::write_atomic(&folder.join(SEED), &seed, 0o600)?;
            Ok((ready.state, keys))
        };
        let (state, keys) = super::blocking(work).await?;
        let driver = self.machine_config(instance, image.clone())?.driver;
        let mut identity = self.identity_of(&row, keys, CloneMode::Warm);
        identity.standby = true;
        let saved = Saved {
            ram: template.folder.ram(),
            state,
            grow_to: None,
            identity,
        };
        let (vm, _) = warm::restore(&driver, saved, &Reporter::silent()).await?;
        vm.guest().warm_up().await;
        tracing::info!(id = %row.id, template = template.id, "a clone stands by");
        Ok((driver, vm))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
