//! `/v1/images` and `/v1/catalog`: what is in the store, and what can be launched by name.

use axum::extract::State;
use axum::http::StatusCode;
use pileus_api::{CatalogEntry, CatalogQuery, ErrorReply, Image, PruneReply};

use super::{Json, Path, Query, Reply};
use crate::service::Service;

/// Lists the images that can be launched by name.
#[utoipa::path(get, operation_id = "list_catalog", path = "/v1/catalog", tag = "images",
    params(CatalogQuery),
    responses(
        (status = 200, description = "Images of all hosts", body = Vec<CatalogEntry>),
        (status = 404, description = "Nothing has that name", body = ErrorReply)))]
pub async fn catalog(
    State(service): State<Service>,
    Query(query): Query<CatalogQuery>,
) -> Reply<Json<Vec<CatalogEntry>>> {
    Ok(Json(service.catalog(&query).await?))
}

/// Lists the images in the store.
#[utoipa::path(get, operation_id = "list_images", path = "/v1/images", tag = "images",
    responses((status = 200, description = "Images in the store", body = Vec<Image>)))]
pub async fn list(State(service): State<Service>) -> Reply<Json<Vec<Image>>> {
    Ok(Json(service.images().await?))
}

/// Removes an image that no instance stands on.
#[utoipa::path(delete, operation_id = "remove_image", path = "/v1/images/{image}", tag = "images",
    params(("image" = String, Path, description = "The digest, or its first digits")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "No such image", body = ErrorReply),
        (status = 409, description = "An instance stands on it", body = ErrorReply)))]
pub async fn remove(
    State(service): State<Service>,
    Path(digest): Path<String>,
) -> Reply<StatusCode> {
    service.remove_image(&digest).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes every image that no instance stands on.
#[utoipa::path(post, operation_id = "prune_images", path = "/v1/image-actions/prune", tag = "images",
    responses((status = 200, description = "What was removed", body = PruneReply)))]
pub async fn prune(State(service): State<Service>) -> Reply<Json<PruneReply>> {
    Ok(Json(service.prune_images().await?))
}
