//! `pileus images`: the store's images.

use pileus_api::{Code, Digest, Image};
use pileus_base::Error;

use crate::complete;
use crate::context::Context;
use crate::error::Outcome;
use crate::render::{self, Format};

/// Show and remove the images in the store
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub action: Option<Action>,
    /// How to write the list
    #[arg(
        long,
        value_enum,
        default_value_t,
        hide_default_value = true,
        global = true
    )]
    pub format: Format,
}

#[derive(Debug, Clone, clap::Subcommand)]
pub enum Action {
    /// List the images (what happens if no action is given)
    #[command(visible_alias = "ls")]
    List,
    /// Remove all images that no instance uses
    Prune,
    /// Remove one image
    #[command(visible_alias = "rm")]
    Remove {
        /// The image's digest, or the beginning of it
        #[arg(value_name = "DIGEST", add = complete::digests())]
        digest: String,
    },
}

pub(crate) async fn run(context: &Context, args: Args) -> Outcome {
    let client = context.client().await?;
    match args.action.unwrap_or(Action::List) {
        Action::List => {
            let images = client.images().await?;
            context.print(&render::images::stored(&images, args.format))
        }
        Action::Prune => {
            let reply = client.prune_images().await?;
            context.print(&render::images::pruned(&reply))
        }
        Action::Remove { digest } => {
            let digest = match digest.parse::<Digest>() {
                Ok(digest) => digest,
                Err(_) => by_beginning(&client.images().await?, &digest)?,
            };
            client.remove_image(&digest).await?;
            Ok(0)
        }
    }
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
