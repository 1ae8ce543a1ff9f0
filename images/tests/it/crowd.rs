//! One image that many want at once, in one process and in several, and one for which there is no room at first.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use pileus_base::{Code, Digest, Reporter};
use pileus_images::Store;
use pileus_images::packed::Rule;

use crate::intake::{Upload, import, large_disk, packed, tarred};
use crate::server::{Answer, Server};
use crate::support::*;

#[tokio::test(flavor = "multi_thread")]
async fn one_download_for_64_callers_of_whom_one_leaves() {
    let bytes = packed(&large_disk(2 << 20));
    let slowly = Answer::Trickle(100_000, Duration::from_millis(10));
    let server = Server::start(bytes.clone(), [slowly]).await;
    let fixture = Fixture::new();
    let (first, cancel, _) = recorder();
    let caller = |report: Reporter| {
        let (store, reference) = (fixture.store.clone(), server.reference());
        tokio::spawn(async move { store.obtain(&reference, None, &report).await })
    };
    let leaving = caller(first);
    let staying: Vec<_> = (1..64).map(|_| caller(Reporter::silent())).collect();
    for _ in 0..400 {
        if server.requests() > 0 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    cancel.cancel();
    assert_eq!(leaving.await.unwrap().unwrap_err().code, Code::Cancelled);
    for one in staying {
        assert_eq!(one.await.unwrap().unwrap().digest(), &digest(&bytes));
    }
    assert_eq!(server.requests(), 1);
    fixture.assert_clean();
}

#[tokio::test(flavor = "multi_thread")]
async fn every_caller_is_told_the_rule_and_the_next_one_tries_anew() {
    let good = packed(&disk());
    let bad = zst(&tarred(&disk())[..2048]);
    let slowly = Answer::Trickle(100, Duration::from_millis(5));
    let server = Server::start(bad, [slowly]).await;
    let fixture = Fixture::new();
    let callers: Vec<_> = (0..8)
        .map(|_| {
            let (store, reference) = (fixture.store.clone(), server.reference());
            tokio::spawn(async move { store.obtain(&reference, None, &Reporter::silent()).await })
        })
        .collect();
    for one in callers {
        let err = one.await.unwrap().unwrap_err();
        assert_eq!(
            (err.code, Rule::of(&err)),
            (Code::BadImage, Some(Rule::Truncated))
        );
    }
    assert_eq!(server.requests(), 1);
    server.script.lock().unwrap().bytes = good.into();
    let report = Reporter::silent();
    let got = fixture
        .store
        .obtain(&server.reference(), None, &report)
        .await;
    assert!(got.is_ok());
}

const ROOT: &str = "PILEUS_TEST_CROWD_ROOT";
const URL: &str = "PILEUS_TEST_CROWD_URL";

/// Not a test of its own: one of several processes that share a store.
#[tokio::test]
#[ignore = "run by processes_that_share_a_store_download_once"]
async fn helper() {
    let (Some(root), Ok(url)) = (std::env::var_os(ROOT), std::env::var(URL)) else {
        eprintln!("SKIPPED: only useful as a helper process");
        return;
    };
    let store = Store::open(config(&PathBuf::from(root))).unwrap();
    let got = store
        .obtain(&url.parse().unwrap(), None, &Reporter::silent())
        .await;
    println!("GOT {}", got.unwrap().digest());
}

#[tokio::test(flavor = "multi_thread")]
async fn processes_that_share_a_store_download_once() {
    let bytes = packed(&large_disk(2 << 20));
    let slowly = Answer::Trickle(100_000, Duration::from_millis(30));
    let server = Server::start(bytes.clone(), [slowly]).await;
    let dir = tempfile::tempdir().unwrap();
    let children: Vec<_> = (0..3)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "crowd::helper", "--ignored", "--nocapture"])
                .env(ROOT, dir.path().join("images"))
                .env(URL, server.url())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap()
        })
        .collect();
    for child in children {
        let done = tokio::task::spawn_blocking(|| child.wait_with_output())
            .await
            .unwrap()
            .unwrap();
        let said = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(said.contains(&format!("GOT {}", digest(&bytes))), "{said}");
    }
    assert_eq!(
        server.requests(),
        1,
        "{:?}",
        server.script.lock().unwrap().served
    );
}

/// Not a test of its own: a store on a file system of its own, of 24 MiB.
#[tokio::test]
#[ignore = "run by a_full_disk_is_relieved_once"]
async fn full_disk_helper() {
    let Some(root) = std::env::var_os(ROOT) else {
        eprintln!("SKIPPED: only useful as a helper process");
        return;
    };
    let mut config = config(&PathBuf::from(root).join("images"));
    config.budget.min_free = 0;
    let store = Store::open(config).unwrap();
    let report = Reporter::silent();
    let here = || -> Vec<Digest> {
        let listed = store.list().unwrap();
        listed.into_iter().map(|image| image.info.digest).collect()
    };
    let beside = tempfile::tempdir().unwrap();
    // Data that takes little room as long as it is compressed: nobody sees before how much it needs.
    let bomb = |mib: usize| {
        let mut disk = vec![mib as u8; mib << 20];
        disk[510..512].copy_from_slice(&[0x55, 0xaa]);
        let path = beside.path().join(format!("{mib}.zst"));
        std::fs::write(&path, zst(&disk)).unwrap();
        pileus_images::ImageRef::File(path)
    };
    let first = {
        let image = store.obtain(&bomb(8), None, &report).await.unwrap();
        image.digest().clone()
    };
    // It does not fit beside the first, which goes.
    let second = store.obtain(&bomb(20), None, &report).await.unwrap();
    assert_eq!(here(), [second.digest().clone()]);
    assert_ne!(second.digest(), &first);
    // One that is held stays, and the host is to blame.
    let err = store.obtain(&bomb(9), None, &report).await.unwrap_err();
    assert_eq!(err.code, Code::NoSpace, "{err}");
    assert_eq!(here(), [second.digest().clone()]);
    assert!(
        std::fs::read_dir(store.root().join("stage"))
            .unwrap()
            .next()
            .is_none()
    );
    drop(second);
    let packed = packed(&large_disk(9 << 20));
    let server = Server::start(packed.clone(), []).await;
    let third = store
        .obtain(&server.reference(), None, &report)
        .await
        .unwrap();
    assert_eq!(server.requests(), 1, "there was room before it came");
    assert_eq!(here(), [digest(&packed)]);
    drop(third);
    // More than the whole: an upload can't be asked for again.
    let err = import(&store, Upload::of(&large_disk(30 << 20)), None)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::NoSpace, "{err}");
    let err = store.obtain(&bomb(40), None, &report).await.unwrap_err();
    assert_eq!(err.code, Code::NoSpace, "{err}");
    assert!(
        std::fs::read_dir(store.root().join("stage"))
            .unwrap()
            .next()
            .is_none()
    );
    println!("ALL WELL");
}

#[test]
fn a_full_disk_is_relieved_once() {
    let dir = tempfile::tempdir().unwrap();
    let script = "mount -t tmpfs -o size=24m tmpfs \"$1\" && exec \"$2\" --exact crowd::full_disk_helper \
                  --ignored --nocapture";
    let mut command = Command::new("unshare");
    command
        .args([
            "--mount",
            "--map-root-user",
            "--propagation=private",
            "sh",
            "-c",
            script,
            "sh",
        ])
        .arg(dir.path())
        .arg(std::env::current_exe().unwrap())
        .env(ROOT, dir.path());
    let done = command.output().unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    let why = String::from_utf8_lossy(&done.stderr);
    if !said.contains("running 1 test") {
        eprintln!("SKIPPED: no file system can be mounted here: {why}");
        return;
    }
    assert!(said.contains("ALL WELL"), "{said} {why}");
}
