//! The machine that an image is made in: an instance with a lease, which is gone when the work ends, however it
//! ends.

use std::sync::Arc;
use std::time::Duration;

use pileus_api::{InstanceName, InstanceState};
use pileus_base::{Code, Error, Phase, Reporter, Result};
use pileus_instances::machine::SHUTDOWN_TIMEOUT;

use super::super::Service;
use super::super::leases;
use super::super::registry::Instance;

/// Seconds that a machine stays whose step failed, for a look.
const LOOK: u64 = 3600;

pub(super) struct Throwaway {
    service: Service,
    instance: Option<Arc<Instance>>,
}

/// A name that tells what the machine is for.
pub(super) fn name(what: &str) -> Result<InstanceName> {
    let id = uuid::Uuid::new_v4().simple().to_string();
    format!("{what}-{}", &id[..8]).parse()
}

impl Throwaway {
    pub fn new(service: &Service, instance: Arc<Instance>) -> Self {
        Self {
            service: service.clone(),
            instance: Some(instance),
        }
    }

    pub fn instance(&self) -> Result<&Arc<Instance>> {
        let gone = || Error::internal("The machine that the image is made in is gone");
        self.instance.as_ref().ok_or_else(gone)
    }

    /// Removes it.
    pub async fn end(mut self) {
        if let Some(instance) = self.instance.take() {
            remove(&self.service, &instance).await;
        }
    }

    /// Leaves it for a look, and says so.
    pub async fn keep_for_a_look(mut self, mut err: Error) -> Error {
        let Some(instance) = self.instance.take() else {
            return err;
        };
        let name = instance.row().name;
        let lease = leases::expiry((self.service.parts.clock)(), LOOK);
        let kept = match lease {
            Ok(lease) => instance.change(|row| row.lease = Some(lease)).await,
            Err(err) => Err(err),
        };
        match kept {
            Ok(_) => {
                err.advice = Some(format!(
                    "The machine stays for an hour: `pileus shell {name}` looks into it, `pileus delete --purge \
                     {name}` ends it."
                ));
            }
            Err(why) => {
                tracing::warn!(instance = %name, err = %why, "it can't be kept");
                remove(&self.service, &instance).await;
            }
        }
        err
    }

    /// Waits until its guest has powered itself off.
    pub async fn is_off(&self, bound: Duration, report: &Reporter) -> Result<()> {
        report.phase(Phase::Stopping);
        let machine = self.instance()?.machine()?;
        let mut seen = machine.watch();
        let off = async {
            let stopped = seen
                .wait_for(|now| now.state == InstanceState::Stopped)
                .await;
            let stopped = stopped
                .map(|now| now.last_error.clone())
                .map_err(|_| Error::internal("The instance's task has ended"))?;
            match stopped {
                Some(trouble) => Err(trouble.into()),
                None => Ok(()),
            }
        };
        match tokio::time::timeout(bound, report.or_cancelled(off)).await {
            Ok(done) => done,
            Err(_) => Err(Error::new(
                Code::ShutdownTimeout,
                format!("The guest did not power off within {} s", bound.as_secs()),
            )),
        }
    }

    /// Shuts its guest down in good order.
    pub async fn shut_down(&self, report: &Reporter) -> Result<()> {
        let machine = self.instance()?.machine()?;
        machine.stop(false, SHUTDOWN_TIMEOUT, report.clone()).await
    }
}

impl Drop for Throwaway {
    fn drop(&mut self) {
        if let Some(instance) = self.instance.take() {
            // The work panicked or was dropped.
            let service = self.service.clone();
            tokio::spawn(async move { remove(&service, &instance).await });
        }
    }
}

/// A launch that failed has removed it already; so may somebody else.
async fn remove(service: &Service, instance: &Arc<Instance>) {
    if service.parts.registry.by_id(instance.id).is_some() {
        service.undo(instance).await;
    }
}
