//! Bytes that come: pulled by the daemon, or sent by a client, to be kept or only to be judged.
//!
//! Next step: `images/src/bring.rs` and `images/src/import.rs`.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use futures_util::StreamExt;
use pileus_api::{
    ErrorBody, ImageImportQuery, ImageInspectQuery, Inspection, Operation, OperationKind,
    PullRequest, Refusal,
};
use pileus_base::{Code, Digest, Error, Reporter, Result, ResultExt};
use pileus_images::packed::Rule;
use pileus_images::{About, Arrival, Image, ImageRef, Inspected};
use tokio::io::AsyncRead;
use tokio::sync::oneshot;
use tokio_util::io::StreamReader;

use super::{document, keep};
use crate::http::listener::Peer;
use crate::service::Service;
use crate::service::archive_import::Upload;

/// What is pulled if nobody says.
const DEFAULT_IMAGE: &str = "default";

impl Service {
    /// Brings an image into the store. The operation's result is its digest.
    pub async fn pull_image(&self, request: PullRequest, peer: Peer) -> Result<Operation> {
        let source = request.image.filter(|image| !image.is_empty());
        let source = source.unwrap_or_else(|| DEFAULT_IMAGE.to_owned());
        let reference: ImageRef = source.parse()?;
        // Of a user who may not read everything, the very file that the user may read.
        let file = match &reference {
            ImageRef::File(path) => super::open_as(&self.parts.mode, peer, path)?,
            _ => None,
        };
        let service = self.clone();
        self.parts
            .operations
            .begin(
                OperationKind::Pull,
                reference.shown(),
                |report| async move {
                    let store = &service.parts.store;
                    let checksum = request.checksum.as_ref();
                    let image = match file {
                        Some(file) => {
                            let arrival = arrival_of(&reference, &file)?;
                            let file = tokio::fs::File::from_std(file);
                            store.import(file, &arrival, checksum, &report).await?
                        }
                        None if request.refresh => {
                            store.obtain_anew(&reference, checksum, &report).await?
                        }
                        None => store.obtain(&reference, checksum, &report).await?,
                    };
                    report.result(image.digest().to_string());
                    service.images_changed();
                    Ok(())
                },
            )
            .await
    }

    /// Obtains an image from the store; if that did not have it, those who watch are told.
    pub(in crate::service) async fn obtain_image(
        &self,
        reference: &ImageRef,
        checksum: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        let since = (self.parts.clock)();
        let store = &self.parts.store;
        let image = store.obtain(reference, checksum, report).await?;
        if image.info().created >= since {
            self.images_changed();
        }
        Ok(image)
    }

    /// Begins to take in what a client sends. The operation's result is the image's digest.
    pub async fn import_image(
        &self,
        query: ImageImportQuery,
        length: Option<u64>,
        upload: Upload,
    ) -> Result<Operation> {
        if let Some(tag) = &query.tag {
            keep::check_tag(tag)?;
        }
        let name = query.name.as_deref().map(plain_name);
        let name = name.filter(|name| !name.is_empty());
        let name = name.unwrap_or_else(|| "upload".to_owned());
        let arrival = Arrival {
            source: format!("import:{name}"),
            total: length,
            room: query.room,
            about: About {
                title: name.clone(),
                ..About::default()
            },
        };
        let service = self.clone();
        self.parts
            .operations
            .begin(OperationKind::ImportImage, name, |report| async move {
                let store = &service.parts.store;
                let checksum = query.checksum.as_ref();
                let stream = reader(upload);
                let image = store.import(stream, &arrival, checksum, &report).await?;
                if let Some(tag) = query.tag {
                    let (store, digest) = (store.clone(), image.digest().clone());
                    crate::service::blocking(move || store.tag(&tag, &digest)).await?;
                }
                report.result(image.digest().to_string());
                service.images_changed();
                Ok(())
            })
            .await
    }

    /// Begins to judge what a client sends; nothing of it is kept. What came of it comes by the channel, if the
    /// operation succeeds.
    pub async fn inspect_image(
        &self,
        query: ImageInspectQuery,
        upload: Upload,
    ) -> Result<(Operation, oneshot::Receiver<Inspection>)> {
        let (sender, receiver) = oneshot::channel();
        let service = self.clone();
        let operation = self
            .parts
            .operations
            .begin(OperationKind::InspectImage, "upload", |report| async move {
                let found = service.inspect_now(query, upload, &report).await?;
                // Nobody may wait for it any more.
                let _ = sender.send(found);
                Ok(())
            })
            .await?;
        Ok((operation, receiver))
    }

    async fn inspect_now(
        &self,
        query: ImageInspectQuery,
        upload: Upload,
        report: &Reporter,
    ) -> Result<Inspection> {
        let store = &self.parts.store;
        let found = store.inspect(reader(upload), query.room, None, report);
        match found.await {
            Ok(found) => {
                let stored = store.get(&found.digest).is_some();
                fine(found, stored)
            }
            Err(err) if matches!(err.code, Code::BadImage | Code::ImageTooLarge) => {
                Ok(refused(&err))
            }
            Err(err) => Err(err),
        }
    }
}

fn fine(found: Inspected, stored: bool) -> Result<Inspection> {
    Ok(Inspection {
        kind: kind(&found),
        digest: Some(found.digest),
        size: Some(found.size),
        virtual_size: Some(found.virtual_size),
        disk_usage: Some(found.allocated),
        disk_digest: found.disk_digest,
        machine: found.machine.as_ref().map(document).transpose()?,
        manifest: found.manifest.as_ref().map(document).transpose()?,
        warnings: found.warnings,
        stored,
        refused: None,
    })
}

fn refused(err: &Error) -> Inspection {
    Inspection {
        kind: String::new(),
        digest: None,
        size: None,
        virtual_size: None,
        disk_usage: None,
        disk_digest: None,
        machine: None,
        manifest: None,
        warnings: Vec::new(),
        stored: false,
        refused: Some(Refusal {
            rule: Rule::of(err).map(|rule| rule.as_str().to_owned()),
            error: ErrorBody::from(err),
        }),
    }
}

/// A file on this host that was opened for a user.
fn arrival_of(reference: &ImageRef, file: &File) -> Result<Arrival> {
    let found = file.metadata().io("Looking at the image")?;
    if !found.is_file() {
        return Err(Error::new(
            Code::BadImage,
            format!("{reference} is no ordinary file"),
        ));
    }
    let source = reference.to_string();
    let title = plain_name(&source);
    Ok(Arrival {
        about: About {
            title,
            ..About::default()
        },
        source,
        total: Some(found.len()),
        room: Some(found.len().min(found.blocks().saturating_mul(512))),
    })
}

/// `packed`, or a disk's form and what it is compressed with.
fn kind(found: &Inspected) -> String {
    use pileus_images::format::Kind;
    let word = |kind: Kind| match kind {
        Kind::Qcow2 => "qcow2",
        Kind::Raw => "raw",
        Kind::Tar => "packed",
        Kind::Xz => "xz",
        Kind::Gzip => "gzip",
        Kind::Zstd => "zstd",
        Kind::Other(what) => what,
    };
    match (found.kind, found.compression) {
        (Kind::Tar, _) => "packed".to_owned(),
        (kind, None) => word(kind).to_owned(),
        (kind, Some(packed)) => format!("{}+{}", word(kind), word(packed)),
    }
}

/// The last part of a file's name, without what could drive a terminal.
fn plain_name(name: &str) -> String {
    let name = name.rsplit('/').next().unwrap_or_default();
    let plain = name.chars().filter(|c| !c.is_control());
    plain.take(100).collect()
}

/// What a client sends, as something to read.
fn reader(upload: Upload) -> impl AsyncRead + Unpin + Send {
    let stream = futures_util::stream::unfold(upload, |mut upload| async move {
        Some((upload.recv().await?, upload))
    });
    // A reader may ask again after the end.
    StreamReader::new(Box::pin(stream.fuse()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_files_last_part() {
        for (name, plain) in [
            ("web.tar.zst", "web.tar.zst"),
            ("/home/ann/web.tar.zst", "web.tar.zst"),
            ("a/..", ".."),
            ("x\x1b[31m\n", "x[31m"),
            ("a/", ""),
        ] {
            assert_eq!(plain_name(name), plain, "{name:?}");
        }
        assert_eq!(plain_name(&"é".repeat(200)).chars().count(), 100);
    }
}
