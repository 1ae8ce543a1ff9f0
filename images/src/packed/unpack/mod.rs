//! From the bytes of an archive, as they come, to a sparse disk in a folder. Nothing is written before it is within its
//! budget, all of it is hashed on the way, and nothing remains after a failure.
//!
//! ```text
//! pipe     bytes → SHA-256 → zstd → a stream    two threads before the one that walks the tar
//! folder   the files that come of it            beneath one folder, and gone unless all went well
//! sink     a member's data → a sparse file      zero blocks become holes, chunks go to the digest's thread
//! ```
//!
//! Next step: `layer` (judges layer.qcow2 and merges one that holds data).

mod folder;
mod pipe;
mod sink;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use pileus_base::{Digest, Error, Reporter, Result, ResultExt};

use super::layer::{self, Judged};
use super::machine::Machine;
use super::manifest::{DiskMember, Manifest, Member as Listed, Members};
use super::members::{Bounds, Kind, Member, Walk};
use super::rule::Rule;
use crate::store::{Limits, Tools};
use folder::Folder;
use sink::Sink;

/// A layer that a manifest tells of has no data, so it is small.
const MOST_LAYER: u64 = 64 << 20;

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

    fn bounds(&self) -> Bounds {
        Bounds {
            disk: self.disk,
            small: self.small,
            skipped: self.skipped,
            members: self.members,
            extents: self.extents,
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
    /// machine.json as it came; [`Machine::parse`] takes it.
    pub machine: Vec<u8>,
    /// manifest.json as it came; what it says of the members fits them.
    pub manifest: Option<Vec<u8>>,
}

/// Unpacks an archive into a folder, which must have neither a [`super::DISK`] nor a [`super::LAYER`]. Blocks; several
/// threads work until it returns. While `input` waits it must heed that the work is cancelled; an `io::Error` of it that
/// holds a [`pileus_base::Error`] is returned as that one.
pub fn unpack(
    input: impl Read + Send,
    folder: &Path,
    budgets: &Budgets,
    report: &Reporter,
) -> Result<Unpacked> {
    let folder = Folder::open(folder)?;
    let (members, archive) = pipe::run(input, budgets, report, |stream| {
        Taking {
            folder: &folder,
            budgets,
            report,
            left: budgets.data,
        }
        .members(Walk::new(stream, budgets.bounds()))
    })?;
    let layer = members.judge_layer(budgets)?;
    Machine::parse(&members.machine)
        .map_err(|err| err.detail(format!("rule: {}", Rule::Machine.as_str())))?;
    members.check_manifest()?;
    folder.keep(layer);
    Ok(Unpacked {
        archive: archive.digest,
        archive_bytes: archive.bytes,
        disk_size: members.disk.size,
        disk: members.disk.digest,
        data: members.disk.data,
        layer,
        machine: members.machine,
        manifest: members.manifest,
    })
}

/// The whole way: unpacks, and merges a layer that has data. `stage` marks the programs that work on it.
pub async fn take_in(
    input: impl Read + Send + 'static,
    folder: &Path,
    budgets: &Budgets,
    tools: &Tools,
    stage: &str,
    report: &Reporter,
) -> Result<Unpacked> {
    let (to, within, told) = (folder.to_owned(), budgets.clone(), report.clone());
    let mut unpacked = tokio::task::spawn_blocking(move || unpack(input, &to, &within, &told))
        .await
        .map_err(|err| Error::internal(format!("Unpacking an image panicked: {err}")))??;
    if unpacked.layer == Layer::Data {
        layer::merge_with(tools, stage, budgets.reserve, folder, &mut unpacked, report).await?;
    }
    Ok(unpacked)
}

/// The members of an archive on their way into a folder.
struct Taking<'a> {
    folder: &'a Folder,
    budgets: &'a Budgets,
    report: &'a Reporter,
    /// Bytes of data that may still be written.
    left: u64,
}

/// What came.
struct Came {
    disk: DiskMember,
    layer: File,
    machine: Vec<u8>,
    manifest: Option<Vec<u8>>,
}

impl Taking<'_> {
    fn members(mut self, mut walk: Walk<pipe::Stream<'_>>) -> Result<Came> {
        let (mut disk, mut layer, mut machine, mut manifest) = (None, None, None, None);
        while let Some(member) = walk.next_member()? {
            match member.kind {
                Kind::Disk => disk = Some(self.file(&mut walk, &member)?.1),
                Kind::Layer => layer = Some(self.file(&mut walk, &member)?.0),
                Kind::Machine => machine = Some(small(&mut walk, &member)?),
                Kind::Manifest => manifest = Some(small(&mut walk, &member)?),
            }
        }
        // The walk's end says which one is missing.
        let missing = || Rule::MissingMember.refuse();
        Ok(Came {
            disk: disk.ok_or_else(missing)?,
            layer: layer.ok_or_else(missing)?,
            machine: machine.ok_or_else(missing)?,
            manifest,
        })
    }

    fn file(
        &mut self,
        walk: &mut Walk<pipe::Stream<'_>>,
        member: &Member,
    ) -> Result<(File, DiskMember)> {
        let file = self.folder.create(member.kind)?;
        let written = sink::write(
            Sink {
                name: member.kind.name(),
                file: &file,
                folder: self.folder,
                size: member.size,
                left: self.left,
                reserve: self.budgets.reserve,
                report: self.report,
            },
            |each| walk.read(member, each),
        )?;
        self.left = self.left.saturating_sub(written.data);
        Ok((file, written))
    }
}

fn small(walk: &mut Walk<pipe::Stream<'_>>, member: &Member) -> Result<Vec<u8>> {
    // The walk has bounded its size.
    let mut bytes = vec![0; member.size as usize];
    walk.read(member, &mut |at, piece| {
        bytes[at as usize..][..piece.len()].copy_from_slice(piece);
        Ok(())
    })?;
    Ok(bytes)
}

impl Came {
    fn judge_layer(&self, budgets: &Budgets) -> Result<Layer> {
        Ok(match layer::judge(&self.layer, self.disk.size)? {
            Judged::Empty => Layer::Empty,
            Judged::Data(bytes) if bytes > budgets.data.saturating_sub(self.disk.data) => {
                return Err(
                    Rule::DataTooLarge.because("the disk, and what is to be merged into it")
                );
            }
            Judged::Data(_) => Layer::Data,
        })
    }

    /// The manifest must fit, if there is one.
    fn check_manifest(&self) -> Result<()> {
        let Some(text) = &self.manifest else {
            return Ok(());
        };
        let manifest = Manifest::parse(text)?;
        // Only what is of the right size is worth hashing.
        let size = self.layer.metadata().io("Looking at a layer")?.len();
        if size != manifest.members.layer.size || size > MOST_LAYER {
            return Err(Rule::ManifestMismatch.because(super::LAYER));
        }
        let mut layer = vec![0; size as usize];
        self.layer
            .read_exact_at(&mut layer, 0)
            .io("Reading a layer")?;
        manifest.check(&Members {
            disk: self.disk.clone(),
            layer: Listed::of(&layer),
            machine: Listed::of(&self.machine),
        })
    }
}
