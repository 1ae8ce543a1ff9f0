//! No bytes may make the reader of archives panic, or write more than it may; nor may any make the parser of manifests
//! panic, and what that takes can be written and read again.
//!
//! The first byte chooses: a manifest, a tar, or a tar within zstd.
#![no_main]

#[path = "../../images/src/archive/extents.rs"]
#[allow(dead_code)]
mod extents;
#[path = "../../daemon/src/service/archive_manifest.rs"]
#[allow(dead_code)]
mod manifest;
#[path = "../../instances/src/qemu/hardware.rs"]
#[allow(dead_code)]
mod hardware;
#[path = "../../images/src/archive/member.rs"]
#[allow(dead_code)]
mod member;
#[path = "../../images/src/archive/parts.rs"]
#[allow(dead_code)]
mod parts;
#[path = "../../images/src/archive/read.rs"]
#[allow(dead_code)]
mod read;
#[path = "../../instances/src/qemu/spec.rs"]
#[allow(dead_code)]
mod spec;
#[path = "../../images/src/sparse.rs"]
#[allow(dead_code)]
mod sparse;

// The manifest's file names its errors by their place in the image store.
extern crate self as pileus_images;
extern crate self as pileus_instances;
pub mod qemu {
    pub use crate::hardware::Hardware;
}
pub mod archive {
    pub mod read {
        pub use crate::read::bad;
    }
}

use std::fs::File;
use std::io::Read;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use manifest::Manifest;
use read::{Input, Reader};

const BUDGET: u64 = 1 << 20;

/// One file a process, in memory.
static FILE: LazyLock<File> = LazyLock::new(|| {
    let name = format!("/dev/shm/pileus-fuzz-archive-{}", std::process::id());
    let mut options = File::options();
    let file = options
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&name);
    let file = file.unwrap();
    std::fs::remove_file(name).unwrap();
    file
});

fuzz_target!(|bytes: &[u8]| {
    let Some((kind, bytes)) = bytes.split_first() else {
        return;
    };
    match kind % 3 {
        0 => parse(bytes),
        1 => walk(Reader::new(bytes, BUDGET)),
        _ => {
            if let Ok(input) = Input::new(bytes) {
                walk(Reader::new(input, BUDGET));
            }
        }
    }
});

fn parse(bytes: &[u8]) {
    let Ok(manifest) = Manifest::read(bytes) else {
        return;
    };
    let again = Manifest::read(&manifest.write().unwrap()).unwrap();
    assert_eq!(again, manifest);
    for (n, _) in manifest.layers.iter().enumerate() {
        let chain = manifest.chain(n as u32);
        assert!(chain.len() <= 200 && chain.is_sorted());
        assert_eq!(manifest.layers[chain[0] as usize].below, None);
    }
    assert!(manifest.parts().len() < 1010);
}

fn walk<R: Read>(mut reader: Reader<R>) {
    let mut still = |_| Ok(());
    let mut stored = 0;
    while let Ok(Some(member)) = reader.next_member() {
        let sum: u64 = member.extents.iter().map(|extent| extent.len).sum();
        assert_eq!(sum, member.stored);
        assert!(
            member
                .extents
                .last()
                .is_none_or(|last| last.end() <= member.size)
        );
        assert!(!member.name.contains(['\0', '\n', ' ']));
        FILE.set_len(0).unwrap();
        // A size that no file system has is an error of the host, not a defect.
        let to = FILE.try_clone().unwrap();
        if member.size > 1 << 40 || reader.extract(&member, to, &mut still).is_err() {
            return;
        }
        stored += member.stored;
        assert!(stored <= BUDGET);
        assert_eq!(FILE.metadata().unwrap().len(), member.size);
    }
}
