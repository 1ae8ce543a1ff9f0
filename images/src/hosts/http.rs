//! Images at a URL. What is written is what is asked: `http` stays `http`.

use futures_util::future::{BoxFuture, FutureExt, ready};
use pileus_base::{Reporter, Result};

use super::{About, CatalogEntry, Host, Item, Origin};
use crate::reference::ImageRef;

#[derive(Debug, Default)]
pub struct HttpHost;

impl Host for HttpHost {
    fn name(&self) -> &str {
        "http"
    }

    fn catalog(&self, _: bool) -> BoxFuture<'_, Result<Vec<CatalogEntry>>> {
        ready(Ok(Vec::new())).boxed()
    }

    fn resolve<'a>(
        &'a self,
        reference: &'a ImageRef,
        _: &'a Reporter,
    ) -> BoxFuture<'a, Result<Option<Item>>> {
        let ImageRef::Url(url) = reference else {
            return ready(Ok(None)).boxed();
        };
        let title = url
            .path_segments()
            .and_then(|mut parts| parts.next_back().map(str::to_owned))
            .filter(|name| !name.is_empty());
        // Credentials in the URL are used, but kept out of what is stored and shown.
        let mut shown = url.clone();
        let _ = shown.set_username("");
        let _ = shown.set_password(None);
        let item = Item {
            key: format!("url:{shown}"),
            source: shown.to_string(),
            origin: Origin::Url(url.clone()),
            expected: None,
            about: About {
                title: title.unwrap_or_else(|| shown.to_string()),
                ..About::default()
            },
        };
        ready(Ok(Some(item))).boxed()
    }
}
