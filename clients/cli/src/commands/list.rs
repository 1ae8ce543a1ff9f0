//! `pileus list`.

use crate::context::Context;
use crate::error::Outcome;
use crate::render::{self, FormatOption};

/// List all available instances
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub format: FormatOption,
    /// Leave the addresses out
    #[arg(long, hide = true)]
    pub no_ipv4: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let mut instances = context.client().await?.instances().await?;
    instances.sort_by(|a, b| a.name.cmp(&b.name));
    let text = render::list::render(&instances, args.format.format, !args.no_ipv4);
    context.print(&text)
}
