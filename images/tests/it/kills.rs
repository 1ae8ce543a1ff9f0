//! A process killed at hundreds of random points while it does all that a store can do: afterwards the store
//! opens, no image is damaged, nothing is left over, and tags and sources mean images that are there.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pileus_base::{Code, Digest, Reporter, Result};
use pileus_images::manager::gc::Minima;
use pileus_images::manager::{Downloader, Manager, Payload, Tracker};
use pileus_images::{ImageRef, Store};
use rand::Rng;

use crate::support::*;

const ROOT: &str = "PILEUS_TEST_KILLS_ROOT";
const KILLS: u32 = 360;
/// Two stores side by side, one a processor.
const LANES: u32 = 2;
const IMAGES: u8 = 4;
const SIZE: usize = 1 << 20;

fn content(number: u8) -> Vec<u8> {
    let mut bytes = vec![0; SIZE];
    bytes[..200 << 10].fill(number + 1);
    bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
    bytes
}

/// A store whose budget is too small for all images, so that it is always collecting.
fn open(root: &Path) -> Result<Arc<Store>> {
    let mut config = config(&root.join("images"));
    config.budget.max_bytes = Some(900 << 10);
    Store::open(config)
}

fn manager(store: &Arc<Store>) -> Result<Manager> {
    let minima = Minima { disk: 0, memory: 0 };
    Manager::on(store.clone(), Arc::new(Tracker::new("/", minima)))
}

/// What two tasks at the same time may get in each other's way with.
fn fine<T>(done: Result<T>) -> Option<T> {
    match done {
        Ok(value) => Some(value),
        Err(err) if matches!(err.code, Code::ImageInUse | Code::ImageNotFound) => None,
        Err(err) => panic!("{err}"),
    }
}

async fn busy(root: PathBuf, store: Arc<Store>, manager: Manager) {
    let report = Reporter::silent();
    let mut instances = Vec::new();
    let pick = |most: u8| rand::rng().random_range(0..most);
    loop {
        let number = pick(IMAGES);
        let form = ["raw", "zst"][usize::from(pick(2))];
        let reference = ImageRef::File(root.join(format!("{number}.{form}")));
        let image = store.obtain(&reference, None, &report).await.unwrap();
        let digest = image.digest().clone();
        match pick(8) {
            0 => drop(fine(store.tag(&format!("t{}", pick(3)), &digest))),
            1 => drop(fine(store.untag(&format!("t{}", pick(3))))),
            2 => drop(fine(store.verify(&digest, &report))),
            3 => {
                drop(image);
                fine(store.remove(&digest));
                continue;
            }
            4 => {
                drop(image);
                fine(store.remove_with_tags(&digest));
                continue;
            }
            5 => instances.clear(),
            _ => {
                let download = Downloader::new(move |_| async move {
                    let bytes = std::io::Cursor::new(content(number));
                    Ok(Payload::Stream(Box::new(bytes)))
                });
                let id = format!("id{number}");
                instances.push(manager.instance(&id, download, &report).await.unwrap());
            }
        }
        drop(image);
        store.tidy().unwrap();
    }
}

/// Not a test of its own: the process that is killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by killed_at_hundreds_of_points_a_store_is_whole"]
async fn helper() {
    let Some(root) = std::env::var_os(ROOT).map(PathBuf::from) else {
        eprintln!("SKIPPED: only useful as a helper process");
        return;
    };
    println!("\nopening");
    let store = open(&root).unwrap();
    let manager = manager(&store).unwrap();
    println!("\nbusy");
    let other = busy(root.clone(), store.clone(), manager.clone());
    let other = tokio::spawn(other);
    tokio::select! {
        done = other => done.unwrap(),
        () = busy(root, store, manager) => {}
    }
}

/// What was found after the kills, so that it shows whether they came in the middle of something.
#[derive(Debug, Default)]
struct Tally {
    kills: AtomicU32,
    with_stages: AtomicU32,
    with_locks: AtomicU32,
    with_drafts: AtomicU32,
    with_instances: AtomicU32,
    images: AtomicU32,
    tags: AtomicU32,
}

fn names(folder: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.unwrap().file_name().into_string().unwrap()
    };
    entries.map(name).collect()
}

fn drafts(images: &Path) -> usize {
    let mut folders = vec![images.to_owned()];
    folders.extend(names(images).iter().map(|name| images.join(name)));
    let all = folders.iter().flat_map(|folder| names(folder));
    all.filter(|name| name.ends_with(".tmp")).count()
}

fn count(tally: &AtomicU32, there: bool) {
    tally.fetch_add(u32::from(there), Ordering::Relaxed);
}

fn kill_once(root: &Path, tally: &Tally) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "kills::helper", "--ignored", "--nocapture"])
        .env(ROOT, root)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Mostly in the middle of its work, sometimes while it opens the store.
    let wanted = match rand::rng().random_range(0..8) {
        0 => "opening",
        _ => "busy",
    };
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    while lines
        .next()
        .expect("the helper works until it is killed")
        .unwrap()
        != wanted
    {}
    let pause = rand::rng().random_range(0..60_000);
    std::thread::sleep(Duration::from_micros(pause));
    child.kill().unwrap();
    let ended = child.wait().unwrap();
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(ended.signal(), Some(9), "it failed before it was killed");

    let images = root.join("images");
    tally.kills.fetch_add(1, Ordering::Relaxed);
    count(&tally.with_stages, !names(&images.join("stage")).is_empty());
    count(&tally.with_locks, !names(&images.join("locks")).is_empty());
    count(&tally.with_drafts, drafts(&images) > 0);
    let places = names(&images.join("instances"));
    let used = |place: &String| !names(&images.join("instances").join(place)).is_empty();
    count(&tally.with_instances, places.iter().any(used));
}

/// All that must be so, whatever was going on.
fn check(root: &Path, whole: &BTreeMap<Digest, Vec<u8>>, tally: &Tally) {
    let store = open(root).unwrap();
    drop(manager(&store).unwrap());
    let images = store.root();
    for folder in ["stage", "locks", "instances"] {
        let left = names(&images.join(folder));
        assert!(left.is_empty(), "{folder}: {left:?}");
    }
    assert_eq!(drafts(images), 0);
    let there: HashSet<Digest> = names(images)
        .iter()
        .filter(|name| !["stage", "locks", "instances", "tags", "sources"].contains(&name.as_str()))
        .map(|name| name.parse().expect("nothing but images"))
        .collect();
    let listed = store.list().unwrap();
    assert_eq!(listed.len(), there.len(), "one is damaged");
    for image in &listed {
        let digest = &image.info.digest;
        let held = store
            .get(digest)
            .expect("an image that is listed can be had");
        held.check_unchanged().unwrap();
        let disk = std::fs::read(held.disk()).unwrap();
        assert!(disk == whole[digest], "{digest} has another content");
    }
    let tags = store.tags().unwrap();
    assert_eq!(tags.len(), names(&images.join("tags")).len());
    assert!(
        tags.values().all(|digest| there.contains(digest)),
        "{tags:?}"
    );
    for name in names(&images.join("sources")) {
        let text = std::fs::read(images.join("sources").join(&name)).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let digest = record["digest"].as_str().unwrap().parse().unwrap();
        assert!(there.contains(&digest), "a source means what is gone");
    }
    tally
        .images
        .fetch_add(listed.len() as u32, Ordering::Relaxed);
    tally.tags.fetch_add(tags.len() as u32, Ordering::Relaxed);
}

fn lane(tally: &Tally) {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let mut whole = BTreeMap::new();
    for number in 0..IMAGES {
        let (raw, zst) = (content(number), zst(&content(number)));
        std::fs::write(root.join(format!("{number}.raw")), &raw).unwrap();
        std::fs::write(root.join(format!("{number}.zst")), &zst).unwrap();
        whole.insert(digest(&raw), raw.clone());
        whole.insert(digest(&zst), raw);
    }
    for _ in 0..KILLS / LANES {
        kill_once(root, tally);
        check(root, &whole, tally);
    }
    let store = open(root).unwrap();
    for image in store.list().unwrap() {
        let found = store.verify(&image.info.digest, &Reporter::silent());
        assert!(found.unwrap().warnings.is_empty());
    }
}

#[test]
fn killed_at_hundreds_of_points_a_store_is_whole() {
    let tally = Tally::default();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..LANES {
            scope.spawn(|| lane(&tally));
        }
    });
    eprintln!("{tally:?} in {:?}", begin.elapsed());
    // The kills came in the middle of something.
    assert!(tally.kills.into_inner() >= 300);
    assert!(tally.with_stages.into_inner() >= 30);
    assert!(tally.with_locks.into_inner() >= 30);
    // Few, where the machine is busy.
    assert!(tally.with_instances.into_inner() > 0);
    assert!(tally.images.into_inner() > 0 && tally.tags.into_inner() > 0);
}
