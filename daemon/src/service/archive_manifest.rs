//! The manifest of an instance's archive: what the instance is, and which members follow. A manifest from outside
//! is untrusted: it is parsed with bounds, and [`Manifest::check`] is the list of what it must keep to.
//!
//! A layer stands on one with a lower number or, the lowest, on the image; so no chain can be a ring or lack
//! something, whatever is written here.

use pileus_api::{Autostart, OnCrash, Timestamp};
use pileus_base::{Code, Digest, Error, InstanceName, Result, Size, SnapshotName};
use pileus_instances::qemu::Hardware;
use serde::{Deserialize, Serialize};

pub const NAME: &str = "manifest.json";
pub const MOST_BYTES: u64 = 1 << 20;
/// What tells these archives from others.
const FORMAT: &str = "pileus-instance";
/// Grows when a reader of today could misunderstand what is written.
const VERSION: u32 = 1;

const MOST_LAYERS: usize = 1000;
/// As many as an instance's disk may have (`layers.rs`).
const DEEPEST: u32 = 200;
const MOST_SNAPSHOTS: usize = 500;
const MOST_COMMENT: usize = 10 << 10;
const MOST_TEXT: usize = 512;
const MOST_CMDLINE: usize = 4096;
/// Kernel and initrd.
const MOST_BOOT_FILE: u64 = 1 << 30;
/// User data and network configuration.
pub const MOST_GIVEN: u64 = 16 << 20;
/// The image store's own limit.
const MOST_IMAGE: Size = Size(2 << 40);
const MOST_DISK: Size = Size(1 << 46);
const LEAST_MEMORY: Size = Size::mib(16);
const MOST_MEMORY: Size = Size(1 << 50);
const MOST_CPUS: u32 = 255;
const MOST_EVER_TAKEN: u32 = 1_000_000;
const SECTOR: u64 = 512;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: String,
    pub version: u32,
    /// Which program wrote it, for a person.
    pub written_by: String,
    pub instance: Instance,
    pub image: Image,
    /// Members `layers/0.qcow2` and so on.
    pub layers: Vec<Layer>,
    /// In the order in which they were taken.
    pub snapshots: Vec<Snapshot>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Instance {
    pub name: InstanceName,
    pub cpus: u32,
    pub memory: Size,
    pub disk: Size,
    /// What its disk holds: this layer and those below it.
    pub layer: u32,
    pub machine_type: Option<String>,
    /// What the machine has besides the usual.
    #[serde(default, skip_serializing_if = "Hardware::is_usual")]
    pub hardware: Hardware,
    pub firmware_boot: bool,
    pub timezone: Option<String>,
    pub autostart: Autostart,
    pub on_crash: OnCrash,
    /// How many snapshots were ever taken.
    pub snapshots_taken: u32,
    /// The snapshot that it stands on.
    pub head: Option<SnapshotName>,
    /// Bytes of the member `user-data`, if there is one.
    pub user_data: Option<u64>,
    /// The same of `network-config`.
    pub network_config: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Its name in the store that it comes from.
    pub digest: Digest,
    pub source: String,
    pub os: String,
    pub release: String,
    pub title: String,
    pub codename: String,
    pub version: String,
    pub arch: String,
    /// Of the member `disk.img`.
    pub size: Size,
    pub min_disk: Size,
    pub disk: Digest,
    pub kernel: Option<File>,
    pub initrd: Option<File>,
    /// The kernel's command line.
    pub cmdline: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub bytes: u64,
    pub digest: Digest,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// The layer that it stands on; none: the image.
    pub below: Option<u32>,
    /// Of the file.
    pub bytes: u64,
    /// What a guest sees.
    pub size: Size,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    pub name: SnapshotName,
    pub comment: String,
    pub parent: Option<SnapshotName>,
    pub created_at: Timestamp,
    pub cpus: u32,
    pub memory: Size,
    pub disk: Size,
    pub layer: u32,
    pub firmware_boot: bool,
}

/// A member that follows the manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Disk,
    Kernel,
    Initrd,
    Layer(u32),
    UserData,
    NetworkConfig,
}

impl Part {
    pub fn name(self) -> String {
        match self {
            Part::Disk => "disk.img".to_owned(),
            Part::Kernel => "kernel".to_owned(),
            Part::Initrd => "initrd".to_owned(),
            Part::Layer(n) => format!("layers/{n}.qcow2"),
            Part::UserData => "user-data".to_owned(),
            Part::NetworkConfig => "network-config".to_owned(),
        }
    }
}

impl Manifest {
    pub fn new(instance: Instance, image: Image) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            written_by: concat!("pileusd ", env!("CARGO_PKG_VERSION")).to_owned(),
            instance,
            image,
            layers: Vec::new(),
            snapshots: Vec::new(),
        }
    }

    pub fn write(&self) -> Result<Vec<u8>> {
        self.check().map_err(|err| {
            Error::internal("The instance's record makes no sense").detail(err.message)
        })?;
        let text = serde_json::to_vec_pretty(self)
            .map_err(|err| Error::internal(format!("Writing {NAME}: {err}")))?;
        match text.len() as u64 <= MOST_BYTES {
            true => Ok(text),
            false => Err(Error::new(
                Code::WrongState,
                "The instance has more snapshots than an archive can tell of",
            )
            .advise("Delete some of them, or their long comments.")),
        }
    }

    /// Reads and checks one from outside.
    pub fn read(bytes: &[u8]) -> Result<Self> {
        #[derive(Deserialize)]
        struct Kind {
            format: String,
            version: u32,
        }
        let damaged = |err: serde_json::Error| bad(&format!("{NAME}: {err}"));
        if bytes.len() as u64 > MOST_BYTES {
            return Err(bad("its manifest is too long"));
        }
        let kind: Kind = serde_json::from_slice(bytes).map_err(damaged)?;
        if kind.format != FORMAT {
            return Err(bad("it holds no instance"));
        }
        if kind.version != VERSION {
            return Err(Error::new(
                Code::BadArchive,
                format!(
                    "The archive has the form {}, which this pileus does not know",
                    kind.version
                ),
            )
            .advise("Import it with the pileus that wrote it, or a newer one."));
        }
        let manifest: Self = serde_json::from_slice(bytes).map_err(damaged)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// All members after the manifest, in order, with the bytes of their files.
    pub fn parts(&self) -> Vec<(Part, u64)> {
        let mut parts = vec![(Part::Disk, self.image.size.bytes())];
        let files = [
            (Part::Kernel, &self.image.kernel),
            (Part::Initrd, &self.image.initrd),
        ];
        let files = files.into_iter();
        parts.extend(files.filter_map(|(part, file)| Some((part, file.as_ref()?.bytes))));
        let layers = (0..).zip(&self.layers);
        parts.extend(layers.map(|(n, layer)| (Part::Layer(n), layer.bytes)));
        parts.extend(self.instance.user_data.map(|bytes| (Part::UserData, bytes)));
        let network = self.instance.network_config;
        parts.extend(network.map(|bytes| (Part::NetworkConfig, bytes)));
        parts
    }

    /// The layer and those below it, the lowest first. The manifest was checked.
    pub fn chain(&self, top: u32) -> Vec<u32> {
        let mut chain = vec![top];
        while let Some(below) = chain
            .last()
            .and_then(|n| self.layers.get(*n as usize)?.below)
        {
            chain.push(below);
        }
        chain.reverse();
        chain
    }

    fn check(&self) -> Result<()> {
        self.check_image()?;
        self.check_layers()?;
        self.check_instance()?;
        self.check_snapshots()?;
        let mut used = vec![false; self.layers.len()];
        let tops = self.snapshots.iter().map(|s| s.layer);
        for top in tops.chain([self.instance.layer]) {
            for n in self.chain(top) {
                used[n as usize] = true;
            }
        }
        rule(
            used.iter().all(|used| *used),
            "nobody stands on one of its layers",
        )
    }

    fn check_image(&self) -> Result<()> {
        let image = &self.image;
        let size = image.size.bytes();
        let whole = size > 0 && size.is_multiple_of(SECTOR) && image.size <= MOST_IMAGE;
        rule(whole, "its image has a size that makes no sense")?;
        rule(
            image.min_disk <= MOST_IMAGE,
            "its image has a size that makes no sense",
        )?;
        for file in [&image.kernel, &image.initrd].into_iter().flatten() {
            let good = (1..=MOST_BOOT_FILE).contains(&file.bytes);
            rule(good, "its kernel has a size that makes no sense")?;
        }
        let bootable =
            image.kernel.is_some() || (image.initrd.is_none() && image.cmdline.is_none());
        rule(
            bootable,
            "its image has an initrd or a command line, but no kernel",
        )?;
        let told = image.cmdline.as_ref().is_none_or(|line| {
            line.len() <= MOST_CMDLINE && line.bytes().all(|b| (b' '..=b'~').contains(&b))
        });
        rule(told, "its kernel's command line can't be one")?;
        let texts = [
            &image.source,
            &image.os,
            &image.release,
            &image.title,
            &image.codename,
            &image.version,
            &image.arch,
            &self.written_by,
        ];
        let plain = |text: &&String| text.len() <= MOST_TEXT && !text.chars().any(char::is_control);
        rule(
            texts.iter().all(plain),
            "a text about its image can't be one",
        )
    }

    /// What stands on something is at least as large.
    fn check_layers(&self) -> Result<()> {
        let count = self.layers.len();
        rule(
            (1..=MOST_LAYERS).contains(&count),
            "it has too many layers, or none",
        )?;
        let mut depths = Vec::with_capacity(count);
        for layer in &self.layers {
            let (below, depth) = match layer.below {
                None => (self.image.size, 1),
                Some(n) => match (self.layers.get(n as usize), depths.get(n as usize)) {
                    (Some(below), Some(depth)) => (below.size, depth + 1),
                    _ => return Err(bad("a layer stands on one that comes later")),
                },
            };
            rule(depth <= DEEPEST, "too many layers stand on each other")?;
            let size = layer.size.bytes();
            let whole = size.is_multiple_of(SECTOR) && layer.size <= MOST_DISK;
            rule(
                whole && layer.size >= below,
                "a layer is smaller than what it stands on",
            )?;
            // What is in a layer may have been written several times over, but not without end.
            rule(
                layer.bytes <= 2 * MOST_DISK.bytes(),
                "a layer's file is too large",
            )?;
            depths.push(depth);
        }
        Ok(())
    }

    fn check_instance(&self) -> Result<()> {
        let instance = &self.instance;
        self.check_shape(
            instance.cpus,
            instance.memory,
            instance.disk,
            instance.layer,
        )?;
        let machine = instance.machine_type.as_deref();
        rule(
            machine.is_none_or(|text| release(text).is_some()),
            "its machine type is unknown",
        )?;
        rule(
            instance.hardware.is_sound(),
            "its hardware is nothing that a machine can have",
        )?;
        let zone = instance.timezone.as_deref().is_none_or(|zone| {
            zone.len() <= 64
                && !zone.starts_with('/')
                && !zone.contains("..")
                && zone
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"/_+-".contains(&b))
        });
        rule(zone, "its time zone can't be one")?;
        rule(
            instance.snapshots_taken <= MOST_EVER_TAKEN,
            "it has too many snapshots",
        )?;
        let given = [instance.user_data, instance.network_config];
        let short = given.into_iter().flatten().all(|bytes| bytes <= MOST_GIVEN);
        rule(short, "its user data is too long")
    }

    fn check_shape(&self, cpus: u32, memory: Size, disk: Size, layer: u32) -> Result<()> {
        rule(
            (1..=MOST_CPUS).contains(&cpus),
            "its number of CPUs makes no sense",
        )?;
        let fits = (LEAST_MEMORY..=MOST_MEMORY).contains(&memory);
        let whole = memory.bytes().is_multiple_of(1 << 20);
        rule(fits && whole, "its memory makes no sense")?;
        let below = self.layers.get(layer as usize);
        let below = below.ok_or_else(|| bad("a disk stands on a layer that is not there"))?;
        rule(
            disk <= MOST_DISK && disk.round_up(SECTOR) >= below.size,
            "a disk is smaller than what it stands on",
        )
    }

    /// A parent was taken before its children, so there is no ring.
    fn check_snapshots(&self) -> Result<()> {
        rule(
            self.snapshots.len() <= MOST_SNAPSHOTS,
            "it has too many snapshots",
        )?;
        let named = |before: &[Snapshot], name: &SnapshotName| {
            before
                .iter()
                .any(|s| s.name.as_str().eq_ignore_ascii_case(name.as_str()))
        };
        for (n, snapshot) in self.snapshots.iter().enumerate() {
            let before = &self.snapshots[..n];
            rule(
                !named(before, &snapshot.name),
                "two snapshots have one name",
            )?;
            let parent = snapshot.parent.as_ref();
            rule(
                parent.is_none_or(|parent| named(before, parent)),
                "a snapshot's parent is not there",
            )?;
            rule(
                snapshot.comment.len() <= MOST_COMMENT,
                "a comment is too long",
            )?;
            self.check_shape(
                snapshot.cpus,
                snapshot.memory,
                snapshot.disk,
                snapshot.layer,
            )?;
        }
        let head = self.instance.head.as_ref();
        rule(
            head.is_none_or(|head| named(&self.snapshots, head)),
            "the snapshot that it stands on is not there",
        )
    }
}

/// The machine type that an instance gets here: its own, unless this host's QEMU is older than that; then
/// the host's newest with the same chipset.
pub fn machine_type(wanted: Option<&str>, host: &str) -> String {
    let Some(newest) = release(host) else {
        return host.to_owned();
    };
    let known = |text: &&str| release(text).is_some_and(|release| release <= newest);
    match wanted {
        Some(wanted) if known(&wanted) => wanted.to_owned(),
        Some(wanted) if wanted.starts_with(I440FX) => {
            format!("{I440FX}{}.{}", newest.0, newest.1)
        }
        _ => host.to_owned(),
    }
}

const I440FX: &str = "pc-i440fx-";

/// The release in `pc-q35-10.0`.
fn release(machine: &str) -> Option<(u16, u16)> {
    let number = machine.strip_prefix("pc-q35-");
    let number = number.or_else(|| machine.strip_prefix(I440FX))?;
    let (major, minor) = number.split_once('.')?;
    let number = |text: &str| {
        let digits = (1..=3).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| text.parse().ok())?
    };
    Some((number(major)?, number(minor)?))
}

fn rule(kept: bool, why: &str) -> Result<()> {
    match kept {
        true => Ok(()),
        false => Err(bad(why)),
    }
}

fn bad(why: &str) -> Error {
    pileus_images::archive::read::bad(why)
}

#[cfg(test)]
#[path = "archive_manifest_tests.rs"]
pub(crate) mod tests;
