//! `/v1/settings`: what can be set, and what holds.

use axum::extract::State;
use pileus_api::{ErrorReply, Setting, SettingRequest};

use super::{Json, Path, Reply, whole};
use crate::service::Service;

/// Lists all settings.
#[utoipa::path(get, operation_id = "list_settings", path = "/v1/settings", tag = "settings",
    responses((status = 200, description = "Settings", body = Vec<Setting>)))]
pub async fn list(State(service): State<Service>) -> Reply<Json<Vec<Setting>>> {
    Ok(Json(service.settings().await?))
}

#[utoipa::path(get, operation_id = "get_setting", path = "/v1/settings/{key}", tag = "settings",
    params(("key" = String, Path, description = "The setting")),
    responses(
        (status = 200, description = "The setting", body = Setting),
        (status = 404, description = "No such setting", body = ErrorReply)))]
pub async fn get(State(service): State<Service>, Path(key): Path<String>) -> Reply<Json<Setting>> {
    Ok(Json(service.setting(&key).await?))
}

/// Changes a setting; it holds at once.
#[utoipa::path(put, operation_id = "set_setting", path = "/v1/settings/{key}", tag = "settings", request_body = SettingRequest,
    params(("key" = String, Path, description = "The setting")),
    responses(
        (status = 200, description = "The setting as it is now", body = Setting),
        (status = 400, description = "The value is not possible", body = ErrorReply),
        (status = 404, description = "No such setting", body = ErrorReply)))]
pub async fn set(
    State(service): State<Service>,
    Path(key): Path<String>,
    Json(request): Json<SettingRequest>,
) -> Reply<Json<Setting>> {
    let set = async move { service.set(&key, &request.value).await };
    Ok(Json(whole(set).await?))
}
