//! manifest.json: what the members of a packed image consist of, and where the image comes from. Archives of
//! others have none. It says nothing of the host or the time, so the same image always has the same.
//!
//! Whoever wrote the archive wrote this too: that it fits shows that nothing was damaged or mixed up, not that
//! the image is the one that somebody meant. The archive's own digest does that.
//!
//! Next step: `unpack` (holds what comes out of an archive against it), `pack` (writes it, last).

use pileus_base::{Digest, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::rule::Rule;

/// The form that is written, and the only one that is read.
const FORMAT: u32 = 1;
/// A manifest is not larger.
pub const MOST_BYTES: usize = 64 << 10;
/// Nor is a text in one.
const MOST_TEXT: usize = 512;

/// What `manifest.json` says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: u32,
    pub members: Members,
    #[serde(default, skip_serializing_if = "Provenance::is_empty")]
    pub provenance: Provenance,
}

/// The members that an image consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Members {
    #[serde(rename = "disk.img")]
    pub disk: DiskMember,
    #[serde(rename = "layer.qcow2")]
    pub layer: Member,
    #[serde(rename = "machine.json")]
    pub machine: Member,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskMember {
    /// Bytes, as a guest sees it.
    pub size: u64,
    /// Bytes that are not zero, in whole blocks of 4 KiB.
    pub data: u64,
    /// The disk's digest (see [`super::digest`]).
    pub digest: Digest,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// Bytes.
    pub size: u64,
    pub sha256: Digest,
}

impl Member {
    pub fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self {
            size: bytes.len() as u64,
            sha256: Digest::from_bytes(sha2::Sha256::digest(bytes).into()),
        }
    }
}

/// Where an image comes from, as far as who made it wants to tell. Texts are lines of at most 512 bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
pub struct Provenance {
    /// The program that made it, and its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_version: Option<String>,
    /// What it was made from, for a person: `debian 13`, `instance web`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// The name of the image that it was made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source_digest: Option<Digest>,
    /// SHA-256 of the recipe that it was built by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipe: Option<Digest>,
    /// For a person: `Debian 13 (trixie)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// `Debian`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub os: Option<String>,
    /// `13`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub release: Option<String>,
    /// `trixie`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub codename: Option<String>,
    /// The image's own version: `2026.1`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// `x86_64`
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arch: Option<String>,
}

impl Provenance {
    /// Made by this program.
    pub fn ours() -> Self {
        Self {
            tool: Some("pileus".to_owned()),
            tool_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            ..Self::default()
        }
    }

    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The texts that are no short lines by the names of their fields. A terminal may show what they say.
    fn strange(&self) -> Option<&'static str> {
        let texts = [
            ("tool", &self.tool),
            ("toolVersion", &self.tool_version),
            ("source", &self.source),
            ("title", &self.title),
            ("os", &self.os),
            ("release", &self.release),
            ("codename", &self.codename),
            ("version", &self.version),
            ("arch", &self.arch),
        ];
        let strange = |text: &String| text.len() > MOST_TEXT || text.chars().any(char::is_control);
        texts
            .into_iter()
            .find(|(_, text)| text.as_ref().is_some_and(strange))
            .map(|(name, _)| name)
    }
}

impl Manifest {
    pub fn new(members: Members, provenance: Provenance) -> Self {
        Self {
            format: FORMAT,
            members,
            provenance,
        }
    }

    /// Strict: no field is unknown, there twice, or of another kind. An error's source is [`Rule::Manifest`].
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        /// All that manifests of any form have in common.
        #[derive(Deserialize)]
        struct Form {
            format: u64,
        }
        let bad = |why: &dyn std::fmt::Display| Rule::Manifest.because(why);
        if bytes.len() > MOST_BYTES {
            return Err(bad(&format_args!("it has more than {MOST_BYTES} bytes")));
        }
        let form: Form = serde_json::from_slice(bytes).map_err(|err| bad(&err))?;
        if form.format != u64::from(FORMAT) {
            return Err(bad(&format_args!(
                "it has the form {}, which this version doesn't know",
                form.format
            )));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(|err| bad(&err))?;
        // A list of the fields' values would pass for an object, and null for a field that is not there.
        let value: Value = serde_json::from_slice(bytes).map_err(|err| bad(&err))?;
        if !is_plain(&value) {
            return Err(bad(&"it has a list or null in it"));
        }
        manifest.sane().map_err(|why| bad(&why))?;
        Ok(manifest)
    }

    fn sane(&self) -> Result<(), String> {
        if let Some(name) = self.provenance.strange() {
            return Err(format!(
                "{name} is not one line of at most {MOST_TEXT} bytes"
            ));
        }
        let disk = &self.members.disk;
        if disk.data > disk.size {
            return Err("the disk has more data than bytes".to_owned());
        }
        Ok(())
    }

    /// The file's bytes. What could not be read again is not written.
    pub fn to_json(&self) -> Result<Vec<u8>> {
        self.sane().map_err(|why| {
            Error::new(
                pileus_base::Code::InvalidArgument,
                format!("The manifest can't be written: {why}"),
            )
        })?;
        let mut text = serde_json::to_vec_pretty(self)
            .map_err(|err| Error::internal(format!("Writing a manifest: {err}")))?;
        text.push(b'\n');
        Ok(text)
    }

    /// Holds what was found in an archive against what this says. An error's source is
    /// [`Rule::ManifestMismatch`].
    pub fn check(&self, found: &Members) -> Result<()> {
        let said = &self.members;
        let differs = [
            (super::DISK, said.disk != found.disk),
            (super::LAYER, said.layer != found.layer),
            (super::MACHINE, said.machine != found.machine),
        ];
        match differs.into_iter().find(|(_, differs)| *differs) {
            Some((name, _)) => Err(Rule::ManifestMismatch.because(name)),
            None => Ok(()),
        }
    }
}

fn is_plain(value: &Value) -> bool {
    match value {
        Value::Object(fields) => fields.values().all(is_plain),
        Value::Array(_) | Value::Null => false,
        _ => true,
    }
}

#[cfg(test)]
#[path = "manifest_tests.rs"]
mod tests;
