//! Images: what is in the store, and what can be launched.

use pileus_base::{Digest, Size};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::Timestamp;
use crate::error::ErrorBody;

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
    /// Names that people gave it: each launches it, and keeps it from being collected.
    #[serde(default)]
    pub tags: Vec<String>,
}

/// All that is known about an image of the store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ImageDetails {
    #[serde(flatten)]
    pub image: Image,
    /// For a person: `Debian 13 (trixie)`, or the file's name.
    pub title: String,
    pub codename: String,
    /// `x86_64`; empty if not known.
    pub arch: String,
    /// The smallest disk that an instance of it may have.
    pub min_disk: Size,
    /// Kernel command line for direct boot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    pub initrd: bool,
    /// Digest of the disk's content; nothing until the image was verified once, if it did not come with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_digest: Option<Digest>,
    /// The machine that it wants (machine.json, version 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub machine: Option<serde_json::Value>,
    /// What it was made of and how, as it says itself. Nobody vouches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made_of: Option<String>,
    /// IDs of the templates that were made from it.
    #[serde(default)]
    pub templates: Vec<String>,
}

/// Brings an image into the store without launching it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    /// As a launch takes it; the default image if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What it must hash to, as it is fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<Digest>,
    /// Fetch or build it again, whatever the store has.
    #[serde(default)]
    pub refresh: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ImageImportQuery {
    /// What the bytes must hash to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[param(value_type = Option<String>)]
    pub checksum: Option<Digest>,
    /// A tag that the image is to get.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<String>,
    /// Name of the file that is sent, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Bytes of a disk that the file takes where it is; without room for as many nothing is read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ImageInspectQuery {
    /// As for an import: bytes of a disk that the file takes where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub room: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct VerifyRequest {
    /// Digests (or their beginnings), tags or sources.
    #[serde(default)]
    pub images: Vec<String>,
    /// All images of the store.
    #[serde(default)]
    pub all: bool,
}

/// What a file is, as the store would take it. It was not kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Inspection {
    /// `packed`, `qcow2` or `raw`; with what it is compressed behind it, `raw+xz`. Empty if it is none of them.
    pub kind: String,
    /// Of the bytes as they came: the name that the image would have. Nothing if not all were read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Bytes that came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<Size>,
    /// What a guest would see.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtual_size: Option<Size>,
    /// What the disk would take on the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_usage: Option<Size>,
    /// Of the disk's content.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_digest: Option<Digest>,
    /// machine.json, migrated to version 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub machine: Option<serde_json::Value>,
    /// manifest.json.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub manifest: Option<serde_json::Value>,
    pub warnings: Vec<String>,
    /// Whether the store has it.
    pub stored: bool,
    /// Why the store would not take it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<Refusal>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Refusal {
    /// The rule that it breaks, if it is one of packed images.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    pub error: ErrorBody,
}

/// Which image a tag is to name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TagRequest {
    /// A digest (or its beginning), a tag or a source.
    pub image: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ImageRemoveQuery {
    /// Also one that has a tag; its tags go with it.
    #[serde(default)]
    pub force: bool,
}

/// Which images go: without bounds all that nobody uses, otherwise the least recently used until the bounds hold. One that
/// is used or has a tag never goes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ImagePruneQuery {
    /// Those that were not used for so long: `30d`, `12h`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub older_than: Option<String>,
    /// Bytes that all images may take together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_bytes: Option<u64>,
    /// Only tell what would go.
    #[serde(default)]
    pub dry_run: bool,
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
    /// Where it came from.
    #[serde(default)]
    pub source: String,
    pub freed: Size,
}
