//! Images: what is in the store, and what can be launched.

use pileus_base::{Digest, Size};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Timestamp;

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    pub digest: Digest,
    /// Operating system, `Debian`; empty if the image doesn't say.
    pub os: String,
    /// Release for a person, `13`.
    pub release: String,
    /// Build or serial of the release, `20261121`.
    pub version: String,
    /// Where it came from, `build:debian-13` or an address.
    pub source: String,
    /// Size of the disk that a guest sees.
    pub virtual_size: Size,
    /// What the image takes on the host's disk.
    pub disk_usage: Size,
    /// Whether its kernel lies beside it, so that it boots without firmware.
    pub direct_boot: bool,
    #[schema(value_type = String, format = "date-time")]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub used_at: Option<Timestamp>,
    /// Names of the instances that stand on it.
    pub used_by: Vec<String>,
}

/// Which of the images that can be launched are asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct CatalogQuery {
    /// `NAME`, `REMOTE:NAME` (that image alone, under the name that was asked for; or those whose names
    /// hold it) or `REMOTE:`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub search: Option<String>,
    /// Also releases that are no longer supported.
    #[serde(default)]
    pub unsupported: bool,
    /// Ask the image hosts, however new the copies of their lists are.
    #[serde(default)]
    pub refresh: bool,
}

/// An image that `launch` knows by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CatalogEntry {
    /// The name to launch, `debian-13`.
    pub name: String,
    pub aliases: Vec<String>,
    pub os: String,
    pub release: String,
    pub version: String,
    /// The image host, `build`.
    pub remote: String,
    /// Whether the store has it already.
    pub cached: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PruneReply {
    pub removed: Vec<PrunedImage>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PrunedImage {
    pub digest: Digest,
    pub freed: Size,
}
