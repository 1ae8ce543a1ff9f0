//! Every format with every compression, and what is refused: hostile, damaged and too large images.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use pileus_base::{Code, Reporter};

use crate::support::*;

/// The same disk as qcow2.
fn qcow2(fixture: &Fixture, options: &[&str]) -> Vec<u8> {
    let (raw, out) = (fixture.path("src.raw"), fixture.path("src.qcow2"));
    std::fs::write(&raw, disk()).unwrap();
    let mut args = vec!["convert", "-q", "-f", "raw", "-O", "qcow2"];
    args.extend(options);
    args.extend([text(&raw), text(&out)]);
    qemu_img(&args);
    std::fs::read(&out).unwrap()
}

async fn refused(fixture: &Fixture, bytes: &[u8]) -> pileus_base::Error {
    let reference = fixture.file("bad.img", bytes);
    let got = fixture
        .store
        .obtain(&reference, None, &Reporter::silent())
        .await;
    fixture.assert_clean();
    assert!(fixture.store.list().unwrap().is_empty());
    got.unwrap_err()
}

#[tokio::test]
async fn formats_and_compressions_give_the_same_disk() {
    let fixture = Fixture::new();
    let raw = disk();
    let plain = qcow2(&fixture, &[]);
    let artifacts = [
        ("raw", raw.clone()),
        ("raw.xz", xz(&raw)),
        ("raw.gz", gz(&raw)),
        ("raw.zst", zst(&raw)),
        ("qcow2", plain.clone()),
        ("qcow2.xz", xz(&plain)),
        ("qcow2.gz", gz(&plain)),
        ("qcow2.zst", zst(&plain)),
        ("v2", qcow2(&fixture, &["-o", "compat=0.10"])),
        ("compressed", qcow2(&fixture, &["-c"])),
        (
            "compressed-zstd",
            qcow2(&fixture, &["-c", "-o", "compression_type=zstd"]),
        ),
        (
            "extended-l2",
            qcow2(&fixture, &["-o", "extended_l2=on,cluster_size=128k"]),
        ),
        (
            "small-clusters",
            qcow2(&fixture, &["-o", "cluster_size=512"]),
        ),
        // Two members of gzip, as some tools write them.
        (
            "members.gz",
            [gz(&raw[..1 << 20]), gz(&raw[1 << 20..])].concat(),
        ),
    ];
    for (name, bytes) in artifacts {
        // The name says nothing: all are told by their bytes.
        let reference = fixture.file("image.bin", &bytes);
        let image = fixture
            .store
            .obtain(&reference, Some(&digest(&bytes)), &Reporter::silent())
            .await
            .unwrap_or_else(|err| panic!("{name}: {err} {:?}", err.details));
        assert!(std::fs::read(image.disk()).unwrap() == raw, "{name}");
        let meta = std::fs::metadata(image.disk()).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o444, "{name}");
        assert!(meta.blocks() * 512 < 1 << 20, "{name} is not sparse");
        assert_eq!(image.digest(), &digest(&bytes), "{name}");
        assert_eq!(image.info().virtual_size.bytes(), DISK_SIZE as u64);
    }
    fixture.assert_clean();
}

#[tokio::test]
async fn hostile_qcow2_files_are_refused_before_any_tool_sees_them() {
    // A qemu-img that must not be called.
    let fixture = Fixture::with(|config| config.tools.qemu_img = "/nonexistent/qemu-img".into());
    let secret = fixture.path("secret");
    std::fs::write(&secret, vec![7; 1 << 20]).unwrap();
    let bad = fixture.path("bad.qcow2");
    let cases: &[(&str, Vec<String>)] = &[
        (
            "backing file",
            vec!["-b".into(), text(&secret).into(), "-F".into(), "raw".into()],
        ),
        (
            "external data file",
            vec![
                "-o".into(),
                format!(
                    "data_file={},data_file_raw=on",
                    fixture.path("data").display()
                ),
            ],
        ),
        (
            "encrypted",
            vec![
                "--object".into(),
                "secret,id=s,data=x".into(),
                "-o".into(),
                "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10".into(),
            ],
        ),
    ];
    for (rule, options) in cases {
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        args.extend(options.iter().map(String::as_str));
        args.extend([text(&bad), "1M"]);
        qemu_img(&args);
        let err = refused(&fixture, &std::fs::read(&bad).unwrap()).await;
        assert_eq!(err.code, Code::BadImage, "{rule}");
        assert!(err.message.contains(rule), "{}", err.message);
    }
    qemu_img(&["create", "-q", "-f", "qcow2", text(&bad), "1M"]);
    qemu_img(&["snapshot", "-c", "s1", text(&bad)]);
    let err = refused(&fixture, &std::fs::read(&bad).unwrap()).await;
    assert!(
        err.message.contains("1 internal snapshots"),
        "{}",
        err.message
    );

    qemu_img(&["create", "-q", "-f", "qcow2", text(&bad), "1T"]);
    let err = refused(&fixture, &std::fs::read(&bad).unwrap()).await;
    assert_eq!(err.code, Code::ImageTooLarge);

    // The L1 table of a good file, made huge.
    let mut huge = qcow2(&fixture, &[]);
    huge[36..40].copy_from_slice(&u32::MAX.to_be_bytes());
    let err = refused(&fixture, &huge).await;
    assert!(err.message.contains("L1 table"), "{}", err.message);
}

#[tokio::test]
async fn a_cut_qcow2_is_refused() {
    let fixture = Fixture::new();
    let whole = qcow2(&fixture, &[]);
    for len in [60, 100, 65536, whole.len() - 65536] {
        let err = refused(&fixture, &whole[..len]).await;
        assert_eq!(err.code, Code::BadImage, "{len}: {err}");
    }
}

#[tokio::test]
async fn cut_or_damaged_compression_is_refused() {
    let fixture = Fixture::new();
    let raw = disk();
    for whole in [xz(&raw), gz(&raw), zst(&raw)] {
        let err = refused(&fixture, &whole[..whole.len() - 9]).await;
        assert_eq!(err.code, Code::BadImage, "{err}");
    }
    let mut damaged = xz(&raw);
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0xff;
    assert_eq!(refused(&fixture, &damaged).await.code, Code::BadImage);
    assert!(
        refused(&fixture, &gz(&gz(&raw)))
            .await
            .message
            .contains("twice")
    );
}

#[tokio::test]
async fn what_is_no_disk_is_refused() {
    let fixture = Fixture::new();
    for (bytes, why) in [
        (&b"<html>404</html>"[..], "web page"),
        (b"", "partition table"),
        (b"hello", "partition table"),
        (&[0; 4096], "partition table"),
        (b"KDMV\x01\0\0\0", "VMDK"),
        (b"vhdxfile", "VHDX"),
    ] {
        let err = refused(&fixture, bytes).await;
        assert_eq!(err.code, Code::BadImage);
        assert!(err.message.contains(why), "{}", err.message);
    }
    let folder = fixture.path("folder");
    std::fs::create_dir(&folder).unwrap();
    let got = fixture
        .store
        .obtain(&fixture.reference("folder"), None, &Reporter::silent())
        .await;
    assert_eq!(got.unwrap_err().code, Code::BadImage);
    let got = fixture
        .store
        .obtain(&fixture.reference("none"), None, &Reporter::silent())
        .await;
    assert_eq!(got.unwrap_err().code, Code::ImageNotFound);
}

#[tokio::test]
async fn bombs_stop_at_the_limit() {
    let fixture = Fixture::with(|config| config.limits.virtual_size = 8 << 20);
    // Not zeros, which would take no room anyhow.
    let mut bomb = vec![0x41; 40 << 20];
    bomb[510..512].copy_from_slice(&[0x55, 0xaa]);
    for packed in [xz(&bomb), gz(&bomb), zst(&bomb)] {
        assert!(packed.len() < 1 << 20);
        let err = refused(&fixture, &packed).await;
        assert_eq!(err.code, Code::ImageTooLarge, "{err}");
    }
}

#[tokio::test]
async fn no_room_is_told_up_front() {
    let fixture = Fixture::with(|config| config.limits.reserve = u64::MAX / 2);
    let err = refused(&fixture, &disk()).await;
    assert_eq!(err.code, Code::NoSpace);
}

#[tokio::test]
async fn a_missing_qemu_img_is_named() {
    let fixture = Fixture::with(|config| config.tools.qemu_img = "pileus-no-qemu-img".into());
    let bytes = qcow2(&fixture, &[]);
    let err = refused(&fixture, &bytes).await;
    assert_eq!(err.code, Code::ToolMissing);
}
