//! Images that come as a stream from whoever has them: taken into the store, or only judged.
//!
//! Next step: `intake` (what the bytes pass through).

use std::sync::Arc;

use pileus_base::{Digest, Phase, Reporter, Result, Size, files};
use tokio::io::AsyncRead;

use crate::bring::agree;
use crate::format::{self, Form, Kind};
use crate::hosts::About;
use crate::image::Image;
use crate::intake::{Intake, Taken, broken_off};
use crate::packed::{Machine, Manifest};
use crate::stage::Stage;
use crate::store::Store;

/// What is known of an image that comes as a stream.
#[derive(Debug, Clone, Default)]
pub struct Arrival {
    /// Where it comes from, for a person: `file:///home/ann/image.tar.zst`.
    pub source: String,
    pub about: About,
    /// Bytes that will come, if that is known; for the progress.
    pub total: Option<u64>,
    /// Bytes of the disk that it takes at least, if that is known: without room for them nothing is read. If nothing is
    /// said it is `total`.
    pub room: Option<u64>,
}

/// What an image is, found out without keeping it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inspected {
    pub kind: Kind,
    /// What it was compressed with.
    pub compression: Option<Kind>,
    /// SHA-256 of the bytes as they came: its name in the store.
    pub digest: Digest,
    /// How many bytes came.
    pub size: Size,
    /// What a guest would see.
    pub virtual_size: Size,
    /// What the disk would take on this host.
    pub allocated: Size,
    /// The disk's digest (`packed::digest`).
    pub disk_digest: Option<Digest>,
    /// The machine that it wants.
    pub machine: Option<Machine>,
    pub manifest: Option<Manifest>,
    pub warnings: Vec<String>,
}

impl Store {
    /// Takes in an image of any form that a launch takes. With `checksum`, no other content is taken; if that image
    /// is here already, nothing is read. A stream that breaks off leaves nothing.
    pub async fn import(
        self: &Arc<Self>,
        stream: impl AsyncRead + Unpin + Send,
        arrival: &Arrival,
        checksum: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        if let Some(image) = checksum.and_then(|digest| self.get(digest)) {
            image.touch();
            return Ok(image);
        }
        let room = arrival.room.or(arrival.total);
        self.make_room(room.unwrap_or(0), report).await?;
        let intake = self.receive(stream, arrival.total, report).await?;
        let image = self
            .finish(intake, checksum, &arrival.source, &arrival.about, report)
            .await?;
        image.touch();
        Ok(image)
    }

    /// Judges an image by all rules, without keeping it. For the time of it, it takes the room that the image would
    /// take: if there is none for `room` bytes, as far as that is known, nothing is read.
    pub async fn inspect(
        self: &Arc<Self>,
        stream: impl AsyncRead + Unpin + Send,
        room: Option<u64>,
        checksum: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Inspected> {
        self.make_room(room.unwrap_or(0), report).await?;
        let mut intake = self.receive(stream, None, report).await?;
        let Taken { digest, size, form } = intake.finish().await?;
        agree(checksum, &digest)?;
        let (kind, compression) = match &form {
            Form::Disk(compression) => (Kind::Raw, *compression),
            Form::Qcow2(compression) => (Kind::Qcow2, *compression),
            Form::Packed(_) => (Kind::Tar, Some(Kind::Zstd)),
        };
        let target = intake.target().clone();
        let settled = format::settle(&self.work(&target.stage.id()), &target, form).await?;
        Ok(Inspected {
            kind,
            compression,
            digest,
            size: Size(size),
            virtual_size: Size(settled.size),
            allocated: Size(files::allocated(&target.stage.draft().disk())),
            disk_digest: settled.disk,
            machine: settled.machine,
            manifest: settled.manifest,
            warnings: settled.warnings,
        })
    }

    /// Reads a stream to its end.
    async fn receive(
        &self,
        stream: impl AsyncRead + Unpin + Send,
        total: Option<u64>,
        report: &Reporter,
    ) -> Result<Intake> {
        report.phase(Phase::RetrievingImage);
        let stage = Arc::new(Stage::create(&self.stages())?);
        let mut intake = Intake::new(self.target(stage, report));
        match intake.pour(stream, total, broken_off).await {
            Ok(()) => Ok(intake),
            Err(err) => {
                intake.abort().await;
                Err(err)
            }
        }
    }
}
