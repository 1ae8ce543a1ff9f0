//! The image store: from a name, a URL or a file to an immutable, verified, digest-named base disk,
//! and from that to a thin overlay. Useful on its own; the daemon is one of its users.
//!
//! The way of an image, in the order of the modules:
//!
//! ```text
//! reference  what the user wrote            `debian`, `build:debian-13`, `file:///x`, `https://…`
//! lookup     which host is asked
//! hosts      → one item that can be got     which host knows the name, and how to get it
//! obtain     one piece of work an item      many callers wait for the same fetch or build
//! fetch      → bytes as they come           a file's, or `download`'s (resume, retry); hosts/build makes a disk
//! intake     bytes → SHA-256 → format       threads with short queues between; nothing is kept twice
//! format     → a raw, sparse disk           magic bytes, decompression, the qcow2 check, qemu-img
//! bring      one item, all of the above     what the store does to have an image (`import`: of a stream)
//! store      → root/HEX/                    published by one rename, listed, held by locks (`lock`), named (`tags`)
//! collect    root/HEX/ →                    removed, pruned, the least recently used first when room is needed
//! overlay    → an instance's own disk       a thin qcow2 on top; nothing is ever copied
//! archive    ⇄ one file with disks in it    tar and zstd, written to and read from streams
//! packed     ⇄ `image.tar.zst`              disk, layer, machine.json: packed images that travel
//! manager    the ancestor's vocabulary      Manager, Instance, Downloader, MutableImage, gc
//! ```
//!
//! Next step on the way of the data: `instances/` (a machine that boots from an overlay).

pub mod archive;
mod bring;
mod collect;
mod download;
pub mod fetch;
pub mod format;
pub mod hosts;
mod image;
mod import;
mod intake;
mod lock;
mod lookup;
pub mod manager;
mod obtain;
pub mod overlay;
pub mod packed;
pub mod qcow2;
mod reference;
mod refresh;
mod sources;
mod sparse;
mod stage;
mod store;
mod tags;
mod tool;
mod verify;

pub use collect::{Budget, Removed};
pub use fetch::Patience;
pub use hosts::{About, CatalogEntry, Host, Item, Origin};
pub use image::{DiskMark, Image, ImageInfo};
pub use import::{Arrival, Inspected};
pub use lock::ItemLock;
pub use lookup::CatalogWish;
pub use reference::ImageRef;
pub use store::{InUse, Limits, Listed, Store, StoreConfig, Tools};
pub use verify::Verified;
