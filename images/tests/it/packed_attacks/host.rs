//! What is not the archive's fault: a full disk, an input that fails, work that is no longer wanted.

use std::io::{self, Read};
use std::path::Path;
use std::process::Command;

use pileus_base::{Code, Error, Reporter};
use pileus_images::packed::Rule;
use pileus_images::packed::unpack::{Budgets, unpack};
use tokio_util::sync::CancellationToken;

use super::{MIB, budgets, good, names, try_it, zst};

/// Gives a beginning, and then an end of its own.
struct Then<F>(Vec<u8>, usize, F);

impl<F: FnMut() -> io::Result<usize>> Read for Then<F> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = &self.0[self.1..];
        if rest.is_empty() {
            return (self.2)();
        }
        let len = rest.len().min(buffer.len()).min(1000);
        buffer[..len].copy_from_slice(&rest[..len]);
        self.1 += len;
        Ok(len)
    }
}

fn failed(input: impl Read + Send, report: &Reporter) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let err = unpack(input, dir.path(), &budgets(), report).unwrap_err();
    assert_eq!(names(dir.path()), [""; 0]);
    err
}

#[test]
fn an_input_that_fails_says_why() {
    let half = || {
        let whole = zst(&good().end());
        whole[..whole.len() / 2].to_vec()
    };
    let ours = || {
        Err(io::Error::other(Error::new(
            Code::FetchFailed,
            "the server is gone",
        )))
    };
    let err = failed(Then(half(), 0, ours), &Reporter::silent());
    assert_eq!(
        (err.code, err.message.as_str()),
        (Code::FetchFailed, "the server is gone")
    );
    let plain = || Err(io::Error::from_raw_os_error(5));
    let err = failed(Then(half(), 0, plain), &Reporter::silent());
    assert_eq!((err.code, Rule::of(&err)), (Code::Io, None));
    // Cut, without an error.
    let err = failed(Then(half(), 0, || Ok(0)), &Reporter::silent());
    assert_eq!(Rule::of(&err), Some(Rule::Truncated));
}

#[test]
fn cancelled_in_its_middle() {
    let cancel = CancellationToken::new();
    let report = Reporter::new(|_| (), cancel.clone());
    let whole = zst(&good().end());
    let half = whole[..whole.len() / 2].to_vec();
    let input = Then(half, 0, || {
        cancel.cancel();
        Err(io::Error::other("whatever"))
    });
    assert_eq!(failed(input, &report).code, Code::Cancelled);
    assert_eq!(failed(&whole[..], &report).code, Code::Cancelled);
}

#[test]
fn no_thread_is_left() {
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    let whole = zst(&good().end());
    for len in [0, 5, whole.len() / 2, whole.len()] {
        drop(try_it(&whole[..len], &budgets()));
    }
    // Other tests have threads too: it has to be as few at some time.
    let before = threads();
    let few = (0..200).any(|_| {
        drop(try_it(&whole[..whole.len() / 2], &budgets()));
        threads() <= before
    });
    assert!(few, "{} threads, {before} before", threads());
}

#[test]
fn what_is_there_stays() {
    let archive = zst(&good().end());
    let dir = tempfile::tempdir().unwrap();
    let precious = dir.path().join("precious");
    std::fs::write(&precious, "text").unwrap();
    for link in [false, true] {
        let path = dir.path().join("disk.img");
        match link {
            true => std::os::unix::fs::symlink(&precious, &path).unwrap(),
            false => std::fs::write(&path, "text").unwrap(),
        }
        let err = unpack(&archive[..], dir.path(), &budgets(), &Reporter::silent()).unwrap_err();
        assert_eq!(err.code, Code::Io, "{err}");
        assert_eq!(std::fs::read(&path).unwrap(), b"text");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(std::fs::read(&precious).unwrap(), b"text");
    }
    assert_eq!(names(dir.path()), ["precious"]);
    // A folder that is a link is not followed either.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path(), &link).unwrap();
    assert!(unpack(&archive[..], &link, &budgets(), &Reporter::silent()).is_err());
}

#[test]
fn the_reserve_stays_free() {
    let greedy = Budgets {
        reserve: u64::MAX,
        ..budgets()
    };
    let (dir, got) = try_it(&zst(&good().end()), &greedy);
    assert_eq!(got.unwrap_err().code, Code::NoSpace);
    assert_eq!(names(dir.path()), [""; 0]);
}

/// Runs the other half of this test in a mount namespace of its own, on a file system of 1 MiB.
#[test]
fn a_full_disk() {
    const INSIDE: &str = "PILEUS_TEST_FULL_DISK";
    if let Ok(folder) = std::env::var(INSIDE) {
        return on_a_full_disk(Path::new(&folder));
    }
    let dir = tempfile::tempdir().unwrap();
    let program = std::env::current_exe().unwrap();
    let script =
        "mount -t tmpfs -o size=1M none \"$1\" || exit 77; exec \"$2\" --exact \"$3\" --nocapture";
    let name = format!(
        "{}::a_full_disk",
        module_path!().split_once("::").unwrap().1
    );
    let done = Command::new("unshare")
        .args([
            "--user",
            "--map-root-user",
            "--mount",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .arg(dir.path())
        .arg(program)
        .arg(name)
        .env(INSIDE, dir.path())
        .output();
    match done {
        Ok(done) if done.status.success() => {
            let text = String::from_utf8_lossy(&done.stdout).into_owned();
            assert!(text.contains("1 passed"), "{text}");
        }
        Ok(done) if !matches!(done.status.code(), Some(1 | 77)) => {
            panic!(
                "{}{}",
                String::from_utf8_lossy(&done.stdout),
                String::from_utf8_lossy(&done.stderr)
            );
        }
        Ok(done) => eprintln!(
            "SKIPPED: no mount namespace here: {}",
            String::from_utf8_lossy(&done.stderr)
        ),
        Err(err) => eprintln!("SKIPPED: unshare can't be run: {err}"),
    }
}

fn on_a_full_disk(folder: &Path) {
    let data = vec![7; 3 * MIB as usize];
    let tar = super::tar::Tar::default().file("disk.img", &data);
    let err = unpack(
        &zst(&tar.end())[..],
        folder,
        &budgets(),
        &Reporter::silent(),
    )
    .unwrap_err();
    assert_eq!(err.code, Code::NoSpace, "{err}");
    assert_eq!(names(folder), [""; 0]);
}
