//! How bytes come in: the same images as files, downloads and uploads, whole, cut, changed under way; and what that
//! costs.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use pileus_base::{Code, Digest, Reporter, Update};
use pileus_images::packed::Rule;
use pileus_images::{Arrival, Store};
use tokio::io::{AsyncRead, ReadBuf};

use crate::server::{Answer, Server};
use crate::support::*;

const MACHINE: &str = r#"{"version": 1, "memory": 512, "network": "e1000"}"#;

/// A packed image, made with the tools that the ancestor used.
pub fn packed(disk: &[u8]) -> Vec<u8> {
    zst(&tarred(disk))
}

pub fn tarred(disk: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("disk.img"), disk).unwrap();
    std::fs::write(dir.path().join("machine.json"), MACHINE).unwrap();
    let run = |program: &str, args: &[&str]| {
        let done = Command::new(program)
            .args(args)
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "{program}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        done.stdout
    };
    // So that it is stored as a sparse member.
    run("fallocate", &["--dig-holes", "disk.img"]);
    let layer =
        "create -q -f qcow2 -o backing_file=disk.img,backing_fmt=raw,lazy_refcounts=on layer.qcow2";
    run("qemu-img", &layer.split(' ').collect::<Vec<_>>());
    run(
        "tar",
        &["-Scf", "-", "disk.img", "layer.qcow2", "machine.json"],
    )
}

/// A disk of many different bytes, which nothing can compress, and a large hole.
pub fn large_disk(data: usize) -> Vec<u8> {
    let mut disk = vec![0; data + (16 << 20)];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for bytes in disk[..data].chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.copy_from_slice(&state.to_le_bytes()[..bytes.len()]);
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk
}

fn qcow2(disk: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (raw, out) = (dir.path().join("raw"), dir.path().join("qcow2"));
    std::fs::write(&raw, disk).unwrap();
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&raw),
        text(&out),
    ]);
    std::fs::read(&out).unwrap()
}

fn forms() -> Vec<(&'static str, Vec<u8>)> {
    let raw = disk();
    vec![
        ("raw", raw.clone()),
        ("raw.xz", xz(&raw)),
        ("qcow2", qcow2(&raw)),
        ("qcow2.zst", zst(&qcow2(&raw))),
        ("packed", packed(&raw)),
    ]
}

type Sleeping = Pin<Box<tokio::time::Sleep>>;

/// An upload that comes in pieces, and may break off.
#[derive(Clone)]
pub struct Upload {
    bytes: bytes::Bytes,
    piece: usize,
    pause: Duration,
    /// What comes after the last byte.
    end: Option<io::ErrorKind>,
    sleep: Arc<Mutex<Option<Sleeping>>>,
    read: Arc<AtomicU64>,
}

impl Upload {
    pub fn of(bytes: &[u8]) -> Self {
        Self {
            bytes: bytes.to_vec().into(),
            piece: 50_000,
            pause: Duration::ZERO,
            end: None,
            sleep: Arc::default(),
            read: Arc::default(),
        }
    }

    fn slow(bytes: &[u8], piece: usize, pause: u64) -> Self {
        Self {
            piece,
            pause: Duration::from_millis(pause),
            ..Self::of(bytes)
        }
    }

    fn broken(bytes: &[u8], end: io::ErrorKind) -> Self {
        Self {
            end: Some(end),
            ..Self::of(bytes)
        }
    }
}

impl AsyncRead for Upload {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        to: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if !self.pause.is_zero() {
            let pause = self.pause;
            let mut sleep = self.sleep.lock().unwrap();
            let sleeping = sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(pause)));
            std::task::ready!(sleeping.as_mut().poll(context));
            *sleep = None;
        }
        let len = self.bytes.len().min(self.piece).min(to.remaining());
        if let (0, Some(kind)) = (len, self.end) {
            return Poll::Ready(Err(io::Error::new(kind, "the line is dead")));
        }
        let piece = self.bytes.split_to(len);
        to.put_slice(&piece);
        self.read.fetch_add(len as u64, Ordering::SeqCst);
        Poll::Ready(Ok(()))
    }
}

pub async fn import(
    store: &Arc<Store>,
    upload: Upload,
    checksum: Option<&Digest>,
) -> pileus_base::Result<Arc<pileus_images::Image>> {
    let arrival = Arrival {
        source: "upload".into(),
        ..Arrival::default()
    };
    store
        .import(upload, &arrival, checksum, &Reporter::silent())
        .await
}

#[tokio::test]
async fn every_form_comes_in_every_way() {
    let raw = disk();
    let mut digests = Vec::new();
    for (form, bytes) in forms() {
        let name = digest(&bytes);
        let server = Server::start(bytes.clone(), []).await;
        for way in ["file", "download", "upload"] {
            let fixture = Fixture::new();
            let report = Reporter::silent();
            let file = fixture.file("image", &bytes);
            let got = match way {
                "file" => fixture.store.obtain(&file, Some(&name), &report).await,
                "download" => {
                    fixture
                        .store
                        .obtain(&server.reference(), None, &report)
                        .await
                }
                _ => import(&fixture.store, Upload::of(&bytes), Some(&name)).await,
            };
            let image =
                got.unwrap_or_else(|err| panic!("{form} by {way}: {err} {:?}", err.details));
            assert!(
                std::fs::read(image.disk()).unwrap() == raw,
                "{form} by {way}"
            );
            assert_eq!(image.digest(), &name, "{form} by {way}");
            assert!(
                image.allocated().bytes() < 1 << 20,
                "{form} by {way} is not sparse"
            );
            let memory = image
                .info()
                .machine
                .as_ref()
                .and_then(|machine| machine.memory);
            assert_eq!(memory, (form == "packed").then_some(512), "{form} by {way}");
            digests.push(image.info().disk_digest.clone().unwrap());
            // Nothing else was published with it.
            let mut names: Vec<_> = std::fs::read_dir(image.disk().parent().unwrap())
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .collect();
            names.sort();
            assert_eq!(names, ["disk.raw", "image.json", "used"], "{form} by {way}");
            fixture.assert_clean();
        }
    }
    digests.dedup();
    assert_eq!(digests.len(), 1, "the same disk has the same digest");
}

#[tokio::test]
async fn an_image_is_judged_without_being_kept() {
    for (form, bytes) in forms() {
        let fixture = Fixture::new();
        let report = Reporter::silent();
        let judged = fixture
            .store
            .inspect(Upload::of(&bytes), None, None, &report)
            .await
            .unwrap();
        assert_eq!(judged.digest, digest(&bytes), "{form}");
        assert_eq!(judged.size.bytes(), bytes.len() as u64, "{form}");
        assert_eq!(judged.virtual_size.bytes(), DISK_SIZE as u64, "{form}");
        assert!(judged.allocated.bytes() < 1 << 20, "{form}");
        assert_eq!(judged.machine.is_some(), form == "packed", "{form}");
        assert!(fixture.store.list().unwrap().is_empty());
        fixture.assert_clean();
        let wrong = digest(b"other");
        let judged = fixture
            .store
            .inspect(Upload::of(&bytes), None, Some(&wrong), &report)
            .await;
        assert_eq!(judged.unwrap_err().code, Code::ChecksumMismatch, "{form}");
        let judged = fixture
            .store
            .inspect(Upload::of(&bytes[..400]), None, None, &report)
            .await;
        assert_eq!(judged.unwrap_err().code, Code::BadImage, "{form}");
        fixture.assert_clean();
    }
}

#[tokio::test]
async fn a_wrong_checksum_or_a_broken_stream_leaves_nothing() {
    for (form, bytes) in forms() {
        let fixture = Fixture::new();
        let wrong = digest(b"other");
        let got = import(&fixture.store, Upload::of(&bytes), Some(&wrong)).await;
        assert_eq!(got.unwrap_err().code, Code::ChecksumMismatch, "{form}");
        let cuts = [0, 1, 511, bytes.len() / 2, bytes.len() - 1, bytes.len()];
        for at in cuts {
            for kind in [io::ErrorKind::ConnectionReset, io::ErrorKind::UnexpectedEof] {
                let got = import(&fixture.store, Upload::broken(&bytes[..at], kind), None).await;
                assert_eq!(got.unwrap_err().code, Code::Cancelled, "{form} cut at {at}");
            }
        }
        assert!(fixture.store.list().unwrap().is_empty());
        fixture.assert_clean();
        // And then it can be had.
        let image = import(&fixture.store, Upload::of(&bytes), None)
            .await
            .unwrap();
        // What is here is not read again.
        let again = Upload::of(&bytes);
        let same = import(&fixture.store, again.clone(), Some(image.digest()))
            .await
            .unwrap();
        assert!(Arc::ptr_eq(&image, &same));
        assert_eq!(again.read.load(Ordering::SeqCst), 0);
        let same = import(&fixture.store, Upload::of(&bytes), None)
            .await
            .unwrap();
        assert!(Arc::ptr_eq(&image, &same));
        fixture.assert_clean();
    }
}

#[tokio::test]
async fn an_upload_has_its_limits() {
    let fixture = Fixture::with(|config| {
        config.limits.download = 1 << 20;
        config.limits.virtual_size = 2 << 20;
    });
    let got = import(&fixture.store, Upload::of(&disk()), None).await;
    assert_eq!(got.unwrap_err().code, Code::ImageTooLarge);
    let got = import(&fixture.store, Upload::of(&packed(&disk())), None).await;
    assert_eq!(got.unwrap_err().code, Code::ImageTooLarge);
    let full = Fixture::with(|config| config.limits.reserve = u64::MAX / 2);
    let upload = Upload::of(&disk());
    let got = import(&full.store, upload.clone(), None).await;
    assert_eq!(got.unwrap_err().code, Code::NoSpace);
    assert_eq!(
        upload.read.load(Ordering::SeqCst),
        0,
        "told before anything is sent"
    );
    fixture.assert_clean();
}

#[tokio::test]
async fn a_cancelled_or_forgotten_import_leaves_nothing() {
    let disk = large_disk(3 << 20);
    for (form, bytes) in [
        ("raw", disk.clone()),
        ("raw.zst", zst(&disk)),
        ("qcow2", qcow2(&disk)),
        ("packed", packed(&disk)),
    ] {
        let fixture = Fixture::new();
        let (report, cancel, _) = recorder();
        let upload = Upload::slow(&bytes, 100_000, 5);
        let read = upload.read.clone();
        let canceller = async {
            for _ in 0..400 {
                if read.load(Ordering::SeqCst) >= 2_500_000 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            cancel.cancel();
        };
        let arrival = Arrival::default();
        let work = fixture.store.import(upload, &arrival, None, &report);
        let (got, ()) = tokio::join!(work, canceller);
        assert_eq!(got.unwrap_err().code, Code::Cancelled, "{form}");
        fixture.assert_clean();
        // Nobody awaits it any more, while its threads are at work.
        let upload = Upload::slow(&bytes, 100_000, 8);
        let forgotten = import(&fixture.store, upload, None);
        let ended = tokio::time::timeout(Duration::from_millis(150), forgotten).await;
        assert!(ended.is_err(), "{form}: too fast for this test");
        for _ in 0..200 {
            let left = std::fs::read_dir(fixture.store.root().join("stage"))
                .unwrap()
                .count();
            if left == 0 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        fixture.assert_clean();
    }
}

/// Bytes that all files below a folder take.
fn taken(folder: &Path) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(found) if found.is_dir() => taken(&entry.path()),
            Ok(found) => found.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

/// The most that a stage took while `work` went on.
async fn peak<T>(root: &Path, work: impl Future<Output = T>) -> (u64, T) {
    let (stop, most) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicU64::new(0)),
    );
    let watcher = {
        let (stop, most, stage) = (stop.clone(), most.clone(), root.join("stage"));
        std::thread::spawn(move || {
            while !stop.load(Ordering::SeqCst) {
                most.fetch_max(taken(&stage), Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
            }
        })
    };
    let done = work.await;
    stop.store(true, Ordering::SeqCst);
    watcher.join().unwrap();
    (most.load(Ordering::SeqCst), done)
}

#[tokio::test]
async fn nothing_is_kept_beside_what_comes_out() {
    let disk = large_disk(12 << 20);
    let archive = packed(&disk);
    assert!(archive.len() > 11 << 20);
    // A file system gives what is written in larger pieces and takes the rest back later; the layer is small.
    let slack = 1 << 20;
    for bytes in [archive, zst(&disk)] {
        let fixture = Fixture::new();
        let upload = Upload::slow(&bytes, 200_000, 5);
        let (most, image) = peak(fixture.store.root(), import(&fixture.store, upload, None)).await;
        let extracted = image.unwrap().allocated().bytes();
        assert!(most > 6 << 20, "it was looked at while it was made: {most}");
        assert!(most <= extracted + slack, "{most} of {extracted}");
        // Of a local file too.
        let fixture = Fixture::new();
        let reference = fixture.file("image.tar.zst", &bytes);
        let report = Reporter::silent();
        let work = fixture.store.obtain(&reference, None, &report);
        let (most, image) = peak(fixture.store.root(), work).await;
        let extracted = image.unwrap().allocated().bytes();
        assert!(most <= extracted + slack, "{most} of {extracted}");
    }
}

#[tokio::test]
async fn a_packed_image_comes_through_cuts() {
    let bytes = packed(&large_disk(3 << 20));
    let cuts = [1000, 600_000, 900_000, 0, 1_000_000].map(Answer::CutAfter);
    let server = Server::start(bytes.clone(), cuts).await;
    let fixture = Fixture::with(|config| config.patience.attempts = 4);
    let (report, _, seen) = recorder();
    let image = fixture
        .store
        .obtain(&server.reference(), None, &report)
        .await
        .unwrap();
    assert_eq!(image.digest(), &digest(&bytes));
    assert_eq!(server.downloads(), 1, "all others were resumed");
    let all = Some(bytes.len() as u64);
    let last = Update::Progress {
        done: bytes.len() as u64,
        total: all,
    };
    assert!(seen.lock().unwrap().contains(&last));
    fixture.assert_clean();
}

#[tokio::test]
async fn an_image_that_changes_under_way_is_made_anew() {
    let first = packed(&large_disk(3 << 20));
    let mut other = large_disk(2 << 20);
    other[4096] ^= 1;
    for then in [packed(&other), zst(&other), other.clone(), qcow2(&other)] {
        let wanted = digest(&then);
        // Deep within its disk, so that much was written already.
        let answers = [Answer::Becomes(
            2_500_000,
            then.into(),
            Some("\"two\"".into()),
        )];
        let server = Server::start(first.clone(), answers).await;
        let fixture = Fixture::new();
        let report = Reporter::silent();
        let got = fixture
            .store
            .obtain(&server.reference(), None, &report)
            .await;
        let image = got.unwrap();
        assert_eq!(image.digest(), &wanted);
        assert!(std::fs::read(image.disk()).unwrap() == other);
        assert_eq!(server.downloads(), 2);
        fixture.assert_clean();
    }
}

#[tokio::test]
async fn a_bad_image_ends_its_download_at_once() {
    let mut tar = tarred(&large_disk(12 << 20));
    // A digit of the first header's time.
    tar[140] ^= 1;
    let bytes = zst(&tar);
    let pieces = Answer::Trickle(400_000, Duration::from_millis(50));
    let server = Server::start(bytes, [pieces]).await;
    let fixture = Fixture::new();
    let (report, _, seen) = recorder();
    let got = fixture
        .store
        .obtain(&server.reference(), None, &report)
        .await;
    let err = got.unwrap_err();
    assert_eq!(err.code, Code::BadImage, "{err}");
    assert_eq!(Rule::of(&err), Some(Rule::NotTar));
    let seen = seen.lock().unwrap();
    let most = seen.iter().filter_map(|update| match update {
        Update::Progress { done, .. } => Some(*done),
        _ => None,
    });
    assert!(most.max().unwrap_or(0) < 9 << 20, "it went on");
    assert_eq!(server.requests(), 1);
    fixture.assert_clean();
}

#[tokio::test]
async fn what_is_no_packed_image_is_told_so() {
    let fixture = Fixture::new();
    let tar = tarred(&disk());
    for (bytes, rule) in [
        (gz(&tar), Some(Rule::NotZstd)),
        (xz(&tar), Some(Rule::NotZstd)),
        (zst(&tar[..tar.len() / 2]), Some(Rule::Truncated)),
        (
            [packed(&disk()), b"more".to_vec()].concat(),
            Some(Rule::ZstdTrailing),
        ),
        (tar.clone(), None),
        (zst(&zst(&tar)), None),
    ] {
        let err = import(&fixture.store, Upload::of(&bytes), None)
            .await
            .unwrap_err();
        assert_eq!((err.code, Rule::of(&err)), (Code::BadImage, rule), "{err}");
        fixture.assert_clean();
    }
}
