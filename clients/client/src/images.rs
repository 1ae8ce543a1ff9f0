//! Calls about images: what can be launched, what the store holds, and their bytes both ways.

use bytes::Bytes;
use futures_util::{Stream, TryStream};
use pileus_api::archive::IMAGE_MEDIA_TYPE;
use pileus_api::{
    CatalogEntry, CatalogQuery, Image, ImageDetails, ImageImportQuery, ImageInspectQuery,
    ImagePruneQuery, ImageRemoveQuery, Inspection, Operation, PruneReply, PullRequest, TagRequest,
    VerifyRequest, routes,
};
use pileus_base::{Code, Error, Result};
use reqwest::{Body, Method, header};
use uuid::Uuid;

use crate::Client;

impl Client {
    /// The images that `launch` knows by name.
    pub async fn catalog(&self) -> Result<Vec<CatalogEntry>> {
        self.get(routes::CATALOG).await
    }

    /// Those of them that are asked for.
    pub async fn catalog_of(&self, query: &CatalogQuery) -> Result<Vec<CatalogEntry>> {
        let request = self.request(Method::GET, routes::CATALOG);
        self.answer(request.query(query)).await
    }

    /// The images in the store.
    pub async fn images(&self) -> Result<Vec<Image>> {
        self.get(routes::IMAGES).await
    }

    /// All about one; like all calls here it takes a digest (or its beginning), a tag or a source.
    pub async fn image(&self, image: &str) -> Result<ImageDetails> {
        self.get(&image_path(routes::IMAGE, image)?).await
    }

    /// Brings an image into the store. The operation's result is its digest.
    pub async fn pull_image(&self, request: &PullRequest) -> Result<Operation> {
        self.post(routes::IMAGES, request).await
    }

    /// Brings what is sent into the store; returns when it is there. The operation's result is its digest.
    pub async fn import_image<S>(&self, query: &ImageImportQuery, bytes: S) -> Result<Operation>
    where
        S: TryStream<Ok = Bytes, Error = std::io::Error> + Send + 'static,
    {
        let request = self
            .request(Method::POST, routes::IMAGES_IMPORT)
            .query(query)
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(Body::wrap_stream(bytes));
        self.answer(request).await
    }

    /// Has the daemon judge what is sent; nothing of it is kept.
    pub async fn inspect_image<S>(&self, query: &ImageInspectQuery, bytes: S) -> Result<Inspection>
    where
        S: TryStream<Ok = Bytes, Error = std::io::Error> + Send + 'static,
    {
        let request = self
            .request(Method::POST, routes::IMAGES_INSPECT)
            .query(query)
            .header(header::CONTENT_TYPE, "application/octet-stream")
            .body(Body::wrap_stream(bytes));
        self.answer(request).await
    }

    /// An image as the bytes of `image.tar.zst`, and the operation that writes it: if that fails, the stream ends with
    /// an error, and the operation knows why.
    pub async fn export_image(
        &self,
        image: &str,
    ) -> Result<(Uuid, impl Stream<Item = Result<Bytes>> + use<>)> {
        let path = image_path(routes::IMAGE_EXPORT, image)?;
        let request = self.request(Method::GET, &path);
        self.download(request.header(header::ACCEPT, IMAGE_MEDIA_TYPE))
            .await
    }

    /// Reads images again and compares them with what they were. The operation fails if one is damaged.
    pub async fn verify_images(&self, request: &VerifyRequest) -> Result<Operation> {
        self.post(routes::IMAGES_VERIFY, request).await
    }

    /// Gives an image a name; one that another image has changes hands.
    pub async fn tag_image(&self, image: &str, tag: &str) -> Result<ImageDetails> {
        let request = TagRequest {
            image: image.to_owned(),
        };
        let path = image_path(routes::IMAGE_TAG, tag)?;
        self.answer(self.request(Method::PUT, &path).json(&request))
            .await
    }

    pub async fn untag_image(&self, tag: &str) -> Result<()> {
        let path = image_path(routes::IMAGE_TAG, tag)?;
        self.send(self.request(Method::DELETE, &path)).await?;
        Ok(())
    }

    /// Removes an image that nobody uses; with `force` also one that has tags.
    pub async fn remove_image(&self, image: &str, force: bool) -> Result<()> {
        let path = image_path(routes::IMAGE, image)?;
        let request = self.request(Method::DELETE, &path);
        self.send(request.query(&ImageRemoveQuery { force }))
            .await?;
        Ok(())
    }

    /// Removes images that nobody uses.
    pub async fn prune_images(&self, query: &ImagePruneQuery) -> Result<PruneReply> {
        let request = self.request(Method::POST, routes::IMAGES_PRUNE);
        self.answer(request.query(query)).await
    }
}

/// A path with an image's or a tag's name in it. What would become another path is no name of one.
fn image_path(route: &str, name: &str) -> Result<String> {
    match name {
        "" | "." | ".." => Err(Error::new(
            Code::ImageNotFound,
            format!("There is no image \"{name}\" in the store"),
        )),
        name => Ok(routes::fill(route, name)),
    }
}
