//! Looks at the host: the one place where the facts for `checks.rs` come from.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use pileus_base::{Layout, Result, Size, files};
use pileus_instances::qemu::host::{KvmFacts, choose};

use super::checks::{Facts, tools};
use crate::service::{Mode, Service, blocking, describe};

/// Where the system's programs are, whatever the daemon's PATH says.
const SYSTEM_FOLDERS: [&str; 4] = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"];

impl Service {
    /// Takes some tens of milliseconds.
    pub(super) async fn facts(&self) -> Result<Facts> {
        let parts = &self.parts;
        let qemu = parts.hypervisor.get().await;
        let qemu = qemu.map(|host| describe(&host).version);
        let mut network = parts.network.health().await;
        let (system, full_uid_map) = match &parts.mode {
            Mode::System => (true, true),
            Mode::User(entered) => {
                network.extend(entered.health());
                (false, entered.full_uid_map)
            }
        };
        let broken = parts.broken.iter();
        let broken = broken
            .map(|row| (row.name.clone(), row.why.clone()))
            .collect();
        let (layout, search) = (parts.layout.clone(), parts.hypervisor.search.clone());
        let choice = parts.hypervisor.choice;
        let look = move || {
            let kvm = KvmFacts::of_host();
            let mut missing = tools(system);
            missing.retain(|tool| !is_there(tool.program, &search));
            let (memory, memory_available) = memory();
            Ok(Facts {
                system,
                accelerator: choose(choice, &kvm),
                kvm,
                qemu,
                missing,
                network,
                space: space(&layout),
                memory,
                memory_available,
                tun: pileus_networks::host::check_tun(),
                socket_group: socket_group(&layout.socket()),
                full_uid_map,
                broken,
            })
        };
        blocking(look).await
    }
}

fn is_there(program: &str, search: &OsStr) -> bool {
    let folders = std::env::split_paths(search).filter(|folder| folder.is_absolute());
    folders
        .chain(SYSTEM_FOLDERS.iter().map(PathBuf::from))
        .any(|folder| folder.join(program).is_file())
}

fn space(layout: &Layout) -> Vec<(PathBuf, Size)> {
    [&layout.data, &layout.cache]
        .into_iter()
        .filter_map(|path| Some((path.clone(), Size(files::free_space(path).ok()?))))
        .collect()
}

/// Total and available.
fn memory() -> (Size, Size) {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let value = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
        Some(Size(kib.saturating_mul(1024)))
    };
    let of = |name| value(name).unwrap_or(Size(0));
    (of("MemTotal:"), of("MemAvailable:"))
}

/// Whether members of a group may connect; nothing if the daemon listens elsewhere.
fn socket_group(path: &Path) -> Option<bool> {
    let found = std::fs::symlink_metadata(path).ok()?;
    Some(found.gid() != 0 && found.mode() & 0o020 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host() {
        let (total, available) = memory();
        assert!(total > available && available > Size::mib(1));
        assert!(is_there("sh", OsStr::new("")));
        assert!(!is_there(
            "no-such-program",
            OsStr::new("/usr/bin:relative")
        ));
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(socket_group(&dir.path().join("none")), None);
        let layout = Layout::below(dir.path(), 0);
        assert!(space(&layout).is_empty());
        std::fs::create_dir_all(&layout.data).unwrap();
        assert_eq!(space(&layout).len(), 1);
    }
}
