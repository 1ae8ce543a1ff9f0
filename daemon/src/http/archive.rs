//! Instances as archives: bytes both ways. Whoever closes the connection ends the work, and so does whoever sends
//! nothing for too long while there is room for it.

use std::io;
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use pileus_api::archive::{MEDIA_TYPE, OPERATION_HEADER};
use pileus_api::{ErrorReply, ImportQuery, Operation, OperationState};
use pileus_base::{Code, Error};
use tokio::sync::mpsc;

use super::{Json, Path, Query, Reply};
use crate::operations::Operations;
use crate::service::Service;
use crate::service::archive::Export;
use crate::service::archive_import::Upload;

/// Pieces of an upload that wait to be read.
const PIECES: usize = 4;
/// A client that sends nothing for so long, though what it sent before was taken, will hardly send more: its machine is
/// gone, or it is held. An operation with its files must not wait for it for ever.
const SILENCE: Duration = Duration::from_secs(60);
/// How long a client that still sends gets to read why that is of no use.
const DRAIN: Duration = Duration::from_secs(30);
/// The import's end is asked for again after this.
const POLL: Duration = Duration::from_secs(600);

/// Sends an instance with its snapshots as one file. It may run and is not stopped.
#[utoipa::path(get, operation_id = "export_instance", path = "/v1/instances/{name}/export", tag = "instances",
    params(("name" = String, Path, description = "The instance")),
    responses(
        (status = 200, description = "The archive. The header `pileus-operation` names the operation that writes it; if \
            that fails, the reply breaks off",
            content_type = "application/vnd.pileus.instance+zstd", body = String,
            headers(("pileus-operation" = String, description = "Id of the operation"))),
        (status = 404, description = "No such instance", body = ErrorReply),
        (status = 409, description = "Its state doesn't allow this", body = ErrorReply)))]
pub async fn export(State(service): State<Service>, Path(name): Path<String>) -> Reply<Response> {
    Ok(reply(service.export(&name).await?, MEDIA_TYPE))
}

/// The bytes that an operation makes, as a reply that names it.
pub(super) fn reply(export: Export, media_type: &'static str) -> Response {
    let pieces = futures_util::stream::unfold(export.bytes, |mut bytes| async {
        Some((bytes.recv().await?, bytes))
    });
    let headers = [
        (header::CONTENT_TYPE.as_str(), media_type.to_owned()),
        (OPERATION_HEADER, export.operation.to_string()),
    ];
    (headers, Body::from_stream(pieces)).into_response()
}

/// Makes a new, stopped instance out of an archive. The reply comes when it is there; a connection that is closed before
/// leaves nothing.
#[utoipa::path(post, operation_id = "import_instance", path = "/v1/import", tag = "instances",
    params(ImportQuery),
    request_body(content = String, content_type = "application/vnd.pileus.instance+zstd",
        description = "The archive's bytes"),
    responses(
        (status = 200, description = "The operation; its result is the instance's name", body = Operation),
        (status = 400, description = "The archive is damaged or breaks a rule", body = ErrorReply),
        (status = 408, description = "The client fell silent", body = ErrorReply),
        (status = 409, description = "The name is in use", body = ErrorReply),
        (status = 507, description = "There is no room for it", body = ErrorReply)))]
pub async fn import(
    State(service): State<Service>,
    Query(query): Query<ImportQuery>,
    body: Body,
) -> Reply<Json<Operation>> {
    let operation = service.import(query.name, upload(body)).await?;
    Ok(Json(ended(&service, operation).await?))
}

/// What a client sends.
pub(super) fn upload(body: Body) -> Upload {
    let (sender, upload) = mpsc::channel(PIECES);
    // On its own: it goes on for a while when the work that reads it has failed.
    tokio::spawn(forward(body.into_data_stream(), sender, SILENCE));
    upload
}

/// The same for whom reads it at once.
pub(super) fn uploaded(body: Body) -> impl Stream<Item = io::Result<Bytes>> + Send + Unpin {
    let pieces = futures_util::stream::unfold(upload(body), |mut upload| async {
        Some((upload.recv().await?, upload))
    });
    // A reader may ask again after the end.
    Box::pin(pieces.fuse())
}

/// The operation when it has succeeded, or why it has not. A client that goes away meanwhile ends it.
pub(super) async fn ended(service: &Service, mut operation: Operation) -> Reply<Operation> {
    let _watch = CancelledWithClient(service.operations().clone(), operation.id);
    while !operation.is_over() {
        operation = service.operations().wait(operation.id, POLL).await?;
    }
    match (operation.state, operation.error.take()) {
        (OperationState::Succeeded, _) => Ok(operation),
        (_, Some(error)) => Err(Error::from(error).into()),
        (_, None) => Err(Error::internal("Work failed without saying why").into()),
    }
}

/// Ends work whose client has gone. One that is over does not mind.
struct CancelledWithClient(Operations, uuid::Uuid);

impl Drop for CancelledWithClient {
    fn drop(&mut self) {
        let (operations, id) = (self.0.clone(), self.1);
        tokio::spawn(async move {
            if let Err(err) = operations.cancel(id).await {
                tracing::debug!(%id, %err, "an operation can't be cancelled");
            }
        });
    }
}

/// Hands on what comes until nobody wants it, or nothing comes for as long as `silence`; then takes in the rest for a
/// while, so that the client gets to read the reply.
async fn forward(mut body: BodyDataStream, to: mpsc::Sender<io::Result<Bytes>>, silence: Duration) {
    loop {
        // Only while there is room: a client whose bytes nobody takes is not the silent one.
        let piece = match tokio::time::timeout(silence, body.next()).await {
            Ok(None) => return,
            Ok(Some(piece)) => {
                piece.map_err(|err| io::Error::new(io::ErrorKind::ConnectionAborted, err))
            }
            Err(_) => Err(io::Error::other(stalled(silence))),
        };
        let last = piece.is_err();
        if to.send(piece).await.is_err() || last {
            // Whoever still reads has all that there is.
            drop(to);
            let drain = async { while let Some(Ok(_)) = body.next().await {} };
            let _ = tokio::time::timeout(DRAIN, drain).await;
            return;
        }
    }
}

/// Whoever reads an upload finds it inside of the `io::Error`.
fn stalled(silence: Duration) -> Error {
    let seconds = silence.as_secs();
    Error::new(
        Code::UploadStalled,
        format!("The client sent nothing for {seconds} seconds"),
    )
    .advise("Nothing was kept of it; send it again, from a source that doesn't pause for so long.")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(pieces: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Upload {
        let (sender, upload) = mpsc::channel(PIECES);
        let body = Body::from_stream(pieces).into_data_stream();
        tokio::spawn(forward(body, sender, Duration::from_millis(50)));
        upload
    }

    #[tokio::test]
    async fn a_client_that_falls_silent_is_not_waited_for() {
        let pieces = futures_util::stream::iter([Ok(Bytes::from_static(b"some"))]);
        let mut upload = sent(pieces.chain(futures_util::stream::pending()));
        assert_eq!(upload.recv().await.unwrap().unwrap(), "some");
        let err = upload.recv().await.unwrap().unwrap_err();
        let err = err.downcast::<Error>().unwrap();
        assert_eq!(err.code, Code::UploadStalled);
        assert_eq!(err.class(), pileus_base::Class::User);
        assert!(upload.recv().await.is_none());
    }

    /// Its bytes wait for us, not we for it.
    #[tokio::test]
    async fn a_client_that_has_to_wait_is_not_silent() {
        let count = PIECES + 3;
        let pieces = (0..count).map(|_| Ok(Bytes::from_static(b"x")));
        let mut upload = sent(futures_util::stream::iter(pieces));
        tokio::time::sleep(Duration::from_millis(200)).await;
        for _ in 0..count {
            assert_eq!(upload.recv().await.unwrap().unwrap(), "x");
        }
        assert!(upload.recv().await.is_none());
    }
}
