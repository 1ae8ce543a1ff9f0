//! Calls about snapshots, clones and names. What takes long answers with an operation.

use pileus_api::{
    CloneReply, CloneRequest, Code, Instance, Operation, RenameRequest, RestoreRequest, Snapshot,
    SnapshotName, SnapshotReply, SnapshotRequest, routes,
};
use pileus_base::{Error, Result};
use reqwest::Method;

use crate::Client;
use crate::http::instance_path;

impl Client {
    /// The snapshots of all instances.
    pub async fn all_snapshots(&self) -> Result<Vec<Snapshot>> {
        self.get(routes::SNAPSHOTS).await
    }

    pub async fn snapshots(&self, instance: &str) -> Result<Vec<Snapshot>> {
        self.get(&instance_path(routes::INSTANCE_SNAPSHOTS, instance)?)
            .await
    }

    pub async fn snapshot(&self, instance: &str, snapshot: &str) -> Result<Snapshot> {
        let path = snapshot_path(routes::INSTANCE_SNAPSHOT, instance, snapshot)?;
        self.get(&path).await
    }

    pub async fn take_snapshot(
        &self,
        instance: &str,
        request: &SnapshotRequest,
    ) -> Result<SnapshotReply> {
        let path = instance_path(routes::INSTANCE_SNAPSHOTS, instance)?;
        self.post(&path, request).await
    }

    pub async fn restore(
        &self,
        instance: &str,
        snapshot: &str,
        request: &RestoreRequest,
    ) -> Result<Operation> {
        let path = snapshot_path(routes::INSTANCE_RESTORE, instance, snapshot)?;
        self.post(&path, request).await
    }

    /// Deletes a snapshot for good.
    pub async fn delete_snapshot(&self, instance: &str, snapshot: &str) -> Result<Operation> {
        let path = snapshot_path(routes::INSTANCE_SNAPSHOT, instance, snapshot)?;
        self.answer(self.request(Method::DELETE, &path)).await
    }

    /// A new, stopped instance with the disk of another one.
    pub async fn clone_instance(&self, name: &str, request: &CloneRequest) -> Result<CloneReply> {
        self.post(&instance_path(routes::INSTANCE_CLONE, name)?, request)
            .await
    }

    pub async fn rename(&self, name: &str, request: &RenameRequest) -> Result<Instance> {
        self.post(&instance_path(routes::INSTANCE_RENAME, name)?, request)
            .await
    }

    /// Writes an instance's memory to disk and ends its VM.
    pub async fn suspend(&self, name: &str) -> Result<Operation> {
        let path = instance_path(routes::INSTANCE_SUSPEND, name)?;
        self.answer(self.request(Method::POST, &path)).await
    }
}

/// A name that can't be one is refused here, so that it never becomes another path.
fn snapshot_path(route: &str, instance: &str, snapshot: &str) -> Result<String> {
    instance_path(route, instance)?;
    if snapshot.parse::<SnapshotName>().is_err() {
        return Err(Error::new(
            Code::SnapshotNotFound,
            format!("No such snapshot: {instance}.{snapshot}"),
        ));
    }
    Ok(routes::fill_two(route, instance, snapshot))
}
