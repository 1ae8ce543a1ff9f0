//! From the bytes of an archive, as they come, to a sparse disk in a folder. Nothing is written before it is
//! within its budget, all of it is hashed on the way, and nothing remains after a failure.
//!
//! Next step: `layer` (judges layer.qcow2 and merges one that holds data).

use std::io::Read;
use std::path::Path;

use pileus_base::{Digest, Error, Reporter, Result};

use super::layer;
use crate::format::Work;
use crate::store::Limits;

/// What an archive may cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budgets {
    /// Bytes of the archive as it comes.
    pub archive: u64,
    /// Bytes of the disk as a guest sees it; one of just this size is taken.
    pub disk: u64,
    /// Bytes of data (what is not zero, in whole blocks) that are written.
    pub data: u64,
    /// Bytes of tar for each byte of the archive, once the tar has more than `ratio_from` bytes.
    pub ratio: u64,
    pub ratio_from: u64,
    /// Bytes of members that nobody needs.
    pub skipped: u64,
    /// How many members there may be, all headers counted.
    pub members: u64,
    /// Extents of a sparse member.
    pub extents: usize,
    /// Bytes of each of machine.json and manifest.json.
    pub small: u64,
    /// Free bytes that are left to others.
    pub reserve: u64,
}

impl Budgets {
    /// The largest disk that the ancestor took is one byte smaller.
    pub const ANCESTORS_DISK: u64 = 50 << 30;

    /// Within a store's limits.
    pub fn of(limits: &Limits) -> Self {
        Self {
            archive: limits.download,
            disk: limits.virtual_size,
            data: limits.virtual_size,
            ratio: 1000,
            ratio_from: 1 << 30,
            skipped: 1 << 30,
            members: 10_000,
            extents: crate::archive::extents::MOST,
            small: 1 << 20,
            reserve: limits.reserve,
        }
    }
}

/// Whether the archive's layer says anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layer {
    /// It has no data; it was thrown away.
    Empty,
    /// It has data, and lies beside the disk until [`layer::merge`] has put the data into the disk.
    Data,
}

/// What came out of an archive. The folder has the disk as [`super::DISK`]; it is not yet synced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpacked {
    /// SHA-256 of the archive as it came: the image's name in the store.
    pub archive: Digest,
    pub archive_bytes: u64,
    /// Bytes of the disk as a guest sees it.
    pub disk_size: u64,
    /// The disk's digest (see [`super::digest`]).
    pub disk: Digest,
    /// Bytes of the disk that are not zero, in whole blocks.
    pub data: u64,
    pub layer: Layer,
    /// machine.json as it came.
    pub machine: Vec<u8>,
    /// manifest.json as it came; what it says of the members was compared.
    pub manifest: Option<Vec<u8>>,
}

/// Unpacks an archive into a folder, which must have neither a [`super::DISK`] nor a [`super::LAYER`]. Blocks; several
/// threads work until it returns. `input` must end with an error when the work is cancelled while it waits.
pub fn unpack(
    input: impl Read + Send,
    folder: &Path,
    budgets: &Budgets,
    report: &Reporter,
) -> Result<Unpacked> {
    let _ = (input, folder, budgets, report);
    Err(Error::internal("unpack is being written"))
}

/// The whole way: unpacks, and merges a layer that has data.
pub(crate) async fn take_in(
    work: &Work<'_>,
    input: impl Read + Send + 'static,
    folder: &Path,
    budgets: &Budgets,
    report: &Reporter,
) -> Result<Unpacked> {
    let (to, within, told) = (folder.to_owned(), budgets.clone(), report.clone());
    let mut unpacked = tokio::task::spawn_blocking(move || unpack(input, &to, &within, &told))
        .await
        .map_err(|err| Error::internal(format!("Unpacking an image panicked: {err}")))??;
    if unpacked.layer == Layer::Data {
        layer::merge(work, folder, &mut unpacked, report).await?;
    }
    Ok(unpacked)
}
