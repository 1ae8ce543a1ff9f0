//! `pileus purge`.

use crate::aliases;
use crate::context::Context;
use crate::error::Outcome;

/// Purge all deleted instances permanently
#[derive(Debug, Clone, clap::Args)]
pub struct Args {}

pub(crate) async fn run(context: &Context) -> Outcome {
    let gone = context.client().await?.purge().await?;
    let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
    aliases::forget(&context.env, &gone);
    Ok(0)
}
