//! `/v1/images` and `/v1/catalog`: what is in the store, what can be launched by name, and images as streams of bytes.

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use pileus_api::archive::IMAGE_MEDIA_TYPE;
use pileus_api::{
    CatalogEntry, CatalogQuery, ErrorReply, Image, ImageDetails, ImageImportQuery,
    ImageInspectQuery, ImagePruneQuery, ImageRemoveQuery, Inspection, Operation, PruneReply,
    PullRequest, TagRequest, VerifyRequest,
};
use pileus_base::Error;

use super::archive::{ended, reply, upload};
use super::{Json, Path, Query, Reply};
use crate::http::listener::Peer;
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

/// Brings an image into the store. The operation's result is its digest.
#[utoipa::path(post, operation_id = "pull_image", path = "/v1/images", tag = "images", request_body = PullRequest,
    responses(
        (status = 202, description = "The work has begun", body = Operation),
        (status = 400, description = "The request can't work", body = ErrorReply)))]
pub async fn pull(
    State(service): State<Service>,
    peer: Peer,
    Json(request): Json<PullRequest>,
) -> Reply<(StatusCode, Json<Operation>)> {
    let operation = service.pull_image(request, peer).await?;
    Ok((StatusCode::ACCEPTED, Json(operation)))
}

/// Tells all about an image of the store.
#[utoipa::path(get, operation_id = "get_image", path = "/v1/images/{image}", tag = "images",
    params(("image" = String, Path, description = "A digest or its first digits, a tag, or a source")),
    responses(
        (status = 200, description = "The image", body = ImageDetails),
        (status = 404, description = "No such image", body = ErrorReply)))]
pub async fn get(
    State(service): State<Service>,
    Path(image): Path<String>,
) -> Reply<Json<ImageDetails>> {
    Ok(Json(service.image(&image).await?))
}

/// Removes an image that nobody uses.
#[utoipa::path(delete, operation_id = "remove_image", path = "/v1/images/{image}", tag = "images",
    params(
        ("image" = String, Path, description = "A digest or its first digits, a tag, or a source"),
        ImageRemoveQuery),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "No such image", body = ErrorReply),
        (status = 409, description = "It is used, or has a tag", body = ErrorReply)))]
pub async fn remove(
    State(service): State<Service>,
    Path(image): Path<String>,
    Query(query): Query<ImageRemoveQuery>,
) -> Reply<StatusCode> {
    service.remove_image(&image, query.force).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Sends an image as a packed image, `image.tar.zst`.
#[utoipa::path(get, operation_id = "export_image", path = "/v1/images/{image}/export", tag = "images",
    params(("image" = String, Path, description = "A digest or its first digits, a tag, or a source")),
    responses(
        (status = 200, description = "The archive. The header `pileus-operation` names the operation that writes it; if \
            that fails, the reply breaks off",
            content_type = "application/vnd.pileus.image+zstd", body = String,
            headers(("pileus-operation" = String, description = "Id of the operation"))),
        (status = 404, description = "No such image", body = ErrorReply)))]
pub async fn export(State(service): State<Service>, Path(image): Path<String>) -> Reply<Response> {
    let export = service.export_image(&image).await?;
    Ok(reply(export, IMAGE_MEDIA_TYPE))
}

/// Takes an image in any form that a launch takes. The reply comes when it is in the store; a connection that is closed
/// before leaves nothing.
#[utoipa::path(post, operation_id = "import_image", path = "/v1/image-actions/import", tag = "images",
    params(ImageImportQuery),
    request_body(content = String, content_type = "application/octet-stream", description = "The image's bytes"),
    responses(
        (status = 200, description = "The operation; its result is the image's digest", body = Operation),
        (status = 400, description = "The image is damaged or breaks a rule", body = ErrorReply),
        (status = 408, description = "The client fell silent", body = ErrorReply),
        (status = 507, description = "There is no room for it", body = ErrorReply)))]
pub async fn import(
    State(service): State<Service>,
    Query(query): Query<ImageImportQuery>,
    headers: HeaderMap,
    body: Body,
) -> Reply<Json<Operation>> {
    let length = headers.get(header::CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse().ok());
    let operation = service.import_image(query, length, upload(body)).await?;
    Ok(Json(ended(&service, operation).await?))
}

/// Judges an image as an import does, and keeps nothing of it. One that breaks a rule is no error here: the reply says so.
#[utoipa::path(post, operation_id = "inspect_image", path = "/v1/image-actions/inspect", tag = "images",
    params(ImageInspectQuery),
    request_body(content = String, content_type = "application/octet-stream", description = "The image's bytes"),
    responses(
        (status = 200, description = "What it is", body = Inspection),
        (status = 408, description = "The client fell silent", body = ErrorReply),
        (status = 507, description = "There is no room to look at it", body = ErrorReply)))]
pub async fn inspect(
    State(service): State<Service>,
    Query(query): Query<ImageInspectQuery>,
    body: Body,
) -> Reply<Json<Inspection>> {
    let (operation, found) = service.inspect_image(query, upload(body)).await?;
    ended(&service, operation).await?;
    let found = found.await;
    Ok(Json(found.map_err(|_| {
        Error::internal("An image was judged, and nothing came of it")
    })?))
}

/// Reads images of the store again and compares them with what they were when they came.
#[utoipa::path(post, operation_id = "verify_images", path = "/v1/image-actions/verify", tag = "images",
    request_body = VerifyRequest,
    responses(
        (status = 202, description = "The work has begun. It fails if an image is damaged; its result is how many are not",
            body = Operation),
        (status = 404, description = "No such image", body = ErrorReply)))]
pub async fn verify(
    State(service): State<Service>,
    Json(request): Json<VerifyRequest>,
) -> Reply<(StatusCode, Json<Operation>)> {
    let operation = service.verify_images(request).await?;
    Ok((StatusCode::ACCEPTED, Json(operation)))
}

/// Gives an image a name. One that another image has changes hands.
#[utoipa::path(put, operation_id = "tag_image", path = "/v1/image-tags/{tag}", tag = "images",
    params(("tag" = String, Path, description = "The name")),
    request_body = TagRequest,
    responses(
        (status = 200, description = "The image", body = ImageDetails),
        (status = 400, description = "That can't be a name", body = ErrorReply),
        (status = 404, description = "No such image", body = ErrorReply)))]
pub async fn tag(
    State(service): State<Service>,
    Path(tag): Path<String>,
    Json(request): Json<TagRequest>,
) -> Reply<Json<ImageDetails>> {
    Ok(Json(service.tag_image(tag, &request).await?))
}

/// Takes a name away; the image stays.
#[utoipa::path(delete, operation_id = "untag_image", path = "/v1/image-tags/{tag}", tag = "images",
    params(("tag" = String, Path, description = "The name")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 404, description = "No such name", body = ErrorReply)))]
pub async fn untag(State(service): State<Service>, Path(tag): Path<String>) -> Reply<StatusCode> {
    service.untag_image(tag).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Removes images that nobody uses.
#[utoipa::path(post, operation_id = "prune_images", path = "/v1/image-actions/prune", tag = "images",
    params(ImagePruneQuery),
    responses(
        (status = 200, description = "What was removed, or would be", body = PruneReply),
        (status = 400, description = "A bound that is none", body = ErrorReply)))]
pub async fn prune(
    State(service): State<Service>,
    Query(query): Query<ImagePruneQuery>,
) -> Reply<Json<PruneReply>> {
    Ok(Json(service.prune_images(query).await?))
}
