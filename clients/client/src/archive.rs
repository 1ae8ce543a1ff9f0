//! Instances as archives: streams of bytes both ways.

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStream};
use pileus_api::archive::{MEDIA_TYPE, OPERATION_HEADER};
use pileus_api::{ImportQuery, InstanceName, Operation, routes};
use pileus_base::{Error, Result};
use reqwest::{Body, Method, RequestBuilder, header};
use uuid::Uuid;

use crate::Client;
use crate::http::instance_path;

impl Client {
    /// An instance with its snapshots as the bytes of an archive, and the operation that writes it: if that fails,
    /// the stream ends with an error, and the operation knows why.
    pub async fn export(
        &self,
        name: &str,
    ) -> Result<(Uuid, impl Stream<Item = Result<Bytes>> + use<>)> {
        let path = instance_path(routes::INSTANCE_EXPORT, name)?;
        self.download(self.request(Method::GET, &path)).await
    }

    /// The bytes of a reply, and the operation that makes them.
    pub(crate) async fn download(
        &self,
        request: RequestBuilder,
    ) -> Result<(Uuid, impl Stream<Item = Result<Bytes>> + use<>)> {
        let response = self.send(request).await?;
        let operation = response.headers().get(OPERATION_HEADER);
        let operation = operation.and_then(|id| id.to_str().ok()?.parse().ok());
        let operation =
            operation.ok_or_else(|| Error::internal("The daemon names no operation"))?;
        let client = self.clone();
        let bytes = response
            .bytes_stream()
            .map(move |part| part.map_err(|err| client.broken(&err)));
        Ok((operation, bytes))
    }

    /// Makes a new, stopped instance out of an archive; returns when it is there. The operation's result is its name.
    pub async fn import<S>(&self, name: Option<InstanceName>, archive: S) -> Result<Operation>
    where
        S: TryStream<Ok = Bytes, Error = std::io::Error> + Send + 'static,
    {
        let request = self
            .request(Method::POST, routes::IMPORT)
            .query(&ImportQuery { name })
            .header(header::CONTENT_TYPE, MEDIA_TYPE)
            .body(Body::wrap_stream(archive));
        self.answer(request).await
    }
}
