//! Archives of GNU tar and the zstd program: all that the ancestor's readers took, and what they took by mistake.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use pileus_images::packed::Rule;

use super::{MACHINE, budgets, disk, layer, refused, taken};

/// Runs programs as the ancestor did, with the members in the folder.
fn shell(dir: &Path, script: &str) -> Vec<u8> {
    let done = Command::new("sh")
        .args(["-ec", script])
        .current_dir(dir)
        .output()
        .unwrap();
    assert!(
        done.status.success(),
        "{script}: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    done.stdout
}

/// A disk with more extents than fit into a header.
fn fragmented() -> Vec<u8> {
    let mut disk = vec![0; 3 << 20];
    for n in 0..60 {
        disk[n * 49_152..][..4096].fill(n as u8 + 1);
    }
    disk
}

fn folder(disk: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("dense"), disk).unwrap();
    shell(dir.path(), "cp --sparse=always dense disk.img && rm dense");
    std::fs::write(dir.path().join("layer.qcow2"), layer()).unwrap();
    std::fs::write(dir.path().join("machine.json"), MACHINE).unwrap();
    std::fs::write(dir.path().join("notes.txt"), "an extra member").unwrap();
    dir
}

#[test]
fn all_that_gnu_tar_writes() {
    let members = "disk.img layer.qcow2 machine.json";
    for disk in [disk(), fragmented(), vec![0; 3 << 20]] {
        let dir = folder(&disk);
        for command in [
            // The ancestor's own.
            format!("tar -Sc {members}"),
            format!("tar -c {members}"),
            format!("tar -Sc --format=posix {members}"),
            format!("tar -Sc --format=posix --sparse-version=0.1 {members}"),
            format!("tar -c --format=posix {members}"),
            format!("tar -c --format=ustar {members}"),
            format!("tar -c --format=v7 {members}"),
            format!("tar -c --format=oldgnu -S {members}"),
            // Any order, and what else there may be.
            "tar -Sc machine.json notes.txt layer.qcow2 disk.img".to_owned(),
            "tar -Sc --format=posix layer.qcow2 disk.img notes.txt machine.json".to_owned(),
            format!("tar -Sc --hole-detection=raw {members}"),
            format!(
                "tar -Sc --transform='s,^notes,{},' {members} notes.txt",
                "long/".repeat(30)
            ),
            format!(
                "tar -Sc --format=posix --transform='s,^notes,{},' {members} notes.txt",
                "long/".repeat(30)
            ),
            format!("tar -Sc --label=v --transform='s,^n,dir/,' {members} notes.txt"),
            format!("tar -Sc --pax-option=comment=x --format=posix {members}"),
            format!("tar -Sc --pax-option=globexthdr.name=g,comment=x --format=posix {members}"),
            // 512 KiB of padding.
            format!("tar -Sc -b 1024 {members}"),
        ] {
            taken(&shell(dir.path(), &format!("{command} | zstd -qc")), &disk);
        }
    }
}

#[test]
fn what_gnu_tar_writes_and_nobody_should_pack() {
    let dir = folder(&disk());
    for (rule, command) in [
        (Rule::MemberPath, "tar -Sc ."),
        (
            Rule::MemberPath,
            "tar -Sc ./disk.img ./layer.qcow2 ./machine.json",
        ),
        (Rule::MissingMember, "tar -Sc disk.img machine.json"),
        (
            Rule::SparseVersion,
            "tar -Sc --format=posix --sparse-version=0.0 disk.img layer.qcow2 machine.json",
        ),
        (
            Rule::MemberKind,
            "ln -s /etc/passwd x && mv -T x disk.img && tar -Sc disk.img layer.qcow2 machine.json",
        ),
    ] {
        let archive = shell(dir.path(), &format!("({command}) | zstd -qc"));
        assert_eq!(
            Rule::of(&refused(&archive, &budgets())),
            Some(rule),
            "{command}"
        );
    }
}

#[test]
fn all_that_the_zstd_program_writes() {
    let dir = folder(&disk());
    shell(dir.path(), "tar -Scf t disk.img layer.qcow2 machine.json");
    for command in [
        "zstd -3 -qc t",
        "zstd -qc --no-check t",
        "zstd -qc -T2 --long=27 < t",
        "zstd -qc -19 < t",
        "zstd -qc --fast < t",
        "split -b 50000 t piece. && for piece in piece.*; do zstd -qc $piece; done",
    ] {
        taken(&shell(dir.path(), command), &disk());
    }
    for (rule, command) in [
        // Without the size in its header the window is what it says.
        (Rule::ZstdWindow, "zstd -qc --long=28 < t"),
        (Rule::ZstdWindow, "zstd -qc --ultra --long=31 < t"),
        (Rule::NotZstd, "gzip -c t"),
        (Rule::NotZstd, "xz -c t"),
        (Rule::NotZstd, "cat t"),
        (Rule::ZstdTrailing, "zstd -qc t; echo garbage behind it"),
        (
            Rule::ZstdDamaged,
            "echo x > d; cat t t t t t t t t > many; zstd -qc -D many < t",
        ),
    ] {
        let archive = shell(dir.path(), command);
        assert_eq!(
            Rule::of(&refused(&archive, &budgets())),
            Some(rule),
            "{command}"
        );
    }
}

/// Both demonstrated: the ancestor took a disk with a flipped bit if the tar's padding was long, or if the frame had no
/// checksum.
#[test]
fn a_flipped_bit_in_the_middle_of_the_disk() {
    let mut noise = vec![0; 2 << 20];
    let mut state = 1_u64;
    for byte in &mut noise {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    noise.resize(3 << 20, 0);
    let dir = folder(&noise);
    let members = "disk.img layer.qcow2 machine.json";
    let mut archive = shell(dir.path(), &format!("tar -Sc -b 1024 {members} | zstd -qc"));
    let middle = archive.len() / 2;
    archive[middle] ^= 1;
    assert_eq!(
        Rule::of(&refused(&archive, &budgets())),
        Some(Rule::ZstdDamaged)
    );
    // Without a checksum nobody can tell, but the archive's digest is another one, by which the store knows images.
    let mut archive = shell(
        dir.path(),
        &format!("tar -Sc {members} | zstd -qc --no-check"),
    );
    let whole = taken(&archive, &noise);
    archive[middle] ^= 1;
    let (_dir, got) = super::try_it(&archive, &budgets());
    assert!(
        got.is_err() || got.is_ok_and(|got| got.archive != whole.archive && got.disk != whole.disk)
    );
}

#[test]
fn the_programs_take_what_we_take() {
    // What the tests' own tars are worth: GNU tar unpacks the same disk of them.
    let dir = tempfile::tempdir().unwrap();
    let mut child = Command::new("sh")
        .args(["-ec", "zstd -dqc | tar -xS"])
        .current_dir(dir.path())
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let archive = super::zst(&super::good().end());
    child.stdin.take().unwrap().write_all(&archive).unwrap();
    assert!(child.wait().unwrap().success());
    assert!(std::fs::read(dir.path().join("disk.img")).unwrap() == disk());
}
