//! `/v1/operations`: look at long work, follow it, wait for it, cancel it.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event as SseEvent, Sse};
use futures_util::{Stream, StreamExt};
use pileus_api::{ErrorReply, Operation, OperationEvent};
use serde::Deserialize;
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use super::events::{keep_alive, message};
use super::{Json, Path, Query, Reply};
use crate::operations::Operations;
use crate::service::Service;

/// A client that waits longer asks again.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// Lists the newest operations, newest first.
#[utoipa::path(get, operation_id = "list_operations", path = "/v1/operations", tag = "operations",
    responses((status = 200, description = "Operations", body = Vec<Operation>)))]
pub async fn list(State(service): State<Service>) -> Reply<Json<Vec<Operation>>> {
    Ok(Json(service.operations().list().await?))
}

/// Tells where an operation stands.
#[utoipa::path(get, operation_id = "get_operation", path = "/v1/operations/{id}", tag = "operations",
    params(("id" = Uuid, Path, description = "The operation")),
    responses(
        (status = 200, description = "The operation", body = Operation),
        (status = 404, description = "No such operation", body = ErrorReply)))]
pub async fn get(State(service): State<Service>, Path(id): Path<Uuid>) -> Reply<Json<Operation>> {
    Ok(Json(service.operations().get(id).await?))
}

/// Asks an operation to stop. It undoes what it must; wait for its end.
#[utoipa::path(delete, operation_id = "cancel_operation", path = "/v1/operations/{id}", tag = "operations",
    params(("id" = Uuid, Path, description = "The operation")),
    responses(
        (status = 200, description = "The operation as it is now", body = Operation),
        (status = 404, description = "No such operation", body = ErrorReply)))]
pub async fn cancel(
    State(service): State<Service>,
    Path(id): Path<Uuid>,
) -> Reply<Json<Operation>> {
    Ok(Json(service.operations().cancel(id).await?))
}

#[derive(Debug, Deserialize, utoipa::IntoParams)]
#[into_params(parameter_in = Query)]
pub struct WaitQuery {
    /// How long to wait at most; 600 at most, which is also the default.
    seconds: Option<u64>,
}

/// Answers when the operation is over, or with its present state when the time is up.
#[utoipa::path(get, operation_id = "wait_for_operation", path = "/v1/operations/{id}/wait", tag = "operations",
    params(("id" = Uuid, Path, description = "The operation"), WaitQuery),
    responses(
        (status = 200, description = "The operation", body = Operation),
        (status = 404, description = "No such operation", body = ErrorReply)))]
pub async fn wait(
    State(service): State<Service>,
    Path(id): Path<Uuid>,
    Query(query): Query<WaitQuery>,
) -> Reply<Json<Operation>> {
    let at_most = query
        .seconds
        .map_or(LONGEST_WAIT, Duration::from_secs)
        .min(LONGEST_WAIT);
    Ok(Json(service.operations().wait(id, at_most).await?))
}

/// Streams what an operation does until it is over.
#[utoipa::path(get, operation_id = "follow_operation", path = "/v1/operations/{id}/events", tag = "operations",
    params(("id" = Uuid, Path, description = "The operation")),
    responses(
        (status = 200, description = "Server-sent events, each an OperationEvent as JSON; the last is `done`",
            content_type = "text/event-stream", body = OperationEvent),
        (status = 404, description = "No such operation", body = ErrorReply)))]
pub async fn events(
    State(service): State<Service>,
    Path(id): Path<Uuid>,
) -> Reply<Sse<impl Stream<Item = Result<SseEvent, Infallible>>>> {
    let operations = service.operations().clone();
    let follow = operations.follow(id).await?;
    let mut first = Vec::new();
    match &follow.events {
        None => first.push(OperationEvent::Done {
            operation: Box::new(follow.operation),
        }),
        Some(_) => {
            first.extend(
                follow
                    .operation
                    .phase
                    .map(|phase| OperationEvent::Phase { phase }),
            );
            first.extend(
                follow
                    .operation
                    .progress
                    .map(|progress| OperationEvent::Progress { progress }),
            );
        }
    }
    let rest = futures_util::stream::unfold(follow.events, move |events| {
        next_event(operations.clone(), id, events)
    });
    let stream = futures_util::stream::iter(first)
        .chain(rest)
        .filter_map(|event| async move { message(&event) });
    Ok(Sse::new(stream).keep_alive(keep_alive()))
}

type Events = tokio::sync::broadcast::Receiver<OperationEvent>;

async fn next_event(
    operations: Operations,
    id: Uuid,
    events: Option<Events>,
) -> Option<(OperationEvent, Option<Events>)> {
    let mut events = events?;
    loop {
        match events.recv().await {
            Ok(done @ OperationEvent::Done { .. }) => return Some((done, None)),
            Ok(event) => return Some((event, Some(events))),
            // A slow reader misses some progress; it must not miss the end.
            Err(RecvError::Lagged(_)) => {}
            Err(RecvError::Closed) => {
                let operation = Box::new(operations.get(id).await.ok()?);
                return Some((OperationEvent::Done { operation }, None));
            }
        }
    }
}
