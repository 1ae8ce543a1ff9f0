//! Writes a file or the content of a folder of this host as a tar archive, for the guest's own tar.

use std::fs::{self, File, Metadata};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use tar::{Builder, EntryType, Header};

/// The name of a single file in its archive; the guest gives it its real one.
pub(super) const FILE: &str = "file";

/// Packs what stands at `source`; returns what was left out (sockets and the like). A link at `source`
/// itself is followed, those inside a folder are kept.
pub(super) fn pack(source: &Path, to: impl Write) -> io::Result<Vec<String>> {
    let mut builder = Builder::new(to);
    let mut skipped = Vec::new();
    let meta = fs::metadata(source)?;
    if meta.is_dir() {
        folder(&mut builder, source, "", &mut skipped)?;
    } else {
        let file = File::open(source)?;
        append(&mut builder, file, &meta, FILE)?;
    }
    builder.into_inner()?.flush()?;
    Ok(skipped)
}

fn folder(
    builder: &mut Builder<impl Write>,
    path: &Path,
    prefix: &str,
    skipped: &mut Vec<String>,
) -> io::Result<()> {
    let mut entries = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let path = entry.path();
        let name = entry.file_name();
        let Some(name) = name.to_str() else {
            skipped.push(path.display().to_string());
            continue;
        };
        let name = format!("{prefix}{name}");
        let meta = fs::symlink_metadata(&path)?;
        let kind = meta.file_type();
        if kind.is_dir() {
            let mut header = header(&meta, EntryType::Directory, 0);
            builder.append_data(&mut header, format!("{name}/"), io::empty())?;
            folder(builder, &path, &format!("{name}/"), skipped)?;
        } else if kind.is_symlink() {
            let mut header = header(&meta, EntryType::Symlink, 0);
            let to = fs::read_link(&path)?;
            // As it is: the library would tidy it up, as far as it fits.
            match header.set_link_name_literal(to.as_os_str().as_bytes()) {
                Ok(()) => builder.append_data(&mut header, &name, io::empty())?,
                Err(_) => builder.append_link(&mut header, &name, to)?,
            }
        } else if kind.is_file() {
            let file = File::options()
                .read(true)
                .custom_flags(libc_nofollow())
                .open(&path)?;
            append(builder, file, &meta, &name)?;
        } else {
            skipped.push(path.display().to_string());
        }
    }
    Ok(())
}

fn libc_nofollow() -> i32 {
    rustix::fs::OFlags::NOFOLLOW.bits().cast_signed()
}

fn header(meta: &Metadata, kind: EntryType, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(size);
    header.set_mode(meta.mode() & 0o7777);
    header.set_mtime(u64::try_from(meta.mtime()).unwrap_or_default());
    header
}

/// Appends exactly as many bytes as the header says, or fails: what follows would be misread.
fn append(
    builder: &mut Builder<impl Write>,
    file: File,
    meta: &Metadata,
    name: &str,
) -> io::Result<()> {
    let mut header = header(meta, EntryType::Regular, meta.len());
    let mut counted = Counted(file.take(meta.len()), 0);
    builder.append_data(&mut header, name, &mut counted)?;
    if counted.1 != meta.len() {
        let text = format!("{name} became shorter while it was read");
        return Err(io::Error::other(text));
    }
    Ok(())
}

struct Counted<R>(R, u64);

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.0.read(buffer)?;
        self.1 += len as u64;
        Ok(len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::process::{Command, Stdio};

    #[test]
    fn a_real_tar_gives_the_same_tree_back() {
        let from = tempfile::tempdir().unwrap();
        let at = |name: &str| from.path().join(name);
        fs::create_dir_all(at("a/b/empty")).unwrap();
        fs::write(at("a/b/data"), vec![7; 100_000]).unwrap();
        let long = "x".repeat(200);
        fs::write(at(&format!("a/{long}")), "long").unwrap();
        symlink("../nowhere", at("a/link")).unwrap();
        symlink("x/y".repeat(50), at("a/far")).unwrap();
        fs::write(at("-dash"), "").unwrap();
        std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let mut archive = Vec::new();
        let skipped = pack(from.path(), &mut archive).unwrap();
        assert_eq!(skipped, [at("socket").display().to_string()]);
        fs::remove_file(at("socket")).unwrap();

        let to = tempfile::tempdir().unwrap();
        let mut tar = Command::new("tar")
            .args(["-x", "-o", "-p", "-f", "-", "-C"])
            .arg(to.path())
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        tar.stdin.take().unwrap().write_all(&archive).unwrap();
        assert!(tar.wait().unwrap().success());
        let same = Command::new("diff")
            .args(["-r", "--no-dereference"])
            .args([from.path(), to.path()])
            .status();
        assert!(same.unwrap().success());
    }

    #[test]
    fn a_single_file_has_a_known_name() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("x"), "hello").unwrap();
        symlink("x", dir.path().join("l")).unwrap();
        let mut archive = Vec::new();
        pack(&dir.path().join("l"), &mut archive).unwrap();
        let mut archive = tar::Archive::new(&archive[..]);
        let mut entries = archive.entries().unwrap();
        let entry = entries.next().unwrap().unwrap();
        assert_eq!(entry.path().unwrap(), Path::new(FILE));
        assert_eq!(entry.size(), 5);
        assert!(pack(&dir.path().join("none"), io::sink()).is_err());
    }
}
