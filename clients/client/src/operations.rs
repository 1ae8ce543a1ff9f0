//! Long work: follow its events to the end, wait for it, cancel it.

use std::time::{Duration, Instant};

use futures_util::{Stream, StreamExt};
use pileus_api::{Operation, OperationEvent, OperationState, routes};
use pileus_base::{Code, Error, Result};
use reqwest::Method;
use uuid::Uuid;

use crate::Client;
use crate::sse;

/// One long poll; the daemon answers earlier when the operation is over.
const POLL_SECONDS: u64 = 30;
/// How long a daemon may be away while its operation is followed.
const RESTART: Duration = Duration::from_secs(10);

impl Client {
    pub async fn operations(&self) -> Result<Vec<Operation>> {
        self.get(routes::OPERATIONS).await
    }

    pub async fn operation(&self, id: Uuid) -> Result<Operation> {
        self.get(&routes::fill(routes::OPERATION, &id.to_string()))
            .await
    }

    /// The operation when it is over, or as it is after `seconds`.
    pub async fn poll(&self, id: Uuid, seconds: u64) -> Result<Operation> {
        let path = routes::fill(routes::OPERATION_WAIT, &id.to_string());
        let request = self
            .request(Method::GET, &path)
            .query(&[("seconds", seconds)])
            .timeout(Duration::from_secs(seconds + 30));
        self.answer(request).await
    }

    /// The operation when it is over, however long that takes.
    pub async fn wait(&self, id: Uuid) -> Result<Operation> {
        loop {
            let operation = self.poll(id, POLL_SECONDS).await?;
            if operation.is_over() {
                return Ok(operation);
            }
        }
    }

    /// Asks the daemon to end an operation; its end comes with the events.
    pub async fn cancel(&self, id: Uuid) -> Result<()> {
        let path = routes::fill(routes::OPERATION, &id.to_string());
        self.send(self.request(Method::DELETE, &path)).await?;
        Ok(())
    }

    /// The operation's events; the last one is `Done`.
    pub async fn operation_events(
        &self,
        id: Uuid,
    ) -> Result<impl Stream<Item = Result<OperationEvent>> + use<>> {
        let path = routes::fill(routes::OPERATION_EVENTS, &id.to_string());
        let response = self.send(self.request(Method::GET, &path)).await?;
        Ok(sse::events(self.clone(), response))
    }

    /// Follows an operation to its end, telling `on_event` what happens. A failed operation is
    /// returned, not an error: see [`into_result`].
    pub async fn follow(
        &self,
        operation: Operation,
        mut on_event: impl FnMut(&OperationEvent),
    ) -> Result<Operation> {
        if operation.is_over() {
            return Ok(operation);
        }
        let mut events = Box::pin(self.operation_events(operation.id).await?);
        while let Some(event) = events.next().await {
            // A stream that breaks is not the end of the operation: ask for it below.
            let Ok(event) = event else { break };
            on_event(&event);
            if let OperationEvent::Done { operation } = event {
                return Ok(*operation);
            }
        }
        self.wait_through_restart(operation.id).await
    }

    /// Waits for an operation while its daemon may be restarting: the next one knows how it ended.
    async fn wait_through_restart(&self, id: Uuid) -> Result<Operation> {
        let deadline = Instant::now() + RESTART;
        loop {
            match self.wait(id).await {
                Err(err) if err.code == Code::DaemonUnreachable && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                result => return result,
            }
        }
    }
}

/// The operation if it succeeded, else its error.
pub fn into_result(operation: Operation) -> Result<Operation> {
    match operation.state {
        OperationState::Succeeded => Ok(operation),
        OperationState::Cancelled => Err(operation.error.map_or_else(
            || Error::new(Code::Cancelled, "The operation was cancelled"),
            Error::from,
        )),
        OperationState::Failed | OperationState::Running => Err(operation.error.map_or_else(
            || Error::internal("The operation failed without saying why"),
            Error::from,
        )),
    }
}
