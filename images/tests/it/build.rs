//! The local build. The real one takes a minute, the network and a Debian archive; it is run by name:
//! `cargo test -p pileus-images --test it -- --ignored a_real_build`.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant};

use pileus_base::{Code, Phase, Update};
use pileus_images::{ImageRef, Store, StoreConfig};

use crate::support::*;

fn fake_mmdebstrap(fixture_dir: &std::path::Path, script: &str) -> std::path::PathBuf {
    let path = fixture_dir.join("mmdebstrap");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn debian() -> ImageRef {
    "build:debian-13".parse().unwrap()
}

fn keys_missing() -> bool {
    let missing = !std::path::Path::new("/usr/share/keyrings/debian-archive-keyring.gpg").exists();
    if missing {
        eprintln!("SKIPPED: debian-archive-keyring is not installed");
    }
    missing
}

#[tokio::test]
async fn the_hook_s_files_become_the_image() {
    if keys_missing() {
        return;
    }
    let tools = tempfile::tempdir().unwrap();
    let fixture = Fixture::with(|config| {
        config.tools.mmdebstrap = fake_mmdebstrap(
            tools.path(),
            "echo 'I: running apt-get update...' >&2
             truncate -s 2M /proc/self/fd/100
             printf kernel >/proc/self/fd/101; printf initrd >/proc/self/fd/102",
        );
    });
    let (report, _, seen) = recorder();
    let image = fixture
        .store
        .obtain(&debian(), None, &report)
        .await
        .unwrap();
    assert_eq!(std::fs::read(image.kernel().unwrap()).unwrap(), b"kernel");
    assert_eq!(std::fs::read(image.initrd().unwrap()).unwrap(), b"initrd");
    assert_eq!(
        image.cmdline(),
        Some("root=LABEL=pileus-root console=ttyS0")
    );
    assert_eq!(image.digest(), &digest(&vec![0; 2 << 20]));
    assert_eq!(image.info().title, "Debian 13 (trixie)");
    let mode = |path: std::path::PathBuf| std::fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(image.disk()), 0o444);
    assert_eq!(mode(image.kernel().unwrap()), 0o444);
    assert!(
        seen.lock()
            .unwrap()
            .contains(&Update::Phase(Phase::BuildingImage))
    );
    assert!(
        seen.lock()
            .unwrap()
            .contains(&Update::Log("I: running apt-get update...".into()))
    );
    // The second time nothing is built, by whatever name.
    let again = fixture
        .store
        .obtain(&"default".parse().unwrap(), None, &report)
        .await;
    assert!(std::sync::Arc::ptr_eq(&again.unwrap(), &image));
    fixture.assert_clean();
}

#[tokio::test]
async fn a_failed_build_shows_the_last_lines() {
    if keys_missing() {
        return;
    }
    let tools = tempfile::tempdir().unwrap();
    let fixture = Fixture::with(|config| {
        config.tools.mmdebstrap = fake_mmdebstrap(tools.path(), "echo 'E: no archive' >&2; exit 2");
    });
    let (report, _, _) = recorder();
    let err = fixture
        .store
        .obtain(&debian(), None, &report)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::ToolFailed);
    assert_eq!(err.details, ["E: no archive"]);
    fixture.assert_clean();
}

#[tokio::test]
async fn a_cancelled_build_ends_its_programs() {
    if keys_missing() {
        return;
    }
    let tools = tempfile::tempdir().unwrap();
    let fixture = Fixture::with(|config| {
        config.tools.mmdebstrap =
            fake_mmdebstrap(tools.path(), "echo 'I: begun' >&2; sleep 600; true");
    });
    let (report, cancel, seen) = recorder();
    let canceller = async {
        while !seen
            .lock()
            .unwrap()
            .contains(&Update::Log("I: begun".into()))
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        cancel.cancel();
    };
    let begin = Instant::now();
    let reference = debian();
    let (got, ()) = tokio::join!(fixture.store.obtain(&reference, None, &report), canceller);
    assert_eq!(got.unwrap_err().code, Code::Cancelled);
    assert!(begin.elapsed() < Duration::from_secs(15));
    fixture.assert_clean();
}

#[tokio::test]
async fn a_missing_mmdebstrap_is_named() {
    if keys_missing() {
        return;
    }
    let fixture = Fixture::with(|config| config.tools.mmdebstrap = "pileus-no-mmdebstrap".into());
    let (report, _, _) = recorder();
    let err = fixture
        .store
        .obtain(&debian(), None, &report)
        .await
        .unwrap_err();
    assert_eq!(err.code, Code::ToolMissing);
    assert!(err.advice.unwrap().contains("mmdebstrap"));
}

#[tokio::test]
#[ignore = "takes a minute and a Debian archive; run by name"]
async fn a_real_build() {
    let dir = tempfile::tempdir().unwrap();
    let name = std::env::var("PILEUS_TEST_BUILD").unwrap_or_else(|_| "build:debian-13".into());
    let store = Store::open(StoreConfig::new(dir.path().join("images"))).unwrap();
    let (report, _, seen) = recorder();
    let begin = Instant::now();
    let image = store
        .obtain(&name.parse().unwrap(), None, &report)
        .await
        .unwrap_or_else(|err| panic!("{err}\n{}", err.details.join("\n")));
    let meta = std::fs::metadata(image.disk()).unwrap();
    eprintln!(
        "{name}: {:?}, {} MiB of {} MiB allocated",
        begin.elapsed(),
        meta.blocks() / 2048,
        meta.len() >> 20
    );
    let head = &std::fs::read(image.disk()).unwrap()[..1 << 20];
    assert_eq!(head[510..512], [0x55, 0xaa]);
    assert_eq!(head[446], 0x80, "bootable");
    assert_eq!(&head[446 + 8..446 + 12], 2048_u32.to_le_bytes());
    assert!(head[..440].iter().any(|byte| *byte != 0), "boot.img");
    assert!(head[512..4096].iter().any(|byte| *byte != 0), "core.img");
    assert!(meta.blocks() * 512 < 600 << 20);
    // A bzImage has its magic there.
    let kernel = std::fs::read(image.kernel().unwrap()).unwrap();
    assert_eq!(&kernel[0x202..0x206], b"HdrS");
    assert!(std::fs::metadata(image.initrd().unwrap()).unwrap().len() > 1 << 20);
    assert!(
        seen.lock()
            .unwrap()
            .contains(&Update::Phase(Phase::BuildingImage))
    );
    assert_eq!(
        std::fs::read_dir(dir.path().join("images/stage"))
            .unwrap()
            .count(),
        0
    );
    if let Some(keep) = std::env::var_os("PILEUS_TEST_KEEP") {
        eprintln!("kept in {}", dir.keep().display());
        drop(keep);
    }
}
