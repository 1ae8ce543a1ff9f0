//! Export: an instance with its snapshots as one stream of bytes, while it runs if it runs.
//!
//! ```text
//!   turn ─▶ the disk is frozen ─▶ every layer is opened ─▶ turn given back
//!        ─▶ manifest ─▶ image ─▶ layers, the lowest first ─▶ user data ─▶ digests      (blocking, bounded)
//! ```
//!
//! Layers never change, and a file that is open can be read to its end even if its last user drops it meanwhile;
//! the image is held as everybody holds one. So the instance can be used, and even deleted, while it is written.
//! The disk of a running or suspended instance is as after a power cut. Memory does not travel: another host may
//! not be able to go on with it.
//!
//! Next step: `archive_import.rs`, and `images/src/archive/` for the form.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pileus_api::{ErrorBody, InstanceState, OperationKind};
use pileus_base::{Code, Error, Layout, Phase, Reporter, Result, ResultExt, Size};
use pileus_images::Image;
use pileus_images::archive::extents::Source;
use pileus_images::archive::{Writer, layer};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use super::archive_manifest::{self as manifest, Manifest, Part};
use super::given::Given;
use super::registry::Instance;
use super::{Service, wiring};
use crate::state::instances::{InstanceRow, Layer};

/// Pieces on their way to or from a client.
pub(super) const PIECES: usize = 8;
/// Each of so many bytes.
const PIECE: usize = 128 << 10;
/// So long may a client read nothing, which may be a person who is asked for a password behind a pipe.
const PATIENCE: Duration = Duration::from_secs(600);
/// More threads than that don't help: reading is one.
const MOST_THREADS: usize = 4;

/// An archive that is being written. Dropping the receiver ends it.
pub struct Export {
    pub operation: Uuid,
    pub bytes: mpsc::Receiver<io::Result<Bytes>>,
}

impl Service {
    /// Begins to write an instance. What is wrong with the request, and what goes wrong before the first byte, is
    /// told at once; the rest by the operation.
    pub async fn export(&self, name: &str) -> Result<Export> {
        let instance = self.parts.registry.get_usable(name)?;
        instance.machine_soon().await?;
        self.can_be_frozen(&instance.row())?;
        let (sender, bytes) = mpsc::channel(PIECES);
        let (ready, begun) = oneshot::channel();
        let service = self.clone();
        let operation = self
            .parts
            .operations
            .begin(OperationKind::Export, name, |report| async move {
                let plan = service.plan_export(&instance, &report).await;
                let told = ready.send(plan.as_ref().err().map(ErrorBody::from));
                let plan = plan?;
                if told.is_err() {
                    return Err(gone());
                }
                let failed = sender.clone();
                let out = Pieces::new(sender, report.clone());
                let done = super::blocking(move || plan.write(out, &report)).await;
                if let Err(err) = &done {
                    break_off(failed, err);
                }
                done
            })
            .await?;
        match begun.await {
            Ok(None) => Ok(Export {
                operation: operation.id,
                bytes,
            }),
            Ok(Some(trouble)) => Err(trouble.into()),
            Err(_) => Err(Error::internal("The export broke off")),
        }
    }

    /// Brings the instance's disk to a point that stays, and takes hold of all that belongs to it.
    async fn plan_export(&self, instance: &Arc<Instance>, report: &Reporter) -> Result<Plan> {
        let _turn = instance.usable_turn(report).await?;
        report.phase(Phase::Snapshotting);
        match instance.machine()?.snapshot().state {
            InstanceState::Stopped => self.freeze_still(instance).await?,
            InstanceState::Suspended => {
                report.warn("Its saved memory is not exported: the copy will boot");
                self.freeze_still(instance).await?;
            }
            InstanceState::Running => self
                .freeze_running(instance, None, report)
                .await
                .map(drop)?,
            state => {
                return Err(Error::new(
                    Code::WrongState,
                    format!(
                        "Instance '{}' can't be exported while it is {}",
                        instance.row().name,
                        state.as_str()
                    ),
                ));
            }
        }
        let row = instance.row();
        for snapshot in row.snapshots.iter().filter(|s| s.saved.is_some()) {
            report.warn(format!(
                "The memory of snapshot {} is not exported: only its disk is",
                snapshot.name
            ));
        }
        let image = row.spec.image.as_ref();
        let image = image.and_then(|image| self.parts.store.get(&image.digest));
        let image = image.ok_or_else(|| wiring::no_image(&row))?;
        let layout = self.parts.layout.clone();
        super::blocking(move || Plan::of(&layout, row, image)).await
    }
}

/// All that is written, open.
struct Plan {
    row: InstanceRow,
    image: Arc<Image>,
    layers: Vec<File>,
    /// Where each layer stands in the archive, and what it stands on.
    places: HashMap<Layer, u32>,
    below: Vec<Option<u32>>,
    given: Given,
}

impl Plan {
    fn of(layout: &Layout, row: InstanceRow, image: Arc<Image>) -> Result<Self> {
        let mut plan = Self {
            image,
            layers: Vec::new(),
            places: HashMap::new(),
            below: Vec::new(),
            given: Given::load(&layout.instance(row.id))?,
            row,
        };
        let row = plan.row.clone();
        for snapshot in row.snapshots.iter() {
            plan.add(layout, &snapshot.layers)?;
        }
        plan.add(layout, &row.spec.layers)?;
        Ok(plan)
    }

    fn add(&mut self, layout: &Layout, chain: &[Layer]) -> Result<()> {
        let mut below = None;
        for layer in chain {
            let place = match self.places.get(layer) {
                Some(&place) if self.below.get(place as usize) == Some(&below) => place,
                Some(_) => return Err(Error::internal("A layer stands on two others")),
                None => {
                    let path = layout.layer(layer.0);
                    let file = File::open(&path).io(format_args!("Opening {}", path.display()))?;
                    let place = u32::try_from(self.layers.len())
                        .map_err(|_| Error::internal("An instance has too many layers"))?;
                    self.layers.push(file);
                    self.below.push(below);
                    self.places.insert(*layer, place);
                    place
                }
            };
            below = Some(place);
        }
        Ok(())
    }

    fn place(&self, chain: &[Layer]) -> Result<u32> {
        let place = chain.last().and_then(|top| self.places.get(top));
        place
            .copied()
            .ok_or_else(|| Error::internal("A disk stands on no layer"))
    }

    fn write(self, out: Pieces, report: &Reporter) -> Result<()> {
        report.phase(Phase::Archiving);
        let mut moved = Progress::new(report, Some(self.total()?));
        let text = self.manifest(&mut moved)?.write()?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = u32::try_from(threads.min(MOST_THREADS)).unwrap_or(1);
        let mut archive = Writer::new(out, threads)?;
        archive.bytes(manifest::NAME, &text)?;
        let base = [
            (Part::Disk, Some(self.image.disk())),
            (Part::Kernel, self.image.kernel()),
            (Part::Initrd, self.image.initrd()),
        ];
        for (part, path) in base {
            let Some(path) = path else { continue };
            let what = format!("Opening {}", path.display());
            let file = File::open(&path).io(&what)?;
            let source = Source::whole(&file).io(&what)?;
            archive.file(&part.name(), source, &mut |n| moved.add(n))?;
        }
        for (n, file) in (0..).zip(&self.layers) {
            let (_, head) = layer::to_travel(file)?;
            let source = layer::source(file, &head)?;
            archive.file(&Part::Layer(n).name(), source, &mut |n| moved.add(n))?;
        }
        for (part, bytes) in [
            (Part::UserData, &self.given.user_data),
            (Part::NetworkConfig, &self.given.network_config),
        ] {
            if let Some(bytes) = bytes {
                archive.bytes(&part.name(), bytes)?;
            }
        }
        let mut out = archive.finish()?;
        out.flush().io("Sending the archive")?;
        moved.end();
        Ok(())
    }

    /// Bytes that the host's disk has of it.
    fn total(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        let mut total = self.image.allocated().bytes();
        for file in &self.layers {
            total += file.metadata().io("Looking at a layer")?.blocks() * 512;
        }
        Ok(total)
    }

    fn manifest(&self, moved: &mut Progress<'_>) -> Result<Manifest> {
        let row = &self.row;
        let spec = &row.spec;
        let head = spec
            .head
            .and_then(|id| row.snapshots.iter().find(|s| s.id == id));
        let instance = manifest::Instance {
            name: row.name.clone(),
            // What is set for the next boot holds for the copy's first one.
            cpus: spec.pending.cpus.unwrap_or(spec.cpus),
            memory: spec.pending.memory.unwrap_or(spec.memory),
            disk: spec.disk,
            layer: self.place(&spec.layers)?,
            machine_type: spec.machine_type.clone(),
            hardware: spec.hardware.clone(),
            firmware_boot: spec.firmware_boot,
            timezone: spec.timezone.clone(),
            autostart: spec.autostart,
            on_crash: spec.on_crash,
            snapshots_taken: spec.snapshots_taken,
            head: head.map(|snapshot| snapshot.name.clone()),
            user_data: self.given.user_data.as_ref().map(|data| data.len() as u64),
            network_config: self
                .given
                .network_config
                .as_ref()
                .map(|data| data.len() as u64),
        };
        let mut manifest = Manifest::new(instance, self.image_part(moved)?);
        for (file, below) in self.layers.iter().zip(&self.below) {
            let (header, _) = layer::to_travel(file)?;
            manifest.layers.push(manifest::Layer {
                below: *below,
                bytes: file.metadata().io("Looking at a layer")?.len(),
                size: Size(header.virtual_size),
            });
        }
        for snapshot in row.snapshots.iter() {
            let parent = row.snapshots.iter().find(|s| Some(s.id) == snapshot.parent);
            manifest.snapshots.push(manifest::Snapshot {
                name: snapshot.name.clone(),
                comment: snapshot.comment.clone(),
                parent: parent.map(|parent| parent.name.clone()),
                created_at: snapshot.created_at,
                cpus: snapshot.cpus,
                memory: snapshot.memory,
                disk: snapshot.disk,
                layer: self.place(&snapshot.layers)?,
                firmware_boot: snapshot.firmware_boot,
            });
        }
        Ok(manifest)
    }

    fn image_part(&self, moved: &mut Progress<'_>) -> Result<manifest::Image> {
        let info = self.image.info();
        // The first time it is read for this, which is no progress.
        let content = self.image.content(&mut |_| moved.add(0))?;
        let file = |path: Option<std::path::PathBuf>, digest| match (path, digest) {
            (Some(path), Some(digest)) => {
                let meta = path.metadata();
                let bytes = meta
                    .io(format_args!("Looking at {}", path.display()))?
                    .len();
                Ok::<_, Error>(Some(manifest::File { bytes, digest }))
            }
            _ => Ok(None),
        };
        let of_row = self.row.spec.image.as_ref();
        Ok(manifest::Image {
            digest: info.digest.clone(),
            source: of_row.map_or_else(|| info.source.clone(), |image| image.source.clone()),
            os: info.os.clone(),
            release: info.release.clone(),
            title: info.title.clone(),
            codename: info.codename.clone(),
            version: info.version.clone(),
            arch: info.arch.clone(),
            size: info.virtual_size,
            min_disk: info.min_disk,
            disk: content.disk,
            kernel: file(self.image.kernel(), content.kernel)?,
            initrd: file(self.image.initrd(), content.initrd)?,
            cmdline: content.cmdline,
        })
    }
}

/// Tells how far the work is, and ends it when it is no longer wanted.
pub(super) struct Progress<'a> {
    report: &'a Reporter,
    done: u64,
    /// If it is known.
    total: Option<u64>,
}

impl<'a> Progress<'a> {
    pub fn new(report: &'a Reporter, total: Option<u64>) -> Self {
        Self {
            report,
            done: 0,
            total,
        }
    }

    pub fn add(&mut self, bytes: u64) -> Result<()> {
        self.report.check()?;
        if bytes > 0 {
            self.done += bytes;
            // What a file takes on the disk is not quite what there is to read.
            let done = self.total.map_or(self.done, |total| self.done.min(total));
            self.report.progress(done, self.total);
        }
        Ok(())
    }

    fn end(&self) {
        self.report
            .progress(self.total.unwrap_or(self.done), self.total);
    }
}

/// Ends a client's bytes as those of an error: otherwise it would take what it has for the whole. The operation does not
/// wait until a client that reads nothing has read that.
pub(super) fn break_off(to: mpsc::Sender<io::Result<Bytes>>, why: &Error) {
    let broken = io::Error::other(why.to_string());
    tokio::spawn(async move {
        let _ = to.send(Err(broken)).await;
    });
}

/// Sends bytes from a blocking thread to a client, piece by piece; waits for one that is slow, but not for ever for one
/// that reads nothing.
pub(super) struct Pieces {
    to: mpsc::Sender<io::Result<Bytes>>,
    report: Reporter,
    gathered: Vec<u8>,
    patience: Duration,
}

impl Pieces {
    pub fn new(to: mpsc::Sender<io::Result<Bytes>>, report: Reporter) -> Self {
        Self {
            to,
            report,
            gathered: Vec::with_capacity(PIECE),
            patience: PATIENCE,
        }
    }

    fn send(&mut self) -> io::Result<()> {
        let piece = std::mem::replace(&mut self.gathered, Vec::with_capacity(PIECE));
        let sent = tokio::runtime::Handle::current().block_on(async {
            tokio::select! {
                sent = self.to.send(Ok(piece.into())) => sent.is_ok(),
                () = self.report.cancelled() => false,
                () = tokio::time::sleep(self.patience) => {
                    let seconds = self.patience.as_secs();
                    self.report.warn(format!("Nobody read what is sent for {seconds} s: it is given up"));
                    false
                }
            }
        });
        match sent {
            true => Ok(()),
            false => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

impl Write for Pieces {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PIECE - self.gathered.len();
        let bytes = &bytes[..room.min(bytes.len())];
        self.gathered.extend_from_slice(bytes);
        if self.gathered.len() == PIECE {
            self.send()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.gathered.is_empty() {
            true => Ok(()),
            false => self.send(),
        }
    }
}

fn gone() -> Error {
    Error::new(Code::Cancelled, "The archive's reader has gone")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_client_that_reads_nothing_is_given_up() {
        let (to, mut bytes) = mpsc::channel(1);
        let mut pieces = Pieces {
            patience: Duration::from_millis(50),
            ..Pieces::new(to.clone(), Reporter::silent())
        };
        let sent = tokio::task::spawn_blocking(move || pieces.write_all(&[1; 4 * PIECE]));
        let err = sent.await.unwrap().unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::BrokenPipe);
        // If it reads on after all, it sees that this was not the whole.
        break_off(to, &gone());
        assert_eq!(bytes.recv().await.unwrap().unwrap().len(), PIECE);
        assert!(bytes.recv().await.unwrap().is_err());
        assert!(bytes.recv().await.is_none());
    }
}
