//! Archives: one file that holds disks. A tar in the form that every tar reads (GNU's headers, its old sparse
//! members), compressed with zstd:
//!
//! ```text
//! zstd -dqc web.pileus | tar -t           what is in it
//! zstd -dqc web.pileus | tar -xS          unpacks it, holes and all
//! ```
//!
//! The same content gives the same bytes: no times, owners or modes of the host, members in a fixed order,
//! and holes where there are zeros, whatever the file system says of them.
//!
//! ```text
//! extents   a file's data by its zero blocks
//! write     members → tar → zstd              stops when nobody reads
//! out       a tar's headers and data, and zstd around them
//! read      zstd → tar → members              for archives that nobody trusts: an allow-list with budgets
//! member    what both ways share: digests, blocks
//! parts     what both strict readers of tars share: numbers, checksums, sparse maps (`packed/members`)
//! content   what an image consists of, and an image of the store out of an archive
//! flatten   one disk of an instance's layers, for an image of the store
//! merge     several layers become one
//! layer     a qcow2 layer's head without names of files, and with ours
//! ```
//!
//! A member's digest is the SHA-256 of its bytes if it is dense. Of a sparse member it is that of its extents
//! (offset and length as 64-bit big-endian numbers, then the data) followed by its size: hashing terabytes of
//! zeros would say nothing more. The last member, `digests.json`, has those of all before it.
//!
//! Next step: `daemon/src/service/archive.rs` (instances); packed images (`packed`) use the same parts.

mod content;
pub mod extents;
mod flatten;
pub mod layer;
pub(crate) mod member;
mod merge;
pub(crate) mod out;
pub(crate) mod parts;
pub mod read;
pub mod write;

pub use content::{Content, Incoming};
pub use read::{Input, Member, Reader};
pub use write::Writer;

/// The last member.
pub const DIGESTS: &str = "digests.json";
