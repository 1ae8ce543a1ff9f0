//! A new instance's beginning: its row, with a name, an address, a MAC address and a slot, all taken in one
//! transaction. What is made of it comes after (`launch.rs`, `fork.rs`, `clone.rs`, `archive_import.rs`).

use std::collections::HashSet;
use std::sync::{Arc, PoisonError};

use pileus_api::{InstanceState, Timestamp};
use pileus_base::{Error, InstanceName, Result};

use super::order::{DEFAULT_DISK, DEFAULT_MEMORY, Order, free_name};
use super::registry::Instance;
use super::{Service, leases, wiring};
use crate::state;
use crate::state::instances::{ExtraNic, History, InstanceRow, Spec, Stage};

/// An instance that has its row and nothing else. Unless the work that makes more of it begins, it goes.
pub(super) struct Reserved {
    service: Service,
    instance: Arc<Instance>,
    begun: bool,
}

impl Reserved {
    pub fn name(&self) -> InstanceName {
        self.instance.row().name
    }

    /// For the work, which undoes it itself if it comes to nothing.
    pub fn begin(mut self) -> Arc<Instance> {
        self.begun = true;
        self.instance.clone()
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if !self.begun {
            let (service, instance) = (self.service.clone(), self.instance.clone());
            tokio::spawn(async move { service.undo(&instance).await });
        }
    }
}

impl Service {
    pub(super) async fn reserve(
        &self,
        order: &Order,
        extra_nics: Vec<ExtraNic>,
    ) -> Result<Arc<Instance>> {
        let (spec, lease) = self.plan(order, extra_nics)?;
        self.reserve_row(order.name.clone(), spec, lease).await
    }

    /// What is known of an instance before its image is, and when its lease ends.
    pub(super) fn plan(
        &self,
        order: &Order,
        extra_nics: Vec<ExtraNic>,
    ) -> Result<(Spec, Option<Timestamp>)> {
        let lease = match order.request.lease {
            Some(seconds) => Some(leases::expiry((self.parts.clock)(), seconds)?),
            None => None,
        };
        let wanted = &order.wanted;
        let spec = Spec {
            disk_in_memory: order.request.disk_in_memory,
            timezone: order.request.timezone.clone(),
            extra_nics,
            ..Spec::new(
                // What the image wants is known later.
                wanted.cpus.unwrap_or(1),
                wanted.memory.unwrap_or(DEFAULT_MEMORY),
                order.disk.unwrap_or(DEFAULT_DISK),
            )
        };
        Ok((spec, lease))
    }

    /// [`Service::reserve_row`] for a client, who may go before the work has begun: then it is undone.
    pub(super) async fn reserve_for(
        &self,
        wanted: Option<InstanceName>,
        spec: Spec,
        lease: Option<Timestamp>,
    ) -> Result<Reserved> {
        let service = self.clone();
        let reserved = tokio::spawn(async move {
            let instance = service.reserve_row(wanted, spec, lease).await?;
            Ok(Reserved {
                service,
                instance,
                begun: false,
            })
        });
        reserved
            .await
            .map_err(|err| Error::internal("The reservation broke off").with_source(err))?
    }

    /// Takes a name (a random one if none is wanted), an address, a MAC and a slot, all in one
    /// transaction.
    pub(super) async fn reserve_row(
        &self,
        wanted: Option<InstanceName>,
        spec: Spec,
        lease: Option<Timestamp>,
    ) -> Result<Arc<Instance>> {
        let network = self.parts.network.clone();
        let reserved = self.parts.pool.reserved.clone();
        let created_at = (self.parts.clock)();
        let row = self
            .parts
            .state
            .run(move |tx| {
                state::instances::macs_are_free(tx, &spec.extra_nics)?;
                let taken = state::instances::taken(tx)?;
                let name = match wanted {
                    Some(name) => name,
                    None => free_name(&taken.names)?,
                };
                let reserved = reserved.lock().unwrap_or_else(PoisonError::into_inner);
                let slot = (0..)
                    .find(|slot| !taken.slots.contains(slot) && !reserved.slots.contains(slot))
                    .unwrap_or_default();
                let used = taken.addresses.iter().chain(&reserved.addresses).copied();
                let row = InstanceRow {
                    id: uuid::Uuid::new_v4(),
                    name,
                    address: network.free_address(&used.collect::<HashSet<_>>())?,
                    mac: wiring::random_mac(),
                    slot,
                    stage: Stage::Is(InstanceState::Creating),
                    deleted: false,
                    created_at,
                    started_at: None,
                    lease,
                    shutdown_at: None,
                    spec,
                    process: None,
                    history: History::default(),
                    snapshots: Arc::default(),
                };
                state::instances::insert(tx, &row)?;
                Ok(row)
            })
            .await?;
        let instance = Instance::new(row, self.parts.state.clone(), self.parts.hub.clone());
        self.parts.registry.add(instance.clone());
        Ok(instance)
    }
}
