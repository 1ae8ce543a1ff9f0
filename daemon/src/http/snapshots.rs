//! Snapshots and clones of instances, their names, and their suspend.

use axum::extract::State;
use axum::http::StatusCode;
use pileus_api::{
    CloneReply, CloneRequest, ErrorReply, Instance, Operation, RenameRequest, RestoreRequest,
    Snapshot, SnapshotReply, SnapshotRequest,
};

use super::{Json, Path, Reply, whole};
use crate::service::Service;

/// Lists the snapshots of all instances, those in the trash too.
#[utoipa::path(get, operation_id = "list_all_snapshots", path = "/v1/snapshots", tag = "snapshots",
    responses((status = 200, description = "Snapshots by instance, in the order in which they were taken", body = Vec<Snapshot>)))]
pub async fn all(State(service): State<Service>) -> Json<Vec<Snapshot>> {
    Json(service.all_snapshots())
}

/// Lists an instance's snapshots in the order in which they were taken.
#[utoipa::path(get, operation_id = "list_snapshots", path = "/v1/instances/{name}/snapshots", tag = "snapshots",
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 200, description = "Snapshots", body = Vec<Snapshot>),
        (status = 404, description = "No such instance", body = ErrorReply)))]
pub async fn list(
    State(service): State<Service>,
    Path(name): Path<String>,
) -> Reply<Json<Vec<Snapshot>>> {
    Ok(Json(service.snapshots(&name)?))
}

/// Takes a snapshot of a stopped, suspended or running instance.
#[utoipa::path(post, operation_id = "take_snapshot", path = "/v1/instances/{name}/snapshots", tag = "snapshots", request_body = SnapshotRequest,
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 202, description = "The snapshot is being taken", body = SnapshotReply),
        (status = 404, description = "No such instance", body = ErrorReply),
        (status = 409, description = "The name is in use", body = ErrorReply)))]
pub async fn take(
    State(service): State<Service>,
    Path(name): Path<String>,
    Json(request): Json<SnapshotRequest>,
) -> Reply<(StatusCode, Json<SnapshotReply>)> {
    let reply = service.take_snapshot(&name, request).await?;
    Ok((StatusCode::ACCEPTED, Json(reply)))
}

#[utoipa::path(get, operation_id = "get_snapshot", path = "/v1/instances/{name}/snapshots/{snapshot}", tag = "snapshots",
    params(("name" = String, Path, description = "The instance"), ("snapshot" = String, Path, description = "The snapshot")),
    responses(
        (status = 200, description = "The snapshot", body = Snapshot),
        (status = 404, description = "No such instance or snapshot", body = ErrorReply)))]
pub async fn get(
    State(service): State<Service>,
    Path((name, snapshot)): Path<(String, String)>,
) -> Reply<Json<Snapshot>> {
    Ok(Json(service.snapshot(&name, &snapshot)?))
}

/// Deletes a snapshot for good. What later ones and the instance need of it stays.
#[utoipa::path(delete, operation_id = "delete_snapshot", path = "/v1/instances/{name}/snapshots/{snapshot}", tag = "snapshots",
    params(("name" = String, Path, description = "The instance"), ("snapshot" = String, Path, description = "The snapshot")),
    responses(
        (status = 202, description = "The deletion has begun", body = Operation),
        (status = 404, description = "No such instance or snapshot", body = ErrorReply)))]
pub async fn delete(
    State(service): State<Service>,
    Path((name, snapshot)): Path<(String, String)>,
) -> Reply<(StatusCode, Json<Operation>)> {
    let operation = service.delete_snapshot(&name, &snapshot).await?;
    Ok((StatusCode::ACCEPTED, Json(operation)))
}

/// Brings an instance back to a snapshot; what it is now is lost.
#[utoipa::path(post, operation_id = "restore_snapshot", path = "/v1/instances/{name}/snapshots/{snapshot}/restore", tag = "snapshots", request_body = RestoreRequest,
    params(("name" = String, Path, description = "The instance"), ("snapshot" = String, Path, description = "The snapshot")),
    responses(
        (status = 202, description = "The restore has begun", body = Operation),
        (status = 404, description = "No such instance or snapshot", body = ErrorReply)))]
pub async fn restore(
    State(service): State<Service>,
    Path((name, snapshot)): Path<(String, String)>,
    Json(request): Json<RestoreRequest>,
) -> Reply<(StatusCode, Json<Operation>)> {
    let operation = service.restore(&name, &snapshot, &request).await?;
    Ok((StatusCode::ACCEPTED, Json(operation)))
}

/// Makes a new, stopped instance with the disk of another one or of one of its snapshots.
#[utoipa::path(post, operation_id = "clone_instance", path = "/v1/instances/{name}/clone", tag = "instances", request_body = CloneRequest,
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 202, description = "The clone is being made", body = CloneReply),
        (status = 404, description = "No such instance or snapshot", body = ErrorReply),
        (status = 409, description = "The name is in use", body = ErrorReply)))]
pub async fn clone(
    State(service): State<Service>,
    Path(name): Path<String>,
    Json(request): Json<CloneRequest>,
) -> Reply<(StatusCode, Json<CloneReply>)> {
    let reply = service.clone_instance(&name, request).await?;
    Ok((StatusCode::ACCEPTED, Json(reply)))
}

/// Gives an instance another name, in its guest too if that runs.
#[utoipa::path(post, operation_id = "rename_instance", path = "/v1/instances/{name}/rename", tag = "instances", request_body = RenameRequest,
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 200, description = "The instance", body = Instance),
        (status = 404, description = "No such instance", body = ErrorReply),
        (status = 409, description = "The name is in use", body = ErrorReply)))]
pub async fn rename(
    State(service): State<Service>,
    Path(name): Path<String>,
    Json(request): Json<RenameRequest>,
) -> Reply<Json<Instance>> {
    let renamed = async move { service.rename(&name, &request).await };
    Ok(Json(whole(renamed).await?))
}

/// Writes a running instance's memory to disk and ends its VM; a start goes on where it was.
#[utoipa::path(post, operation_id = "suspend_instance", path = "/v1/instances/{name}/suspend", tag = "instances",
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 202, description = "The suspend has begun", body = Operation),
        (status = 404, description = "No such instance", body = ErrorReply)))]
pub async fn suspend(
    State(service): State<Service>,
    Path(name): Path<String>,
) -> Reply<(StatusCode, Json<Operation>)> {
    let operation = service.suspend(&name).await?;
    Ok((StatusCode::ACCEPTED, Json(operation)))
}
