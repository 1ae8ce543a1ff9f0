//! layer.qcow2: judged by our own parser before any tool sees it. One without data is thrown away. One that has data is
//! merged into the disk by qemu-img, in bounds, once all of its tables have been checked to lie in the file; which
//! files it works on is said to qemu-img as explicit nodes, never by what the layer says.
//!
//! Next step for the disk that comes of it: the store (`import`), or `mutable`.

mod merge;
mod tables;

use std::fs::File;
use std::os::unix::fs::FileExt;

use pileus_base::{Error, Result, ResultExt};

use super::rule::Rule;
use crate::qcow2::header::{self, Below, Refusal};

pub(crate) use merge::merge;
pub use merge::merge_with;

/// What a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judged {
    Empty,
    /// Bytes that are in the disk instead after merging, at most.
    Data(u64),
}

/// Checks a layer that came in an archive with a disk of so many bytes.
pub fn judge(file: &File, disk_size: u64) -> Result<Judged> {
    let len = file.metadata().io("Looking at a layer")?.len();
    let mut head = vec![0; len.min(header::HEAD as u64) as usize];
    file.read_exact_at(&mut head, 0).io("Reading a layer")?;
    let below = Below {
        name: super::DISK.as_bytes(),
        format: b"raw",
        size: disk_size,
    };
    let header = header::parse_layer(&head, len, below).map_err(refused)?;
    tables::data(&header, len, |bytes, at| file.read_exact_at(bytes, at)).map(|data| match data {
        0 => Judged::Empty,
        data => Judged::Data(data),
    })
}

fn refused(refusal: Refusal) -> Error {
    let rule = match refusal {
        Refusal::Truncated | Refusal::NotQcow2 => Rule::LayerNotQcow2,
        Refusal::Version(_) => Rule::LayerVersion,
        Refusal::BackingFile | Refusal::BackingName => Rule::LayerBacking,
        Refusal::BackingFormat => Rule::LayerBackingFormat,
        Refusal::DataFile => Rule::LayerDataFile,
        Refusal::Encrypted => Rule::LayerEncrypted,
        Refusal::Snapshots(_) => Rule::LayerSnapshots,
        Refusal::Bitmaps => Rule::LayerBitmaps,
        Refusal::Dirty => Rule::LayerDirty,
        Refusal::Corrupt => Rule::LayerCorrupt,
        Refusal::UnknownFeature(_) => Rule::LayerFeature,
        Refusal::Extension(_) => Rule::LayerExtension,
        Refusal::Empty | Refusal::TooLarge(..) | Refusal::Size(..) => Rule::LayerSize,
        Refusal::L1Table | Refusal::RefcountTable => Rule::LayerTables,
        Refusal::ClusterBits(_)
        | Refusal::HeaderLength(_)
        | Refusal::RefcountOrder(_)
        | Refusal::CompressionType(_) => Rule::LayerHeader,
    };
    rule.because(refusal)
}
