//! Whether images are still what they were.
//!
//! Next step: `images/src/verify.rs`.

use pileus_api::{Operation, OperationKind, VerifyRequest};
use pileus_base::{Code, Error, Phase, Reporter, Result};

use super::keep;
use crate::service::{Service, blocking};

impl Service {
    /// Begins to read images again. The operation's result is how many were fine; if one is not, it fails.
    pub async fn verify_images(&self, request: VerifyRequest) -> Result<Operation> {
        if request.images.is_empty() != request.all {
            return Err(Error::new(
                Code::InvalidArgument,
                "Either images are named, or all are meant",
            ));
        }
        let (store, names) = (self.parts.store.clone(), request.images);
        let digests = blocking(move || {
            if names.is_empty() {
                return store.digests();
            }
            let mut digests = Vec::new();
            for name in names {
                let digest = keep::find_digest(&store, &name)?;
                if !digests.contains(&digest) {
                    digests.push(digest);
                }
            }
            Ok(digests)
        })
        .await?;
        let target = match digests.as_slice() {
            [one] if !request.all => one.short().to_owned(),
            _ => "images".to_owned(),
        };
        let service = self.clone();
        self.parts
            .operations
            .begin(OperationKind::VerifyImages, target, |report| async move {
                service.verify_now(digests, &report).await
            })
            .await
    }

    async fn verify_now(&self, digests: Vec<pileus_base::Digest>, report: &Reporter) -> Result<()> {
        report.phase(Phase::VerifyingImage);
        let mut damaged: Vec<Error> = Vec::new();
        let mut fine = 0;
        let many = digests.len() > 1;
        for digest in digests {
            let (store, watch) = (self.parts.store.clone(), report.clone());
            match blocking(move || store.verify(&digest, &watch)).await {
                Ok(verified) => {
                    fine += 1;
                    for warning in verified.warnings {
                        report.warn(warning);
                    }
                }
                Err(err) if err.code == Code::BadImage => {
                    // Of many it is told when it is found, not only at the end.
                    if many {
                        report.warn(err.message.clone());
                    }
                    damaged.push(err);
                }
                // Removed meanwhile, by somebody who did not want it any more.
                Err(err) if err.code == Code::ImageNotFound => {}
                Err(err) => return Err(err),
            }
        }
        report.result(fine.to_string());
        if damaged.len() == 1
            && let Some(one) = damaged.pop()
        {
            return Err(one);
        }
        if damaged.is_empty() {
            return Ok(());
        }
        let mut all = Error::new(
            Code::BadImage,
            format!("{} images are damaged", damaged.len()),
        )
        .advise("Remove them; they are fetched again when they are needed.");
        all.details = damaged.into_iter().map(|err| err.message).collect();
        Err(all)
    }
}
