//! `pileus networks`.

use crate::context::Context;
use crate::error::Outcome;
use crate::render::{self, FormatOption};

/// List available network interfaces
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub format: FormatOption,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let mut networks = context.client().await?.networks().await?;
    networks.sort_by(|a, b| a.name.cmp(&b.name));
    context.print(&render::networks::render(&networks, args.format.format))
}
