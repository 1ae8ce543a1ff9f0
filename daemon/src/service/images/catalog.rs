//! What can be launched by name.

use pileus_api::{CatalogEntry, CatalogQuery};
use pileus_base::{Code, Result};
use pileus_images::{CatalogWish, ImageInfo};

use crate::service::Service;

impl Service {
    /// What can be launched by name; with a search text, what that means.
    pub async fn catalog(&self, query: &CatalogQuery) -> Result<Vec<CatalogEntry>> {
        let search = query.search.as_deref().unwrap_or_default();
        let (remote, name) = match search.split_once(':') {
            Some((remote, name)) => (Some(remote.to_owned()), name),
            None => (None, search),
        };
        let wish = CatalogWish {
            remote,
            unsupported: query.unsupported,
            refresh: query.refresh,
        };
        let store = &self.parts.store;
        let entries = match name {
            "" => store.catalog(&wish).await?,
            name => match store.search(&search.parse()?).await {
                Ok(entry) => vec![entry],
                // Not the name of one: those whose names hold it.
                Err(err) if err.code == Code::ImageNotFound => {
                    let mut some = store.catalog(&wish).await?;
                    some.retain(|entry| {
                        let mut names = std::iter::once(&entry.name).chain(&entry.aliases);
                        names.any(|known| known.contains(name))
                    });
                    match some.is_empty() {
                        true => return Err(err),
                        false => some,
                    }
                }
                Err(err) => return Err(err),
            },
        };
        let stored = store.list()?;
        Ok(entries
            .into_iter()
            .map(|entry| {
                let source = format!("{}:{}", entry.remote, entry.name);
                let cached = |info: &ImageInfo| match &entry.digest {
                    Some(digest) => info.digest == *digest,
                    None => info.source == source,
                };
                CatalogEntry {
                    cached: stored.iter().any(|image| cached(&image.info)),
                    name: entry.name,
                    aliases: entry.aliases,
                    os: entry.about.os,
                    release: entry.about.release,
                    version: entry.about.version,
                    remote: entry.remote,
                }
            })
            .collect())
    }
}
