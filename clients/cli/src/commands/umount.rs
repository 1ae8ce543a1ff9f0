//! `pileus umount`: its grammar. Mounts are not there yet, and it says so.

use crate::commands::mount;
use crate::error::Outcome;

/// Unmount a directory from an instance (not there yet)
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Instances, and where in them; all mounts of the instance if no path is given
    #[arg(value_name = "NAME[:PATH]", required = true)]
    pub targets: Vec<String>,
}

pub(crate) fn run(_: &Args) -> Outcome {
    Err(mount::not_yet())
}
