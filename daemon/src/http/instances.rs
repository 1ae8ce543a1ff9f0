//! `/v1/instances`: launch, look, start, stop, delete. What takes long answers with an operation.

use axum::body::Body;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use pileus_api::{
    DeleteQuery, ErrorReply, Instance, LaunchRequest, LogQuery, Operation, StartRequest,
    StopRequest,
};

use super::{Json, Path, Query, Reply};
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
    Ok(Json(service.purge().await?))
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
