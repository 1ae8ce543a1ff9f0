//! Images that are files on this machine.

use std::path::{Path, PathBuf};

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
        let named = name_of(path);
        let title = named
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        let item = Item {
            key: format!("file:{}", named.display()),
            source: ImageRef::File(named).to_string(),
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

/// The name of a file that was opened for us (`/proc/self/fd/7`): the next time it has another number. What is
/// remembered of a file is told by its inode and time, so a name that leads elsewhere by now does no harm.
fn name_of(path: &Path) -> PathBuf {
    match path.starts_with("/proc/self/fd") {
        true => std::fs::read_link(path).unwrap_or_else(|_| path.to_owned()),
        false => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[tokio::test]
    async fn an_open_file_has_its_own_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().canonicalize().unwrap().join("a.img");
        let file = std::fs::File::create(&path).unwrap();
        let open = ImageRef::File(format!("/proc/self/fd/{}", file.as_raw_fd()).into());
        let report = Reporter::silent();
        let found = FileHost.resolve(&open, &report).await.unwrap().unwrap();
        let named = ImageRef::File(path);
        let same = FileHost.resolve(&named, &report).await.unwrap().unwrap();
        assert_eq!((&found.key, &found.source), (&same.key, &same.source));
        assert_eq!(found.about.title, "a.img");
        // What is read is what was opened.
        assert!(matches!(found.origin, Origin::File(path) if path.starts_with("/proc/self/fd")));
    }
}
