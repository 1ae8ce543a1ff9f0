//! From a name to one item: asks the hosts in order, and lists what they have. A name that a person gave to an
//! image of the store (`tags`) goes before all hosts.
//!
//! Next step: `store` (brings the item).

use std::sync::Arc;

use pileus_base::{Code, Error, Reporter, Result};

use crate::hosts::{About, CatalogEntry, Host, Item};
use crate::image::ImageInfo;
use crate::reference::ImageRef;
use crate::store::Store;

/// What a list of what can be launched is to show.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CatalogWish {
    /// One host's images only.
    pub remote: Option<String>,
    /// Also those that their makers no longer keep secure.
    pub unsupported: bool,
    /// Ask the hosts, however new the copies of their lists are.
    pub refresh: bool,
}

impl Store {
    /// Asks the hosts, in order, which item is meant. Nothing is fetched yet.
    pub async fn resolve(&self, reference: &ImageRef, report: &Reporter) -> Result<Item> {
        if let Some(item) = self.ask(reference, report).await? {
            return Ok(item);
        }
        let known = |remote: &str| self.config.hosts.iter().any(|host| host.name() == remote);
        let message = match reference {
            ImageRef::On { remote, .. } if !known(remote) => format!(
                "Remote \"{remote}\" is unknown or unreachable. If image mirror is enabled, please \
                 confirm it is valid."
            ),
            ImageRef::On { remote, name } => {
                format!("Unable to find an image matching \"{name}\" in remote \"{remote}\".")
            }
            _ => format!("Unable to find an image matching \"{reference}\"."),
        };
        Err(Error::new(Code::ImageNotFound, message).advise("`pileus find` shows what there is."))
    }

    /// The item with a digest that is not in the store (as `missing` says), if a host promises it.
    pub(crate) async fn promised(
        &self,
        reference: &ImageRef,
        missing: Error,
        report: &Reporter,
    ) -> Result<Item> {
        match self.ask(reference, report).await {
            Ok(Some(item)) => Ok(item),
            Ok(None) => Err(missing),
            // That it is not here says more.
            Err(err) if err.code == Code::FetchFailed => Err(missing.detail(err.message)),
            Err(err) => Err(err),
        }
    }

    async fn ask(&self, reference: &ImageRef, report: &Reporter) -> Result<Option<Item>> {
        for (number, host) in self.config.hosts.iter().enumerate() {
            match report.or_cancelled(host.resolve(reference, report)).await {
                Ok(Some(item)) => return Ok(Some(item)),
                Ok(None) => {}
                // The hosts after it are not asked: they may know the name with another meaning.
                Err(err) if err.code == Code::FetchFailed => {
                    return Err(self.unreachable(reference, number, err).await);
                }
                Err(err) => return Err(err),
            }
        }
        Ok(None)
    }

    /// The error for a name that no host before the `number`th knows, and that one can't be asked.
    async fn unreachable(&self, reference: &ImageRef, number: usize, err: Error) -> Error {
        let mut there = Vec::new();
        for host in &self.config.hosts[..number] {
            let entries = host.catalog(false).await.unwrap_or_default();
            there.extend(entries.into_iter().map(|entry| entry.name));
        }
        let message = format!(
            "Unable to find an image matching \"{reference}\": remote \"{}\" is unreachable. {}.",
            self.config.hosts[number].name(),
            err.message
        );
        let advice = match there.as_slice() {
            [] => {
                "Check the connection, or name another host with `local.image.mirror`.".to_owned()
            }
            names => format!(
                "Check the connection, or name another host with `local.image.mirror`. Without it \
                 there are: {}.",
                names.join(", ")
            ),
        };
        Error::new(Code::FetchFailed, message)
            .advise(advice)
            .with_source(err)
    }

    /// What can be got by name. A host that can't be asked is left out, unless all can't or it is the
    /// one that is meant.
    pub async fn catalog(&self, wish: &CatalogWish) -> Result<Vec<CatalogEntry>> {
        let wanted = |host: &&Arc<dyn Host>| match &wish.remote {
            Some(remote) => host.name() == remote,
            None => host.is_listed(),
        };
        let hosts: Vec<_> = self.config.hosts.iter().filter(wanted).collect();
        if let (Some(remote), []) = (&wish.remote, hosts.as_slice()) {
            let message = format!(
                "Remote '{remote}' is not found. Please use `multipass find` for supported remotes \
                 and images."
            );
            return Err(Error::new(Code::ImageNotFound, message));
        }
        let mut all: Vec<CatalogEntry> = Vec::new();
        let mut failure = None;
        // Side by side: one that does not answer costs its time once.
        let asked = hosts.iter().map(|host| host.catalog(wish.refresh));
        let answers = futures_util::future::join_all(asked).await;
        for (host, answer) in hosts.iter().zip(answers) {
            match answer {
                // A release that an earlier remote has is not shown again.
                Ok(entries) => {
                    let earlier = all.len();
                    for entry in entries {
                        let known = |other: &CatalogEntry| other.about.title == entry.about.title;
                        let fits = entry.supported || wish.unsupported;
                        if fits && !all[..earlier].iter().any(known) {
                            all.push(entry);
                        }
                    }
                }
                Err(err) => {
                    tracing::warn!(host = host.name(), %err, "catalogue not available");
                    failure = Some(err);
                }
            }
        }
        match failure {
            Some(err) if all.is_empty() => Err(err),
            _ => Ok(all),
        }
    }

    /// The one image that `reference` means, as a list shows it: under the name that was asked for.
    pub async fn search(&self, reference: &ImageRef) -> Result<CatalogEntry> {
        if let Some(image) = self.tagged(reference)? {
            return Ok(entry_of(reference, image.info()));
        }
        let item = self.resolve(reference, &Reporter::silent()).await?;
        Ok(CatalogEntry {
            remote: String::new(),
            name: reference.to_string(),
            aliases: Vec::new(),
            supported: true,
            digest: item.expected,
            about: item.about,
        })
    }
}

/// An image of the store as a catalogue shows it.
fn entry_of(reference: &ImageRef, info: &ImageInfo) -> CatalogEntry {
    CatalogEntry {
        remote: String::new(),
        name: reference.to_string(),
        aliases: Vec::new(),
        supported: true,
        digest: Some(info.digest.clone()),
        about: About {
            os: info.os.clone(),
            release: info.release.clone(),
            title: info.title.clone(),
            codename: info.codename.clone(),
            version: info.version.clone(),
            arch: info.arch.clone(),
        },
    }
}
