//! Import: an instance out of an archive that nobody trusts. It is a new one, as a clone is: its own address, MAC,
//! keys and seed, and an identity that its first boot here gives it (`Spec::identify`).
//!
//! ```text
//!   manifest, checked ─▶ row `creating` with the name ─▶ image (unless the store has it), layers, user data,
//!   each checked as it comes ─▶ digests ─▶ end of the stream ─▶ row: layers, snapshots ─▶ disk, keys, seed
//!   ─▶ row `stopped`
//! ```
//!
//! Members come in the manifest's order and in no other. Until the last step a crash leaves a row `creating` and
//! layers that no row names: a start sweeps both, and whatever fails is undone.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::Arc;

use bytes::{Buf, Bytes};
use pileus_api::{InstanceImage, InstanceState, Operation, OperationKind, Origin, Timestamp};
use pileus_base::{Digest, Error, InstanceName, Layout, Phase, Reporter, Result, ResultExt, files};
use pileus_images::archive::read::bad;
use pileus_images::archive::{Content, DIGESTS, Incoming, Input, Member, Reader, layer};
use pileus_images::{Image, ImageInfo, Store};
use pileus_instances::guest::cloud_init;
use pileus_instances::qemu::Hardware;
use tokio::sync::mpsc;
use uuid::Uuid;

use super::Service;
use super::archive::Progress;
use super::archive_manifest::{self as manifest, Manifest, Part};
use super::given::Given;
use super::registry::Instance;
use crate::state::instances::{InstanceRow, Layer, SnapshotRow, Spec, Stage};

const MOST_DIGESTS: u64 = 1 << 20;
/// What a member costs beside its data: headers with as many extents as a reader takes.
const HEADERS: u64 = 8 << 20;

/// What a client sends; an error is an upload that broke off.
pub type Upload = mpsc::Receiver<io::Result<Bytes>>;
type Archive = Reader<Input<Arriving>>;

impl Service {
    /// Begins to import what arrives. The operation's result is the instance's name.
    pub async fn import(&self, name: Option<InstanceName>, upload: Upload) -> Result<Operation> {
        // A host that can't run anything says so before anything is sent.
        self.parts.hypervisor.get().await?;
        let target = name
            .as_ref()
            .map_or("archive", InstanceName::as_str)
            .to_owned();
        let service = self.clone();
        self.parts
            .operations
            .begin(OperationKind::Import, target, |report| async move {
                service.import_now(name, upload, &report).await
            })
            .await
    }

    async fn import_now(
        &self,
        name: Option<InstanceName>,
        upload: Upload,
        report: &Reporter,
    ) -> Result<()> {
        report.phase(Phase::Archiving);
        let arriving = Arriving {
            from: upload,
            piece: Bytes::new(),
            report: report.clone(),
        };
        let (archive, digest, manifest) = super::blocking(move || open(arriving)).await?;
        let host = self.parts.hypervisor.get().await?;
        let spec = spec_of(&manifest, &host.qemu.machine_type);
        let name = name.unwrap_or_else(|| manifest.instance.name.clone());
        let instance = self.reserve_row(Some(name.clone()), spec, None).await?;
        let unpacking = Unpacking {
            archive,
            digests: BTreeMap::from([(manifest::NAME.to_owned(), digest)]),
            manifest,
            store: self.parts.store.clone(),
            layout: self.parts.layout.clone(),
            now: (self.parts.clock)(),
            layers: Fresh::default(),
            given: Given::default(),
            base: PathBuf::new(),
        };
        let done = self.import_into(&instance, unpacking, report).await;
        match done {
            Ok(()) => report.result(name.as_str()),
            Err(_) => self.undo(&instance).await,
        }
        done
    }

    async fn import_into(
        &self,
        instance: &Arc<Instance>,
        unpacking: Unpacking,
        report: &Reporter,
    ) -> Result<()> {
        let watch = report.clone();
        let unpacked = super::blocking(move || unpacking.run(&watch)).await?;
        report.phase(Phase::Configuring);
        let Unpacked {
            manifest,
            image,
            is_new,
            mut layers,
            given,
        } = unpacked;
        if is_new {
            self.images_changed();
        }
        let digest = image.digest().clone();
        let row = instance
            .change(|row| describe(row, &manifest, &layers.0, digest))
            .await?;
        // The row knows them: they go with it.
        layers.0.clear();
        let folder = self.parts.layout.instance(row.id);
        super::blocking(move || {
            files::create_folder(&folder, 0o700)?;
            given.store(&folder)
        })
        .await?;
        self.write_copy(&row, &row).await?;
        report.check()?;
        // From here on it stays, whatever happens.
        instance
            .change(|row| {
                row.spec.booted = true;
                row.stage = Stage::Is(InstanceState::Stopped);
            })
            .await?;
        self.own(instance, image).map(drop)
    }
}

/// Reads the manifest, which is the first member.
fn open(arriving: Arriving) -> Result<(Archive, Digest, Manifest)> {
    let mut archive = Reader::new(Input::new(arriving)?, manifest::MOST_BYTES + HEADERS);
    let first = archive.next_member()?;
    let first = first.filter(|member| member.name == manifest::NAME);
    let first = first.ok_or_else(|| bad("it does not begin with a manifest"))?;
    let (bytes, digest) = archive.bytes(&first, manifest::MOST_BYTES)?;
    let manifest = Manifest::read(&bytes)?;
    Ok((archive, digest, manifest))
}

fn spec_of(manifest: &Manifest, host: &str) -> Spec {
    let of = &manifest.instance;
    let machine_type = manifest::machine_type(of.machine_type.as_deref(), host);
    Spec {
        machine_type: Some(machine_type),
        // No two machines have one id.
        hardware: Hardware {
            uuid: None,
            ..of.hardware.clone()
        },
        firmware_boot: of.firmware_boot,
        origin: Origin::Import,
        identify: true,
        autostart: of.autostart,
        on_crash: of.on_crash,
        timezone: of.timezone.clone(),
        snapshots_taken: of.snapshots_taken,
        ..Spec::new(of.cpus, of.memory, of.disk)
    }
}

/// Says in the row what came.
fn describe(
    row: &mut InstanceRow,
    manifest: &Manifest,
    layers: &[(Layer, Layout)],
    digest: Digest,
) {
    let chain = |top| {
        let places = manifest.chain(top).into_iter();
        places
            .filter_map(|n| layers.get(n as usize))
            .map(|(layer, _)| *layer)
            .collect::<Vec<_>>()
    };
    let mut snapshots: Vec<SnapshotRow> = Vec::new();
    let id_of = |snapshots: &[SnapshotRow], name: &Option<pileus_base::SnapshotName>| {
        let name = name.as_ref()?.as_str();
        let found = snapshots
            .iter()
            .find(|s| s.name.as_str().eq_ignore_ascii_case(name));
        found.map(|snapshot| snapshot.id)
    };
    for snapshot in &manifest.snapshots {
        snapshots.push(SnapshotRow {
            id: Uuid::new_v4(),
            name: snapshot.name.clone(),
            comment: snapshot.comment.clone(),
            parent: id_of(&snapshots, &snapshot.parent),
            created_at: snapshot.created_at,
            cpus: snapshot.cpus,
            memory: snapshot.memory,
            disk: snapshot.disk,
            layers: chain(snapshot.layer),
            firmware_boot: snapshot.firmware_boot,
            identify: true,
            saved: None,
        });
    }
    row.spec.layers = chain(manifest.instance.layer);
    row.spec.head = id_of(&snapshots, &manifest.instance.head);
    row.spec.image = Some(InstanceImage {
        digest,
        source: manifest.image.source.clone(),
        os: manifest.image.os.clone(),
        release: manifest.image.release.clone(),
    });
    row.snapshots = Arc::new(snapshots);
}

/// An archive on its way to the disk.
struct Unpacking {
    archive: Archive,
    manifest: Manifest,
    digests: BTreeMap<String, Digest>,
    store: Arc<Store>,
    layout: Layout,
    now: Timestamp,
    layers: Fresh,
    given: Given,
    /// The image's disk, or where it will be.
    base: PathBuf,
}

/// All of it, checked.
struct Unpacked {
    manifest: Manifest,
    image: Arc<Image>,
    /// The store did not have it before.
    is_new: bool,
    layers: Fresh,
    given: Given,
}

impl Unpacking {
    fn run(mut self, report: &Reporter) -> Result<Unpacked> {
        let parts = self.manifest.parts();
        let sizes = parts.iter().map(|(_, bytes)| bytes + HEADERS).sum::<u64>();
        self.archive.allow(sizes + MOST_DIGESTS + HEADERS);
        let mut moved = Progress::new(report, None);
        let content = self.content();
        let known = self.store.find_content(&content, &mut |_| moved.add(0))?;
        let incoming = match &known {
            Some(image) => {
                self.base = image.disk();
                None
            }
            None => {
                self.base = self.store.disk_of(&content.digest()?);
                Some(self.store.begin_import()?)
            }
        };
        for (part, bytes) in parts {
            self.take(part, bytes, incoming.as_ref(), &mut moved)?;
        }
        self.finish()?;
        files::sync_folder(&self.layout.layers())?;
        let is_new = known.is_none();
        let image = match (known, incoming) {
            (Some(image), _) => image,
            (None, Some(incoming)) => {
                let mut info = self.image_info(&content)?;
                // Without it nothing could tell damage later.
                info.disk_digest = Some(incoming.disk_digest(&mut |_| moved.add(0))?);
                self.store.publish_import(incoming, info, &content)?
            }
            (None, None) => return Err(Error::internal("An import has no image")),
        };
        Ok(Unpacked {
            manifest: self.manifest,
            image,
            is_new,
            layers: self.layers,
            given: self.given,
        })
    }

    fn take(
        &mut self,
        part: Part,
        bytes: u64,
        incoming: Option<&Incoming>,
        moved: &mut Progress<'_>,
    ) -> Result<()> {
        let member = self.next(&part.name())?;
        if member.size != bytes {
            return Err(bad(&format!(
                "{} has another size than it should",
                member.name
            )));
        }
        let image = self.manifest.image.clone();
        let (path, expected) = match part {
            Part::Disk => (incoming.map(Incoming::disk), Some(image.disk)),
            Part::Kernel => (
                incoming.map(Incoming::kernel),
                image.kernel.map(|f| f.digest),
            ),
            Part::Initrd => (
                incoming.map(Incoming::initrd),
                image.initrd.map(|f| f.digest),
            ),
            Part::Layer(n) => return self.take_layer(n, &member, moved),
            Part::UserData | Part::NetworkConfig => return self.take_given(part, &member),
        };
        // Also of what is only read: so long may it be.
        self.store.check_room(self.store.root(), member.stored)?;
        let digest = match path {
            Some(path) => {
                let file = files::create_private(&path)?;
                let found = self.archive.extract(&member, file, &mut |n| moved.add(n))?;
                files::set_mode(&path, 0o644)?;
                found
            }
            None => self.archive.discard(&member, &mut |n| moved.add(n))?,
        };
        if expected.as_ref() != Some(&digest) {
            return Err(bad(&format!(
                "{} is not what the manifest says",
                member.name
            )));
        }
        self.digests.insert(member.name, digest);
        Ok(())
    }

    fn take_layer(&mut self, n: u32, member: &Member, moved: &mut Progress<'_>) -> Result<()> {
        let folder = self.layout.layers();
        files::create_folder(&folder, 0o700)?;
        self.store.check_room(&folder, member.stored)?;
        let layer = Layer(Uuid::new_v4());
        let path = self.layout.layer(layer.0);
        let file = files::create_private(&path)?;
        self.layers.0.push((layer, self.layout.clone()));
        let into = file.try_clone().io("Opening a layer")?;
        let digest = self.archive.extract(member, into, &mut |n| moved.add(n))?;
        let of = self.manifest.layers.get(n as usize);
        let of = of.ok_or_else(|| Error::internal("A layer has no place in the manifest"))?;
        layer::check(&file, of.size.bytes())?;
        let below = of.below.and_then(|n| self.layers.0.get(n as usize));
        match below {
            Some((below, _)) => layer::settle(&file, &self.layout.layer(below.0), "qcow2")?,
            None => layer::settle(&file, &self.base, "raw")?,
        }
        self.digests.insert(member.name.clone(), digest);
        Ok(())
    }

    /// What goes to cloud-init is checked as if it came with a launch.
    fn take_given(&mut self, part: Part, member: &Member) -> Result<()> {
        let (bytes, digest) = self.archive.bytes(member, manifest::MOST_GIVEN)?;
        let refused = |err| bad(&format!("{} can't be used", part.name())).with_source(err);
        match part {
            Part::UserData => {
                let checked = cloud_init::check(bytes).map_err(refused)?;
                self.given.user_data = Some(checked.bytes);
            }
            _ => {
                let checked = cloud_init::check_network(bytes).map_err(refused)?;
                self.given.network_config = Some(checked);
            }
        }
        self.digests.insert(member.name.clone(), digest);
        Ok(())
    }

    /// The digests, and nothing behind them.
    fn finish(&mut self) -> Result<()> {
        let member = self.next(DIGESTS)?;
        let (bytes, _) = self.archive.bytes(&member, MOST_DIGESTS)?;
        let told: BTreeMap<String, Digest> =
            serde_json::from_slice(&bytes).map_err(|err| bad(&format!("{DIGESTS}: {err}")))?;
        if told != self.digests {
            return Err(bad("its members are not those that were written"));
        }
        match self.archive.next_member()? {
            None => Ok(()),
            Some(member) => Err(bad(&format!("it has a member {} too many", member.name))),
        }
    }

    fn next(&mut self, name: &str) -> Result<Member> {
        match self.archive.next_member()? {
            Some(member) if member.name == name => Ok(member),
            Some(member) => Err(bad(&format!("{} stands where {name} should", member.name))),
            None => Err(bad(&format!("it has no {name}"))),
        }
    }

    fn content(&self) -> Content {
        let image = &self.manifest.image;
        Content {
            size: image.size,
            disk: image.disk.clone(),
            kernel: image.kernel.as_ref().map(|file| file.digest.clone()),
            initrd: image.initrd.as_ref().map(|file| file.digest.clone()),
            cmdline: image.cmdline.clone(),
        }
    }

    fn image_info(&self, content: &Content) -> Result<ImageInfo> {
        let image = &self.manifest.image;
        let mut info = ImageInfo::new(
            content.digest()?,
            image.source.clone(),
            image.size,
            self.now,
        );
        info.os.clone_from(&image.os);
        info.release.clone_from(&image.release);
        info.title.clone_from(&image.title);
        info.codename.clone_from(&image.codename);
        info.version.clone_from(&image.version);
        info.arch.clone_from(&image.arch);
        info.min_disk = image.min_disk.max(image.size);
        info.kernel = image.kernel.is_some();
        info.initrd = image.initrd.is_some();
        info.cmdline.clone_from(&image.cmdline);
        Ok(info)
    }
}

/// Layers that no row names yet, in the manifest's order; dropped, they go.
#[derive(Default)]
struct Fresh(Vec<(Layer, Layout)>);

impl Drop for Fresh {
    fn drop(&mut self) {
        for (layer, layout) in &self.0 {
            if let Err(err) = files::remove_file(&layout.layer(layer.0)) {
                tracing::warn!(%err, "a layer of an import that failed can't be removed");
            }
        }
    }
}

/// What a client sends, for a blocking thread.
struct Arriving {
    from: Upload,
    piece: Bytes,
    report: Reporter,
}

impl Read for Arriving {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            let next = tokio::runtime::Handle::current().block_on(async {
                tokio::select! {
                    next = self.from.recv() => next,
                    () = self.report.cancelled() => Some(Err(io::ErrorKind::ConnectionAborted.into())),
                }
            });
            match next {
                Some(piece) => self.piece = piece?,
                None => return Ok(0),
            }
        }
        let len = self.piece.len().min(buffer.len());
        self.piece.copy_to_slice(&mut buffer[..len]);
        Ok(len)
    }
}
