//! Images: what is in the store, what can be launched, and who may read which file.

use std::fs::File;
use std::path::Path;

use pileus_api::{CatalogEntry, CatalogQuery, Event, Image as ApiImage, PruneReply, PrunedImage};
use pileus_base::{Code, Error, Result};
use pileus_images::{CatalogWish, ImageInfo};

use super::{Mode, Service, blocking};
use crate::http::listener::Peer;

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

    pub async fn images(&self) -> Result<Vec<ApiImage>> {
        let instances = self.parts.registry.all();
        let mut images: Vec<_> = self
            .parts
            .store
            .list()?
            .iter()
            .map(|image| {
                let info = &image.info;
                let used_by = instances
                    .iter()
                    .map(|instance| instance.row())
                    .filter(|row| {
                        let stands_on = row.spec.image.as_ref().map(|i| &i.digest);
                        stands_on == Some(&info.digest)
                    })
                    .map(|row| row.name.to_string());
                ApiImage {
                    digest: info.digest.clone(),
                    os: info.os.clone(),
                    release: info.release.clone(),
                    version: info.version.clone(),
                    source: info.source.clone(),
                    virtual_size: info.virtual_size,
                    disk_usage: image.allocated,
                    direct_boot: info.kernel,
                    created_at: info.created,
                    used_at: Some(image.last_used),
                    used_by: used_by.collect(),
                    tags: Vec::new(),
                }
            })
            .collect();
        images.sort_by(|a, b| (&a.os, &a.release, &a.digest).cmp(&(&b.os, &b.release, &b.digest)));
        Ok(images)
    }

    /// Removes an image by its digest or the digest's first digits.
    pub async fn remove_image(&self, digest: &str) -> Result<()> {
        let digits = digest.strip_prefix("sha256:").unwrap_or(digest);
        let images = self.parts.store.list()?;
        let mut found = images
            .iter()
            .filter(|image| !digits.is_empty() && image.info.digest.hex().starts_with(digits));
        let (Some(image), None) = (found.next(), found.next()) else {
            return Err(Error::new(
                Code::ImageNotFound,
                format!("image \"{digest}\" does not exist, or more than one begins so"),
            )
            .advise("`pileus images` lists the digests."));
        };
        let digest = image.info.digest.clone();
        if self.digests_in_use().contains(&digest) {
            return Err(Error::new(
                Code::ImageInUse,
                format!("image {} is used by an instance", digest.short()),
            )
            .advise("`pileus images` tells by which; purge that first."));
        }
        let store = self.parts.store.clone();
        blocking(move || store.remove(&digest)).await?;
        self.parts.hub.send(Event::Images);
        Ok(())
    }

    pub async fn prune_images(&self) -> Result<PruneReply> {
        let in_use = self.digests_in_use();
        let store = self.parts.store.clone();
        let removed = blocking(move || store.prune(&in_use)).await?;
        self.parts.hub.send(Event::Images);
        Ok(PruneReply {
            removed: removed
                .into_iter()
                .map(|removed| PrunedImage {
                    digest: removed.info.digest,
                    source: removed.info.source,
                    freed: removed.freed,
                })
                .collect(),
        })
    }
}

/// A system daemon reads files as root; it must not do so for someone who may not read them. Opens
/// the file with the caller's own rights (user and first group); nothing if the caller may do all.
pub(super) fn open_as(mode: &Mode, peer: Peer, path: &Path) -> Result<Option<File>> {
    if peer.uid == 0 || matches!(mode, Mode::User(_)) {
        return Ok(None);
    }
    // Opened by a thread that is this user for a moment. Only this thread's identity changes, and it
    // ends right after.
    let path = path.to_owned();
    let opened = std::thread::spawn(move || {
        rustix::thread::set_thread_groups(&[])?;
        nix::unistd::setfsgid(nix::unistd::Gid::from_raw(peer.gid));
        nix::unistd::setfsuid(nix::unistd::Uid::from_raw(peer.uid));
        File::open(&path)
    })
    .join();
    match opened {
        Ok(Ok(file)) => Ok(Some(file)),
        Ok(Err(err)) if err.kind() == std::io::ErrorKind::NotFound => Err(Error::new(
            Code::ImageNotFound,
            "There is no such file, or not for you",
        )),
        Ok(Err(err)) => Err(Error::new(
            Code::PermissionDenied,
            format!("The user {} may not read the image's file: {err}", peer.uid),
        )),
        Err(_) => Err(Error::internal("Checking the file's permission failed")),
    }
}
