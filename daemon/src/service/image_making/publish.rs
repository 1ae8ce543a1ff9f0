//! From a machine that is off to an image of the store, and from there to the client.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pileus_api::{Event, OperationKind};
use pileus_base::{Code, Digest, Phase, Reporter, Result};
use pileus_images::{Image, ImageInfo};
use tokio::sync::mpsc;

use super::super::archive::{Export, PIECES, Progress, break_off};
use super::super::{Service, blocking, wiring};
use super::recipe::About;
use super::throwaway::Throwaway;

/// An image that was made, held.
pub(super) struct Made {
    pub image: Arc<Image>,
    /// The store did not have it before.
    pub is_new: bool,
    pub tag: Option<String>,
}

/// What a disk is made of.
pub(super) struct Parts {
    pub base: PathBuf,
    /// The lowest first.
    pub layers: Vec<PathBuf>,
}

impl Service {
    /// Begins the work of making an image; its bytes come when it is made. Whoever drops them ends it.
    pub(super) async fn making<F>(
        &self,
        kind: OperationKind,
        target: impl Into<String>,
        work: impl FnOnce(Reporter) -> F,
    ) -> Result<Export>
    where
        F: Future<Output = Result<Made>> + Send + 'static,
    {
        let (sender, bytes) = mpsc::channel(PIECES);
        let service = self.clone();
        let operation = self
            .parts
            .operations
            .begin(kind, target, |report| {
                let work = work(report.clone());
                async move {
                    let gone = CancelledWithReader::watch(&sender, &report);
                    let failed = sender.clone();
                    let done = async {
                        let made = work.await?;
                        report.result(made.image.digest().to_string());
                        service.send(made, sender, &report).await
                    };
                    let done = done.await;
                    drop(gone);
                    if let Err(err) = &done {
                        break_off(failed, err);
                    }
                    done
                }
            })
            .await?;
        Ok(Export {
            operation: operation.id,
            bytes,
        })
    }

    /// Sends an image; then it gets its tag, or goes if it has none. One that could not be sent goes too.
    async fn send(
        &self,
        made: Made,
        to: mpsc::Sender<io::Result<bytes::Bytes>>,
        report: &Reporter,
    ) -> Result<()> {
        let digest = made.image.digest().clone();
        let sent = self.send_image(made.image.clone(), to, report).await;
        let tagged = match (&sent, made.tag) {
            (Ok(()), Some(tag)) => {
                let (store, digest) = (self.parts.store.clone(), digest.clone());
                blocking(move || store.tag(&tag, &digest).map(|_| true)).await
            }
            _ => Ok(false),
        };
        drop(made.image);
        let stays = matches!(tagged, Ok(true)) || !made.is_new;
        if !stays {
            self.remove_made(&digest).await;
        }
        self.made_is_settled(&digest).await;
        self.parts.hub.send(Event::Images);
        sent.and(tagged.map(drop))
    }

    async fn remove_made(&self, digest: &Digest) {
        let (store, gone) = (self.parts.store.clone(), digest.clone());
        match blocking(move || store.remove(&gone)).await {
            Ok(_) => {}
            // Somebody launched or tagged it meanwhile: then it is theirs.
            Err(err) if err.code == Code::ImageInUse => {}
            Err(err) => {
                tracing::warn!(image = digest.short(), %err, "an image that was sent can't be removed");
            }
        }
    }

    /// The layers of a machine that is off.
    pub(super) fn parts_of(&self, machine: &Throwaway, image: &Image) -> Result<Parts> {
        let row = machine.instance()?.row();
        let layout = &self.parts.layout;
        let below = row.spec.layers.iter().map(|layer| layout.layer(layer.0));
        Ok(Parts {
            base: image.disk(),
            layers: below.chain([wiring::disk(layout, &row)]).collect(),
        })
    }

    /// Makes an image of the store. One that `stays` there is one that can be verified.
    pub(super) async fn publish(
        &self,
        parts: &Parts,
        mut info: ImageInfo,
        stays: bool,
        report: &Reporter,
    ) -> Result<(Arc<Image>, bool)> {
        report.phase(Phase::Flattening);
        let store = self.parts.store.clone();
        let incoming = blocking(move || store.begin_import()).await?;
        let store = &self.parts.store;
        info.virtual_size = store
            .flatten(&incoming, &parts.base, &parts.layers, report)
            .await?;
        info.min_disk = info.virtual_size;
        if !has_boot_sector(&incoming.disk()) {
            report.warn("The disk has no boot sector: no firmware will boot this image");
        }
        report.phase(Phase::VerifyingImage);
        let counted = report.clone();
        let (incoming, content, info) = blocking(move || {
            let mut moved = Progress::new(&counted, None);
            let content = incoming.disk_content(&mut |n| moved.add(n))?;
            if stays {
                info.disk_digest = Some(incoming.disk_digest(&mut |_| moved.add(0))?);
            }
            Ok((incoming, content, info))
        })
        .await?;
        report.check()?;
        let digest = content.digest()?;
        let is_new = store.get(&digest).is_none();
        if is_new {
            self.made_begins(&digest).await?;
        }
        let store = store.clone();
        let published = blocking(move || store.publish_import(incoming, info, &content)).await;
        if published.is_err() {
            self.made_is_settled(&digest).await;
        }
        Ok((published?, is_new))
    }

    /// What a new image says of itself.
    pub(super) fn info_of(
        &self,
        from: Option<&ImageInfo>,
        source: String,
        about: &About,
    ) -> ImageInfo {
        let now = (self.parts.clock)();
        // Its digest is that of its content, which is not known yet.
        let mut info = ImageInfo::new(
            Digest::from_bytes([0; 32]),
            source,
            pileus_base::Size(0),
            now,
        );
        if let Some(from) = from {
            info.os.clone_from(&from.os);
            info.release.clone_from(&from.release);
            info.codename.clone_from(&from.codename);
            info.arch.clone_from(&from.arch);
            info.machine.clone_from(&from.machine);
        }
        info.version = now.strftime("%Y%m%d").to_string();
        let said = [
            (&mut info.os, &about.os),
            (&mut info.release, &about.release),
            (&mut info.version, &about.version),
            (&mut info.title, &about.title),
        ];
        for (field, value) in said {
            if let Some(value) = value {
                field.clone_from(value);
            }
        }
        if about.machine.is_some() {
            info.machine.clone_from(&about.machine);
        }
        info
    }
}

/// Whether firmware may find something to boot on a disk: an image carries no kernel beside it.
fn has_boot_sector(disk: &Path) -> bool {
    use std::os::unix::fs::FileExt;
    let mut mark = [0; 2];
    let read = File::open(disk).and_then(|disk| disk.read_exact_at(&mut mark, 510));
    read.is_ok() && mark == [0x55, 0xaa]
}

/// Cancels the work when nobody reads any more.
struct CancelledWithReader(tokio::task::AbortHandle);

impl CancelledWithReader {
    fn watch(to: &mpsc::Sender<io::Result<bytes::Bytes>>, report: &Reporter) -> Self {
        let (to, cancel) = (to.clone(), report.cancel_token().clone());
        let watch = async move {
            to.closed().await;
            cancel.cancel();
        };
        Self(tokio::spawn(watch).abort_handle())
    }
}

impl Drop for CancelledWithReader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A made image without a tag is only there to be sent. It is noted before it is in the store, so that a daemon
/// that starts after one that was killed removes it.
mod notes {
    use pileus_base::{Digest, Result};
    use rusqlite::Transaction;

    use crate::state::settings;

    const KEY: &str = "images.being-made";

    pub fn all(tx: &Transaction<'_>) -> Result<Vec<Digest>> {
        let text = settings::get(tx, KEY)?.unwrap_or_default();
        Ok(text
            .split_whitespace()
            .filter_map(|d| d.parse().ok())
            .collect())
    }

    pub fn change(tx: &Transaction<'_>, change: impl FnOnce(&mut Vec<Digest>)) -> Result<()> {
        let mut noted = all(tx)?;
        change(&mut noted);
        let text: Vec<String> = noted.iter().map(ToString::to_string).collect();
        settings::set(tx, KEY, &text.join(" "))
    }
}

impl Service {
    async fn made_begins(&self, digest: &Digest) -> Result<()> {
        let digest = digest.clone();
        self.parts
            .state
            .run(move |tx| notes::change(tx, |noted| noted.push(digest)))
            .await
    }

    async fn made_is_settled(&self, digest: &Digest) {
        let gone = digest.clone();
        let done = self
            .parts
            .state
            .run(move |tx| notes::change(tx, |noted| noted.retain(|noted| *noted != gone)))
            .await;
        if let Err(err) = done {
            tracing::warn!(image = digest.short(), %err, "it stays noted as one being made");
        }
    }

    /// Removes what a daemon that was killed had made and not sent.
    pub(crate) async fn sweep_made_images(&self) -> Result<()> {
        let noted = self.parts.state.run(notes::all).await?;
        let in_use = self.digests_in_use();
        for digest in noted {
            if !in_use.contains(&digest) && self.parts.store.get(&digest).is_some() {
                tracing::warn!(
                    image = digest.short(),
                    "an image that was not sent is removed"
                );
                self.remove_made(&digest).await;
            }
            self.made_is_settled(&digest).await;
        }
        Ok(())
    }
}
