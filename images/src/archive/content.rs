//! Images of the store on their way into an archive and out of one.
//!
//! An image's name in the store is the digest of the artifact that it was made of, which an archive doesn't
//! hold and whose claim to be it nobody can check. So an image that comes in an archive is known by what it
//! consists of: if the store has one of the same content, that one is used, whatever its name is; otherwise it
//! is stored under the digest of its content. An archive can never give its bytes the name of another image.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use pileus_base::{Digest, Error, Result, ResultExt, Size, files};
use serde::{Deserialize, Serialize};

use super::member::Moved;
use super::write::digest_of;
use crate::image::{Draft, Image, ImageInfo};
use crate::packed;
use crate::stage::Stage;
use crate::store::Store;

/// Beside an image's other files: what it consists of, so that it is read once.
const CONTENT: &str = "content.json";
/// More threads than that don't help one reader of a disk.
const MOST_THREADS: usize = 4;

/// What an image consists of. Digests as an archive's members have them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Content {
    pub size: Size,
    pub disk: Digest,
    pub kernel: Option<Digest>,
    pub initrd: Option<Digest>,
    pub cmdline: Option<String>,
}

impl Content {
    /// The name of an image that came in an archive.
    pub fn digest(&self) -> Result<Digest> {
        use sha2::Digest as _;
        let text = serde_json::to_vec(self)
            .map_err(|err| Error::internal(format!("Writing an image's content: {err}")))?;
        let mut hash = sha2::Sha256::new();
        hash.update(b"pileus image content 1\n");
        hash.update(&text);
        Ok(Digest::from_bytes(hash.finalize().into()))
    }
}

impl Image {
    /// What the image consists of. The first call reads all of it. Blocks.
    pub fn content(&self, moved: Moved<'_>) -> Result<Content> {
        let kept = self.folder().join(CONTENT);
        let known = files::read_bounded(&kept, 64 << 10)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok());
        if let Some(known) = known {
            return Ok(known);
        }
        let mut digest = |path: PathBuf| {
            let file = File::open(&path).io(format_args!("Opening {}", path.display()))?;
            digest_of(&file, moved)
        };
        let content = Content {
            size: self.info().virtual_size,
            disk: digest(self.disk())?,
            kernel: self.kernel().map(&mut digest).transpose()?,
            initrd: self.initrd().map(&mut digest).transpose()?,
            cmdline: self.cmdline().map(str::to_owned),
        };
        let text = serde_json::to_vec(&content)
            .map_err(|err| Error::internal(format!("Writing an image's content: {err}")))?;
        if let Err(err) = files::write_atomic(&kept, &text, 0o444) {
            tracing::debug!(image = self.digest().short(), %err, "content not recorded");
        }
        Ok(content)
    }
}

impl Store {
    /// An image with just this content. May read those that could be it. Blocks.
    pub fn find_content(&self, content: &Content, moved: Moved<'_>) -> Result<Option<Arc<Image>>> {
        for listed in self.list()? {
            let alike = listed.info.virtual_size == content.size
                && listed.info.cmdline == content.cmdline
                && listed.info.kernel == content.kernel.is_some()
                && listed.info.initrd == content.initrd.is_some();
            if !alike {
                continue;
            }
            // It may have been removed meanwhile.
            if let Some(image) = self.get(&listed.info.digest)
                && image.content(moved)? == *content
            {
                return Ok(Some(image));
            }
        }
        Ok(None)
    }

    /// Room for an image that comes from outside. Blocks for a moment.
    pub fn begin_import(&self) -> Result<Incoming> {
        let stage = Stage::create(&self.stages())?;
        Ok(Incoming {
            draft: stage.draft(),
            stage,
        })
    }

    /// Where the disk of an image with this digest is or will be.
    pub fn disk_of(&self, digest: &Digest) -> PathBuf {
        Image::disk_in(&self.folder(digest))
    }

    /// Makes what came an image of the store, under its content's digest. Blocks.
    #[expect(
        clippy::needless_pass_by_value,
        reason = "what came is used up: its stage goes with it"
    )]
    pub fn publish_import(
        &self,
        incoming: Incoming,
        mut info: ImageInfo,
        content: &Content,
    ) -> Result<Arc<Image>> {
        info.digest = content.digest()?;
        self.publish(&incoming.stage, info)
    }

    /// An error unless so many bytes fit on the file system of `folder`, and what is to stay free does.
    pub fn check_room(&self, folder: &std::path::Path, bytes: u64) -> Result<()> {
        let reserve = self.config.limits.reserve;
        let free = files::free_space(folder)?;
        if free >= bytes.saturating_add(reserve) {
            return Ok(());
        }
        Err(Error::new(
            pileus_base::Code::NoSpace,
            format!(
                "The archive needs {} of disk space, and {} have to stay free; {} has {} left",
                Size(bytes),
                Size(reserve),
                folder.display(),
                Size(free),
            ),
        )
        .advise("Free some space, or remove unused images with `pileus image prune`."))
    }
}

/// An image that is coming in; dropped, it leaves nothing.
#[derive(Debug)]
pub struct Incoming {
    pub(super) stage: Stage,
    draft: Draft,
}

impl Incoming {
    pub fn disk(&self) -> PathBuf {
        self.draft.disk()
    }

    pub fn kernel(&self) -> PathBuf {
        self.draft.kernel()
    }

    pub fn initrd(&self) -> PathBuf {
        self.draft.initrd()
    }

    /// What `ImageInfo::disk_digest` says: an archive's own digest of the disk is another one. Reads the disk. Blocks.
    pub fn disk_digest(&self, moved: Moved<'_>) -> Result<Digest> {
        let path = self.disk();
        let file = File::open(&path).io(format_args!("Opening {}", path.display()))?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        packed::digest::of_file(&file, threads.min(MOST_THREADS), moved)
    }
}
