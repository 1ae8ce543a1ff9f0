//! Calls about instances. What takes long answers with an operation, to be followed to its end with
//! [`Client::follow`].

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use pileus_api::{
    DeleteQuery, Event, ForkReply, ForkRequest, Identity, Instance, LaunchRequest, LeaseRequest,
    LogQuery, Operation, StartRequest, StopRequest, routes,
};
use pileus_base::Result;
use reqwest::Method;

use crate::Client;
use crate::http::{ANSWER, instance_path};
use crate::sse;

impl Client {
    pub async fn instances(&self) -> Result<Vec<Instance>> {
        self.get(routes::INSTANCES).await
    }

    pub async fn instance(&self, name: &str) -> Result<Instance> {
        self.get(&instance_path(routes::INSTANCE, name)?).await
    }

    pub async fn launch(&self, request: &LaunchRequest) -> Result<Operation> {
        self.post(routes::INSTANCES, request).await
    }

    pub async fn start(&self, name: &str, request: &StartRequest) -> Result<Operation> {
        self.post(&instance_path(routes::INSTANCE_START, name)?, request)
            .await
    }

    pub async fn stop(&self, name: &str, request: &StopRequest) -> Result<Operation> {
        self.post(&instance_path(routes::INSTANCE_STOP, name)?, request)
            .await
    }

    pub async fn restart(&self, name: &str, request: &StartRequest) -> Result<Operation> {
        self.post(&instance_path(routes::INSTANCE_RESTART, name)?, request)
            .await
    }

    /// Moves an instance to the trash, or deletes it for good.
    pub async fn delete(&self, name: &str, purge: bool) -> Result<Operation> {
        let path = instance_path(routes::INSTANCE, name)?;
        let request = self.request(Method::DELETE, &path);
        self.answer(request.query(&DeleteQuery { purge })).await
    }

    /// Renews the lease of a throw-away instance for so many seconds from now; 0 ends it and keeps the
    /// instance.
    pub async fn lease(&self, name: &str, seconds: u64) -> Result<()> {
        let path = instance_path(routes::INSTANCE_LEASE, name)?;
        let request = self.request(Method::POST, &path).timeout(ANSWER);
        self.send(request.json(&LeaseRequest { seconds })).await?;
        Ok(())
    }

    /// Clones a running instance, its memory included.
    pub async fn fork(&self, name: &str, request: &ForkRequest) -> Result<ForkReply> {
        self.post(&instance_path(routes::INSTANCE_FORK, name)?, request)
            .await
    }

    /// What makes the instance itself, as its guest tells now.
    pub async fn identity(&self, name: &str) -> Result<Identity> {
        self.get(&instance_path(routes::INSTANCE_IDENTITY, name)?)
            .await
    }

    /// Takes an instance out of the trash.
    pub async fn recover(&self, name: &str) -> Result<Instance> {
        let path = instance_path(routes::INSTANCE_RECOVER, name)?;
        self.answer(self.request(Method::POST, &path)).await
    }

    /// Empties the trash; returns the names of what is gone, when it is gone.
    pub async fn purge(&self) -> Result<Vec<String>> {
        self.answer(self.request(Method::POST, routes::PURGE)).await
    }

    /// The console log: its present bytes or, if the query says so, all that is added until the
    /// stream is dropped.
    pub async fn log(
        &self,
        name: &str,
        query: &LogQuery,
    ) -> Result<impl Stream<Item = Result<Bytes>> + use<>> {
        let path = instance_path(routes::INSTANCE_LOG, name)?;
        let response = self
            .send(self.request(Method::GET, &path).query(query))
            .await?;
        let client = self.clone();
        Ok(response
            .bytes_stream()
            .map(move |part| part.map_err(|err| client.broken(&err))))
    }

    /// What changes in the daemon, until the stream is dropped.
    pub async fn events(&self) -> Result<impl Stream<Item = Result<Event>> + use<>> {
        let response = self.send(self.request(Method::GET, routes::EVENTS)).await?;
        Ok(sse::events(self.clone(), response))
    }
}
