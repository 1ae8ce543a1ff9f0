//! Images that are files on this machine.

use futures_util::future::{BoxFuture, FutureExt, ready};
use pileus_base::{Reporter, Result};

use super::{About, CatalogEntry, Host, Item, Origin};
use crate::reference::ImageRef;

#[derive(Debug, Default)]
pub struct FileHost;

impl Host for FileHost {
    fn name(&self) -> &str {
        "file"
    }

    fn catalog(&self, _: bool) -> BoxFuture<'_, Result<Vec<CatalogEntry>>> {
        ready(Ok(Vec::new())).boxed()
    }

    fn resolve<'a>(
        &'a self,
        reference: &'a ImageRef,
        _: &'a Reporter,
    ) -> BoxFuture<'a, Result<Option<Item>>> {
        let ImageRef::File(path) = reference else {
            return ready(Ok(None)).boxed();
        };
        let title = path
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let item = Item {
            key: format!("file:{}", path.display()),
            source: reference.to_string(),
            origin: Origin::File(path.clone()),
            expected: None,
            about: About {
                title: title.unwrap_or_default(),
                ..About::default()
            },
        };
        ready(Ok(Some(item))).boxed()
    }
}
