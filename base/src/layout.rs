//! Where everything lies on the host. Three roots (data, cache, run), each a plain folder that a
//! person can understand:
//!
//! ```text
//! data/   pileus.db          the state (SQLite)
//!         lock               held by the one daemon of this storage
//!         instances/ID/      disk.qcow2, seed.iso, console.log, user-data, keys
//!         images/            the image store (see images/src/store.rs)
//!         templates/ID/      saved machines that launches start from (docs/decisions/0010)
//!         layers/ID.qcow2    disks that were frozen, shared by the instances that stand on them
//! cache/                     what can be fetched again: downloads, package lists
//! run/    pileusd.sock       the API
//!         i/ID8/             QMP, agent, SSH and console sockets of a running instance
//!         net/               dnsmasq's files, the user-mode namespace's holder
//! memory/                    a folder of ours on a tmpfs: disks and memories that may be lost with a
//!                            restart of the host
//! ```

use std::path::{Path, PathBuf};

/// Unix socket paths have room for 107 bytes; longest name below `run/` is `i/XXXXXXXX/console.sock`.
const MAX_RUN_PATH: usize = 75;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    pub data: PathBuf,
    pub cache: PathBuf,
    pub run: PathBuf,
    /// On the host's tmpfs; made when it is first used.
    pub memory: PathBuf,
}

/// What the environment says about a user's folders; read in `main`, passed in here.
#[derive(Debug, Clone, Default)]
pub struct UserFolders {
    pub home: Option<PathBuf>,
    pub data_home: Option<PathBuf>,
    pub cache_home: Option<PathBuf>,
    pub runtime_dir: Option<PathBuf>,
    pub uid: u32,
}

impl Layout {
    /// All below one folder: `--storage DIR`.
    pub fn below(dir: &Path, uid: u32) -> Self {
        let run = dir.join("run");
        let run = if run.as_os_str().len() > MAX_RUN_PATH {
            short_run(dir, uid)
        } else {
            run
        };
        let data = dir.join("data");
        Self {
            memory: memory(&data, uid),
            data,
            cache: dir.join("cache"),
            run,
        }
    }

    /// The folders of the system's daemon.
    pub fn system() -> Self {
        let data = PathBuf::from("/var/lib/pileus");
        Self {
            memory: memory(&data, 0),
            data,
            cache: "/var/cache/pileus".into(),
            run: "/run/pileus".into(),
        }
    }

    /// The XDG folders of a user's own daemon.
    pub fn user(folders: &UserFolders) -> Self {
        let home = folders.home.clone().unwrap_or_else(|| "/tmp".into());
        let data = folders
            .data_home
            .clone()
            .unwrap_or_else(|| home.join(".local/share"));
        let cache = folders
            .cache_home
            .clone()
            .unwrap_or_else(|| home.join(".cache"));
        let data = data.join("pileus");
        let run = match &folders.runtime_dir {
            Some(dir) if dir.as_os_str().len() + 7 <= MAX_RUN_PATH => dir.join("pileus"),
            _ => short_run(&data, folders.uid),
        };
        Self {
            memory: memory(&data, folders.uid),
            data,
            cache: cache.join("pileus"),
            run,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.run.join("pileusd.sock")
    }

    pub fn database(&self) -> PathBuf {
        self.data.join("pileus.db")
    }

    pub fn lock(&self) -> PathBuf {
        self.data.join("lock")
    }

    pub fn images(&self) -> PathBuf {
        self.data.join("images")
    }

    pub fn instances(&self) -> PathBuf {
        self.data.join("instances")
    }

    pub fn instance(&self, id: uuid::Uuid) -> PathBuf {
        self.instances().join(id.to_string())
    }

    pub fn templates(&self) -> PathBuf {
        self.data.join("templates")
    }

    pub fn layers(&self) -> PathBuf {
        self.data.join("layers")
    }

    pub fn layer(&self, id: uuid::Uuid) -> PathBuf {
        self.layers().join(format!("{id}.qcow2"))
    }

    /// Folder of a running instance's sockets; short, because socket paths are.
    pub fn instance_run(&self, id: uuid::Uuid) -> PathBuf {
        let text = id.simple().to_string();
        self.run.join("i").join(&text[..8])
    }

    pub fn network_run(&self) -> PathBuf {
        self.run.join("net")
    }
}

/// A short folder for a storage whose own path is too long, the same one at each start.
fn short_run(dir: &Path, uid: u32) -> PathBuf {
    Path::new("/tmp").join(own_name(dir, uid))
}

/// A storage's folder on the tmpfs that every Linux has.
fn memory(data: &Path, uid: u32) -> PathBuf {
    Path::new("/dev/shm").join(own_name(data, uid))
}

/// A name for a folder beside those of others.
fn own_name(dir: &Path, uid: u32) -> String {
    // FNV-1a: only has to be stable and spread; the daemon refuses a folder that it doesn't own.
    let hash = dir
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("pileus-{uid}-{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn socket_paths_stay_short_whatever_the_storage_is() {
        let long = PathBuf::from(format!("/{}", "x".repeat(300)));
        let layout = Layout::below(&long, 1000);
        let longest = layout.instance_run(uuid::Uuid::nil()).join("console.sock");
        assert!(longest.as_os_str().len() < 100, "{}", longest.display());
        assert_ne!(layout.run, Layout::below(&long.join("y"), 1000).run);
        assert_eq!(
            Layout::below(Path::new("/srv/p"), 0).socket(),
            PathBuf::from("/srv/p/run/pileusd.sock")
        );
    }

    #[test]
    fn xdg_folders_win_over_home() {
        let folders = UserFolders {
            home: Some("/home/u".into()),
            cache_home: Some("/c".into()),
            runtime_dir: Some("/run/user/1000".into()),
            uid: 1000,
            ..Default::default()
        };
        let layout = Layout::user(&folders);
        assert_eq!(layout.data, PathBuf::from("/home/u/.local/share/pileus"));
        assert_eq!(layout.cache, PathBuf::from("/c/pileus"));
        assert_eq!(layout.run, PathBuf::from("/run/user/1000/pileus"));
    }
}
