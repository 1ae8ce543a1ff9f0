//! A daemon killed in the middle of an import: the next one finds no half image, ends the program
//! that is still at work, and can do it all again.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pileus_base::Reporter;
use pileus_images::{ImageRef, Store, StoreConfig};

use crate::support::*;

const ROOT: &str = "PILEUS_TEST_CRASH_ROOT";

/// Not a test of its own: the process that is killed.
#[tokio::test]
#[ignore = "run by the_next_store_cleans_up_after_a_kill"]
async fn helper() {
    let Some(root) = std::env::var_os(ROOT).map(PathBuf::from) else {
        eprintln!("SKIPPED: only useful as a helper process");
        return;
    };
    let mut config = config(&root.join("images"));
    config.tools.qemu_img = root.join("slow-qemu-img");
    let store = Store::open(config).unwrap();
    let reference = ImageRef::File(root.join("disk.qcow2"));
    let _ = store.obtain(&reference, None, &Reporter::silent()).await;
}

fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(begin.elapsed() < Duration::from_secs(90), "no {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn is_running(pid: i32) -> bool {
    pileus_base::process::ProcessId::of(pid).is_some()
}

/// Ends with the test, however that ends.
struct Helper(std::process::Child);

impl Helper {
    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(root: &Path, helper: &str) -> Helper {
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", helper, "--ignored"])
        .env(ROOT, root)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    Helper(child)
}

#[tokio::test]
async fn the_next_store_cleans_up_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    std::fs::write(root.join("disk.raw"), disk()).unwrap();
    let (raw, qcow2) = (root.join("disk.raw"), root.join("disk.qcow2"));
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&raw),
        text(&qcow2),
    ]);
    let pid_file = root.join("pid");
    let slow = root.join("slow-qemu-img");
    let script = format!(
        "#!/bin/sh\necho $$ >{0}.new; mv {0}.new {0}\nexec sleep 600\n",
        pid_file.display()
    );
    std::fs::write(&slow, script).unwrap();
    std::fs::set_permissions(&slow, std::fs::Permissions::from_mode(0o755)).unwrap();

    let mut helper = start(root, "crash::helper");
    let tool: i32 = wait_for("program at work", || {
        std::fs::read_to_string(&pid_file).ok()?.trim().parse().ok()
    });
    // While it lives, its stage is not another one's to sweep.
    let store = Store::open(config(&root.join("images"))).unwrap();
    assert!(is_running(tool));
    assert_eq!(
        std::fs::read_dir(store.root().join("stage"))
            .unwrap()
            .count(),
        1
    );
    drop(store);

    helper.kill();
    assert!(is_running(tool), "the program outlives the daemon");
    let store = Store::open(config(&root.join("images"))).unwrap();
    wait_for("end of the leftover program", || {
        (!is_running(tool)).then_some(())
    });
    assert_eq!(
        std::fs::read_dir(store.root().join("stage"))
            .unwrap()
            .count(),
        0
    );
    assert!(store.list().unwrap().is_empty());
    let image = store
        .obtain(&ImageRef::File(qcow2), None, &Reporter::silent())
        .await
        .unwrap();
    assert!(std::fs::read(image.disk()).unwrap() == disk());
}

/// Not a test of its own: the process that is killed while mmdebstrap works.
#[tokio::test]
#[ignore = "run by a_real_build_is_swept_after_a_kill"]
async fn build_helper() {
    let Some(root) = std::env::var_os(ROOT).map(PathBuf::from) else {
        eprintln!("SKIPPED: only useful as a helper process");
        return;
    };
    let store = Store::open(StoreConfig::new(root.join("images"))).unwrap();
    let reference = "build:debian-13".parse().unwrap();
    let _ = store.obtain(&reference, None, &Reporter::silent()).await;
}

#[test]
#[ignore = "needs a Debian archive; run by name"]
fn a_real_build_is_swept_after_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let stage = root.join("images/stage");
    let mut helper = start(root, "crash::build_helper");
    // Packages are being unpacked: mounts are there, and many processes.
    let id = wait_for("root in the making", || {
        let id = std::fs::read_dir(&stage).ok()?.next()?.ok()?;
        let mut made = std::fs::read_dir(id.path().join("tmp")).ok()?.flatten();
        made.any(|root| root.path().join("usr/bin/dpkg").exists())
            .then(|| id.file_name().into_string().unwrap())
    });
    std::thread::sleep(Duration::from_secs(2));
    helper.kill();
    assert!(!at_work(&id).is_empty(), "mmdebstrap outlives the daemon");
    let begin = Instant::now();
    Store::open(StoreConfig::new(root.join("images"))).unwrap();
    eprintln!("swept in {:?}", begin.elapsed());
    assert_eq!(std::fs::read_dir(&stage).unwrap().count(), 0);
    assert_eq!(at_work(&id), Vec::<i32>::new());
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(text(root)), "{mounts}");
}

/// The processes that have the stage's name in their environment.
fn at_work(id: &str) -> Vec<i32> {
    let mark = format!("PILEUS_STAGE={id}");
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            std::fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|environ| environ.split(|b| *b == 0).any(|e| e == mark.as_bytes()))
        })
        .collect()
}
