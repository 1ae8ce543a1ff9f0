//! `/v1/networks`: the host's interfaces that instances can be connected to.

use axum::extract::State;
use pileus_api::HostNetwork;

use super::{Json, Reply};
use crate::service::Service;

/// Lists bridges and Ethernet cards of the host.
#[utoipa::path(get, operation_id = "list_networks", path = "/v1/networks", tag = "host",
    responses((status = 200, description = "Networks by name", body = Vec<HostNetwork>)))]
pub async fn list(State(service): State<Service>) -> Reply<Json<Vec<HostNetwork>>> {
    Ok(Json(service.networks().await?))
}
