//! `pileus image remove` and `prune`.

use pileus_api::{Code, Digest, Image};
use pileus_base::Error;

use crate::complete;
use crate::context::Context;
use crate::error::Outcome;
use crate::render;

/// Remove one image
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The image's digest, or the beginning of it
    #[arg(value_name = "DIGEST", add = complete::digests())]
    pub digest: String,
}

pub(super) async fn run(context: &Context, args: &Args) -> Outcome {
    let client = context.client().await?;
    let digest = match args.digest.parse::<Digest>() {
        Ok(digest) => digest,
        Err(_) => by_beginning(&client.images().await?, &args.digest)?,
    };
    client.remove_image(&digest).await?;
    Ok(0)
}

pub(super) async fn prune(context: &Context) -> Outcome {
    let reply = context.client().await?.prune_images().await?;
    context.print(&render::images::pruned(&reply))
}
/// The one image whose digest begins so.
fn by_beginning(images: &[Image], text: &str) -> Result<Digest, Error> {
    let start = text.strip_prefix("sha256:").unwrap_or(text);
    let start = start.to_ascii_lowercase();
    let mut matching = images
        .iter()
        .filter(|image| start.len() >= 4 && image.digest.hex().starts_with(&start));
    match (matching.next(), matching.next()) {
        (Some(image), None) => Ok(image.digest.clone()),
        (Some(_), Some(_)) => Err(Error::new(
            Code::InvalidArgument,
            format!("Too many images matching \"{text}\""),
        )
        .advise("Give more digits of the digest.")),
        _ => Err(Error::new(
            Code::ImageNotFound,
            format!("No image in the store has a digest that begins with \"{text}\""),
        )
        .advise("pileus images lists them; give 4 digits or more.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    #[test]
    fn a_digest_may_be_shortened_to_what_is_clear() {
        let mut images = samples::images();
        let digest = images[0].digest.clone();
        assert_eq!(by_beginning(&images, "ababab").unwrap(), digest);
        assert_eq!(by_beginning(&images, "sha256:ABAB").unwrap(), digest);
        for (text, code) in [("aba", Code::ImageNotFound), ("ffff", Code::ImageNotFound)] {
            assert_eq!(
                by_beginning(&images, text).unwrap_err().code,
                code,
                "{text}"
            );
        }
        images.push(images[0].clone());
        let err = by_beginning(&images, "abab").unwrap_err();
        assert_eq!(err.code, Code::InvalidArgument);
    }
}
