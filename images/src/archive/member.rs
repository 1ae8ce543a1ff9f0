//! What writing and reading a member have in common.

use pileus_base::{Digest, Result};
use sha2::Digest as _;

use super::extents::Extent;

/// A tar's headers and data begin at multiples of this.
pub const BLOCK: u64 = 512;

/// Told of each piece of data that was moved, and able to end the work.
pub type Moved<'a> = &'a mut dyn FnMut(u64) -> Result<()>;

/// A member's digest, as the folder's page says.
pub struct MemberHash {
    hash: sha2::Sha256,
    dense: bool,
}

impl MemberHash {
    pub fn new(dense: bool) -> Self {
        Self {
            hash: sha2::Sha256::new(),
            dense,
        }
    }

    pub fn extent(&mut self, extent: Extent) {
        if !self.dense {
            self.data(&extent.offset.to_be_bytes());
            self.data(&extent.len.to_be_bytes());
        }
    }

    pub fn data(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
    }

    pub fn finish(mut self, size: u64) -> Digest {
        if !self.dense {
            self.data(&size.to_be_bytes());
        }
        Digest::from_bytes(self.hash.finalize().into())
    }
}
