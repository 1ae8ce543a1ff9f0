//! Image hosts: from a name to one item that can be got. A host knows names and where their images
//! are; how bytes are fetched, checked and stored is the same for all and not their business.
//!
//! One file a host: `build` (made on this machine), `file`, `http`, `simplestreams` (catalogues on the
//! net, such as Ubuntu's).
//!
//! Next step: `obtain` (one piece of work an item).

pub mod apt;
pub mod build;
pub mod file;
pub mod http;
pub mod simplestreams;

use std::path::PathBuf;

use futures_util::future::BoxFuture;
use pileus_base::{Digest, Reporter, Result};
use url::Url;

use crate::reference::ImageRef;

/// What `find` shows of an image that can be got.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CatalogEntry {
    /// The host's name; an image is `remote:name`.
    pub remote: String,
    pub name: String,
    pub aliases: Vec<String>,
    /// Its maker still keeps it secure.
    pub supported: bool,
    /// The digest that the host promises, if it does.
    pub digest: Option<Digest>,
    pub about: About,
}

/// What a host says about an image, for people.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct About {
    /// `Debian`
    pub os: String,
    /// `13`
    pub release: String,
    /// `Debian 13 (trixie)`
    pub title: String,
    pub codename: String,
    /// The host's version of the image, often a date; empty if there is none.
    pub version: String,
    /// `x86_64`
    pub arch: String,
}

/// How an item's bytes come here.
#[derive(Debug, Clone)]
pub enum Origin {
    Build(build::Recipe),
    File(PathBuf),
    Url(Url),
}

/// One image that can be got.
#[derive(Debug, Clone)]
pub struct Item {
    /// Equal keys mean the same item: work on it is shared, its digest is remembered.
    pub key: String,
    /// As a user would write it.
    pub source: String,
    pub origin: Origin,
    /// The digest that the host promises.
    pub expected: Option<Digest>,
    pub about: About,
}

/// A place that images come from.
pub trait Host: Send + Sync + std::fmt::Debug {
    /// The remote's name: what stands before the colon.
    fn name(&self) -> &str;

    /// Whether a list of all hosts' images shows this one's, and names without a remote mean them.
    fn is_listed(&self) -> bool {
        true
    }

    /// What there is, in the order in which it should be shown. With `refresh` no copy is good enough.
    fn catalog(&self, refresh: bool) -> BoxFuture<'_, Result<Vec<CatalogEntry>>>;

    /// The item that `reference` means, or `None` if this host doesn't know it.
    fn resolve<'a>(
        &'a self,
        reference: &'a ImageRef,
        report: &'a Reporter,
    ) -> BoxFuture<'a, Result<Option<Item>>>;
}
