//! Bringing an image into the store: what a reference means is asked of the hosts, its bytes come into a
//! stage, are checked and become a disk, and one rename publishes it. Callers that want the same share the work.
//!
//! Next step: `store` (where it then lies), `overlay` (an instance's own disk on it).

use std::sync::Arc;

use pileus_base::{Code, Digest, Error, Phase, Reporter, Result, ResultExt, Size};

use crate::fetch::{self, Download, Fetched};
use crate::format::{self, Work};
use crate::hosts::{Item, Origin, build};
use crate::image::{Image, ImageInfo};
use crate::reference::ImageRef;
use crate::sources::{Mark, Record};
use crate::stage::Stage;
use crate::store::Store;

impl Store {
    /// The image that `reference` means, got or made if it isn't here. With `checksum`, no other
    /// content is taken. Callers that want the same at the same time share the work.
    pub async fn obtain(
        self: &Arc<Self>,
        reference: &ImageRef,
        checksum: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        report.phase(Phase::ResolvingImage);
        if let Some(image) = self.tagged(reference)? {
            agree(checksum, image.digest())?;
            image.touch();
            return Ok(image);
        }
        let item = match reference {
            ImageRef::Digest(hex) => match self.find(hex) {
                Ok(image) => {
                    agree(checksum, image.digest())?;
                    image.touch();
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
            image.touch();
            return Ok(image);
        }
        let wanted = expected.as_ref().map_or("", |digest| digest.hex());
        let key = format!("{}#{wanted}", item.key);
        let store = self.clone();
        let image = self
            .flights
            .join(&key, report, |report| async move {
                store.bring(&item, expected.as_ref(), &report).await
            })
            .await?;
        image.touch();
        Ok(image)
    }

    /// Gets or makes an item, unless what it gave the last time is still current.
    async fn bring(
        self: Arc<Self>,
        item: &Item,
        expected: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        let _lock = self.lock_item(&item.key, report).await?;
        let known = self.sources.get(&item.key);
        let known = known.and_then(|record| Some((self.get(&record.digest)?, record.mark)));
        let fits = |image: &Image| expected.is_none_or(|digest| digest == image.digest());
        let known = known.filter(|(image, _)| fits(image));
        match (&item.origin, &known) {
            (Origin::Build(_), Some((image, _))) => return Ok(image.clone()),
            (Origin::File(path), Some((image, mark))) if fetch::file_mark(path)? == *mark => {
                return Ok(image.clone());
            }
            _ => {}
        }
        let stage = Stage::create(&self.stages())?;
        let id = stage.id();
        let work = Work {
            limits: &self.config.limits,
            tools: &self.config.tools,
            stage: &id,
            folder: &self.config.root,
        };
        let fetched = self.fetch(item, &known, &stage, &work, report).await;
        let (digest, mark) = match (fetched, known) {
            (Ok(Fetched::New(digest, mark)), _) => (digest, mark),
            (Ok(Fetched::Unchanged), Some((image, _))) => return Ok(image),
            (Ok(Fetched::Unchanged), None) => {
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
        agree(expected, &digest)?;
        let image = match self.get(&digest) {
            Some(image) => image,
            None => self.prepare(item, digest, stage, &work, report).await?,
        };
        self.sources.put(&Record {
            key: item.key.clone(),
            digest: image.digest().clone(),
            mark,
        })?;
        Ok(image)
    }

    async fn fetch(
        &self,
        item: &Item,
        known: &Option<(Arc<Image>, Mark)>,
        stage: &Stage,
        work: &Work<'_>,
        report: &Reporter,
    ) -> Result<Fetched> {
        work.check_space()?;
        let artifact = stage.path("artifact");
        match &item.origin {
            Origin::Build(recipe) => {
                build::check_host(work)?;
                let digest = build::make(stage, work, recipe, report).await?;
                Ok(Fetched::New(digest, Mark::default()))
            }
            Origin::File(path) => {
                let (digest, mark) = fetch::copy(work, path, &artifact, report).await?;
                Ok(Fetched::New(digest, mark))
            }
            Origin::Url(url) => {
                let download = Download {
                    client: &self.client,
                    patience: &self.config.patience,
                    work,
                    report,
                    url,
                    known: known.as_ref().map(|(_, mark)| mark),
                };
                download.run(&artifact).await
            }
        }
    }

    /// Makes the stage's artifact an image of the store.
    async fn prepare(
        self: &Arc<Self>,
        item: &Item,
        digest: Digest,
        stage: Stage,
        work: &Work<'_>,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        let draft = stage.draft();
        let built = matches!(item.origin, Origin::Build(_));
        let size = if built {
            std::fs::metadata(draft.disk())
                .io("Looking at the disk")?
                .len()
        } else {
            format::prepare(work, &stage.path("artifact"), &draft, report).await?
        };
        let now = (self.config.now)();
        let mut info = ImageInfo::new(digest.clone(), item.source.clone(), Size(size), now);
        let about = item.about.clone();
        info.os = about.os;
        info.release = about.release;
        info.title = about.title;
        info.codename = about.codename;
        info.version = about.version;
        info.arch = about.arch;
        if built {
            info.version = now.strftime("%Y%m%d").to_string();
            info.kernel = true;
            info.initrd = true;
            info.cmdline = Some(build::cmdline());
        }
        report.check()?;
        let store = self.clone();
        tokio::task::spawn_blocking(move || store.publish(&stage, info))
            .await
            .map_err(|err| Error::internal(format!("Publishing an image panicked: {err}")))?
    }
}

/// An error unless the digest is the one that was asked for.
fn agree(wanted: Option<&Digest>, got: &Digest) -> Result<()> {
    match wanted {
        Some(wanted) if wanted != got => Err(Error::new(
            Code::ChecksumMismatch,
            format!("The image's checksum is {got}, not {wanted}"),
        )
        .advise("Check the checksum and the source; nothing was kept.")),
        _ => Ok(()),
    }
}
