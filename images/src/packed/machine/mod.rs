//! machine.json: the hardware that an image wants, in the words of version 1.

use serde::{Deserialize, Serialize};

/// A machine; what is not set is left to whoever makes one of it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {}
