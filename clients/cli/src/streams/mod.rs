//! Files that travel between this program and the daemon: read or written here, with the rights of the one who calls.
//!
//! ```text
//! send.rs     a file or standard input → daemon       import, image import, image inspect
//! receive.rs  daemon → a file or standard output      export, image export, image pack, image build
//! part.rs     the file that is written until it is complete
//! ```

mod part;
pub(crate) mod receive;
pub(crate) mod send;
