//! No `template.json` may make its parser panic; what it takes can be written and read again, and names a
//! template by sixteen digits.
#![no_main]

#[path = "../../instances/src/qemu/hardware.rs"]
#[allow(dead_code)]
mod hardware;
#[path = "../../instances/src/qemu/spec.rs"]
#[allow(dead_code)]
mod spec;
#[path = "../../instances/src/template.rs"]
#[allow(dead_code)]
mod template;

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use template::{Folder, Manifest};

mod qemu {
    use std::path::PathBuf;

    pub(crate) use crate::spec;
    pub use crate::spec::{Accelerator, Growth};

    pub struct Qemu {
        pub program: PathBuf,
        pub build: String,
        pub machine_type: String,
    }

    pub mod argv {
        pub const LAYOUT: u32 = 1;
    }

    pub mod loan {
        pub(crate) fn is_lent(_: &std::fs::Metadata) -> bool {
            false
        }
    }
}

mod guest {
    pub mod seed {
        pub fn agent_digest() -> String {
            String::new()
        }
    }
}

/// One folder a process, on a tmpfs where there is one.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let name = format!("pileus-fuzz-manifest-{}", std::process::id());
    let shm = PathBuf::from("/dev/shm");
    let folder = if shm.is_dir() {
        shm
    } else {
        std::env::temp_dir()
    }
    .join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
});

fuzz_target!(|bytes: &[u8]| {
    let path = FOLDER.join("template.json");
    std::fs::write(&path, bytes).unwrap();
    let Ok((folder, manifest)) = Folder::read(&*FOLDER) else {
        return;
    };
    let id = manifest.key.id();
    assert!(id.len() == 16 && id.bytes().all(|b| b.is_ascii_hexdigit()));
    // Whatever it says of its files: they are not those that were saved.
    assert!(folder.open_checked(&manifest.key).is_err());
    std::fs::write(&path, serde_json::to_vec(&manifest).unwrap()).unwrap();
    assert_eq!(Manifest::read(&path).unwrap(), manifest);
});
