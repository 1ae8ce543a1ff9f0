//! `pileus image list`: what the store holds.

use crate::context::Context;
use crate::error::Outcome;
use crate::render::{self, Format};

pub(super) async fn list(context: &Context, format: Format) -> Outcome {
    let images = context.client().await?.images().await?;
    context.print(&render::images::stored(&images, format))
}
