//! Bringing an image into the store: what a reference means is asked of the hosts, its bytes become a disk in a
//! stage while they come, are checked, and one rename publishes it. Callers that want the same share the work,
//! also those of other processes.
//!
//! Next step: `store` (where it then lies), `overlay` (an instance's own disk on it).

use std::sync::Arc;

use pileus_base::{Code, Digest, Error, Phase, Reporter, Result, ResultExt, Size, files};

use crate::download::{Download, Fetched};
use crate::fetch;
use crate::format::{self, Work};
use crate::hosts::{About, Item, Origin, build};
use crate::image::{Image, ImageInfo};
use crate::intake::{Intake, Target, blocking};
use crate::packed::manifest::Provenance;
use crate::reference::ImageRef;
use crate::sources::{Mark, Record};
use crate::stage::Stage;
use crate::store::Store;

/// Bytes that a build takes while it is made (see `hosts/build.rs`).
const BUILD_ROOM: u64 = 2 << 30;
/// What is made free when an image turned out to be larger than it seemed, in bytes.
const RELIEF: u64 = 1 << 30;

impl Store {
    /// The image that `reference` means, got or made if it isn't here. With `checksum`, no other
    /// content is taken. Callers that want the same at the same time share the work.
    pub async fn obtain(
        self: &Arc<Self>,
        reference: &ImageRef,
        checksum: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        let image = self.find_or_bring(reference, checksum, report).await?;
        self.glance(&image, report).await?;
        image.touch();
        Ok(image)
    }

    async fn find_or_bring(
        self: &Arc<Self>,
        reference: &ImageRef,
        checksum: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        report.phase(Phase::ResolvingImage);
        if let Some(image) = self.tagged(reference)? {
            agree(checksum, image.digest())?;
            return Ok(image);
        }
        let item = match reference {
            ImageRef::Digest(hex) => match self.find(hex) {
                Ok(image) => {
                    agree(checksum, image.digest())?;
                    return Ok(image);
                }
                Err(err) if err.code == Code::ImageNotFound => {
                    self.promised(reference, err, report).await?
                }
                Err(err) => return Err(err),
            },
            _ => self.resolve(reference, report).await?,
        };
        if let Some(promised) = &item.expected {
            agree(checksum, promised)?;
        }
        let expected = checksum.or(item.expected.as_ref()).cloned();
        if let Some(image) = expected.as_ref().and_then(|digest| self.get(digest)) {
            return Ok(image);
        }
        let wanted = expected.as_ref().map_or("", |digest| digest.hex());
        let key = format!("{}#{wanted}", item.key);
        let store = self.clone();
        self.flights
            .join(&key, report, |report| async move {
                store.bring(&item, expected.as_ref(), &report).await
            })
            .await
    }

    /// Gets or makes an item, unless what it gave the last time is still current.
    async fn bring(
        self: Arc<Self>,
        item: &Item,
        expected: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        let before = self.sources.get(&item.key);
        // Other processes that share the store don't fetch the same.
        let _alone = self.lock_item(&item.key, report).await?;
        if let Some(image) = expected.and_then(|digest| self.get(digest)) {
            return Ok(image);
        }
        let record = self.sources.get(&item.key);
        let is_news = record.is_some() && record != before;
        let known = record.and_then(|record| Some((self.get(&record.digest)?, record.mark)));
        let fits = |image: &Image| expected.is_none_or(|digest| digest == image.digest());
        let known = known.filter(|(image, _)| fits(image));
        match (&item.origin, &known) {
            (Origin::Build(_), Some((image, _))) => return Ok(image.clone()),
            (Origin::File(path), Some((image, mark))) if fetch::file_mark(path)? == *mark => {
                return Ok(image.clone());
            }
            // Fetched while this one waited for its turn.
            (Origin::Url(_), Some((image, _))) if is_news => return Ok(image.clone()),
            _ => {}
        }
        let need = self.need(item);
        self.make_room(need, report).await?;
        let mut fetched = self.fetch(item, known.as_ref(), expected, report).await;
        if fetched.as_ref().is_err_and(|err| err.code == Code::NoSpace)
            && self.relieve(need.saturating_add(RELIEF)).await?
        {
            report.log("The disk was full; images that nobody needs were removed.");
            fetched = self.fetch(item, known.as_ref(), expected, report).await;
        }
        let (image, mark) = match (fetched, known) {
            (Ok(Some(new)), _) => new,
            (Ok(None), Some((image, _))) => return Ok(image),
            (Ok(None), None) => {
                return Err(Error::new(
                    Code::FetchFailed,
                    format!(
                        "{} says that nothing changed, but was never fetched",
                        item.source
                    ),
                ));
            }
            (Err(err), Some((image, _))) if err.code == Code::FetchFailed => {
                report.warn(format!("{err}; using the copy of {}", image.info().created));
                return Ok(image);
            }
            (Err(err), _) => return Err(err),
        };
        self.sources.put(&Record {
            key: item.key.clone(),
            digest: image.digest().clone(),
            mark,
        })?;
        Ok(image)
    }

    /// Bytes that an item takes at least, as far as that is known before it comes.
    fn need(&self, item: &Item) -> u64 {
        match &item.origin {
            Origin::Build(_) => BUILD_ROOM,
            Origin::File(path) => files::allocated(path).min(self.config.limits.download),
            Origin::Url(_) => 0,
        }
    }

    /// The item's image and its mark; nothing if what is known is still current.
    async fn fetch(
        self: &Arc<Self>,
        item: &Item,
        known: Option<&(Arc<Image>, Mark)>,
        expected: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Option<(Arc<Image>, Mark)>> {
        let stage = Arc::new(Stage::create(&self.stages())?);
        if let Origin::Build(recipe) = &item.origin {
            let image = self.build(item, recipe, stage, expected, report).await?;
            return Ok(Some((image, Mark::default())));
        }
        let mut intake = Intake::new(self.target(stage, report));
        let pushed = match &item.origin {
            Origin::Url(url) => {
                let download = Download {
                    store: self,
                    report,
                    url,
                    known: known.map(|(_, mark)| mark),
                    checked: expected.is_some(),
                };
                download.run(&mut intake).await
            }
            Origin::File(path) => fetch::file(path, &mut intake).await.map(Fetched::New),
            Origin::Build(_) => Err(Error::internal("A build has no bytes")),
        };
        let mark = match pushed {
            Ok(Fetched::New(mark)) => mark,
            Ok(Fetched::Unchanged) => return Ok(None),
            Err(err) => {
                intake.abort().await;
                return Err(err);
            }
        };
        let image = self
            .finish(intake, expected, &item.source, &item.about, report)
            .await?;
        Ok(Some((image, mark)))
    }

    pub(crate) fn target(&self, stage: Arc<Stage>, report: &Reporter) -> Target {
        Target::new(stage, &self.config.limits, &self.config.root, report)
    }

    pub(crate) fn work<'a>(&'a self, stage: &'a str) -> Work<'a> {
        Work {
            limits: &self.config.limits,
            tools: &self.config.tools,
            stage,
            folder: &self.config.root,
        }
    }

    /// Makes an image of the store of all that was pushed.
    pub(crate) async fn finish(
        self: &Arc<Self>,
        mut intake: Intake,
        expected: Option<&Digest>,
        source: &str,
        about: &About,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        let taken = intake.finish().await?;
        agree(expected, &taken.digest)?;
        if let Some(image) = self.get(&taken.digest) {
            return Ok(image);
        }
        let target = intake.target().clone();
        let stage = target.stage.clone();
        let settled = format::settle(&self.work(&stage.id()), &target, taken.form).await?;
        for warning in &settled.warnings {
            report.warn(warning);
        }
        let now = (self.config.now)();
        let mut info = ImageInfo::new(taken.digest, source.to_owned(), Size(settled.size), now);
        tell(&mut info, about);
        info.disk_digest = settled.disk;
        info.machine = settled.machine;
        if let Some(manifest) = settled.manifest {
            made_of(&mut info, manifest.provenance);
        }
        self.publish_stage(stage, info, report).await
    }

    async fn build(
        self: &Arc<Self>,
        item: &Item,
        recipe: &build::Recipe,
        stage: Arc<Stage>,
        expected: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        let id = stage.id();
        let work = self.work(&id);
        build::check_host(&work)?;
        let digest = build::make(&stage, &work, recipe, report).await?;
        agree(expected, &digest)?;
        if let Some(image) = self.get(&digest) {
            return Ok(image);
        }
        let disk = stage.draft().disk();
        let size = std::fs::metadata(&disk).io("Looking at the disk")?.len();
        let now = (self.config.now)();
        let mut info = ImageInfo::new(digest, item.source.clone(), Size(size), now);
        tell(&mut info, &item.about);
        info.version = now.strftime("%Y%m%d").to_string();
        info.kernel = true;
        info.initrd = true;
        info.cmdline = Some(build::cmdline());
        info.disk_digest = Some(format::disk_digest(&disk, report).await?);
        self.publish_stage(stage, info, report).await
    }

    async fn publish_stage(
        self: &Arc<Self>,
        stage: Arc<Stage>,
        info: ImageInfo,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        report.check()?;
        let store = self.clone();
        blocking(move || store.publish(&stage, info)).await
    }
}

fn tell(info: &mut ImageInfo, about: &About) {
    let about = about.clone();
    info.os = about.os;
    info.release = about.release;
    info.title = about.title;
    info.codename = about.codename;
    info.version = about.version;
    info.arch = about.arch;
}

/// What a packed image's maker says of it.
fn made_of(info: &mut ImageInfo, said: Provenance) {
    let digest = said.source_digest.as_ref().map(Digest::to_string);
    let recipe = said.recipe.as_ref().map(Digest::to_string);
    let lines = [
        ("title", &said.title),
        ("tool", &said.tool),
        ("version", &said.tool_version),
        ("source", &said.source),
        ("source digest", &digest),
        ("recipe", &recipe),
    ];
    let lines: Vec<_> = lines
        .iter()
        .filter_map(|(name, value)| Some(format!("{name}: {}", value.as_deref()?)))
        .collect();
    info.made_of = (!lines.is_empty()).then(|| lines.join("\n"));
    info.recipe = said.recipe;
    // What the one who gave us the image says goes before it.
    for (field, value) in [
        (&mut info.os, said.os),
        (&mut info.release, said.release),
        (&mut info.arch, said.arch),
    ] {
        if field.is_empty() {
            *field = value.unwrap_or_default();
        }
    }
}

/// An error unless the digest is the one that was asked for.
pub(crate) fn agree(wanted: Option<&Digest>, got: &Digest) -> Result<()> {
    match wanted {
        Some(wanted) if wanted != got => Err(Error::new(
            Code::ChecksumMismatch,
            format!("The image's checksum is {got}, not {wanted}"),
        )
        .advise("Check the checksum and the source; nothing was kept.")),
        _ => Ok(()),
    }
}
