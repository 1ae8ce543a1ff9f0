//! `/v1/instances`: launch, look, start, stop, delete. What takes long answers with an operation.

use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use pileus_api::{
    DeleteQuery, ErrorReply, ForkReply, ForkRequest, Identity, Instance, LaunchRequest,
    LeaseRequest, LogQuery, Operation, StartRequest, StopRequest,
};

use super::{Json, Path, Query, Reply, whole};
use crate::http::listener::Peer;
use crate::service::Service;

type Begun = (StatusCode, Json<Operation>);

fn begun(operation: Operation) -> Begun {
    (StatusCode::ACCEPTED, Json(operation))
}

/// Lists all instances by name, those in the trash too.
#[utoipa::path(get, operation_id = "list_instances", path = "/v1/instances", tag = "instances",
    responses((status = 200, description = "Instances", body = Vec<Instance>)))]
pub async fn list(State(service): State<Service>) -> Json<Vec<Instance>> {
    Json(service.instances())
}

/// Makes and boots a new instance. The operation's target is its name; it ends when cloud-init has.
#[utoipa::path(post, operation_id = "launch_instance", path = "/v1/instances", tag = "instances", request_body = LaunchRequest,
    responses(
        (status = 202, description = "The launch has begun", body = Operation),
        (status = 400, description = "The request can't work", body = ErrorReply),
        (status = 409, description = "The name is in use", body = ErrorReply)))]
pub async fn launch(
    State(service): State<Service>,
    peer: Peer,
    Json(request): Json<LaunchRequest>,
) -> Reply<Begun> {
    Ok(begun(service.launch(request, peer).await?))
}

/// Tells all about an instance, with a report that is at most a second old.
#[utoipa::path(get, operation_id = "get_instance", path = "/v1/instances/{name}", tag = "instances",
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 200, description = "The instance", body = Instance),
        (status = 404, description = "No such instance", body = ErrorReply)))]
pub async fn get(
    State(service): State<Service>,
    Path(name): Path<String>,
) -> Reply<Json<Instance>> {
    Ok(Json(service.instance(&name).await?))
}

/// Moves an instance to the trash (it is shut down first), or deletes it for good.
#[utoipa::path(delete, operation_id = "delete_instance", path = "/v1/instances/{name}", tag = "instances",
    params(("name" = String, Path, description = "The instance"), DeleteQuery),
    responses(
        (status = 202, description = "The deletion has begun", body = Operation),
        (status = 404, description = "No such instance", body = ErrorReply)))]
pub async fn delete(
    State(service): State<Service>,
    Path(name): Path<String>,
    Query(query): Query<DeleteQuery>,
) -> Reply<Begun> {
    Ok(begun(service.delete(&name, query.purge).await?))
}

/// Boots a stopped instance. The operation ends when its guest is up and cloud-init has ended.
#[utoipa::path(post, operation_id = "start_instance", path = "/v1/instances/{name}/start", tag = "instances", request_body = StartRequest,
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 202, description = "The start has begun", body = Operation),
        (status = 404, description = "No such instance", body = ErrorReply),
        (status = 409, description = "It is in the trash", body = ErrorReply)))]
pub async fn start(
    State(service): State<Service>,
    Path(name): Path<String>,
    Json(request): Json<StartRequest>,
) -> Reply<Begun> {
    Ok(begun(service.start(&name, &request).await?))
}

/// Shuts an instance down, or cuts its power.
#[utoipa::path(post, operation_id = "stop_instance", path = "/v1/instances/{name}/stop", tag = "instances", request_body = StopRequest,
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 202, description = "The stop has begun", body = Operation),
        (status = 404, description = "No such instance", body = ErrorReply)))]
pub async fn stop(
    State(service): State<Service>,
    Path(name): Path<String>,
    Json(request): Json<StopRequest>,
) -> Reply<Begun> {
    Ok(begun(service.stop(&name, &request).await?))
}

/// Reboots a running instance.
#[utoipa::path(post, operation_id = "restart_instance", path = "/v1/instances/{name}/restart", tag = "instances", request_body = StartRequest,
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 202, description = "The restart has begun", body = Operation),
        (status = 404, description = "No such instance", body = ErrorReply)))]
pub async fn restart(
    State(service): State<Service>,
    Path(name): Path<String>,
    Json(request): Json<StartRequest>,
) -> Reply<Begun> {
    Ok(begun(service.restart(&name, &request).await?))
}

/// Takes an instance out of the trash.
#[utoipa::path(post, operation_id = "recover_instance", path = "/v1/instances/{name}/recover", tag = "instances",
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 200, description = "The instance", body = Instance),
        (status = 404, description = "No such instance", body = ErrorReply)))]
pub async fn recover(
    State(service): State<Service>,
    Path(name): Path<String>,
) -> Reply<Json<Instance>> {
    Ok(Json(service.recover(&name).await?))
}

/// Deletes everything in the trash for good; answers with the names.
#[utoipa::path(post, operation_id = "purge_instances", path = "/v1/purge", tag = "instances",
    responses((status = 200, description = "Names of the instances that are gone", body = Vec<String>)))]
pub async fn purge(State(service): State<Service>) -> Reply<Json<Vec<String>>> {
    Ok(Json(whole(async move { service.purge().await }).await?))
}

/// Renews the lease of a throw-away instance, or ends the lease and keeps the instance.
#[utoipa::path(post, operation_id = "renew_lease", path = "/v1/instances/{name}/lease", tag = "instances", request_body = LeaseRequest,
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 200, description = "The instance", body = Instance),
        (status = 404, description = "No such instance, or its lease has run out", body = ErrorReply),
        (status = 409, description = "It has no lease", body = ErrorReply)))]
pub async fn lease(
    State(service): State<Service>,
    Path(name): Path<String>,
    Json(request): Json<LeaseRequest>,
) -> Reply<Json<Instance>> {
    Ok(Json(service.renew_lease(&name, &request).await?))
}

/// Clones a running instance with its memory. The operation ends when all clones run.
#[utoipa::path(post, operation_id = "fork_instance", path = "/v1/instances/{name}/fork", tag = "instances", request_body = ForkRequest,
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 202, description = "The fork has begun", body = ForkReply),
        (status = 404, description = "No such instance", body = ErrorReply),
        (status = 409, description = "It does not run, or a name is in use", body = ErrorReply)))]
pub async fn fork(
    State(service): State<Service>,
    Path(name): Path<String>,
    Json(request): Json<ForkRequest>,
) -> Reply<(StatusCode, Json<ForkReply>)> {
    let reply = service.fork(&name, request).await?;
    Ok((StatusCode::ACCEPTED, Json(reply)))
}

/// Tells what makes the instance itself, as its guest sees it.
#[utoipa::path(get, operation_id = "get_instance_identity", path = "/v1/instances/{name}/identity", tag = "instances",
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 200, description = "Its identity", body = Identity),
        (status = 404, description = "No such instance", body = ErrorReply),
        (status = 409, description = "It does not run", body = ErrorReply)))]
pub async fn identity(
    State(service): State<Service>,
    Path(name): Path<String>,
) -> Reply<Json<Identity>> {
    Ok(Json(service.identity(&name).await?))
}

/// Sends the serial console's log as it is; with `follow` the reply stays open.
#[utoipa::path(get, operation_id = "get_instance_log", path = "/v1/instances/{name}/log", tag = "instances",
    params(("name" = String, Path, description = "The instance"), LogQuery),
    responses(
        (status = 200, description = "The log's bytes, as the guest wrote them",
            content_type = "application/octet-stream", body = String),
        (status = 404, description = "No such instance", body = ErrorReply)))]
pub async fn log(
    State(service): State<Service>,
    Path(name): Path<String>,
    Query(query): Query<LogQuery>,
) -> Reply<Response> {
    let stream = service.log(&name, query.follow, query.tail)?;
    Ok((
        [(header::CONTENT_TYPE, "application/octet-stream")],
        Body::from_stream(stream),
    )
        .into_response())
}
