//! Tests of `template.rs`: a template that was touched in any way is refused, each in words of its own.

use std::io::Write;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::time::{Duration, SystemTime};

use super::*;

const LENGTH: u64 = 32 << 20;

fn qemu() -> Qemu {
    Qemu {
        program: "/bin/sh".into(),
        version: (10, 0, 2),
        build: "QEMU emulator version 10.0.2".into(),
        machine_type: "pc-q35-10.0".into(),
    }
}

fn key() -> TemplateKey {
    let image = digest(b"image");
    let (memory, disk) = (Size::mib(32), Size::gib(5));
    TemplateKey::new(
        image,
        Shape { cpus: 2, memory },
        disk,
        &qemu(),
        Accelerator::Tcg,
        Growth::default(),
    )
}

fn make_file(path: &Path, bytes: &[u8], length: u64) -> File {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(length).unwrap();
    file
}

struct Made {
    folder: Folder,
    root: tempfile::TempDir,
}

impl Made {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(key().id());
        std::fs::create_dir(&path).unwrap();
        let folder = Folder::new(&path, path.join("ram"), path.join("disk.qcow2"));
        make_file(&folder.disk(), b"layer", 5);
        make_file(&folder.state(), b"devices", 7);
        make_file(&folder.ram(), b"memory", LENGTH);
        folder.finish(&key(), "2026-11-22T00:00:00Z").unwrap();
        Self { folder, root }
    }

    fn refused(&self) -> String {
        let err = self.folder.open_checked(&key()).unwrap_err();
        assert_eq!(err.code, Code::NoTemplate, "{err:?}");
        err.message
    }

    /// Changes the text of the manifest.
    fn edit(&self, from: &str, to: &str) {
        let text = std::fs::read_to_string(self.folder.manifest_path()).unwrap();
        assert!(text.contains(from), "{text}");
        std::fs::write(self.folder.manifest_path(), text.replacen(from, to, 1)).unwrap();
    }
}

#[test]
fn an_untouched_template_is_ready_again_and_again() {
    let made = Made::new();
    for _ in 0..2 {
        let mut ready = made.folder.open_checked(&key()).unwrap();
        let mut state = String::new();
        ready.state.read_to_string(&mut state).unwrap();
        assert_eq!(state, "devices");
        assert_eq!(ready.manifest.key.id(), key().id());
        assert_eq!(ready.manifest, made.folder.manifest().unwrap());
    }
    let mode = std::fs::metadata(made.folder.manifest_path()).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    // The memory is sparse: 32 MiB of length take a few blocks.
    let used = made.folder.used_bytes();
    assert!(used > 0 && used < 1 << 20, "{used}");
}

#[test]
fn each_part_of_the_key_changes_the_id() {
    let id = key().id();
    assert!(id.len() == 16 && id.bytes().all(|b| b.is_ascii_hexdigit()));
    assert_eq!(id, key().id());
    let changes: [fn(&mut TemplateKey); 13] = [
        |k| k.image = digest(b"other"),
        |k| k.cpus = 1,
        |k| k.memory = Size::gib(1),
        |k| k.disk = Size::gib(6),
        |k| k.machine_type = "pc-q35-9.2".into(),
        |k| k.accelerator = Accelerator::Kvm,
        |k| k.qemu.build.push('x'),
        |k| k.qemu.size += 1,
        |k| k.qemu.modified.seconds += 1,
        |k| k.qemu.modified.nanoseconds += 1,
        |k| k.cpu = "host:0".into(),
        |k| k.layout += 1,
        |k| k.agent = digest(b"other"),
    ];
    let mut seen = std::collections::HashSet::from([id]);
    for (n, change) in changes.iter().enumerate() {
        let mut other = key();
        change(&mut other);
        assert!(seen.insert(other.id()), "change {n} is not seen");
    }
}

#[test]
fn another_processor_is_another_key_and_another_moment_is_not() {
    let cpu = |model: &str, mhz: &str, flags: &str| {
        cpu_digest(&format!(
            "processor\t: 0\nmodel name\t: {model}\ncpu MHz\t\t: {mhz}\nflags\t\t: {flags}\n\nflags : y\n"
        ))
    };
    let one = cpu("A", "1000.0", "fpu vmx");
    assert_eq!(one, cpu("A", "2400.0", "fpu vmx"));
    assert_ne!(one, cpu("B", "1000.0", "fpu vmx"));
    assert_ne!(one, cpu("A", "1000.0", "fpu"));
    assert_eq!(cpu_model(Accelerator::Tcg), "max");
    assert!(cpu_model(Accelerator::Kvm).starts_with("host:"));
}

#[test]
fn a_template_for_another_key() {
    let made = Made::new();
    let mut other = key();
    other.cpus = 4;
    let err = made.folder.open_checked(&other).unwrap_err();
    assert_eq!(err.code, Code::NoTemplate);
    assert!(err.message.contains("another image, shape or host"));
}

#[test]
fn a_state_that_was_changed() {
    let made = Made::new();
    let state = File::options().write(true).open(made.folder.state());
    state.unwrap().write_all_at(b"D", 0).unwrap();
    assert_eq!(made.refused(), "The template's state is not what was saved");
}

#[test]
fn a_state_that_was_cut() {
    let made = Made::new();
    let state = File::options().write(true).open(made.folder.state());
    let state = state.unwrap();
    state.set_len(3).unwrap();
    assert!(made.refused().contains("state has another length"));
    state.set_len(0).unwrap();
    assert!(made.refused().contains("state is empty"));
}

#[test]
fn a_memory_that_was_cut() {
    let made = Made::new();
    let ram = File::options().write(true).open(made.folder.ram()).unwrap();
    ram.set_len(LENGTH - 4096).unwrap();
    assert!(made.refused().contains("memory has another length"));
}

#[test]
fn a_memory_that_was_written() {
    let made = Made::new();
    let ram = File::options().write(true).open(made.folder.ram()).unwrap();
    ram.write_all_at(b"x", 1 << 20).unwrap();
    // File systems count time in ticks; both writes may fall into one.
    let later = SystemTime::now() + Duration::from_millis(20);
    ram.set_modified(later).unwrap();
    assert!(made.refused().contains("memory was written to"));
}

#[test]
fn a_memory_that_was_replaced() {
    let made = Made::new();
    let old = made.root.path().join("old");
    std::fs::rename(made.folder.ram(), &old).unwrap();
    let modified = old.metadata().unwrap().modified().unwrap();
    let other = make_file(&made.folder.ram(), b"memory", LENGTH);
    other.set_modified(modified).unwrap();
    assert!(made.refused().contains("memory was replaced"));
}

#[test]
fn a_memory_that_is_gone_a_link_or_a_folder() {
    let made = Made::new();
    let old = made.root.path().join("old");
    std::fs::rename(made.folder.ram(), &old).unwrap();
    assert!(made.refused().contains("memory is not there"));
    std::os::unix::fs::symlink(&old, made.folder.ram()).unwrap();
    assert!(made.refused().contains("memory is a link"));
    std::fs::remove_file(made.folder.ram()).unwrap();
    std::fs::create_dir(made.folder.ram()).unwrap();
    assert!(made.refused().contains("memory is no plain file"));
}

#[test]
fn a_memory_that_others_can_reach() {
    let made = Made::new();
    std::fs::set_permissions(made.folder.ram(), PermissionsExt::from_mode(0o640)).unwrap();
    assert!(made.refused().contains("memory has the mode 640"));
    std::fs::set_permissions(made.folder.ram(), PermissionsExt::from_mode(0o600)).unwrap();
    made.folder.open_checked(&key()).unwrap();
    std::fs::hard_link(made.folder.ram(), made.root.path().join("second")).unwrap();
    assert!(made.refused().contains("memory has a second name"));
}

#[tokio::test]
async fn a_memory_of_another_user_unless_it_is_lent() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: a_memory_of_another_user: only root can give files away");
        return;
    }
    let made = Made::new();
    let ram = made.folder.ram();
    let loan = loan::Loan::take(&ram, 0x7000_0001).await.unwrap();
    made.folder.open_checked(&key()).unwrap();
    drop(loan);
    made.folder.open_checked(&key()).unwrap();
    std::os::unix::fs::chown(&ram, Some(0x7000_0001), None).unwrap();
    assert!(made.refused().contains("memory belongs to another user"));
    assert!(loan::take_back(&ram).await.unwrap());
    made.folder.open_checked(&key()).unwrap();
}

#[test]
fn a_disk_that_is_gone_or_grew() {
    let made = Made::new();
    let disk = File::options().write(true).open(made.folder.disk());
    disk.unwrap().set_len(6).unwrap();
    assert!(made.refused().contains("disk has another length"));
    std::fs::remove_file(made.folder.disk()).unwrap();
    assert!(made.refused().contains("disk is not there"));
}

#[test]
fn a_manifest_that_is_missing_damaged_or_of_another_time() {
    let made = Made::new();
    made.edit("\"format\": 1", "\"format\": 2");
    assert!(made.refused().contains("format 2"));
    made.edit("\"format\": 2", "\"format\": 1, \"more\": 1");
    assert!(made.refused().contains("damaged"));
    std::fs::write(made.folder.manifest_path(), vec![b' '; 65 << 10]).unwrap();
    assert!(made.refused().contains("larger than"));
    std::fs::remove_file(made.folder.manifest_path()).unwrap();
    assert!(made.refused().contains("can't be read"));
}

#[test]
fn a_manifest_that_names_other_files() {
    let made = Made::new();
    let other = made.root.path().join("ram");
    std::fs::copy(made.folder.ram(), other).unwrap();
    made.edit(&format!("{}/ram", key().id()), "ram");
    assert!(made.refused().contains("moved to another folder"));
}

#[test]
fn a_template_whose_memory_lies_elsewhere() {
    let made = Made::new();
    let elsewhere = made.root.path().join("other.ram");
    std::fs::rename(made.folder.ram(), &elsewhere).unwrap();
    let folder = Folder::new(made.folder.path(), &elsewhere, made.folder.disk());
    let manifest = folder.finish(&key(), "now").unwrap();
    assert_eq!(manifest.ram.path, elsewhere);
    folder.open_checked(&key()).unwrap();
}

#[test]
fn what_was_not_saved_whole_is_not_finished() {
    let made = Made::new();
    let ram = File::options().write(true).open(made.folder.ram()).unwrap();
    ram.set_len(LENGTH / 2).unwrap();
    let err = made.folder.finish(&key(), "now").unwrap_err();
    assert!(err.message.contains("memory has another length"), "{err}");
    std::fs::remove_file(made.folder.state()).unwrap();
    let err = made.folder.finish(&key(), "now").unwrap_err();
    assert!(err.message.contains("state is not there"), "{err}");
}
