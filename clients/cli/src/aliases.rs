//! Names of the user's own for commands in instances. (Being written.)

use std::ffi::OsString;

use crate::environment::Environment;

/// A command line whose command, the word at `at`, is none of ours: rewritten to the `exec` that this
/// alias stands for, or `None` if it is no alias.
pub(crate) fn rewrite(_args: &[OsString], _at: usize, _env: &Environment) -> Option<Vec<OsString>> {
    None
}
