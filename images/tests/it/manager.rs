//! The ancestor's way: one download for all who want an image, instances that are thrown away, a cache that
//! survives and that a tracker keeps small.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pileus_base::{Code, Error, Reporter, Size};
use pileus_images::manager::gc::Minima;
use pileus_images::manager::{
    Config, Downloader, Instance, Manager, MutableImage, Payload, ResourceTracker, Tracker,
    download_image, random_mac,
};
use pileus_images::packed::Machine;
use tokio_util::sync::CancellationToken;

use crate::support::*;

const ROOT: &str = "PILEUS_TEST_MANAGER_ROOT";

fn tracker() -> Arc<Tracker> {
    let minima = Minima { disk: 0, memory: 0 };
    Arc::new(Tracker::new("/", minima))
}

fn manager_with(folder: &Path, tracker: Arc<dyn ResourceTracker>) -> Manager {
    let StoreConfigParts { limits, patience } = parts(folder);
    let config = Config {
        limits,
        patience,
        proxies: false,
        ..Config::default()
    };
    Manager::new(folder, tracker, config).unwrap()
}

struct StoreConfigParts {
    limits: pileus_images::Limits,
    patience: pileus_images::Patience,
}

fn parts(folder: &Path) -> StoreConfigParts {
    let config = config(folder);
    StoreConfigParts {
        limits: config.limits,
        patience: config.patience,
    }
}

fn manager(folder: &Path) -> Manager {
    manager_with(folder, tracker())
}

/// Gives the disk as a stream after a while, and counts how often it was asked.
fn slow(asked: &Arc<AtomicU32>, pause: u64) -> Downloader {
    let asked = asked.clone();
    Downloader::new(move |_| async move {
        asked.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(pause)).await;
        Ok(Payload::Stream(Box::new(std::io::Cursor::new(disk()))))
    })
}

fn never() -> Downloader {
    Downloader::new(|_| async { panic!("it was asked for") })
}

fn disks(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for place in std::fs::read_dir(folder.join("instances"))
        .unwrap()
        .flatten()
    {
        let disks = std::fs::read_dir(place.path()).unwrap().flatten();
        found.extend(disks.map(|disk| disk.path()));
    }
    found
}

fn seen_by_guest(instance: &Instance) -> Vec<u8> {
    let out = instance.disk_file().with_extension("raw");
    let paths = [instance.disk_file(), &out].map(|path| text(path).to_owned());
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &paths[0], &paths[1]]);
    let seen = std::fs::read(&out).unwrap();
    std::fs::remove_file(out).unwrap();
    seen
}

#[tokio::test]
async fn an_instance_is_a_disk_of_ones_own_and_goes_when_it_is_dropped() {
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(dir.path());
    let report = Reporter::silent();
    let asked = Arc::default();
    let one = manager
        .instance("ci", slow(&asked, 0), &report)
        .await
        .unwrap();
    assert_eq!(one.format(), "qcow2");
    assert!(one.machine().is_empty());
    assert!(one.base().is_absolute());
    assert!(seen_by_guest(&one) == disk());
    let two = manager.instance("ci", never(), &report).await.unwrap();
    assert_ne!(one.disk_file(), two.disk_file());
    let image = manager.store().list().unwrap().remove(0).info.digest;
    let err = manager.store().remove(&image).unwrap_err();
    assert_eq!(err.code, Code::ImageInUse);
    assert_eq!(disks(dir.path()).len(), 2);
    one.release().unwrap();
    assert_eq!(disks(dir.path()), [two.disk_file()]);
    drop(two);
    assert!(disks(dir.path()).is_empty());
    manager.store().remove(&image).unwrap();
    // And comes again when it is wanted again.
    manager
        .instance("ci", slow(&asked, 0), &report)
        .await
        .unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_callers_one_download_and_a_cancelled_one_disturbs_none() {
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(dir.path());
    let asked: Arc<AtomicU32> = Arc::default();
    let cancels: Vec<_> = (0..64).map(|_| CancellationToken::new()).collect();
    let callers: Vec<_> = cancels
        .iter()
        .map(|cancel| {
            let report = Reporter::new(|_| (), cancel.clone());
            let (manager, download) = (manager.clone(), slow(&asked, 1500));
            tokio::spawn(async move { manager.instance("ci", download, &report).await })
        })
        .collect();
    // One of them began the download; whichever it is, it goes on without the first one.
    let begin = Instant::now();
    while asked.load(Ordering::SeqCst) == 0 {
        assert!(begin.elapsed() < Duration::from_secs(20), "nobody asked");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cancels[0].cancel();
    let mut served = 0;
    for (number, caller) in callers.into_iter().enumerate() {
        match caller.await.unwrap() {
            Ok(instance) => {
                assert!(instance.disk_file().exists());
                served += 1;
            }
            Err(err) => {
                assert_eq!((number, err.code), (0, Code::Cancelled));
            }
        }
    }
    assert_eq!((served, asked.load(Ordering::SeqCst)), (63, 1));
}

#[tokio::test]
async fn a_failure_is_shared_told_as_it_is_and_not_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(dir.path());
    let report = Reporter::silent();
    let fail = || {
        Downloader::new(|_| async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            Err(Error::new(Code::FetchFailed, "the network is down"))
        })
    };
    let both = [fail(), never()].map(|download| manager.instance("ci", download, &report));
    for done in futures_util::future::join_all(both).await {
        assert_eq!(done.unwrap_err().code, Code::FetchFailed);
    }
    let text = Downloader::new(|_| async {
        Ok(Payload::Stream(Box::new(std::io::Cursor::new(
            b"<html>not an image</html>".repeat(100),
        ))))
    });
    let err = manager.instance("ci", text, &report).await.unwrap_err();
    assert_eq!(err.code, Code::BadImage);
    let err = download_image("ftp://h/x").unwrap_err();
    assert_eq!(err.code, Code::InvalidArgument);
    let asked = Arc::default();
    manager
        .instance("ci", slow(&asked, 0), &report)
        .await
        .unwrap();
}

#[tokio::test]
async fn a_restart_downloads_nothing_again_and_finds_a_changed_disk() {
    let dir = tempfile::tempdir().unwrap();
    let report = Reporter::silent();
    let asked: Arc<AtomicU32> = Arc::default();
    let first = manager(dir.path());
    let instance = first.instance("ci", slow(&asked, 0), &report).await;
    let digest = first.store().list().unwrap().remove(0).info.digest;
    first.store().verify(&digest, &report).unwrap();
    drop((instance, first));
    let second = manager(dir.path());
    let instance = second.instance("ci", never(), &report).await.unwrap();
    let base = instance.base();
    drop(instance);
    // A disk that somebody wrote to is not used, but downloaded again.
    use std::os::unix::fs::{FileExt, PermissionsExt};
    std::fs::set_permissions(&base, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = std::fs::File::options().write(true).open(&base).unwrap();
    file.write_all_at(b"?", 9000).unwrap();
    let instance = second
        .instance("ci", slow(&asked, 0), &report)
        .await
        .unwrap();
    assert!(seen_by_guest(&instance) == disk());
    assert_eq!(asked.load(Ordering::SeqCst), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_at_a_url_or_in_a_file() {
    let server = crate::server::Server::start(disk(), []).await;
    let dir = tempfile::tempdir().unwrap();
    let manager = manager(dir.path());
    let report = Reporter::silent();
    let download = download_image(&server.url()).unwrap();
    let instance = manager.instance("url", download, &report).await.unwrap();
    assert!(seen_by_guest(&instance) == disk());
    let path = dir.path().join("file");
    std::fs::write(&path, disk()).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    let download = Downloader::new(|_| async { Ok(Payload::File(file)) });
    let same = manager.instance("file", download, &report).await.unwrap();
    assert_eq!(same.base(), instance.base());
}

/// From an image in the making to a machine's disk.
#[tokio::test]
async fn a_packed_image_gives_its_instances_its_machine() {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine {
        memory: Some(512),
        mac: Some(random_mac()),
        ..Machine::default()
    };
    let size = Size(DISK_SIZE as u64);
    let mut made = MutableImage::new(&dir.path().join("making"), size, machine.clone()).unwrap();
    let path = made.disk_file().unwrap();
    std::fs::write(&path, disk()).unwrap();
    path.release();
    let report = Reporter::silent();
    let target = dir.path().join("image.tar.zst");
    made.package(&target, &report).unwrap();
    made.dispose().unwrap();
    let manager = manager(&dir.path().join("images"));
    let download = download_image(&format!("file://{}", target.display())).unwrap();
    let instance = manager.instance("ci", download, &report).await.unwrap();
    assert_eq!(instance.machine(), &machine);
    assert!(seen_by_guest(&instance) == disk());
    // Its disk's digest was made while it came: nothing is taken on trust.
    let digest = manager.store().list().unwrap().remove(0).info.digest;
    assert!(!manager.store().verify(&digest, &report).unwrap().recorded);
}

#[tokio::test]
async fn the_tracker_runs_before_downloads_and_after_releases() {
    let dir = tempfile::tempdir().unwrap();
    let free = Arc::new(AtomicU64::new(100));
    let measured = free.clone();
    let tracker = Arc::new(Tracker::measuring(
        Minima {
            disk: 50,
            memory: 0,
        },
        move || Ok(measured.load(Ordering::SeqCst)),
        || Ok(0),
    ));
    let manager = manager_with(dir.path(), tracker.clone());
    let report = Reporter::silent();
    let of = |number: u8| {
        Downloader::new(move |_| async move {
            let mut bytes = disk();
            bytes[9000] = number;
            Ok(Payload::Stream(Box::new(std::io::Cursor::new(bytes))))
        })
    };
    let there = || manager.store().list().unwrap().len();
    let one = manager.instance("1", of(1), &report).await.unwrap();
    drop(manager.instance("2", of(2), &report).await.unwrap());
    assert_eq!(there(), 2);
    // The disk fills up: what is in use stays.
    free.store(10, Ordering::SeqCst);
    let three = manager.instance("3", of(3), &report).await.unwrap();
    assert_eq!(there(), 2);
    drop(three);
    let begin = Instant::now();
    while there() > 1 {
        assert!(begin.elapsed() < Duration::from_secs(20), "not collected");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(one.base().exists());
    free.store(100, Ordering::SeqCst);
    drop(one);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(there(), 1);
    // A later manager's tracker knows it as well.
    drop(manager);
    let later = manager_with(dir.path(), tracker.clone());
    assert_eq!(tracker.collect_all().disposed, 1);
    assert!(later.store().list().unwrap().is_empty());
}

/// Not a test of its own: a process that has an instance until it is killed.
#[tokio::test]
#[ignore = "run by a_dead_processs_instances_are_swept"]
async fn helper() {
    let Some(root) = std::env::var_os(ROOT).map(PathBuf::from) else {
        eprintln!("SKIPPED: only useful as a helper process");
        return;
    };
    let manager = manager(&root);
    let report = Reporter::silent();
    let asked = Arc::default();
    let _instance = manager.instance("ci", slow(&asked, 0), &report).await;
    std::thread::sleep(Duration::from_secs(600));
}

#[tokio::test]
async fn a_dead_processs_instances_are_swept() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("instances")).unwrap();
    let mut other = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "manager::helper", "--ignored"])
        .env(ROOT, dir.path())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while disks(dir.path()).is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(10));
    }
    // Not while it lives.
    drop(manager(dir.path()));
    assert_eq!(disks(dir.path()).len(), 1);
    other.kill().unwrap();
    other.wait().unwrap();
    let next = manager(dir.path());
    assert!(disks(dir.path()).is_empty());
    let report = Reporter::silent();
    // The image is complete once an instance of it was there.
    next.instance("ci", never(), &report).await.unwrap();
}
