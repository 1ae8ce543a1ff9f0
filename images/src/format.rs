//! From an artifact in the stage to a raw, sparse disk: what it is, is told by its magic bytes, never
//! by its name. Decompression is a stream with a budget, so a bomb stops at the limit.
//!
//! Next step for qcow2: `qcow2/convert.rs`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;

use pileus_base::{Code, Error, Phase, Reporter, Result, ResultExt, Size, files};

use crate::image::Draft;
use crate::qcow2::{convert, header};
use crate::sparse::SparseWriter;
use crate::store::{Limits, Tools};

/// Largest window and dictionary that a decoder may allocate.
const MAX_WINDOW_LOG: u32 = 27;
const MAX_XZ_MEMORY: u64 = 512 << 20;
const CHUNK: usize = 256 << 10;

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
        let free = files::free_space(self.folder)?;
        if free < bytes.saturating_add(self.limits.reserve) {
            return Err(Error::new(
                Code::NoSpace,
                format!(
                    "The image needs {} of disk space, and {} have to stay free; {} has {} left",
                    Size(bytes),
                    Size(self.limits.reserve),
                    self.folder.display(),
                    Size(free),
                ),
            )
            .advise("Free some space, or remove unused images with `pileus images prune`."));
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Qcow2,
    Xz,
    Gzip,
    Zstd,
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
        magics
            .into_iter()
            .find(|(magic, _)| head.starts_with(magic))
            .map_or(Kind::Raw, |(_, kind)| kind)
    }

    fn is_compressed(self) -> bool {
        matches!(self, Self::Xz | Self::Gzip | Self::Zstd)
    }
}

/// Turns `artifact` into the draft's disk and returns the virtual size in bytes. `artifact` is used up.
pub(crate) async fn prepare(
    work: &Work<'_>,
    artifact: &Path,
    draft: &Draft,
    report: &Reporter,
) -> Result<u64> {
    let mut source = artifact.to_owned();
    let mut kind = kind_of(&source)?;
    if kind.is_compressed() {
        report.phase(Phase::PreparingImage);
        let unpacked = source.with_extension("unpacked");
        decompress(work, kind, &source, &unpacked, report).await?;
        files::remove_file(&source)?;
        source = unpacked;
        kind = kind_of(&source)?;
    }
    let disk = draft.disk();
    match kind {
        Kind::Qcow2 => {
            convert::convert(work, &source, &disk, report).await?;
            files::remove_file(&source)?;
        }
        Kind::Raw => {
            report.phase(Phase::VerifyingImage);
            check_raw(&source)?;
            std::fs::rename(&source, &disk).io("Moving the disk")?;
        }
        Kind::Other(what) => return Err(refused(&format!("it is {what}"))),
        Kind::Xz | Kind::Gzip | Kind::Zstd => return Err(refused("it is compressed twice")),
    }
    let size = round_to_sectors(&disk)?;
    if size > work.limits.virtual_size {
        return Err(too_large(work.limits.virtual_size));
    }
    Ok(size)
}

fn refused(why: &str) -> Error {
    Error::new(Code::BadImage, format!("The image is refused: {why}")).advise(
        "Images are qcow2 or raw disks with a partition table, plain or compressed with xz, gzip or zstd.",
    )
}

pub(crate) fn too_large(limit: u64) -> Error {
    Error::new(
        Code::ImageTooLarge,
        format!("The image is larger than the limit of {}", Size(limit)),
    )
}

fn kind_of(path: &Path) -> Result<Kind> {
    Ok(Kind::of(&head(path)?))
}

fn head(path: &Path) -> Result<Vec<u8>> {
    let what = || format!("Reading {}", path.display());
    let mut head = Vec::new();
    File::open(path)
        .io(what())?
        .take(512)
        .read_to_end(&mut head)
        .io(what())?;
    Ok(head)
}

/// A raw disk has no magic of its own; the boot signature (which GPT disks have as well) tells it
/// from an error page or a text.
fn check_raw(path: &Path) -> Result<()> {
    let head = head(path)?;
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

async fn decompress(
    work: &Work<'_>,
    kind: Kind,
    source: &Path,
    target: &Path,
    report: &Reporter,
) -> Result<()> {
    let input = File::open(source).io("Opening the image")?;
    let total = input.metadata().io("Opening the image")?.len();
    let output = File::create_new(target).io("Creating the disk")?;
    let limit = work.limits.virtual_size;
    let (reserve, folder) = (work.limits.reserve, work.folder.to_owned());
    let report = report.clone();
    tokio::task::spawn_blocking(move || {
        let input = Counted {
            input: io::BufReader::with_capacity(CHUNK, input),
            done: 0,
            total,
            report: report.clone(),
        };
        let mut decoder = decoder(kind, input)?;
        let mut writer = SparseWriter::new(output, limit);
        let mut buffer = vec![0; CHUNK];
        let mut checked = 0;
        loop {
            report.check()?;
            let n = match decoder.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => continue,
                Err(err) => {
                    return Err(refused("its compressed data is damaged or cut").with_source(err));
                }
            };
            writer
                .write_all(&buffer[..n])
                .map_err(|err| match err.kind() {
                    io::ErrorKind::FileTooLarge => too_large(limit),
                    _ => Error::io("Writing the disk", err),
                })?;
            // Before the disk is full, not when.
            if writer.position() - checked > 64 << 20 {
                checked = writer.position();
                if files::free_space(&folder)? < reserve {
                    return Err(Error::new(
                        Code::NoSpace,
                        format!("{} is full but for its reserve", folder.display()),
                    )
                    .advise("Free some space, or remove unused images."));
                }
            }
        }
        writer.finish().io("Writing the disk")?;
        Ok(())
    })
    .await
    .map_err(|err| Error::internal(format!("Decompressing panicked: {err}")))?
}

fn decoder(kind: Kind, input: impl io::BufRead + Send + 'static) -> Result<Box<dyn Read>> {
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

/// Tells how much of the input is used up.
struct Counted<R> {
    input: R,
    done: u64,
    total: u64,
    report: Reporter,
}

impl<R: io::BufRead> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.input.read(buffer)?;
        self.count(n);
        Ok(n)
    }
}

impl<R: io::BufRead> io::BufRead for Counted<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.input.fill_buf()
    }

    fn consume(&mut self, n: usize) {
        self.input.consume(n);
        self.count(n);
    }
}

impl<R> Counted<R> {
    fn count(&mut self, n: usize) {
        let before = self.done / (4 << 20);
        self.done += n as u64;
        if self.done / (4 << 20) != before || self.done == self.total {
            self.report.progress(self.done, Some(self.total));
        }
    }
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
