//! Packed images: `image.tar.zst`, one file that holds a disk and the machine that it wants. The format is
//! the one of the Go package that this succeeds, and both read each other's (docs/packed-images.md):
//!
//! ```text
//! disk.img        the disk, raw, sparse
//! layer.qcow2     an empty overlay on it: backing file exactly `disk.img`, format `raw`
//! machine.json    the machine, version 1 (version 0 is migrated)
//! manifest.json   ours and optional: digests of the members, where it comes from
//! ```
//!
//! ```text
//! rule      what an archive can be refused for          each with a name of its own
//! frames    zstd → bytes                                whole frames and nothing else
//! members   a tar → members                             a strict walk with budgets
//! unpack    members → a disk in a stage folder          hashed and written while it streams
//! layer     layer.qcow2: judged before any tool sees it, thrown away if empty, else merged
//! machine/  machine.json                                parse, migrate, merge, limit
//! manifest  manifest.json
//! digest    a disk's digest                             by chunks, in parallel, holes for free
//! pack      a disk and a machine → image.tar.zst        many threads, same content → same bytes
//! mutable   an image in the making                      the ancestor's MutableImage
//! ```
//!
//! Next step: `bring` (the store takes one in), `manager` (the ancestor's way to use them).

pub mod digest;
pub mod frames;
pub mod layer;
pub mod machine;
pub mod manifest;
pub mod members;
pub mod mutable;
pub mod pack;
pub mod rule;
pub mod unpack;

pub use machine::Machine;
pub use manifest::Manifest;
pub use rule::Rule;

/// The raw disk.
pub const DISK: &str = "disk.img";
/// The overlay; its backing string is exactly [`DISK`].
pub const LAYER: &str = "layer.qcow2";
pub const MACHINE: &str = "machine.json";
/// Ours; other readers ignore it.
pub const MANIFEST: &str = "manifest.json";
