//! From an image's bytes to a raw, sparse disk: what they are, is told by magic bytes, never by a name. All is a
//! stream with a budget, so a bomb stops at the limit; only a qcow2 file is kept to be read in its own order.
//!
//! Next step for qcow2: `qcow2/convert.rs`; for packed images: `packed/unpack/`.

use std::fs::File;
use std::io::{self, Cursor, Read, Write};
use std::path::Path;
use std::sync::atomic::Ordering;

use pileus_base::{Code, Digest, Error, Phase, Reporter, Result, ResultExt, Size, files};

use crate::intake::{Target, blocking};
use crate::packed::unpack::{self, Budgets, Layer, Unpacked};
use crate::packed::{self, Machine, Manifest, Rule, digest, layer};
use crate::qcow2::{convert, header};
use crate::sparse::SparseWriter;
use crate::store::{Limits, Tools};

/// Largest window and dictionary that a decoder may allocate.
const MAX_WINDOW_LOG: u32 = 27;
const MAX_XZ_MEMORY: u64 = 512 << 20;
const CHUNK: usize = 256 << 10;
/// As many bytes tell what something is.
const HEAD: usize = 512;
/// Compressed bytes that are looked at to find out what is in them.
const MOST_LOOKED_AT: u64 = 1 << 20;

/// What the steps of one piece of work share.
#[derive(Debug)]
pub(crate) struct Work<'a> {
    pub limits: &'a Limits,
    pub tools: &'a Tools,
    /// The stage's name, for the programs' environment.
    pub stage: &'a str,
    /// A folder on the file system that is being filled.
    pub folder: &'a Path,
}

impl Work<'_> {
    /// An error once less than the reserve is free.
    pub fn check_space(&self) -> Result<()> {
        self.check_room_for(0)
    }

    pub fn check_room_for(&self, bytes: u64) -> Result<()> {
        check_room(self.folder, bytes, self.limits.reserve)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Qcow2,
    Xz,
    Gzip,
    Zstd,
    Tar,
    /// No known magic: a raw disk, if it has a partition table.
    Raw,
    /// Something that pileus knows and does not take.
    Other(&'static str),
}

impl Kind {
    /// Tells the kind by the first bytes (512 are enough).
    pub fn of(head: &[u8]) -> Self {
        let magics: [(&[u8], Kind); 11] = [
            (&header::MAGIC, Kind::Qcow2),
            (b"\xfd7zXZ\0", Kind::Xz),
            (b"\x1f\x8b", Kind::Gzip),
            (b"\x28\xb5\x2f\xfd", Kind::Zstd),
            (b"KDMV", Kind::Other("a VMDK disk")),
            (b"# Disk DescriptorFile", Kind::Other("a VMDK disk")),
            (b"vhdxfile", Kind::Other("a VHDX disk")),
            (b"conectix", Kind::Other("a VHD disk")),
            (b"BZh", Kind::Other("compressed with bzip2")),
            (b"PK\x03\x04", Kind::Other("a zip archive")),
            (b"<", Kind::Other("a web page")),
        ];
        let known = magics
            .into_iter()
            .find(|(magic, _)| head.starts_with(magic));
        match known {
            Some((_, kind)) => kind,
            None if head.get(257..262) == Some(b"ustar") => Self::Tar,
            None => Self::Raw,
        }
    }

    fn is_compressed(self) -> bool {
        matches!(self, Self::Xz | Self::Gzip | Self::Zstd)
    }
}

/// What became of an image's bytes.
#[derive(Debug)]
pub(crate) enum Form {
    /// The draft's disk, and how it was compressed.
    Disk(Option<Kind>),
    /// A qcow2 file in the stage.
    Qcow2(Option<Kind>),
    /// The draft's disk, and more; perhaps a layer that is to be merged into it.
    Packed(Box<Unpacked>),
}

/// Makes the best of a stream: the draft's disk, or a file in the stage if it has to be read in another order
/// than it comes in. Blocks.
pub(crate) fn take(mut input: impl Read + Send, target: &Target) -> Result<Form> {
    let head = head(&mut input).map_err(unreadable)?;
    let outer = Kind::of(&head);
    let mut input = Cursor::new(head).chain(input);
    if !outer.is_compressed() {
        return keep(outer, None, input, target);
    }
    let (inner, recorded) = look_inside(outer, &mut input);
    let mut input = Cursor::new(recorded).chain(input);
    let inner = match inner {
        // The decoder that reads all of it knows better what is wrong.
        None => Kind::Raw,
        Some(head) if is_packed(&head) => return unpacked(outer, input, target),
        Some(head) => Kind::of(&head),
    };
    let decoder = decoder(outer, io::BufReader::with_capacity(CHUNK, &mut input))?;
    let form = keep(inner, Some(outer), decoder, target)?;
    match input.read(&mut [0]) {
        Ok(0) => Ok(form),
        Ok(_) => Err(refused("something follows its compressed data")),
        Err(err) => Err(unreadable(err)),
    }
}

/// A packed image.
fn unpacked(outer: Kind, input: impl Read + Send, target: &Target) -> Result<Form> {
    if outer != Kind::Zstd {
        return Err(Rule::NotZstd.refuse());
    }
    target.hashed.store(true, Ordering::Relaxed);
    let (draft, budgets) = (target.stage.draft(), Budgets::of(&target.limits));
    let unpacked = unpack::unpack(input, &draft.folder, &budgets, &target.report)?;
    Ok(Form::Packed(Box::new(unpacked)))
}

/// Writes what comes to where it belongs.
fn keep(inner: Kind, outer: Option<Kind>, input: impl Read, target: &Target) -> Result<Form> {
    let draft = target.stage.draft();
    let (path, limit, form) = match inner {
        Kind::Qcow2 => (
            target.artifact(),
            target.limits.download,
            Form::Qcow2(outer),
        ),
        Kind::Raw => (draft.disk(), target.limits.virtual_size, Form::Disk(outer)),
        Kind::Other(what) => return Err(refused(&format!("it is {what}"))),
        Kind::Tar => return Err(refused("it is a tar that is not compressed")),
        Kind::Xz | Kind::Gzip | Kind::Zstd => return Err(refused("it is compressed twice")),
    };
    write(input, &path, inner, limit, target)?;
    Ok(form)
}

fn write(mut input: impl Read, path: &Path, kind: Kind, limit: u64, target: &Target) -> Result<()> {
    let file = File::create_new(path).io(format_args!("Creating {}", path.display()))?;
    let mut writer = SparseWriter::new(file, limit);
    let mut buffer = vec![0; CHUNK];
    let mut checked = 0;
    loop {
        target.report.check()?;
        let n = fill(&mut input, &mut buffer).map_err(unreadable)?;
        if kind == Kind::Raw && writer.position() == 0 {
            check_raw(&buffer[..n])?;
        }
        if n == 0 {
            break;
        }
        writer
            .write_all(&buffer[..n])
            .map_err(|err| match err.kind() {
                io::ErrorKind::FileTooLarge => too_large(limit),
                _ => Error::io("Writing the disk", err),
            })?;
        // Before the disk is full, not when.
        if writer.position() - checked > 64 << 20 {
            checked = writer.position();
            target.check_room_for(0)?;
        }
    }
    writer.finish().io("Writing the disk")?;
    Ok(())
}

/// What the draft's disk is, and what came with it.
#[derive(Debug, Default)]
pub(crate) struct Settled {
    /// Bytes as a guest sees it.
    pub size: u64,
    /// The disk's digest (`packed::digest`).
    pub disk: Option<Digest>,
    pub machine: Option<Machine>,
    pub manifest: Option<Manifest>,
    /// What a person should know of the image.
    pub warnings: Vec<String>,
}

/// Makes the draft's disk of what streaming gave.
pub(crate) async fn settle(work: &Work<'_>, target: &Target, form: Form) -> Result<Settled> {
    let (draft, report) = (target.stage.draft(), &target.report);
    let disk = draft.disk();
    let mut settled = Settled::default();
    match form {
        Form::Disk(_) => {}
        Form::Qcow2(_) => {
            let artifact = target.artifact();
            convert::convert(work, &artifact, &disk, report).await?;
            files::remove_file(&artifact)?;
        }
        Form::Packed(mut unpacked) => {
            if unpacked.layer == Layer::Data {
                report.phase(Phase::PreparingImage);
                layer::merge(work, &draft.folder, &mut unpacked, report).await?;
            }
            std::fs::rename(draft.folder.join(packed::DISK), &disk).io("Moving the disk")?;
            let parsed = Machine::parse(&unpacked.machine)?;
            settled.manifest = unpacked
                .manifest
                .as_deref()
                .map(Manifest::parse)
                .transpose()?;
            settled.disk = Some(unpacked.disk);
            settled.warnings = parsed.warnings;
            // One that leaves everything open says nothing.
            settled.machine = Some(parsed.machine).filter(|machine| !machine.is_empty());
        }
    }
    settled.size = round_to_sectors(&disk)?;
    if settled.size > work.limits.virtual_size {
        return Err(too_large(work.limits.virtual_size));
    }
    if settled.disk.is_none() {
        report.phase(Phase::VerifyingImage);
        settled.disk = Some(disk_digest(&disk, report).await?);
    }
    Ok(settled)
}

/// Of a disk that came in another order than it lies in, or whose size was not known before its end.
pub(crate) async fn disk_digest(disk: &Path, report: &Reporter) -> Result<Digest> {
    let what = format!("Reading {}", disk.display());
    let file = File::open(disk).io(&what)?;
    let report = report.clone();
    blocking(move || {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        digest::of_file(&file, threads.min(4), &mut |_| report.check())
    })
    .await
}

fn refused(why: &str) -> Error {
    Error::new(Code::BadImage, format!("The image is refused: {why}")).advise(
        "Images are qcow2 or raw disks with a partition table, plain or compressed with xz, gzip or zstd, \
         and packed images (image.tar.zst).",
    )
}

fn unreadable(err: io::Error) -> Error {
    refused("its compressed data is damaged or cut").with_source(err)
}

pub(crate) fn too_large(limit: u64) -> Error {
    Error::new(
        Code::ImageTooLarge,
        format!("The image is larger than the limit of {}", Size(limit)),
    )
}

pub(crate) fn check_room(folder: &Path, bytes: u64, reserve: u64) -> Result<()> {
    let free = files::free_space(folder)?;
    if free >= bytes.saturating_add(reserve) {
        return Ok(());
    }
    Err(Error::new(
        Code::NoSpace,
        format!(
            "The image needs {} of disk space, and {} have to stay free; {} has {} left",
            Size(bytes),
            Size(reserve),
            folder.display(),
            Size(free),
        ),
    )
    .advise("Free some space, or remove unused images with `pileus image prune`."))
}

/// The first bytes, less only if there are no more.
fn head(input: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(HEAD);
    input.take(HEAD as u64).read_to_end(&mut head)?;
    Ok(head)
}

/// Reads until the buffer is full or the stream ends.
fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
            Err(err) => return Err(err),
        }
    }
    Ok(filled)
}

/// The first bytes of what is compressed, if they can be had, and all that was read for it.
fn look_inside(kind: Kind, input: &mut impl Read) -> (Option<Vec<u8>>, Vec<u8>) {
    let mut recorder = Recorder {
        input: input.take(MOST_LOOKED_AT),
        bytes: Vec::new(),
    };
    let found = decoder(kind, io::BufReader::new(&mut recorder))
        .ok()
        .and_then(|mut decoder| head(&mut decoder).ok());
    (found, recorder.bytes)
}

/// Keeps what it read.
struct Recorder<R> {
    input: R,
    bytes: Vec<u8>,
}

impl<R: Read> Read for Recorder<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buffer)?;
        self.bytes.extend_from_slice(&buffer[..n]);
        Ok(n)
    }
}

/// Whether it is a tar: by the magic that all but the oldest have, or by what a packed image begins with.
fn is_packed(head: &[u8]) -> bool {
    let name = head.split(|byte| *byte == 0).next().unwrap_or_default();
    let known = [
        packed::DISK,
        packed::LAYER,
        packed::MACHINE,
        packed::MANIFEST,
    ];
    Kind::of(head) == Kind::Tar
        || head.len() == HEAD && known.iter().any(|known| known.as_bytes() == name)
}

/// A raw disk has no magic of its own; the boot signature (which GPT disks have as well) tells it
/// from an error page or a text.
fn check_raw(head: &[u8]) -> Result<()> {
    if head.len() < 512 || head[510..512] != [0x55, 0xaa] {
        return Err(refused(
            "it is neither qcow2 nor a disk with a partition table",
        ));
    }
    Ok(())
}

fn round_to_sectors(disk: &Path) -> Result<u64> {
    let what = || format!("Opening {}", disk.display());
    let file = File::options().write(true).open(disk).io(what())?;
    let len = file.metadata().io(what())?.len();
    let size = len.next_multiple_of(512);
    if size != len {
        file.set_len(size).io(what())?;
    }
    Ok(size)
}

fn decoder<'a>(kind: Kind, input: impl io::BufRead + 'a) -> Result<Box<dyn Read + 'a>> {
    let setup = |err: io::Error| Error::io("Setting up the decoder", err);
    Ok(match kind {
        Kind::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
        Kind::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(input).map_err(setup)?;
            decoder.window_log_max(MAX_WINDOW_LOG).map_err(setup)?;
            Box::new(decoder)
        }
        _ => {
            let stream =
                xz2::stream::Stream::new_stream_decoder(MAX_XZ_MEMORY, xz2::stream::CONCATENATED)
                    .map_err(|err| setup(err.into()))?;
            Box::new(xz2::bufread::XzDecoder::new_stream(input, stream))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_by_magic() {
        assert_eq!(Kind::of(b"QFI\xfb\0\0\0\x03"), Kind::Qcow2);
        assert_eq!(Kind::of(b"\xfd7zXZ\0\0"), Kind::Xz);
        assert_eq!(Kind::of(b"\x1f\x8b\x08"), Kind::Gzip);
        assert_eq!(Kind::of(b"\x28\xb5\x2f\xfd\0"), Kind::Zstd);
        assert_eq!(Kind::of(b"<html>"), Kind::Other("a web page"));
        assert_eq!(Kind::of(b""), Kind::Raw);
        assert_eq!(Kind::of(&[0; 512]), Kind::Raw);
    }
}
