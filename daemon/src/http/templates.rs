//! `/v1/templates`: saved machines that launches start from.

use axum::extract::State;
use axum::http::StatusCode;
use pileus_api::{
    ErrorReply, Operation, PrunedTemplate, Template, TemplatePruneQuery, TemplateRequest,
};

use super::{Json, Path, Query, Reply};
use crate::http::listener::Peer;
use crate::service::Service;

/// Lists all templates, those that are being made too.
#[utoipa::path(get, operation_id = "list_templates", path = "/v1/templates", tag = "templates",
    responses((status = 200, description = "Templates", body = Vec<Template>)))]
pub async fn list(State(service): State<Service>) -> Json<Vec<Template>> {
    Json(service.templates())
}

/// Boots a machine of an image and shape and saves it. Ends at once if there is such a template.
#[utoipa::path(post, operation_id = "create_template", path = "/v1/templates", tag = "templates", request_body = TemplateRequest,
    responses(
        (status = 202, description = "The work has begun; its target is the image", body = Operation),
        (status = 400, description = "The request can't work", body = ErrorReply)))]
pub async fn create(
    State(service): State<Service>,
    peer: Peer,
    Json(request): Json<TemplateRequest>,
) -> Reply<(StatusCode, Json<Operation>)> {
    let operation = service.create_template(request, peer).await?;
    Ok((StatusCode::ACCEPTED, Json(operation)))
}

/// Tells all about a template, by its id or the id's first digits.
#[utoipa::path(get, operation_id = "get_template", path = "/v1/templates/{id}", tag = "templates",
    params(("id" = String, Path, description = "The template")),
    responses(
        (status = 200, description = "The template", body = Template),
        (status = 404, description = "No such template", body = ErrorReply)))]
pub async fn get(State(service): State<Service>, Path(id): Path<String>) -> Reply<Json<Template>> {
    Ok(Json(service.template(&id)?))
}

/// Deletes a template. The disk layer of one that instances stand on is kept until they are gone.
#[utoipa::path(delete, operation_id = "delete_template", path = "/v1/templates/{id}", tag = "templates",
    params(("id" = String, Path, description = "The template")),
    responses(
        (status = 200, description = "It is gone", body = PrunedTemplate),
        (status = 404, description = "No such template", body = ErrorReply),
        (status = 409, description = "A launch uses it right now", body = ErrorReply)))]
pub async fn delete(
    State(service): State<Service>,
    Path(id): Path<String>,
) -> Reply<Json<PrunedTemplate>> {
    Ok(Json(service.delete_template(&id).await?))
}

/// Deletes the templates that no launch would use any more, or all.
#[utoipa::path(post, operation_id = "prune_templates", path = "/v1/templates/prune", tag = "templates",
    params(TemplatePruneQuery),
    responses((status = 200, description = "What is gone", body = Vec<PrunedTemplate>)))]
pub async fn prune(
    State(service): State<Service>,
    Query(query): Query<TemplatePruneQuery>,
) -> Reply<Json<Vec<PrunedTemplate>>> {
    Ok(Json(service.prune_templates(query.all).await?))
}
