//! A running machine's disk: how large it is, how it grows, and how a new layer is put on top of it.
//!
//! The top node is called `disk` at the start, and `disk1`, `disk2`, … after each snapshot. Which one
//! it is now is asked of QEMU, so it is the same for a daemon that adopted the machine.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use pileus_base::{Code, Error, Result, ResultExt, Size};
use pileus_qmp::commands::{
    AddFd, BlockResize, BlockdevAdd, BlockdevDel, BlockdevSnapshot, FdSet, QomGet, QueryBlock,
    QueryFdsets, RemoveFd,
};
use serde_json::{Value, json};

use super::vm::{FLUSH_BOUND, Vm, object};

/// The device whose disk is meant, as `argv.rs` names it.
const DEVICE: &str = "/machine/peripheral/vda";
const FIRST: &str = "disk";

/// The node that the guest reads and writes.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Top {
    node: String,
    size: u64,
}

impl Vm {
    /// The disk's size as the guest sees it.
    pub async fn disk_size(&self) -> Result<Size> {
        Ok(Size(self.top().await?.size))
    }

    /// Grows the disk; the guest is told. It never shrinks.
    pub async fn resize_disk(&self, bytes: u64) -> Result<()> {
        let top = self.top().await?;
        if bytes < top.size {
            let (now, wanted) = (Size(top.size), Size(bytes));
            let what = format!("The disk has {now} and can't shrink to {wanted}");
            return Err(Error::new(Code::DiskTooSmall, what));
        }
        let resize = BlockResize {
            node_name: top.node,
            size: bytes,
        };
        self.client().run(&resize).await?;
        Ok(())
    }

    /// Puts a new layer on top: an empty qcow2 file of the disk's `size`, which takes all writes from
    /// now on. The former top is not written again and can be the base of others. The machine may
    /// run; for a state that can be restored on it, halt it first.
    ///
    /// QEMU is asked nothing about its nodes meanwhile: with a hundred layers each such answer takes it
    /// most of a second, in which the guest stands still.
    pub async fn snapshot_disk(&self, layer: &Path, size: Size) -> Result<()> {
        // QEMU would let the guest see a disk of another size.
        let new = size_of_qcow2(layer)?;
        if new != size {
            let (new, size) = (new.bytes(), size.bytes());
            return Err(Error::internal(format!(
                "The new layer has {new} bytes where the disk has {size}"
            )));
        }
        let top = self.top_node().await?;
        let name = name_after(&top)?;
        let set = self.lend_layer(layer, &name).await?;
        let snapshot = async {
            self.add_layer(&name, set).await?;
            let put = BlockdevSnapshot {
                node: top.clone(),
                overlay: name.clone(),
            };
            let done = self.client().run_within(&put, FLUSH_BOUND).await;
            if done.is_err() {
                let node_name = name.clone();
                let _ = self.client().run(&BlockdevDel { node_name }).await;
            }
            done?;
            Ok(())
        };
        let snapshot: Result<()> = snapshot.await;
        // What is needed no more: the new layer, or what the former top could be written with.
        let needless = match &snapshot {
            Ok(()) => self.set_of(&top).await,
            Err(_) => Some(set),
        };
        if let Some(fdset_id) = needless {
            let _ = self.client().run(&RemoveFd { fdset_id }).await;
        }
        snapshot
    }

    /// The descriptors that a node's file was opened from: they carry its name.
    async fn set_of(&self, node: &str) -> Option<u32> {
        let sets = self.client().run(&QueryFdsets {}).await.ok()?;
        let ours = |set: &&FdSet| set.fds.iter().any(|fd| fd.opaque.as_deref() == Some(node));
        let found = sets.iter().find(ours).map(|set| set.fdset_id);
        if found.is_none() {
            tracing::warn!(node, "QEMU keeps what a frozen layer could be written with");
        }
        found
    }

    /// How many layers were put on top since the machine was started.
    pub async fn layers_added(&self) -> Result<u32> {
        number_of(&self.top_node().await?)
    }

    /// The name of the node that the guest reads and writes; quick, however many layers there are.
    async fn top_node(&self) -> Result<String> {
        let get = QomGet {
            path: DEVICE.to_owned(),
            property: "drive".to_owned(),
        };
        match self.client().run(&get).await? {
            Value::String(node) => Ok(node),
            _ => Err(Error::new(
                Code::QemuFailed,
                "QEMU does not say what the machine's disk is",
            )),
        }
    }

    async fn top(&self) -> Result<Top> {
        let blocks = self.client().run(&QueryBlock {}).await?;
        parse_top(&blocks).ok_or_else(|| {
            Error::new(
                Code::QemuFailed,
                "QEMU does not say what the machine's disk is",
            )
        })
    }

    /// Both ways, because the next snapshot makes QEMU open it again, for reading only.
    async fn lend_layer(&self, layer: &Path, node: &str) -> Result<u32> {
        let open = |options: &OpenOptions| {
            let file = options.open(layer);
            file.io(format_args!("Opening {}", layer.display()))
        };
        let write: File = open(OpenOptions::new().read(true).write(true))?;
        let read: File = open(OpenOptions::new().read(true))?;
        let mut add = AddFd {
            fdset_id: None,
            opaque: Some(node.to_owned()),
        };
        let set = self.client().run_with_fd(&add, write.into()).await?;
        add.fdset_id = Some(set.fdset_id);
        self.client().run_with_fd(&add, read.into()).await?;
        Ok(set.fdset_id)
    }

    async fn add_layer(&self, name: &str, set: u32) -> Result<()> {
        let properties = json!({
            "file": {
                "driver": "file",
                "node-name": format!("{name}-file"),
                "filename": format!("/dev/fdset/{set}"),
                "discard": "unmap",
            },
            // What the file says about itself is not followed.
            "backing": null,
            "discard": "unmap",
            "detect-zeroes": "unmap",
        });
        let add = BlockdevAdd {
            driver: "qcow2".into(),
            node_name: name.to_owned(),
            properties: object(properties),
        };
        self.client().run(&add).await?;
        Ok(())
    }
}

/// The size that the header of a qcow2 file of ours tells.
fn size_of_qcow2(path: &Path) -> Result<Size> {
    let what = || format!("Reading {}", path.display());
    let mut head = [0; 32];
    let file = File::open(path).io(what())?;
    file.read_exact_at(&mut head, 0).io(what())?;
    let mut size = [0; 8];
    size.copy_from_slice(&head[24..]);
    match head.starts_with(b"QFI\xfb") {
        true => Ok(Size(u64::from_be_bytes(size))),
        false => Err(Error::internal(format!("{} is no layer", path.display()))),
    }
}

fn parse_top(blocks: &[Value]) -> Option<Top> {
    let ours = |block: &&Value| {
        let device = block.get("qdev").and_then(Value::as_str);
        device.is_some_and(|device| format!("{device}/").starts_with(&format!("{DEVICE}/")))
    };
    let inserted = blocks.iter().find(ours)?.get("inserted")?;
    Some(Top {
        node: inserted.get("node-name")?.as_str()?.to_owned(),
        size: inserted.pointer("/image/virtual-size")?.as_u64()?,
    })
}

fn number_of(top: &str) -> Result<u32> {
    let number = match top.strip_prefix(FIRST) {
        Some("") => Some(0),
        Some(number) => number.parse::<u32>().ok(),
        None => None,
    };
    number.ok_or_else(|| Error::internal(format!("The disk's top is called {top:?}")))
}

fn name_after(top: &str) -> Result<String> {
    Ok(format!("{FIRST}{}", u64::from(number_of(top)?) + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_counted() {
        for (top, next) in [("disk", "disk1"), ("disk1", "disk2"), ("disk9", "disk10")] {
            assert_eq!(name_after(top).unwrap(), next);
        }
        for odd in ["", "disks", "layer0", "disk-1", "disk4294967296"] {
            assert!(name_after(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn the_top_is_that_of_the_disk_and_not_of_the_seed() {
        let block = |device: &str, node: &str| {
            json!({
                "qdev": format!("/machine/peripheral/{device}/virtio-backend"),
                "inserted": {"node-name": node, "image": {"virtual-size": 1024}},
            })
        };
        let blocks = [json!({}), block("vdb", "seed"), block("vda", "disk2")];
        let top = parse_top(&blocks).unwrap();
        assert_eq!((top.node.as_str(), top.size), ("disk2", 1024));
        assert_eq!(parse_top(&blocks[..2]), None);
    }
}
