//! `pileus purge`.

use crate::context::Context;
use crate::error::Outcome;

/// Purge all deleted instances permanently
#[derive(Debug, Clone, clap::Args)]
pub struct Args {}

pub(crate) async fn run(context: &Context) -> Outcome {
    context.client().await?.purge().await?;
    Ok(0)
}
