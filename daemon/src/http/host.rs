//! `/v1/host`, `/v1/usage`, `/v1/authenticate` and how to reach an instance by SSH.

use axum::extract::State;
use axum::http::StatusCode;
use pileus_api::{AuthenticateRequest, ErrorReply, HostInfo, InstanceUsage, SshInfo};

use super::{Json, Path, Reply};
use crate::service::Service;

/// Tells what the host has, and whether all is there that pileus needs.
#[utoipa::path(get, operation_id = "get_host", path = "/v1/host", tag = "host",
    responses((status = 200, description = "The host", body = HostInfo)))]
pub async fn get(State(service): State<Service>) -> Reply<Json<HostInfo>> {
    Ok(Json(service.host().await?))
}

/// Tells what each running instance has used of the host since its VM started.
#[utoipa::path(get, operation_id = "get_usage", path = "/v1/usage", tag = "host",
    responses((status = 200, description = "Counters of all running instances by name",
        body = Vec<InstanceUsage>)))]
pub async fn usage(State(service): State<Service>) -> Reply<Json<Vec<InstanceUsage>>> {
    Ok(Json(service.usage().await?))
}

/// Tells how an ordinary SSH client reaches an instance.
#[utoipa::path(get, operation_id = "get_instance_ssh", path = "/v1/instances/{name}/ssh", tag = "instances",
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 200, description = "Address and keys", body = SshInfo),
        (status = 404, description = "No such instance", body = ErrorReply),
        (status = 409, description = "It is in the trash, or being made", body = ErrorReply)))]
pub async fn ssh(State(service): State<Service>, Path(name): Path<String>) -> Reply<Json<SshInfo>> {
    Ok(Json(service.ssh_info(&name).await?))
}

/// Says whether a passphrase is the one that was set (`local.passphrase`). It opens nothing: whoever
/// can connect to the daemon may use it already. It is there for scripts that call it.
#[utoipa::path(post, operation_id = "authenticate", path = "/v1/authenticate", tag = "host",
    request_body = AuthenticateRequest,
    responses(
        (status = 204, description = "It is right"),
        (status = 403, description = "It is wrong, none is set, or too many were tried", body = ErrorReply)))]
pub async fn authenticate(
    State(service): State<Service>,
    Json(request): Json<AuthenticateRequest>,
) -> Reply<StatusCode> {
    service.authenticate(&request.passphrase).await?;
    Ok(StatusCode::NO_CONTENT)
}
