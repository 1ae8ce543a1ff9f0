//! Getting an image anew, although the store has what its source gave the last time.
//!
//! Next step: `bring` (gets it as if it had never been here).

use std::sync::Arc;

use pileus_base::{Digest, Phase, Reporter, Result};

use crate::image::Image;
use crate::lookup::CatalogWish;
use crate::reference::ImageRef;
use crate::store::Store;

impl Store {
    /// As [`obtain`](Self::obtain), asking the hosts for the newest and getting it again: what changed is fetched,
    /// what is made here is made again. What a host promises by its digest is not fetched twice. If it fails, all
    /// is as it was.
    pub async fn obtain_anew(
        self: &Arc<Self>,
        reference: &ImageRef,
        checksum: Option<&Digest>,
        report: &Reporter,
    ) -> Result<Arc<Image>> {
        report.phase(Phase::ResolvingImage);
        let is_name = matches!(reference, ImageRef::Name(_) | ImageRef::On { .. });
        if matches!(reference, ImageRef::Digest(_)) || self.tagged(reference)?.is_some() {
            return self.obtain(reference, checksum, report).await;
        }
        if is_name {
            let wish = CatalogWish {
                refresh: true,
                ..CatalogWish::default()
            };
            // Hosts that can't be asked now are asked again when the image is got; then it is told.
            let _ = report.or_cancelled(self.catalog(&wish)).await;
        }
        let key = self.resolve(reference, report).await?.key;
        let before = self.sources.take(&key)?;
        let done = self.obtain(reference, checksum, report).await;
        // It failed, or was not needed.
        if let Some(before) = before
            && self.sources.get(&key).is_none()
        {
            self.sources.put(&before)?;
        }
        done
    }
}
