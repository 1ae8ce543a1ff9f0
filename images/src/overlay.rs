//! An instance's own disk: a thin qcow2 file on top of a base that is never written. Nothing is
//! copied, so it is made in milliseconds whatever the image's size.
//!
//! The base's path is recorded for people and for qemu-img; QEMU is given explicit nodes and must
//! not follow it.

use std::path::Path;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use pileus_base::{Code, Error, Result, ResultExt, Size, files};

/// The guest's sectors; a disk ends with a whole one.
const SECTOR: u64 = 512;

/// Makes the overlay `path` (which must not exist) of `size` bytes, rounded up to whole sectors, on
/// the raw disk `base`. Blocks for a few milliseconds.
pub fn create(path: &Path, size: Size, base: &Path) -> Result<()> {
    let base_size = std::fs::metadata(base)
        .io(format_args!("Looking at {}", base.display()))?
        .len();
    if size.bytes() < base_size {
        return Err(Error::new(
            Code::DiskTooSmall,
            format!(
                "Requested disk ({} bytes) below minimum for this image ({base_size} bytes)",
                size.bytes()
            ),
        )
        .advise(format!("Ask for a disk of at least {}.", Size(base_size))));
    }
    make(path, size, base, "raw")
}

/// Makes the overlay `path` (which must not exist) on another overlay, whose guest sees `size` bytes.
pub fn create_on_layer(path: &Path, size: Size, layer: &Path) -> Result<()> {
    make(path, size, layer, "qcow2")
}

/// The size of the disk that the guest sees, as the overlay's header says.
pub fn size(path: &Path) -> Result<Size> {
    use std::os::unix::fs::FileExt;
    let what = format!("Reading {}", path.display());
    let mut head = [0; 32];
    let file = std::fs::File::open(path).io(&what)?;
    file.read_exact_at(&mut head, 0).io(&what)?;
    let mut size = [0; 8];
    size.copy_from_slice(&head[24..]);
    match head.starts_with(b"QFI\xfb") {
        true => Ok(Size(u64::from_be_bytes(size))),
        false => Err(not_one(path)),
    }
}

fn not_one(path: &Path) -> Error {
    Error::new(Code::BadImage, format!("{} is no overlay", path.display()))
}

/// Whether nothing was ever written to the overlay, so that it reads as what lies below it. Only for
/// overlays that no VM has open.
pub fn is_empty(path: &Path) -> Result<bool> {
    use std::os::unix::fs::FileExt;
    let what = format!("Reading {}", path.display());
    let file = std::fs::File::open(path).io(&what)?;
    let mut head = [0; 48];
    file.read_exact_at(&mut head, 0).io(&what)?;
    let entries = u32::from_be_bytes([head[36], head[37], head[38], head[39]]);
    let mut offset = [0; 8];
    offset.copy_from_slice(&head[40..48]);
    // A table of 2^21 entries is one of a disk of a pebibyte.
    if !head.starts_with(b"QFI\xfb") || entries > 1 << 21 {
        return Err(not_one(path));
    }
    let mut table = vec![0; entries as usize * 8];
    file.read_exact_at(&mut table, u64::from_be_bytes(offset))
        .io(&what)?;
    Ok(table.iter().all(|byte| *byte == 0))
}

fn make(path: &Path, size: Size, below: &Path, format: &str) -> Result<()> {
    let name = below.to_str().ok_or_else(|| {
        Error::new(
            Code::InvalidArgument,
            format!("The path {} is not valid UTF-8", below.display()),
        )
    })?;
    let what = format!("Creating {}", path.display());
    let options = StorageCreateOptions::new().filename(path).overwrite(false);
    let file = File::create_open(options).io(&what)?;
    let made = Qcow2::<File>::create_builder(file)
        .size(size.round_up(SECTOR).bytes())
        .backing(name.to_owned(), format.to_owned())
        .create()
        .io(&what);
    let made = made.and_then(|()| files::set_mode(path, 0o600));
    if made.is_err() {
        files::remove_file(path)?;
    }
    made
}
