//! What we do with qcow2 files: refuse the unsafe ones by our own parser (`header`), and only then
//! let qemu-img check and convert them (`convert`).

pub mod convert;
pub mod header;
