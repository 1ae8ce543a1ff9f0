//! Leases: throw-away instances live as long as somebody renews them. One that runs out is deleted for
//! good. Its VM ends with the daemon, and the next daemon removes what is left (`recover.rs`), so that
//! nothing survives a killed client or a killed daemon.

use std::sync::Arc;
use std::time::Duration;

use pileus_api::{Instance as ApiInstance, InstanceState, LeaseRequest, OperationKind, Timestamp};
use pileus_base::{Code, Error, Reporter, Result};

use super::registry::Instance;
use super::{Service, convert};
use crate::state::instances::Stage;

/// How often expired leases are looked for.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// A lease is renewed; a longer one would be forgotten.
const LONGEST: u64 = 24 * 3600;
const SHORTEST: u64 = 5;

/// When a lease of so many seconds ends.
pub fn expiry(now: Timestamp, seconds: u64) -> Result<Timestamp> {
    if !(SHORTEST..=LONGEST).contains(&seconds) {
        return Err(Error::new(
            Code::InvalidArgument,
            format!("{seconds} s is no possible lease"),
        )
        .advise(format!("Give {SHORTEST} to {LONGEST} seconds.")));
    }
    now.checked_add(Duration::from_secs(seconds))
        .map_err(|err| Error::internal(format!("The clock is wrong: {err}")))
}

/// Watches one launch's lease until it is dropped.
pub(super) struct LeaseWatch(Option<tokio::task::AbortHandle>);

impl Drop for LeaseWatch {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl Service {
    /// Renews the lease of an instance, or ends it and keeps the instance.
    pub async fn renew_lease(&self, name: &str, request: &LeaseRequest) -> Result<ApiInstance> {
        let instance = self.parts.registry.get_usable(name)?;
        let now = (self.parts.clock)();
        let lease = match request.seconds {
            0 => None,
            seconds => Some(expiry(now, seconds)?),
        };
        let row = instance.row();
        let Some(held) = row.lease else {
            // A lease can't be put on an instance that is meant to stay.
            return match lease {
                None => Ok(convert::instance(&instance)),
                Some(_) => Err(Error::new(
                    Code::WrongState,
                    format!("instance \"{name}\" has no lease: it stays until it is deleted"),
                )),
            };
        };
        if held <= now {
            return Err(Error::new(
                Code::InstanceNotFound,
                format!("The lease of instance \"{name}\" has run out"),
            ));
        }
        if lease.is_none() && row.spec.disk_in_memory {
            return Err(Error::new(
                Code::WrongState,
                format!("instance \"{name}\" can't be kept: its disk lies in memory"),
            )
            .advise("Run it without --tmpfs to keep it."));
        }
        instance.change(|row| row.lease = lease).await?;
        Ok(convert::instance(&instance))
    }

    /// Deletes what nobody renews any more. Runs as long as the daemon.
    pub async fn sweep_leases(&self) {
        let mut tick = tokio::time::interval(SWEEP_EVERY);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let now = (self.parts.clock)();
            for instance in self.parts.registry.all() {
                let row = instance.row();
                let over = row.lease.is_some_and(|lease| lease <= now);
                // One that is being prepared is cancelled by its launch, which sees the lease too.
                let busy = matches!(
                    row.stage,
                    Stage::Purging | Stage::Is(InstanceState::Creating)
                );
                if over && !busy {
                    self.end_expired(&instance, now).await;
                }
            }
        }
    }

    /// Cancels a launch whose lease runs out while it is under way. Ends with the guard.
    pub(super) fn end_with_lease(&self, instance: &Arc<Instance>, report: &Reporter) -> LeaseWatch {
        if instance.row().lease.is_none() {
            return LeaseWatch(None);
        }
        let (service, instance) = (self.clone(), instance.clone());
        let cancel = report.cancel_token().clone();
        LeaseWatch(Some(
            tokio::spawn(async move {
                loop {
                    tokio::time::sleep(SWEEP_EVERY).await;
                    let now = (service.parts.clock)();
                    if instance.row().lease.is_some_and(|lease| lease <= now) {
                        tracing::info!(instance = %instance.row().name, "its lease ran out in its launch");
                        cancel.cancel();
                        return;
                    }
                }
            })
            .abort_handle(),
        ))
    }

    async fn end_expired(&self, instance: &Arc<Instance>, now: Timestamp) {
        let name = instance.row().name.to_string();
        // Marked before the work begins, so that the next sweep does not begin it again; unless it was renewed
        // in this very moment.
        let marked = instance.change(|row| {
            if row.lease.is_some_and(|lease| lease <= now) {
                row.stage = Stage::Purging;
            }
        });
        match marked.await {
            Ok(row) if row.stage == Stage::Purging => {}
            Ok(_) => return,
            Err(err) => {
                tracing::error!(instance = name, %err, "an expired instance can't be deleted");
                return;
            }
        }
        tracing::info!(instance = name, "its lease has run out: it is deleted");
        let service = self.clone();
        let instance = instance.clone();
        let begun = self
            .parts
            .operations
            .begin(OperationKind::Delete, name, |report| async move {
                let _turn = instance.turn_by_force(&report).await?;
                match service.parts.registry.by_id(instance.id) {
                    Some(_) => service.end(&instance, &report).await,
                    None => Ok(()),
                }
            })
            .await;
        if let Err(err) = begun {
            tracing::error!(%err, "an expired instance can't be deleted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_have_bounds() {
        let now = Timestamp::UNIX_EPOCH;
        assert!(expiry(now, 4).is_err());
        assert!(expiry(now, 5).is_ok());
        assert!(expiry(now, 24 * 3600).is_ok());
        assert!(expiry(now, 24 * 3600 + 1).is_err());
        assert!(expiry(now, u64::MAX).is_err());
    }
}
