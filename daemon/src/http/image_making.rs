//! Images out of instances and recipes: the reply is the image. Whoever closes the connection ends the work.

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use pileus_api::archive::IMAGE_MEDIA_TYPE;
use pileus_api::{ErrorReply, PackRequest};

use super::archive::{reply, uploaded};
use super::{Json, Path, Reply};
use crate::http::listener::Peer;
use crate::service::Service;

/// Makes an image of an instance and sends it as `image.tar.zst`. The instance may run; it is not stopped.
#[utoipa::path(post, operation_id = "pack_instance", path = "/v1/instances/{name}/pack", tag = "images",
    params(("name" = String, Path, description = "The instance")),
    request_body = PackRequest,
    responses(
        (status = 200, description = "The image's bytes, when it is made. The header `pileus-operation` names the \
            operation that makes it (its result is the image's digest); if that fails, the reply breaks off",
            content_type = "application/vnd.pileus.image+zstd", body = String,
            headers(("pileus-operation" = String, description = "Id of the operation"))),
        (status = 400, description = "The request can't work", body = ErrorReply),
        (status = 404, description = "No such instance or snapshot", body = ErrorReply),
        (status = 409, description = "Its state doesn't allow this", body = ErrorReply)))]
pub async fn pack(
    State(service): State<Service>,
    Path(name): Path<String>,
    Json(request): Json<PackRequest>,
) -> Reply<Response> {
    Ok(reply(
        service.pack_instance(&name, request).await?,
        IMAGE_MEDIA_TYPE,
    ))
}

/// Makes an image by a recipe and sends it as `image.tar.zst`. The body is a `BuildRequest` as one line of JSON, then
/// a tar for each of the recipe's steps that copy, in their order, each with one member named `it`.
#[utoipa::path(post, operation_id = "build_image", path = "/v1/image-actions/build", tag = "images",
    request_body(content = pileus_api::BuildRequest, content_type = "application/vnd.pileus.build",
        description = "The recipe, and the files that it copies"),
    responses(
        (status = 200, description = "The image's bytes, when it is made. The header `pileus-operation` names the \
            operation that makes it: what its steps say are log lines of it; if it fails, the reply breaks off",
            content_type = "application/vnd.pileus.image+zstd", body = String,
            headers(("pileus-operation" = String, description = "Id of the operation"))),
        (status = 400, description = "The recipe can't work", body = ErrorReply),
        (status = 408, description = "The client fell silent", body = ErrorReply)))]
pub async fn build(State(service): State<Service>, peer: Peer, body: Body) -> Reply<Response> {
    let upload = service.receive_build(uploaded(body)).await?;
    Ok(reply(
        service.build_image(upload, peer).await?,
        IMAGE_MEDIA_TYPE,
    ))
}
