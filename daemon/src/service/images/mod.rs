//! Images: what is in the store, and what people do with it.
//!
//! ```text
//! catalog.rs  what can be launched by name        bring.rs   pull, import, inspect: bytes that come
//! mod.rs      what the store holds                export.rs  an image as `image.tar.zst`
//! keep.rs     tags, removing, the budget          check.rs   is it still what it was
//! access.rs   who may read which file
//! ```
//!
//! Next step on the way of the data: `images/src/store.rs`.

mod access;
pub(crate) mod age;
mod bring;
mod catalog;
mod check;
mod export;
pub(crate) mod keep;

pub(super) use access::open_as;

use std::collections::HashMap;
use std::sync::Arc;

use pileus_api::{Event, Image as ApiImage, ImageDetails};
use pileus_base::{Code, Digest, Error, Result};
use pileus_images::{Image, ImageInfo, Listed};

use super::{Service, blocking};

impl Service {
    /// All images of the store, by system and release.
    pub async fn images(&self) -> Result<Vec<ApiImage>> {
        let store = self.parts.store.clone();
        let listed = blocking(move || store.list()).await?;
        let users = self.users_of_images();
        let mut images: Vec<_> = listed.iter().map(|image| shown(image, &users)).collect();
        images.sort_by(|a, b| (&a.os, &a.release, &a.digest).cmp(&(&b.os, &b.release, &b.digest)));
        Ok(images)
    }

    /// All about one.
    pub async fn image(&self, name: &str) -> Result<ImageDetails> {
        let image = self.stored_image(name).await?;
        let store = self.parts.store.clone();
        let listed = blocking(move || {
            let mut listed = store.list()?.into_iter();
            let listed = listed.find(|listed| listed.info.digest == *image.digest());
            // Held here, it can't have gone.
            listed.ok_or_else(|| Error::internal("An image that is held is not in the list"))
        })
        .await?;
        let templates = self.parts.templates.all();
        let templates = templates.iter();
        let of_it = templates.filter(|template| template.key.image == listed.info.digest);
        Ok(ImageDetails {
            templates: of_it.map(|template| template.id.clone()).collect(),
            ..details(&listed, &self.users_of_images())?
        })
    }

    /// The image of the store that is meant by a digest or its first digits, a tag, or the source that it came from.
    /// Held, it stays.
    pub(in crate::service) async fn stored_image(&self, name: &str) -> Result<Arc<Image>> {
        let (store, name) = (self.parts.store.clone(), name.to_owned());
        blocking(move || keep::find(&store, &name)).await
    }

    /// Names of the instances that stand on each image.
    fn users_of_images(&self) -> HashMap<Digest, Vec<String>> {
        let mut users: HashMap<_, Vec<_>> = HashMap::new();
        for instance in self.parts.registry.all() {
            let row = instance.row();
            if let Some(image) = &row.spec.image {
                let names = users.entry(image.digest.clone()).or_default();
                names.push(row.name.to_string());
            }
        }
        users
    }

    /// Tells those who watch that the store has changed.
    pub(in crate::service) fn images_changed(&self) {
        self.parts.hub.send(Event::Images);
    }
}

fn shown(image: &Listed, users: &HashMap<Digest, Vec<String>>) -> ApiImage {
    let info = &image.info;
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
        used_by: users.get(&info.digest).cloned().unwrap_or_default(),
        tags: image.tags.clone(),
    }
}

fn details(image: &Listed, users: &HashMap<Digest, Vec<String>>) -> Result<ImageDetails> {
    let info: &ImageInfo = &image.info;
    Ok(ImageDetails {
        image: shown(image, users),
        title: info.title.clone(),
        codename: info.codename.clone(),
        arch: info.arch.clone(),
        min_disk: info.min_disk,
        cmdline: info.cmdline.clone(),
        initrd: info.initrd,
        disk_digest: info.disk_digest.clone(),
        machine: info.machine.as_ref().map(document).transpose()?,
        made_of: info.made_of.clone(),
        templates: Vec::new(),
    })
}

/// Something as JSON, for clients.
fn document(value: &impl serde::Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(value)
        .map_err(|err| Error::internal(format!("Writing what is known of an image: {err}")))
}

/// An image of the store is not there.
fn not_here(name: &str) -> Error {
    Error::new(
        Code::ImageNotFound,
        format!("There is no image \"{name}\" in the store"),
    )
    .advise("`pileus image list` shows those that are; `pileus image pull` brings others.")
}
