//! What tests stand on: a sealed world (network namespace, storage, environment), a daemon in it that
//! can be killed and started again, the CLI with its output, the guest image (one test has an older one) and the one
//! template that all share, and a stand-in for QEMU (`bin/fake-qemu`).
//!
//! A test reads like instructions; whatever is long belongs here. Things that can't run on this
//! machine say so loudly: [`need`] prints `SKIPPED: reason`, and in CI it fails instead.

mod api;
mod cli;
mod daemon;
mod image;
mod netns;
mod template;

pub use api::{Api, Refusal};
pub use cli::Output;
pub use daemon::{Daemon, Options};
pub use image::{GUEST_IMAGE, OLDER_GUEST_IMAGE, guest_image};
pub use netns::Namespace;
pub use template::Planted;

use std::path::{Path, PathBuf};

/// The program `name` of this workspace, as it was built for the tests.
///
/// # Panics
/// If it was not built.
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own program");
    // target/debug/deps/test-…, or target/debug/program
    let found = test
        .ancestors()
        .skip(1)
        .take(2)
        .map(|folder| folder.join(name))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("{name} is not built: run `cargo build --workspace --bins`, or use ./test")
    })
}

/// Whether what a test needs is there. Where it is not, the test says why and passes; in CI, where
/// everything must be there, it fails.
///
/// # Panics
/// In CI (the variable CI is set), if something is missing.
pub fn need(what: &[Need]) -> bool {
    for need in what {
        if let Err(why) = need.check() {
            assert!(std::env::var_os("CI").is_none(), "CI must have this: {why}");
            eprintln!("SKIPPED: {why}");
            return false;
        }
    }
    true
}

/// What a test may need of the machine.
#[derive(Debug, Clone, Copy)]
pub enum Need {
    /// To make network namespaces, and to become other users.
    Root,
    /// /dev/net/tun, for taps.
    Tun,
    /// A real QEMU, qemu-img and mmdebstrap: a real guest.
    Guest,
    Program(&'static str),
}

impl Need {
    fn check(self) -> Result<(), String> {
        match self {
            Need::Root if is_root() => Ok(()),
            Need::Root => Err("this test needs root (network namespaces)".into()),
            Need::Tun => std::fs::File::options()
                .read(true)
                .write(true)
                .open("/dev/net/tun")
                .map(drop)
                .map_err(|err| format!("/dev/net/tun can't be opened: {err}")),
            Need::Guest => ["qemu-system-x86_64", "qemu-img", "mmdebstrap"]
                .into_iter()
                .try_for_each(|name| Need::Program(name).check()),
            Need::Program(name) => match find(name) {
                Some(_) => Ok(()),
                None => Err(format!("{name} is not installed")),
            },
        }
    }
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|meta| meta.uid() == 0)
}

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|folder| folder.join(name))
        .find(|path| path.is_file())
}

/// How much slower than a quiet machine one may be that builds or tests other things beside.
const PATIENCE: u64 = 3;

/// Tries again and again until `check` gives something. `seconds` are what a quiet machine may need; a loaded
/// one gets three times as many.
///
/// # Panics
/// If it gives nothing within that.
pub fn wait_until<T>(what: &str, seconds: u64, mut check: impl FnMut() -> Option<T>) -> T {
    let until = std::time::Instant::now() + std::time::Duration::from_secs(seconds * PATIENCE);
    loop {
        if let Some(found) = check() {
            return found;
        }
        assert!(
            std::time::Instant::now() < until,
            "{what} did not happen within {} s",
            seconds * PATIENCE
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// Files below a folder, by relative path: to see what a failed request left behind.
pub fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        for entry in std::fs::read_dir(next).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(entry.path());
            } else if let Ok(path) = entry.path().strip_prefix(folder) {
                found.push(path.to_owned());
            }
        }
    }
    found.sort();
    found
}
