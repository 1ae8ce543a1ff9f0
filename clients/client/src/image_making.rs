//! Calls that make images: the answer is the image as it is sent, and the operation that makes it.

use bytes::Bytes;
use futures_util::{Stream, StreamExt, TryStream, stream};
use pileus_api::image_making::BUILD_TYPE;
use pileus_api::{BuildRequest, PackRequest, routes};
use pileus_base::{Error, Result};
use reqwest::{Body, Method, header};
use uuid::Uuid;

use crate::Client;
use crate::http::instance_path;

impl Client {
    /// Makes an image of an instance. If the operation fails, the stream ends with an error, and the operation knows
    /// why; whoever drops the stream ends the work.
    pub async fn pack_instance(
        &self,
        name: &str,
        request: &PackRequest,
    ) -> Result<(Uuid, impl Stream<Item = Result<Bytes>> + use<>)> {
        let path = instance_path(routes::INSTANCE_PACK, name)?;
        self.download(self.request(Method::POST, &path).json(request))
            .await
    }

    /// Makes an image by a recipe; `copies` are the tars that the request tells the lengths of.
    pub async fn build_image<S>(
        &self,
        request: &BuildRequest,
        copies: S,
    ) -> Result<(Uuid, impl Stream<Item = Result<Bytes>> + use<S>)>
    where
        S: TryStream<Ok = Bytes, Error = std::io::Error> + Send + 'static,
    {
        let mut line = serde_json::to_vec(request)
            .map_err(|err| Error::internal(format!("Writing a recipe: {err}")))?;
        line.push(b'\n');
        let head = stream::once(async move { Ok(Bytes::from(line)) });
        let body = head.chain(futures_util::TryStreamExt::into_stream(copies));
        let request = self
            .request(Method::POST, routes::IMAGES_BUILD)
            .header(header::CONTENT_TYPE, BUILD_TYPE)
            .body(Body::wrap_stream(body));
        self.download(request).await
    }
}
