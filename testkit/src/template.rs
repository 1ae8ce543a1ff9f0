//! Templates for tests. The one of the shared guest image is made once by a real daemon, kept in the
//! target folder, and put into each daemon's storage as a copy: then a guest is there in seconds.
//! Templates for the stand-in for QEMU are made by hand, because it reads none.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use pileus_base::{Digest, Size};
use pileus_images::{Image, overlay};
use pileus_instances::machine::Shape;
use pileus_instances::qemu::host::{KvmFacts, choose};
use pileus_instances::qemu::{Accelerator, AcceleratorChoice, Growth, Qemu};
use pileus_instances::template::{Folder, TemplateKey};

use crate::daemon::{Daemon, Options, PATH};
use crate::image;

/// The shape that a launch has if nobody says.
const CPUS: u32 = 1;
const MEMORY: Size = Size::gib(1);
const DISK: Size = Size::gib(5);
/// Templates of other builds of the agent or of QEMU that are kept for the next change back.
const KEEP: usize = 2;
const FILES: [&str; 3] = ["ram", "state", "disk.qcow2"];

/// A saved machine outside of any storage: `ram`, `state`, `disk.qcow2`, and the key.
#[derive(Debug)]
pub(crate) struct Shared {
    folder: PathBuf,
    key: TemplateKey,
}

/// A template in a daemon's storage, for tests that damage it.
#[derive(Debug, Clone)]
pub struct Planted {
    pub id: String,
    pub folder: PathBuf,
    pub ram: PathBuf,
    pub state: PathBuf,
    pub layer: PathBuf,
}

impl Planted {
    pub fn manifest(&self) -> PathBuf {
        self.folder.join("template.json")
    }
}

/// The key that a daemon of this build asks for.
fn key(image: Digest, virtual_size: Size, qemu: Option<&Path>, tcg: bool) -> TemplateKey {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime can be made");
    let qemu = runtime
        .block_on(Qemu::find(qemu, PATH.as_ref()))
        .expect("there is a QEMU");
    let accelerator = match tcg {
        true => Accelerator::Tcg,
        false => {
            let chosen = choose(AcceleratorChoice::Auto, &KvmFacts::of_host());
            chosen.expect("auto is always possible").accelerator
        }
    };
    let disk = DISK.max(virtual_size);
    TemplateKey::new(
        image,
        Shape {
            cpus: CPUS,
            memory: MEMORY,
        },
        disk,
        &qemu,
        accelerator,
        Growth::of_host(),
    )
}

/// The template of the shared guest image. The first caller makes it (a boot), others wait for it.
///
/// # Panics
/// If it can't be made.
pub(crate) fn guest_template(image: &Image) -> Shared {
    let key = key(
        image.digest().clone(),
        image.info().virtual_size,
        None,
        false,
    );
    let root = image::store_root().join("templates");
    fs::create_dir_all(&root).expect("a folder can be made");
    let lock = File::create(root.join("lock")).expect("a lock file can be made");
    lock.lock().expect("the lock can be taken");
    let folder = root.join(key.id());
    if !folder.exists() {
        make(&root, &key, &folder);
    }
    Shared { folder, key }
}

fn make(root: &Path, key: &TemplateKey, folder: &Path) {
    let id = key.id();
    eprintln!("making the template {id} that the guest tests share");
    forget_old(root);
    let daemon = Daemon::start(Options {
        warm: "manual",
        ..Options::real()
    });
    let made = daemon.run(&["template", "create", image::GUEST_IMAGE]);
    assert_eq!(
        made.ok_with_words(),
        format!("Ready: {id}\n"),
        "pileusd was built from another source than the tests: build both"
    );
    let storage = daemon.storage();
    let source = planted(&storage, &id);
    let stage = root.join(format!(".{id}"));
    let _ = fs::remove_dir_all(&stage);
    fs::create_dir(&stage).expect("a folder can be made");
    copy_files(&source, &stage);
    fs::rename(&stage, folder).expect("the folder can be renamed");
}

fn copy_files(source: &Planted, stage: &Path) {
    for (from, name) in [&source.ram, &source.state, &source.layer]
        .into_iter()
        .zip(FILES)
    {
        copy(from, &stage.join(name));
    }
}

fn forget_old(root: &Path) {
    let entries = fs::read_dir(root)
        .expect("the folder can be read")
        .flatten();
    let mut folders: Vec<_> = entries
        .filter_map(|entry| {
            let meta = entry.metadata().ok()?;
            meta.is_dir()
                .then_some((meta.modified().ok()?, entry.path()))
        })
        .collect();
    folders.sort();
    folders.reverse();
    for (_, old) in folders.into_iter().skip(KEEP - 1) {
        let _ = fs::remove_dir_all(old);
    }
}

/// What a storage holds of a template.
fn planted(storage: &Path, id: &str) -> Planted {
    let folder = storage.join("data/templates").join(id);
    let (files, _) = Folder::read(&folder).expect("the template has a manifest");
    Planted {
        id: id.to_owned(),
        ram: files.ram(),
        state: files.state(),
        layer: files.disk(),
        folder,
    }
}

impl Shared {
    /// Puts a copy into a storage that no daemon has open.
    pub(crate) fn plant(&self, storage: &Path) -> Planted {
        plant(storage, &self.key, |place| {
            copy(&self.folder.join(FILES[0]), &place.ram());
            copy(&self.folder.join(FILES[1]), &place.state());
            copy(&self.folder.join(FILES[2]), &place.disk());
        })
    }
}

/// A template that the stand-in for QEMU can be started from. `disk` is the raw image.
pub(crate) fn plant_fake(storage: &Path, image: &Image, qemu: &Path) -> Planted {
    let info = image.info();
    let key = key(image.digest().clone(), info.virtual_size, Some(qemu), true);
    plant(storage, &key, |place| {
        let ram = File::create(place.ram()).expect("a file can be made");
        ram.set_len(MEMORY.bytes()).expect("a length can be set");
        fs::write(place.state(), b"what the stand-in for QEMU saved").expect("a file is written");
        overlay::create(&place.disk(), key.disk, &image.disk()).expect("a layer can be made");
    })
}

fn plant(storage: &Path, key: &TemplateKey, fill: impl FnOnce(&Folder)) -> Planted {
    let (id, layer) = (key.id(), uuid::Uuid::new_v4());
    let path = storage.join("data/templates").join(&id);
    let layers = storage.join("data/layers");
    for folder in [&path, &layers] {
        fs::create_dir_all(folder).expect("a folder can be made");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
        fs::set_permissions(folder, mode).expect("the mode can be set");
    }
    let layer = layers.join(format!("{layer}.qcow2"));
    let place = Folder::new(&path, path.join("ram"), &layer);
    fill(&place);
    for file in [place.ram(), place.state(), place.disk()] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        fs::set_permissions(file, mode).expect("the mode can be set");
    }
    place
        .finish(key, "2026-01-01T00:00:00Z")
        .expect("the template can be sealed");
    planted(storage, &id)
}

/// Never a link: a template whose files have a second name is refused.
fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .args([from, to])
        .status();
    let copied = status.is_ok_and(|status| status.success());
    assert!(copied, "{} can't be copied", from.display());
}
