//! Where an image's bytes come from: whatever gives a stream, a file, or the name of what the store can fetch itself.
//!
//! Next step: `import` (takes a stream in), `bring` (fetches).

use std::fmt;
use std::future::Future;
use std::io::Seek;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use pileus_base::{Reporter, Result, ResultExt};
use tokio::io::AsyncRead;

use crate::image::Image;
use crate::import::Arrival;
use crate::reference::ImageRef;
use crate::store::Store;

/// What a download gave.
pub enum Payload {
    /// An image of any form that the store takes, from its first byte to its last. Nothing is kept beside what comes
    /// out of it.
    Stream(Box<dyn AsyncRead + Send + Unpin>),
    /// The same in a file, read from its beginning.
    File(std::fs::File),
    /// Something that the store fetches: with resume, retries and time-outs.
    Reference(ImageRef),
}

impl fmt::Debug for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stream(_) => f.write_str("Stream"),
            Self::File(file) => f.debug_tuple("File").field(file).finish(),
            Self::Reference(reference) => f.debug_tuple("Reference").field(reference).finish(),
        }
    }
}

type Start = dyn FnOnce(Reporter) -> BoxFuture<'static, Result<Payload>> + Send;

/// Gets an image when it is asked, which may be never.
pub struct Downloader(Box<Start>);

impl Downloader {
    /// One that runs `start`, which gets the reporter of those who wait: for progress, and to learn that none does any
    /// more.
    pub fn new<F>(start: impl FnOnce(Reporter) -> F + Send + 'static) -> Self
    where
        F: Future<Output = Result<Payload>> + Send + 'static,
    {
        Self(Box::new(move |report| Box::pin(start(report))))
    }

    /// Has the image taken in.
    pub(super) async fn take_in(
        self,
        store: &Arc<Store>,
        id: &str,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        let payload = report.or_cancelled((self.0)(report.clone())).await?;
        match payload {
            Payload::Reference(reference) => store.obtain(&reference, None, report).await,
            Payload::Stream(stream) => take_stream(store, stream, None, id, report).await,
            Payload::File(file) => {
                let mut file = file;
                file.rewind().io("Reading a downloaded image")?;
                let size = file.metadata().io("Reading a downloaded image")?.len();
                let stream = tokio::fs::File::from_std(file);
                take_stream(store, stream, Some(size), id, report).await
            }
        }
    }
}

/// A downloader of what is at a URL (`https:`, `http:`, `file:`), by the store's own means.
pub fn download_image(url: &str) -> Result<Downloader> {
    let reference: ImageRef = url.parse()?;
    Ok(Downloader::new(|_| async move {
        Ok(Payload::Reference(reference))
    }))
}

impl fmt::Debug for Downloader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Downloader")
    }
}

/// Has a stream taken in.
async fn take_stream(
    store: &Arc<Store>,
    stream: impl AsyncRead + Send + Unpin,
    total: Option<u64>,
    id: &str,
    report: &Reporter,
) -> Result<Arc<Image>> {
    let arrival = Arrival {
        source: id.to_owned(),
        total,
        ..Arrival::default()
    };
    store.import(stream, &arrival, None, report).await
}
