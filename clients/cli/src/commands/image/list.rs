//! `pileus image list` and `info`: what the store holds, and all about one image of it.

use crate::complete;
use crate::context::Context;
use crate::error::Outcome;
use crate::render::{self, Format};

pub(super) async fn list(context: &Context, format: Format) -> Outcome {
    let images = context.client().await?.images().await?;
    context.print(&render::images::stored(&images, format))
}

/// Show all about an image of the store
#[derive(Debug, Clone, clap::Args)]
pub struct Info {
    /// A tag, the digest (or its first digits), or where it came from
    #[arg(value_name = "IMAGE", add = complete::stored_images())]
    pub image: String,
}

pub(super) async fn info(context: &Context, args: &Info, format: Format) -> Outcome {
    let name = super::named(context, &args.image);
    let details = context.client().await?.image(&name).await?;
    context.print(&render::image::info(&details, format))
}
