//! Making images: of an instance (`pileus image pack`), and by a recipe (`pileus image build`). Both end the same
//! way: a throw-away machine has made a disk, its layers become one, that becomes an image of the store, and
//! the image is streamed as an archive to whoever asked.
//!
//! ```text
//! pack     instance or snapshot ─▶ thin clone ─▶ boots as somebody else ─▶ cleaned up ─▶ off ─┐
//! build    image ─▶ throw-away instance ─▶ steps ─────────────────────────▶ cleaned up ─▶ off ─┤
//! install  empty disk + ISO or kernel ─▶ machine without an agent ─────────────────────▶ off ─┤
//! publish  layers ─▶ one raw disk in the stage ─▶ image of the store ─▶ image.tar.zst ◀───────┘
//! ```
//!
//! ```text
//! recipe     what can be wrong with a recipe            throwaway  the machine, gone whatever happens
//! provision  commands in its guest, the clean-up        upload     what a build's client sends
//! ```
//!
//! Whatever ends the work, nothing is left: the machine is a throw-away instance with a lease (a daemon that was
//! killed removes it when it starts again), its disk a layer of nobody's, the disk in the stage is the stage's, and
//! an image that has no tag is removed when it was sent.
//!
//! Next step: `images/src/archive/flatten.rs`, `images/src/packed/pack.rs`.

mod build;
mod install;
mod pack;
mod provision;
mod publish;
mod recipe;
mod throwaway;
mod upload;

/// Seconds until a machine whose work broke off in an unforeseen way is removed; nothing takes longer.
const LEASE: u64 = 24 * 3600;
