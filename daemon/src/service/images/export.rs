//! An image of the store as the bytes of `image.tar.zst`.
//!
//! Next step: `images/src/packed/pack/`.

use std::fs::File;
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use pileus_api::OperationKind;
use pileus_base::{Code, Digest, Error, Reporter, Result, ResultExt};
use pileus_images::packed::manifest::Provenance;
use pileus_images::packed::pack::{PackSource, pack};
use pileus_images::{Image, ImageInfo};
use tokio::sync::mpsc;

use crate::service::archive::{Export, PIECES, Pieces, break_off};
use crate::service::{Service, blocking};

/// More threads than that don't help one reader of a disk.
const MOST_THREADS: usize = 4;
/// Bytes of a text in a manifest.
const MOST_TEXT: usize = 512;

impl Service {
    /// Begins to write an image. What is wrong with the request is told at once, the rest by the operation.
    pub async fn export_image(&self, name: &str) -> Result<Export> {
        let image = self.stored_image(name).await?;
        let (sender, bytes) = mpsc::channel(PIECES);
        let service = self.clone();
        let operation = self
            .parts
            .operations
            .begin(OperationKind::ExportImage, name, |report| async move {
                let failed = sender.clone();
                let done = service.send_image(image, sender, &report).await;
                if let Err(err) = &done {
                    break_off(failed, err);
                }
                done
            })
            .await?;
        Ok(Export {
            operation: operation.id,
            bytes,
        })
    }

    /// Writes an image as an archive, piece by piece, as fast as the reader takes it.
    pub(in crate::service) async fn send_image(
        &self,
        image: Arc<Image>,
        to: mpsc::Sender<io::Result<Bytes>>,
        report: &Reporter,
    ) -> Result<()> {
        let report = report.clone();
        blocking(move || {
            let path = image.disk();
            let disk = File::open(&path).io(format_args!("Opening {}", path.display()))?;
            let machine = image.info().machine.clone().unwrap_or_default();
            let source = PackSource {
                disk: &disk,
                machine: &machine,
                provenance: provenance(image.info()),
            };
            let threads = std::thread::available_parallelism().map_or(1, usize::from);
            let out = Pieces::new(to, report.clone());
            let packed = pack(&source, out, threads.min(MOST_THREADS), &report)?;
            whole(image.info(), &packed.manifest.members.disk.digest)
        })
        .await
    }
}

/// An error if what was sent is not what the image held when it came: damage does not travel as something whole.
fn whole(info: &ImageInfo, sent: &Digest) -> Result<()> {
    match &info.disk_digest {
        Some(known) if known != sent => Err(Error::new(
            Code::BadImage,
            format!(
                "The stored image {} is damaged: its disk has the digest {sent}, not {known}",
                info.digest.short()
            ),
        )
        .advise("Remove it; it is fetched again when it is needed.")),
        _ => Ok(()),
    }
}

/// What an image says of itself to whoever gets it: nothing of this host or its users.
fn provenance(info: &ImageInfo) -> Provenance {
    let text = |text: &str| Some(line(text)).filter(|text| !text.is_empty());
    Provenance {
        source: text(&source(&info.source)),
        recipe: info.recipe.clone(),
        title: text(&source(&info.title)),
        os: text(&info.os),
        release: text(&info.release),
        arch: text(&info.arch),
        ..Provenance::ours()
    }
}

/// A source that tells others something: no path on this host, no address's user, password or key.
fn source(source: &str) -> String {
    let Some((scheme, rest)) = source.split_once("://") else {
        return source.to_owned();
    };
    if scheme == "file" {
        let name = rest.rsplit('/').next().unwrap_or_default();
        return name.to_owned();
    }
    let rest = rest.split(['?', '#']).next().unwrap_or_default();
    let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
    let host = host.rsplit('@').next().unwrap_or_default();
    format!("{scheme}://{host}/{path}")
}

/// One line of bounded length.
fn line(text: &str) -> String {
    let mut line: String = text.chars().filter(|c| !c.is_control()).collect();
    let mut end = line.len().min(MOST_TEXT);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    line.truncate(end);
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_private_travels() {
        for (told, shown) in [
            ("build:debian-13", "build:debian-13"),
            ("import:web.tar.zst", "import:web.tar.zst"),
            ("file:///home/ann/secret/web.img", "web.img"),
            ("https://h/x.img", "https://h/x.img"),
            (
                "https://ann:pass@h:1/a/x.img?key=1#y",
                "https://h:1/a/x.img",
            ),
            ("http://h?key=1", "http://h/"),
        ] {
            assert_eq!(source(told), shown, "{told}");
        }
        assert_eq!(line("a\nb\x1b[1m"), "ab[1m");
        assert_eq!(line(&"é".repeat(400)).len(), 512);
        assert_eq!(line(&format!("x{}", "é".repeat(400))).len(), 511);
    }
}
