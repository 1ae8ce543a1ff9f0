//! Calls about images: what can be launched and what the store holds.

use pileus_api::{CatalogEntry, CatalogQuery, Digest, Image, PruneReply, routes};
use pileus_base::Result;
use reqwest::Method;

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

    pub async fn remove_image(&self, digest: &Digest) -> Result<()> {
        let path = routes::fill(routes::IMAGE, &digest.to_string());
        self.send(self.request(Method::DELETE, &path)).await?;
        Ok(())
    }

    /// Removes the images that no instance stands on.
    pub async fn prune_images(&self) -> Result<PruneReply> {
        self.answer(self.request(Method::POST, routes::IMAGES_PRUNE))
            .await
    }
}
