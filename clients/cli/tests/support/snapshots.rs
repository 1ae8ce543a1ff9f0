//! Snapshots as the daemon of the tests plays them, and what else is asked of it seldom.

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use pileus_api::{CatalogQuery, Code, ErrorReply, OperationKind};
use pileus_base::Error;

use super::{App, begin, missing, new_operation};

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route(
            "/v1/instances/{name}/snapshots",
            get(snapshots_of).post(take_snapshot),
        )
        .route(
            "/v1/instances/{name}/snapshots/{snapshot}",
            get(snapshot).delete(on_snapshot),
        )
        .route(
            "/v1/instances/{name}/snapshots/{snapshot}/restore",
            post(on_snapshot),
        )
        .route("/v1/snapshots", get(snapshots))
        .route("/v1/catalog", get(catalog))
        .route("/v1/authenticate", post(authenticate))
}

/// A snapshot with little to tell.
pub fn snapshot_json(instance: &str, name: &str, parent: Option<&str>) -> serde_json::Value {
    serde_json::json!({
        "id": uuid::Uuid::new_v4(), "instance": instance, "name": name, "comment": "",
        "parent": parent, "children": [], "head": true, "created_at": "2026-11-21T20:00:00Z",
        "cpus": 1, "memory": 1_u64 << 30, "disk": 5_u64 << 30, "with_memory": false, "size": 1 << 20,
    })
}

async fn snapshots(State(app): State<App>) -> Json<Vec<serde_json::Value>> {
    Json(app.script.lock().unwrap().snapshots.clone())
}

async fn snapshots_of(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Json<Vec<serde_json::Value>> {
    let mut snapshots = app.script.lock().unwrap().snapshots.clone();
    snapshots.retain(|snapshot| snapshot["instance"] == name);
    Json(snapshots)
}

async fn take_snapshot(
    State(app): State<App>,
    Path(name): Path<String>,
    Json(request): Json<serde_json::Value>,
) -> Response {
    let known = app.script.lock().unwrap().instances.clone();
    if known.iter().all(|i| i.name.as_str() != name) {
        return missing(&name);
    }
    let operation = new_operation(&app, OperationKind::Snapshot, &name);
    let taken = request["name"].as_str().unwrap_or("snapshot1");
    let reply = serde_json::json!({"operation": operation, "name": taken});
    (StatusCode::ACCEPTED, Json(reply)).into_response()
}

fn find_snapshot(
    app: &App,
    instance: &str,
    name: &str,
) -> Result<serde_json::Value, Box<Response>> {
    let script = app.script.lock().unwrap();
    let mut all = script.snapshots.iter();
    let found = all.find(|s| s["instance"] == instance && s["name"] == name);
    found.cloned().ok_or_else(|| {
        let text = format!("No such snapshot: {instance}.{name}");
        let error = Error::new(Code::SnapshotNotFound, text).into();
        Box::new((StatusCode::NOT_FOUND, Json(ErrorReply { error })).into_response())
    })
}

async fn snapshot(
    State(app): State<App>,
    Path((instance, name)): Path<(String, String)>,
) -> Response {
    match find_snapshot(&app, &instance, &name) {
        Ok(snapshot) => Json(snapshot).into_response(),
        Err(response) => *response,
    }
}

async fn on_snapshot(
    State(app): State<App>,
    Path((instance, name)): Path<(String, String)>,
) -> Response {
    match find_snapshot(&app, &instance, &name) {
        Ok(_) => begin(&app, OperationKind::Restore, &instance),
        Err(response) => *response,
    }
}

/// An exact name only; what was asked is kept as a body.
async fn catalog(State(app): State<App>, Query(query): Query<CatalogQuery>) -> Response {
    let mut script = app.script.lock().unwrap();
    let asked = serde_json::to_value(&query).unwrap();
    script.bodies.push(("GET /v1/catalog".to_owned(), asked));
    if let Some(error) = script.end.clone() {
        return (StatusCode::BAD_GATEWAY, Json(ErrorReply { error })).into_response();
    }
    let mut found = script.catalog.clone();
    let name = query.search.unwrap_or_default();
    if name.is_empty() {
        return Json(found).into_response();
    }
    found.retain(|entry| entry["name"] == name);
    if found.is_empty() {
        let text = format!("Unable to find an image matching \"{name}\".");
        let error = Error::new(Code::ImageNotFound, text).into();
        return (StatusCode::NOT_FOUND, Json(ErrorReply { error })).into_response();
    }
    for entry in &mut found {
        entry["aliases"] = serde_json::json!([]);
        entry["remote"] = "".into();
    }
    Json(found).into_response()
}

async fn authenticate(Json(request): Json<serde_json::Value>) -> Response {
    if request["passphrase"] == "open sesame" {
        return StatusCode::NO_CONTENT.into_response();
    }
    let text = "Passphrase is not correct. Please try again.";
    let error = Error::new(Code::WrongPassphrase, text).into();
    (StatusCode::FORBIDDEN, Json(ErrorReply { error })).into_response()
}
