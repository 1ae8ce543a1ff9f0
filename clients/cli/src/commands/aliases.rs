//! `pileus aliases`.

use crate::aliases::store;
use crate::context::Context;
use crate::error::Outcome;
use crate::render::{self, FormatOption};

/// List available aliases
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub format: FormatOption,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    let aliases = store::load(&store::file(&context.env)?)?;
    context.print(&render::aliases::render(&aliases, args.format.format))
}
