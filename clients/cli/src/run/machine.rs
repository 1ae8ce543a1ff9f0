//! The instance of a `pileus run`: launched on a lease that this process renews, and deleted at the
//! end. Whatever happens to this process, nothing but a lease is left, and that runs out by itself.

use std::time::Duration;

use pileus_api::{Code, LaunchRequest, Operation, OperationState};
use pileus_base::Error;
use pileus_client::Client;
use tokio::task::JoinHandle;

use crate::commands::launch;
use crate::error::{CommandError, Kind};
use crate::progress::Line;
use crate::signals::Signals;

/// Seconds for which the instance outlives a client that is gone.
const LEASE: u64 = 30;
const RENEW: Duration = Duration::from_secs(10);
/// Bound on the daemon's word that it will delete the instance.
const DELETE: Duration = Duration::from_secs(10);

pub(crate) struct Machine {
    pub client: Client,
    pub name: String,
    /// How it was launched: its phases and warnings.
    pub launch: Operation,
    renewal: Renewal,
}

struct Renewal(JoinHandle<()>);

impl Renewal {
    fn start(client: &Client, name: &str) -> Self {
        let (client, name) = (client.clone(), name.to_owned());
        Self(tokio::spawn(async move {
            loop {
                tokio::time::sleep(RENEW).await;
                // A daemon that restarts is asked again in time; an instance that is gone shows in the
                // command's session.
                let _ = client.lease(&name, LEASE).await;
            }
        }))
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Machine {
    /// Launches the instance; if that fails or is interrupted, nothing of it stays.
    pub async fn launch(
        client: &Client,
        mut request: LaunchRequest,
        signals: &mut Signals,
        line: impl FnOnce(&str) -> Line,
    ) -> Result<Self, CommandError> {
        request.lease = Some(LEASE);
        let begun = tokio::select! {
            begun = client.launch(&request) => begun?,
            signal = signals.next() => {
                return Err(launch::interrupted(signal.number, "Left before the launch began"));
            }
        };
        let name = begun.target.clone();
        let (id, timeout) = (begun.id, request.timeout);
        let renewal = Renewal::start(client, &name);
        let mut line = line(&name);
        let followed = launch::follow(client, begun, timeout, signals, &mut line).await;
        let err = match followed {
            Ok((operation, None)) if operation.state == OperationState::Succeeded => {
                line.end(&operation);
                return Ok(Self {
                    client: client.clone(),
                    name,
                    launch: operation,
                    renewal,
                });
            }
            Ok((_, Some(signal))) => launch::interrupted(signal, "The launch was cancelled"),
            Ok((operation, None)) => {
                line.end(&operation);
                CommandError::of_operation(operation)
            }
            Err(err) => err,
        };
        drop(renewal);
        let left = matches!(err.kind, Kind::Signal(_)) && err.error.message == launch::LEFT;
        if !left {
            if err.kind == Kind::TimedOut {
                let _ = tokio::time::timeout(DELETE, client.cancel(id)).await;
            }
            // Usually the daemon has done this already.
            let _ = tokio::time::timeout(DELETE, client.delete(&name, true)).await;
        }
        Err(err)
    }

    /// Leaves a kept instance alone.
    pub fn leave(self) {
        drop(self.renewal);
    }

    /// Deletes the instance: returns when the daemon has taken that on, which holds even if it is
    /// killed the moment after.
    pub async fn delete(self) -> Result<(), Error> {
        drop(self.renewal);
        match tokio::time::timeout(DELETE, self.client.delete(&self.name, true)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(err)) if err.code == Code::InstanceNotFound => Ok(()),
            Ok(Err(err)) => Err(err),
            Err(_) => Err(Error::new(
                Code::TimedOut,
                "The daemon did not answer in time",
            )),
        }
    }
}
