//! `/v1/server`: what the daemon says of itself.

use axum::extract::State;
use pileus_api::ServerInfo;

use super::Json;
use crate::service::Service;

/// Tells the daemon's version, its mode and what doesn't work as it should.
#[utoipa::path(get, operation_id = "get_server", path = "/v1/server", tag = "server",
    responses((status = 200, description = "The daemon", body = ServerInfo)))]
pub async fn server(State(service): State<Service>) -> Json<ServerInfo> {
    Json(service.server_info().await)
}
