//! Images at a URL. What is written is what is asked: `http` stays `http`.

use futures_util::future::{BoxFuture, FutureExt, ready};
use pileus_base::{Digest, Reporter, Result};
use sha2::Digest as _;
use url::Url;

use super::{About, CatalogEntry, Host, Item, Origin};
use crate::download::shown;
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
        let shown = shown(url);
        let item = Item {
            key: key(url, &shown),
            source: shown.clone(),
            origin: Origin::Url(url.clone()),
            expected: None,
            about: About {
                title: title.unwrap_or(shown),
                ..About::default()
            },
        };
        ready(Ok(Some(item))).boxed()
    }
}

/// Two URLs that differ only in what is not shown may mean two images.
fn key(url: &Url, shown: &str) -> String {
    let hidden = url.query().unwrap_or_default();
    if shown.ends_with(hidden) {
        return format!("url:{shown}");
    }
    let hash = Digest::from_bytes(sha2::Sha256::digest(hidden).into());
    format!("url:{shown}#{}", hash.short())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lets_one_in_is_not_kept() {
        let url: Url = "https://ann:swordfish@h/a.img?v=1&X-Amz-Signature=abc&access_token=t#frag"
            .parse()
            .unwrap();
        let other: Url = "https://h/a.img?v=1&X-Amz-Signature=abd&access_token=t"
            .parse()
            .unwrap();
        assert_eq!(
            shown(&url),
            "https://h/a.img?v=1&X-Amz-Signature=hidden&access_token=hidden"
        );
        let keys = [&url, &other].map(|url| key(url, &shown(url)));
        assert_ne!(keys[0], keys[1]);
        for word in ["ann", "swordfish", "abc", "frag", "=t"] {
            assert!(!keys[0].contains(word), "{}", keys[0]);
        }
        for plain in ["http://h:1/x?y", "https://h/x?file=a%20b&n=1", "https://h/"] {
            let url: Url = plain.parse().unwrap();
            assert_eq!(shown(&url), plain);
            assert_eq!(key(&url, &shown(&url)), format!("url:{plain}"));
        }
    }
}
