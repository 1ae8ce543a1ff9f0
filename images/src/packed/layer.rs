//! layer.qcow2: judged before any tool sees it, thrown away if it has no data, else merged into the disk.

use std::path::Path;

use pileus_base::{Error, Reporter, Result};

use super::unpack::Unpacked;
use crate::format::Work;

/// Puts what the layer has into the disk, and removes the layer.
pub(crate) async fn merge(
    work: &Work<'_>,
    folder: &Path,
    unpacked: &mut Unpacked,
    report: &Reporter,
) -> Result<()> {
    let _ = (work, folder, unpacked, report);
    Err(Error::internal("merging is being written"))
}
