//! The machine's disk: nodes as the arguments and commands describe them, sizes from the files' own headers,
//! and what the guest wrote. That is a mark for each boot, each resume and each identity: so a test can see which
//! layers a guest really stands on, and a machine that goes on from memory notices that its disk is another one's.
//! Marks lie behind the end of the top layer; with the word `data` each is in a cluster of the guest's own.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::{option, part, qcow2};

/// Bytes of a mark on the disk.
const MARK: usize = 64;
const MAGIC: &[u8] = b"MARK ";
/// The guest's cluster with the first mark: behind what images have.
const FIRST_MARK: u64 = 4096;
const MOST_MARKS: u64 = 4096;
/// Where a qcow2 header has the disk's size.
const SIZE_AT: u64 = 24;
const FIRST_SET: u32 = 1000;

struct Node {
    file: Arc<File>,
    set: u32,
    qcow2: bool,
    backing: Option<String>,
}

pub struct Disk {
    /// Files by set, as QEMU keeps them.
    sets: BTreeMap<u32, Vec<Arc<File>>>,
    nodes: BTreeMap<String, Node>,
    top: String,
    /// What the guest wrote, all layers together.
    marks: Vec<String>,
    /// Whether what it writes is data.
    pub data: bool,
}

impl Disk {
    pub fn new(args: &[String]) -> Self {
        let mut disk = Self {
            sets: BTreeMap::new(),
            nodes: BTreeMap::new(),
            top: "disk".into(),
            marks: Vec::new(),
            data: false,
        };
        for added in option(args, "-add-fd") {
            let number = |key| part(added, key).and_then(|n| n.parse::<u32>().ok());
            if let (Some(fd), Some(set)) = (number("fd"), number("set")) {
                // SAFETY: the number was handed over for just this, and is used once.
                let file = unsafe { File::from_raw_fd(fd as RawFd) };
                disk.sets.entry(set).or_default().push(Arc::new(file));
            }
        }
        let mut files = BTreeMap::new();
        for node in option(args, "-blockdev") {
            let Some(name) = part(node, "node-name") else {
                continue;
            };
            let backing = part(node, "backing").map(str::to_owned);
            let qcow2 = part(node, "driver") == Some("qcow2");
            if let Some(file) = part(node, "filename") {
                files.insert(name, file);
            } else if let Some(file) = part(node, "file").and_then(|file| files.get(file)) {
                let _ = disk.open(name, file, qcow2, backing);
            } else if let Some(file) = part(node, "file.filename") {
                let _ = disk.open(name, file, qcow2, backing);
            }
        }
        disk.marks = disk.read_marks();
        disk
    }

    fn open(
        &mut self,
        name: &str,
        path: &str,
        qcow2: bool,
        backing: Option<String>,
    ) -> Result<(), String> {
        let set = set_of(path);
        let file = set.and_then(|set| self.sets.get(&set)?.first().cloned());
        let (Some(set), Some(file)) = (set, file) else {
            return Err(format!("Could not open '{path}'"));
        };
        let node = Node {
            file,
            set,
            qcow2,
            backing,
        };
        match self.nodes.contains_key(name) {
            true => Err(format!("Duplicate nodes with node-name='{name}'")),
            false => {
                self.nodes.insert(name.to_owned(), node);
                Ok(())
            }
        }
    }

    pub fn add_fd(&mut self, set: Option<u32>, file: File) -> u32 {
        let last = self.sets.keys().max().copied().unwrap_or_default();
        let set = set.unwrap_or_else(|| FIRST_SET.max(last + 1));
        self.sets.entry(set).or_default().push(Arc::new(file));
        set
    }

    pub fn remove_fd(&mut self, set: u32) -> Result<(), String> {
        // What a node has open stays open.
        match self.sets.remove(&set) {
            Some(_) => Ok(()),
            None => Err(format!("File descriptor named '{set}' not found")),
        }
    }

    /// The file behind a URI as `file:/dev/fdset/N`.
    pub fn lent(&self, uri: &str) -> Result<Arc<File>, String> {
        let file = set_of(uri).and_then(|set| self.sets.get(&set)?.first().cloned());
        file.ok_or_else(|| format!("Could not open '{uri}'"))
    }

    /// `blockdev-add` of a qcow2 node.
    pub fn add(&mut self, arguments: &Value) -> Result<Value, String> {
        let name = arguments["node-name"].as_str().unwrap_or_default();
        let path = arguments["file"]["filename"].as_str().unwrap_or_default();
        self.open(name, path, true, None)?;
        match self.size(name) {
            Some(_) => Ok(json!({})),
            None => {
                self.nodes.remove(name);
                Err("Image is not in qcow2 format".into())
            }
        }
    }

    pub fn delete(&mut self, name: &str) -> Result<Value, String> {
        let used = self
            .nodes
            .values()
            .any(|n| n.backing.as_deref() == Some(name));
        if used || name == self.top {
            return Err(format!("Node {name} is in use"));
        }
        self.nodes.remove(name);
        Ok(json!({}))
    }

    /// `blockdev-snapshot`.
    pub fn put_on_top(&mut self, arguments: &Value) -> Result<Value, String> {
        let below = arguments["node"].as_str().unwrap_or_default().to_owned();
        let above = arguments["overlay"].as_str().unwrap_or_default().to_owned();
        if below != self.top {
            return Err(format!("Node '{below}' is not the top"));
        }
        let node = self.nodes.get_mut(&above);
        let node = node.ok_or_else(|| format!("Cannot find device='' nor node-name='{above}'"))?;
        node.backing = Some(below);
        self.top = above;
        Ok(json!({}))
    }

    /// `block_resize`: says so from now on, and the file says so at the next start.
    pub fn resize(&mut self, arguments: &Value) -> Result<Value, String> {
        let name = arguments["node-name"].as_str().unwrap_or_default();
        let size = arguments["size"].as_u64().unwrap_or_default();
        let node = self.nodes.get(name).filter(|node| node.qcow2);
        let node = node.ok_or_else(|| format!("Cannot find device='' nor node-name='{name}'"))?;
        let written = node.file.write_all_at(&size.to_be_bytes(), SIZE_AT);
        written.map_err(|err| format!("Could not resize: {err}"))?;
        Ok(json!({}))
    }

    fn size(&self, name: &str) -> Option<u64> {
        let node = self.nodes.get(name)?;
        if !node.qcow2 {
            return node.file.metadata().ok().map(|meta| meta.len());
        }
        let mut header = [0; 32];
        node.file.read_exact_at(&mut header, 0).ok()?;
        let size = header[SIZE_AT as usize..].try_into().ok()?;
        header
            .starts_with(b"QFI\xfb")
            .then_some(u64::from_be_bytes(size))
    }

    /// `query-block`.
    pub fn devices(&self) -> Value {
        json!([{
            "qdev": "/machine/peripheral/vda/virtio-backend",
            "inserted": {
                "node-name": self.top,
                "image": {"virtual-size": self.size(&self.top)},
            },
        }])
    }

    /// `qom-get` of the disk's `drive`.
    pub fn top(&self) -> &str {
        &self.top
    }

    /// `query-fdsets`: each is called by the node that was opened from it.
    pub fn fdsets(&self) -> Value {
        let there = self.nodes.iter();
        let there = there.filter(|(_, node)| self.sets.contains_key(&node.set));
        there
            .map(|(name, node)| json!({"fdset-id": node.set, "fds": [{"fd": 9, "opaque": name}]}))
            .collect()
    }

    /// `query-named-block-nodes`.
    pub fn named(&self) -> Value {
        let all = self.nodes.iter().flat_map(|(name, node)| {
            let file = format!("/dev/fdset/{}", node.set);
            [
                json!({
                    "node-name": name, "file": file,
                    "image": {"virtual-size": self.size(name)},
                }),
                json!({"node-name": format!("{name}-file"), "file": file}),
            ]
        });
        all.collect()
    }

    /// The top, and what is below it.
    fn chain(&self) -> Vec<&Node> {
        let mut chain = Vec::new();
        let mut next = Some(&self.top);
        while let Some(node) = next.and_then(|name| self.nodes.get(name)) {
            chain.push(node);
            next = node.backing.as_ref();
        }
        chain
    }

    /// The files that the machine stands on, the lowest first.
    pub fn files(&self) -> String {
        let name = |node: &&Node| {
            let fd = std::os::fd::AsRawFd::as_raw_fd(&*node.file);
            let path = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap_or_default();
            let name = path.file_name().unwrap_or_default();
            name.to_string_lossy().into_owned()
        };
        let names: Vec<_> = self.chain().iter().rev().map(name).collect();
        names.join(" ")
    }

    /// What the guest wrote, the oldest first.
    pub fn marks(&self) -> &[String] {
        &self.marks
    }

    /// The guest writes.
    pub fn mark(&mut self, text: &str) {
        let Some(node) = self.nodes.get(&self.top).filter(|node| node.qcow2) else {
            return;
        };
        let mut record = MAGIC.to_vec();
        record.extend(text.bytes().take(MARK - MAGIC.len()));
        record.resize(MARK, b' ');
        let written = match self.data {
            true => qcow2::write(&node.file, FIRST_MARK + self.marks.len() as u64, &record),
            false => qcow2::append(&node.file, &record),
        };
        match written {
            Ok(()) => self.marks.push(text.to_owned()),
            Err(err) => eprintln!("fake-qemu: the disk can't be written: {err}"),
        }
    }

    fn read_marks(&self) -> Vec<String> {
        let chain = self.chain();
        let layers: Vec<_> = chain.iter().filter(|node| node.qcow2).collect();
        let text = |record: &[u8; MARK]| {
            let text = record.strip_prefix(MAGIC)?;
            Some(String::from_utf8_lossy(text).trim().to_owned())
        };
        let mut all = Vec::new();
        let mut record = [0; MARK];
        for place in FIRST_MARK..FIRST_MARK + MOST_MARKS {
            let mut has = |node: &Node| qcow2::read(&node.file, place, &mut record);
            let found = layers.iter().any(|node| has(node).unwrap_or(false));
            match text(&record).filter(|_| found) {
                Some(mark) => all.push(mark),
                None => break,
            }
        }
        let mut behind = Vec::new();
        for node in layers {
            let mut end = node.file.metadata().map_or(0, |meta| meta.len());
            while let Some(at) = end.checked_sub(MARK as u64) {
                let read = node.file.read_exact_at(&mut record, at);
                let Some(mark) = text(&record).filter(|_| read.is_ok()) else {
                    break;
                };
                behind.push(mark);
                end = at;
            }
        }
        all.extend(behind.into_iter().rev());
        all
    }

    /// The host name that the seed gives.
    pub fn hostname(&self) -> Option<String> {
        let seed = &self.nodes.get("seed")?.file;
        let mut bytes = vec![0; usize::try_from(seed.metadata().ok()?.len().min(1 << 20)).ok()?];
        seed.read_exact_at(&mut bytes, 0).ok()?;
        let key = b"\"local-hostname\"";
        let at = bytes.windows(key.len()).position(|w| w == key)? + key.len();
        let rest = String::from_utf8_lossy(&bytes[at..(at + 100).min(bytes.len())]).into_owned();
        rest.split('"').nth(1).map(str::to_owned)
    }
}

fn set_of(path: &str) -> Option<u32> {
    path.rsplit('/').next()?.parse().ok()
}
