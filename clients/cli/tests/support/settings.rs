//! Templates and settings as the daemon of the tests plays them.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use pileus_api::{Code, ErrorReply, OperationKind};
use pileus_base::Error;

use super::{App, Script, begin};

pub(super) fn routes() -> Router<App> {
    Router::new()
        .route("/v1/templates", get(templates).post(create_template))
        .route("/v1/templates/prune", post(prune))
        .route("/v1/templates/{id}", get(template).delete(delete_template))
        .route("/v1/settings", get(settings))
        .route("/v1/settings/{key}", get(setting).put(set))
}

async fn templates(State(app): State<App>) -> Json<Vec<serde_json::Value>> {
    Json(app.script.lock().unwrap().templates.clone())
}

async fn create_template(
    State(app): State<App>,
    Json(request): Json<serde_json::Value>,
) -> Response {
    app.script.lock().unwrap().template_requests.push(request);
    begin(&app, OperationKind::CreateTemplate, "debian-13")
}

fn find_template<'a>(script: &'a Script, id: &str) -> Option<&'a serde_json::Value> {
    let mut templates = script.templates.iter();
    templates.find(|t| t["id"].as_str().unwrap().starts_with(id))
}

fn no_template(id: &str) -> Response {
    let error = Error::new(Code::TemplateNotFound, format!("No template {id}")).into();
    (StatusCode::NOT_FOUND, Json(ErrorReply { error })).into_response()
}

async fn delete_template(State(app): State<App>, Path(id): Path<String>) -> Response {
    let mut script = app.script.lock().unwrap();
    let Some(template) = find_template(&script, &id) else {
        return no_template(&id);
    };
    let id = template["id"].clone();
    script.templates.retain(|template| template["id"] != id);
    Json(serde_json::json!({"id": id, "freed": 1 << 20})).into_response()
}

async fn template(State(app): State<App>, Path(id): Path<String>) -> Response {
    match find_template(&app.script.lock().unwrap(), &id) {
        Some(template) => Json(template).into_response(),
        None => no_template(&id),
    }
}

async fn prune() -> Json<serde_json::Value> {
    Json(serde_json::json!([{"id": "0123456789abcdef", "freed": 1 << 20}]))
}

fn setting_json((key, value): &(String, String)) -> serde_json::Value {
    serde_json::json!({"key": key, "value": value, "values": "anything"})
}

async fn settings(State(app): State<App>) -> Json<Vec<serde_json::Value>> {
    let script = app.script.lock().unwrap();
    Json(script.settings.iter().map(setting_json).collect())
}

async fn setting(State(app): State<App>, Path(key): Path<String>) -> Response {
    let script = app.script.lock().unwrap();
    match script.settings.iter().find(|s| s.0 == key) {
        Some(setting) => Json(setting_json(setting)).into_response(),
        None => {
            let text = format!("There is no setting {key}");
            let error = Error::new(Code::SettingNotFound, text).into();
            (StatusCode::NOT_FOUND, Json(ErrorReply { error })).into_response()
        }
    }
}

async fn set(
    State(app): State<App>,
    Path(key): Path<String>,
    Json(request): Json<serde_json::Value>,
) -> Response {
    let value = request["value"].as_str().unwrap().to_owned();
    let mut script = app.script.lock().unwrap();
    if let Some((bad, code, text)) = &script.bad_setting
        && *bad == key
    {
        let error = Error::new(*code, text.clone()).into();
        return (StatusCode::BAD_REQUEST, Json(ErrorReply { error })).into_response();
    }
    script.settings.retain(|s| s.0 != key);
    script.settings.push((key.clone(), value.clone()));
    Json(setting_json(&(key, value))).into_response()
}
