//! The API over HTTP: routes, conversion of errors, and nothing else. Each handler reads a request,
//! calls the service and writes the reply.
//!
//! Next step on the way of the data: `daemon/src/service/`.

mod archive;
mod console;
mod events;
mod exec;
mod host;
mod image_making;
mod images;
mod instances;
pub mod listener;
mod networks;
mod operations;
mod port;
mod server;
mod settings;
mod snapshots;
mod templates;

use axum::Router;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use pileus_api::error::http_status;
use pileus_api::{Code, ErrorBody, ErrorReply, routes};
use pileus_base::Error;
use tower_http::trace::TraceLayer;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::service::Service;

/// A request body holds the user data at most (16 MiB, a third more in base64).
const MAX_BODY: usize = 24 << 20;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "pileus",
        description = "A local mini-cloud. Long work answers with an operation; see /v1/operations.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    servers((url = "http://localhost", description = "The daemon's Unix socket")),
    components(schemas(
        pileus_api::Event,
        pileus_api::OperationEvent,
        pileus_api::ExecControl,
        pileus_api::ExecEvent,
    ))
)]
struct Document;

/// The routes with their documentation.
fn documented() -> (Router<Service>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(server::server))
        .routes(routes!(events::events))
        .routes(routes!(instances::list, instances::launch))
        .routes(routes!(instances::get, instances::delete))
        .routes(routes!(instances::start))
        .routes(routes!(instances::stop))
        .routes(routes!(instances::restart))
        .routes(routes!(instances::recover))
        .routes(routes!(instances::log))
        .routes(routes!(instances::lease))
        .routes(routes!(instances::fork))
        .routes(routes!(instances::identity))
        .routes(routes!(exec::exec))
        .routes(routes!(host::get))
        .routes(routes!(host::usage))
        .routes(routes!(host::ssh))
        .routes(routes!(host::authenticate))
        .routes(routes!(networks::list))
        .routes(routes!(console::console))
        .routes(routes!(port::port))
        .routes(routes!(instances::purge))
        .routes(routes!(snapshots::suspend))
        .routes(routes!(snapshots::clone))
        .routes(routes!(snapshots::rename))
        .routes(routes!(snapshots::all))
        .routes(routes!(snapshots::list, snapshots::take))
        .routes(routes!(snapshots::get, snapshots::delete))
        .routes(routes!(snapshots::restore))
        .routes(routes!(archive::export))
        .routes(routes!(archive::import))
        .routes(routes!(images::catalog))
        .routes(routes!(images::list, images::pull))
        .routes(routes!(images::get, images::remove))
        .routes(routes!(images::export))
        .routes(routes!(images::tag, images::untag))
        .routes(routes!(images::import))
        .routes(routes!(images::inspect))
        .routes(routes!(images::verify))
        .routes(routes!(images::prune))
        .routes(routes!(image_making::pack))
        .routes(routes!(image_making::build))
        .routes(routes!(templates::list, templates::create))
        .routes(routes!(templates::get, templates::delete))
        .routes(routes!(templates::prune))
        .routes(routes!(settings::list))
        .routes(routes!(settings::get, settings::set))
        .routes(routes!(operations::list))
        .routes(routes!(operations::get, operations::cancel))
        .routes(routes!(operations::events))
        .routes(routes!(operations::wait))
        .split_for_parts()
}

/// The OpenAPI document as it is checked in at `api/openapi.json`.
pub fn openapi() -> String {
    let (_, document) = documented();
    let mut text = document
        .to_pretty_json()
        .unwrap_or_else(|err| format!("{{\"error\": \"{err}\"}}"));
    text.push('\n');
    text
}

/// The whole API as a service for axum.
pub fn router(service: Service) -> Router {
    let (router, _) = documented();
    router
        .route(
            routes::OPENAPI,
            axum::routing::get(|| async { ([("content-type", "application/json")], openapi()) }),
        )
        .fallback(|| async {
            let error = Error::new(Code::InvalidArgument, "There is no such path in this API");
            let mut response = Failure(error).into_response();
            *response.status_mut() = StatusCode::NOT_FOUND;
            response
        })
        .layer(axum::extract::DefaultBodyLimit::max(MAX_BODY))
        // `Failure` tells what is our fault; the rest is not: a full disk is a 507.
        .layer(TraceLayer::new_for_http().on_failure(()))
        .with_state(service)
}

/// An error on its way to the client.
#[derive(Debug)]
pub struct Failure(pub Error);

pub type Reply<T> = Result<T, Failure>;

impl From<Error> for Failure {
    fn from(err: Error) -> Self {
        Self(err)
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(http_status(self.0.code))
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(err = ?self.0, "a request failed");
        }
        let error = ErrorBody::from(self.0);
        (status, axum::Json(ErrorReply { error })).into_response()
    }
}

/// Does what a request asks for to its end, though its client goes meanwhile: the half of a change would stay.
/// What is an operation does that by itself.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = pileus_base::Result<T>> + Send + 'static,
) -> Reply<T> {
    let done = tokio::spawn(work).await;
    Ok(done.map_err(|err| Error::internal("The work broke off").with_source(err))??)
}

macro_rules! rejections {
    ($($rejection:ty),*) => {$(
        impl From<$rejection> for Failure {
            fn from(rejection: $rejection) -> Self {
                Self(Error::new(Code::InvalidArgument, rejection.body_text()))
            }
        }
    )*};
}
rejections!(JsonRejection, PathRejection, QueryRejection);

/// axum's extractors, with our errors.
#[derive(FromRequest)]
#[from_request(via(axum::Json), rejection(Failure))]
pub struct Json<T>(pub T);

impl<T: serde::Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        axum::Json(self.0).into_response()
    }
}

#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Failure))]
pub struct Path<T>(pub T);

#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Failure))]
pub struct Query<T>(pub T);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_change_goes_on_without_its_client() {
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let (done, is_done) = tokio::sync::oneshot::channel::<()>();
        {
            let work = whole(async move {
                let _ = wait.await;
                let _ = done.send(());
                Ok(())
            });
            let mut work = std::pin::pin!(work);
            assert!(futures_util::poll!(&mut work).is_pending());
        }
        go.send(()).unwrap();
        is_done.await.unwrap();
    }

    /// `UPDATE_DOCS=1 cargo test -p pileusd` writes the document anew.
    #[test]
    fn the_checked_in_document_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../api/openapi.json");
        let now = openapi();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, &now).unwrap();
        }
        let kept = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            kept == now,
            "api/openapi.json is old: run `cargo xtask openapi`"
        );
    }

    #[test]
    fn every_route_is_documented_under_its_constant() {
        let document: serde_json::Value = serde_json::from_str(&openapi()).unwrap();
        let paths = document["paths"].as_object().unwrap();
        let constants = [
            routes::SERVER,
            routes::EVENTS,
            routes::INSTANCES,
            routes::INSTANCE,
            routes::INSTANCE_START,
            routes::INSTANCE_STOP,
            routes::INSTANCE_RESTART,
            routes::INSTANCE_RECOVER,
            routes::INSTANCE_EXEC,
            routes::INSTANCE_PORT,
            routes::INSTANCE_LOG,
            routes::INSTANCE_LEASE,
            routes::INSTANCE_FORK,
            routes::INSTANCE_IDENTITY,
            routes::INSTANCE_SSH,
            routes::INSTANCE_CONSOLE,
            routes::INSTANCE_EXPORT,
            routes::INSTANCE_PACK,
            routes::IMAGES_BUILD,
            routes::IMPORT,
            routes::HOST,
            routes::NETWORKS,
            routes::USAGE,
            routes::AUTHENTICATE,
            routes::INSTANCE_SUSPEND,
            routes::INSTANCE_CLONE,
            routes::INSTANCE_RENAME,
            routes::INSTANCE_SNAPSHOTS,
            routes::INSTANCE_SNAPSHOT,
            routes::INSTANCE_RESTORE,
            routes::SNAPSHOTS,
            routes::TEMPLATES,
            routes::TEMPLATE,
            routes::TEMPLATES_PRUNE,
            routes::SETTINGS,
            routes::SETTING,
            routes::PURGE,
            routes::CATALOG,
            routes::IMAGES,
            routes::IMAGE,
            routes::IMAGE_EXPORT,
            routes::IMAGE_TAG,
            routes::IMAGES_IMPORT,
            routes::IMAGES_INSPECT,
            routes::IMAGES_VERIFY,
            routes::IMAGES_PRUNE,
            routes::OPERATIONS,
            routes::OPERATION,
            routes::OPERATION_EVENTS,
            routes::OPERATION_WAIT,
        ];
        for path in constants {
            assert!(paths.contains_key(path), "{path} is not documented");
        }
        assert_eq!(paths.len(), constants.len());
    }
}
