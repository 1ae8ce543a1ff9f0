//! manifest.json: what the members of a packed image consist of, and where the image comes from.

/// What `manifest.json` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {}
