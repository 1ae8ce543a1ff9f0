//! `/v1/events`: what changes, as server-sent events.

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::response::sse::{Event as SseEvent, KeepAlive, Sse};
use futures_util::Stream;
use pileus_api::Event;
use tokio::sync::broadcast::error::RecvError;

use crate::service::Service;

/// A message of a stream; what can't be written as JSON is our fault and is left out.
pub(super) fn message<T: serde::Serialize>(value: &T) -> Option<Result<SseEvent, Infallible>> {
    SseEvent::default().json_data(value).ok().map(Ok)
}

/// Keeps proxies and half-dead connections awake.
pub(super) fn keep_alive() -> KeepAlive {
    KeepAlive::new().interval(Duration::from_secs(15))
}

/// Streams every change of instances, operations and images.
#[utoipa::path(get, operation_id = "follow_events", path = "/v1/events", tag = "server",
    responses((status = 200, description = "Server-sent events, each an Event as JSON",
        content_type = "text/event-stream", body = Event)))]
pub async fn events(
    State(service): State<Service>,
) -> Sse<impl Stream<Item = Result<SseEvent, Infallible>>> {
    let events = service.hub().subscribe();
    let stream = futures_util::stream::unfold(events, |mut events| async move {
        loop {
            let event = match events.recv().await {
                Ok(event) => event,
                Err(RecvError::Lagged(missed)) => Event::Lagged { missed },
                Err(RecvError::Closed) => return None,
            };
            if let Some(message) = message(&event) {
                return Some((message, events));
            }
        }
    });
    Sse::new(stream).keep_alive(keep_alive())
}
