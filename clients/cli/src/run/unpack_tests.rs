//! Archives of honest and of hostile guests.

use super::*;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::{Command, Stdio};
use tar::{Builder, Header};

const BOUNDS: Bounds = Bounds {
    bytes: 1 << 20,
    entries: 1000,
};

/// Makes archives that no decent program would make.
struct Evil(Builder<Vec<u8>>);

impl Evil {
    /// Begins as an archive of a folder.
    fn folder() -> Self {
        Self(Builder::new(Vec::new())).entry("./", EntryType::Directory, "", b"")
    }

    fn entry(self, name: &str, kind: EntryType, link: &str, data: &[u8]) -> Self {
        self.with_mode(name, kind, link, data, 0o644)
    }

    fn with_mode(
        mut self,
        name: &str,
        kind: EntryType,
        link: &str,
        data: &[u8],
        mode: u32,
    ) -> Self {
        let mut header = Header::new_gnu();
        // Past the checks that the library makes for honest programs.
        let fields = header.as_mut_bytes();
        fields[..name.len()].copy_from_slice(name.as_bytes());
        fields[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(data.len() as u64);
        header.set_mtime(1_000_000_000);
        header.set_cksum();
        self.0.append(&header, data).unwrap();
        self
    }

    fn file(self, name: &str, data: &str) -> Self {
        self.entry(name, EntryType::Regular, "", data.as_bytes())
    }

    fn link(self, name: &str, to: &str) -> Self {
        self.entry(name, EntryType::Symlink, to, b"")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

/// A folder that is the target, in one that must stay as it was.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        fs::write(dir.path().join("outside/file"), "mine").unwrap();
        Self(dir)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn unpack(&self, archive: &[u8]) -> Result<()> {
        unpack(archive, &self.at("target"), OsStr::new("x"), BOUNDS)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.at(name)).unwrap()
    }

    /// Whether nothing outside of the target was touched.
    fn is_whole(&self) -> bool {
        let names = |path: PathBuf| fs::read_dir(path).unwrap().count();
        self.read("outside/file") == "mine"
            && names(self.at("outside")) == 1
            && names(self.at("")) <= 2
            && fs::metadata(self.at("outside/file")).unwrap().nlink() == 1
    }
}

/// The real one's archive, as the guest's script makes it.
fn real_tar(folder: &Path, args: &[&str]) -> Vec<u8> {
    let tar = Command::new("tar")
        .args(["-c", "-f", "-", "-C"])
        .arg(folder)
        .args(args)
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(tar.status.success());
    tar.stdout
}

#[test]
fn a_real_archive_comes_out_as_it_was() {
    let from = tempfile::tempdir().unwrap();
    let at = |name: &str| from.path().join(name);
    let long = "l".repeat(120);
    fs::create_dir_all(at(&format!("a/{long}/{long}"))).unwrap();
    fs::write(at(&format!("a/{long}/{long}/f")), "deep").unwrap();
    fs::write(at("a/run"), vec![1; 100_000]).unwrap();
    fs::set_permissions(at("a/run"), PermissionsExt::from_mode(0o4755)).unwrap();
    symlink("../a/run", at("a/link")).unwrap();
    symlink("n".repeat(150), at("a/long-link")).unwrap();
    for format in ["--format=gnu", "--format=posix"] {
        let host = Host::new();
        let archive = real_tar(from.path(), &[format, "."]);
        host.unpack(&archive).unwrap();
        let same = Command::new("diff")
            .args(["-r", "--no-dereference"])
            .args([from.path(), &host.at("target")])
            .status();
        assert!(same.unwrap().success(), "{format}");
        let run = fs::metadata(host.at("target/a/run")).unwrap();
        assert_eq!(run.mode() & 0o7700, 0o700, "{format}: no set-user bit");
        assert_eq!(run.mtime(), fs::metadata(at("a/run")).unwrap().mtime());
        // Once more over what is there.
        host.unpack(&archive).unwrap();
    }
}

#[test]
fn a_single_file_takes_the_targets_name() {
    let from = tempfile::tempdir().unwrap();
    fs::write(from.path().join("f"), "new").unwrap();
    let archive = real_tar(from.path(), &["./f"]);
    let host = Host::new();
    host.unpack(&archive).unwrap();
    assert_eq!(host.read("target"), "new");
    // Into a folder under its own name.
    let host = Host::new();
    fs::create_dir(host.at("target")).unwrap();
    host.unpack(&archive).unwrap();
    assert_eq!(host.read("target/x"), "new");
    // A link in the file's place is replaced, not written through.
    let host = Host::new();
    symlink("outside/file", host.at("target")).unwrap();
    host.unpack(&archive).unwrap();
    assert_eq!(host.read("target"), "new");
    assert!(host.is_whole());
}

#[test]
fn whatever_leads_out_is_refused() {
    let folder = Evil::folder;
    let outside = "../outside/file";
    let absolute = tempfile::tempdir().unwrap();
    let absolute = absolute.path().join("x").display().to_string();
    for (what, archive) in [
        ("parent", folder().file(outside, "evil")),
        (
            "parent inside",
            folder().file("a/../../outside/file", "evil"),
        ),
        ("absolute", folder().file(&absolute, "evil")),
        ("no name", folder().file("", "evil")),
        ("the target as a file", folder().file("./", "evil")),
        ("absolute link", folder().link("l", "/etc/passwd")),
        ("link out", folder().link("l", outside)),
        ("deep link out", folder().link("a/l", "../../outside")),
        ("link out and in", folder().link("l", "../target/x")),
        (
            "link over a link that goes up",
            folder().link("a/z", "b/up/.."),
        ),
        ("empty link", folder().link("l", "")),
        (
            "through a link of its own",
            folder().link("l", "d").file("l/file", "evil"),
        ),
        (
            "a link of its own as a folder",
            folder()
                .link("l", ".")
                .entry("l/", EntryType::Directory, "", b""),
        ),
        ("through a file", folder().file("f", "").file("f/g", "evil")),
        (
            "hard link",
            folder().entry("l", EntryType::Link, outside, b""),
        ),
        (
            "hard link inside",
            folder().file("f", "").entry("l", EntryType::Link, "f", b""),
        ),
        ("device", folder().entry("d", EntryType::Char, "", b"")),
        ("disk", folder().entry("d", EntryType::Block, "", b"")),
        ("fifo", folder().entry("d", EntryType::Fifo, "", b"")),
        ("sparse", folder().entry("d", EntryType::GNUSparse, "", b"")),
        (
            "unknown",
            folder().entry("d", EntryType::new(b'Z'), "", b""),
        ),
        (
            "long name out",
            folder()
                .entry(
                    "././@LongLink",
                    EntryType::GNULongName,
                    "",
                    b"../outside/file\0",
                )
                .file("x", "evil"),
        ),
        (
            "long link out",
            folder()
                .entry(
                    "././@LongLink",
                    EntryType::GNULongLink,
                    "",
                    b"../outside/file\0",
                )
                .link("x", "y"),
        ),
        (
            "PAX name out",
            folder()
                .entry("h", EntryType::XHeader, "", b"24 path=../outside/file\n")
                .file("x", "evil"),
        ),
        (
            "PAX size",
            folder()
                .entry("h", EntryType::XHeader, "", b"10 size=5\n")
                .file("x", ""),
        ),
        (
            "first entry a link",
            Evil(Builder::new(Vec::new())).link("target", "outside/file"),
        ),
        (
            "first entry deep",
            Evil(Builder::new(Vec::new())).file("../outside/file", "evil"),
        ),
        (
            "two files",
            Evil(Builder::new(Vec::new())).file("f", "1").file("g", "2"),
        ),
        ("nothing", Evil(Builder::new(Vec::new()))),
    ] {
        let host = Host::new();
        let err = host.unpack(&archive.bytes()).unwrap_err();
        assert_eq!(err.code, Code::InvalidArgument, "{what}: {err}");
        assert!(host.is_whole(), "{what}");
        assert!(!Path::new(&absolute).exists(), "{what}");
    }
}

#[test]
fn links_that_were_there_before_are_not_followed() {
    let host = Host::new();
    fs::create_dir(host.at("target")).unwrap();
    symlink("../outside", host.at("target/l")).unwrap();
    symlink("../outside/file", host.at("target/f")).unwrap();
    let archive = Evil::folder().file("l/file", "evil").bytes();
    let err = host.unpack(&archive).unwrap_err();
    assert!(err.message.contains("l is in the way"), "{err}");
    let archive = Evil::folder()
        .entry("l/", EntryType::Directory, "", b"")
        .bytes();
    assert!(host.unpack(&archive).is_err());
    assert!(host.is_whole());
    // A file takes the link's place.
    host.unpack(&Evil::folder().file("f", "new").bytes())
        .unwrap();
    assert_eq!(host.read("target/f"), "new");
    assert!(host.is_whole());
    // A folder is not replaced by a file, and nothing half done is left.
    fs::create_dir(host.at("target/d")).unwrap();
    assert!(host.unpack(&Evil::folder().file("d", "x").bytes()).is_err());
    let names = fs::read_dir(host.at("target")).unwrap();
    let names: Vec<_> = names.map(|e| e.unwrap().file_name()).collect();
    assert!(names.iter().all(|n| !n.as_bytes().starts_with(b".pileus")));
}

#[test]
fn special_bits_are_dropped_and_folders_stay_usable() {
    let host = Host::new();
    let archive = Evil::folder()
        .with_mode("d/", EntryType::Directory, "", b"", 0o7000)
        .with_mode("d/f", EntryType::Regular, "", b"x", 0o7777)
        .bytes();
    host.unpack(&archive).unwrap();
    let mode = |name: &str| fs::metadata(host.at(name)).unwrap().mode() & 0o7777;
    assert_eq!(mode("target/d") & 0o7700, 0o700);
    assert_eq!(mode("target/d/f") & 0o7000, 0);
}

#[test]
fn bytes_entries_and_names_are_bounded() {
    let host = Host::new();
    let big = Evil::folder().file("f", &"x".repeat(2 << 20)).bytes();
    let err = host.unpack(&big).unwrap_err();
    assert!(err.message.contains("larger than 1.0MiB"), "{err}");
    assert!(!host.at("target/f").exists());
    let mut many = Evil::folder();
    for i in 0..1001 {
        many = many.file(&format!("{i}"), "");
    }
    let err = unpack(
        &many.bytes()[..],
        &host.at("target"),
        OsStr::new("x"),
        Bounds {
            bytes: 1 << 30,
            ..BOUNDS
        },
    );
    assert!(err.unwrap_err().message.contains("more than 1000"));
    let deep = Evil::folder().file(&"d/".repeat(49), "");
    host.unpack(&deep.bytes()).unwrap();
    let long = "d/".repeat(500);
    let deep = Evil::folder()
        .entry("@", EntryType::GNULongName, "", long.as_bytes())
        .file("x", "");
    let err = host.unpack(&deep.bytes()).unwrap_err();
    assert!(err.message.contains("too deep"), "{err}");
    // A record that claims to be huge is not read.
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNULongName);
    header.set_size(1 << 40);
    header.set_cksum();
    let mut endless = Evil::folder().bytes();
    endless.truncate(512);
    endless.extend_from_slice(header.as_bytes());
    endless.extend_from_slice(&[b'a'; 100_000]);
    let err = host.unpack(&endless).unwrap_err();
    assert!(err.message.contains("too long"), "{err}");
}

#[test]
fn a_cut_or_broken_archive_is_an_error_and_leaves_no_half_file() {
    let archive = Evil::folder().file("f", &"x".repeat(5000)).bytes();
    for cut in [100, 512, 700, 1024, 1500, 5000] {
        let host = Host::new();
        let result = host.unpack(&archive[..cut]);
        // Only at the border of two entries is it as if it ended there; the guest's exit code tells.
        assert_eq!(result.is_ok(), cut == 512, "{cut}: {result:?}");
        assert!(!host.at("target/f").exists(), "{cut}");
    }
    let mut flipped = archive;
    flipped[600] ^= 1;
    assert!(Host::new().unpack(&flipped).is_err());
    let mut rest = Vec::new();
    rest.write_all(&[b'x'; 2048]).unwrap();
    assert!(Host::new().unpack(&rest).is_err());
}
