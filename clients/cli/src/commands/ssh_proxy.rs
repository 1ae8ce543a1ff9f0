//! `pileus ssh-proxy`: what `ssh` runs to reach an instance (see `ssh_config.rs`). Hidden, because no person
//! types it.

use crate::context::Context;
use crate::error::Outcome;
use crate::pump::{Take, pump};

/// Connect standard input and output with a TCP port of an instance
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Name of the instance
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The port
    #[arg(value_name = "PORT", default_value_t = 22)]
    pub port: u16,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let client = context.client().await?;
    let (input, output) = client.port(&args.name, args.port).await?;
    pump(input, output, Take::Send).await?;
    Ok(0)
}
