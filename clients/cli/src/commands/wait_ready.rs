//! `pileus wait-ready`: for scripts that begin before the daemon does.

use std::time::Duration;

use pileus_api::Code;

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::several;

const PAUSE: Duration = Duration::from_millis(200);

/// Wait for the daemon to be ready
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Wait so many seconds at most
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub timeout: Option<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let timeout = several::timeout(args.timeout.as_deref())?;
    let line = context.progress().line("pileusd");
    line.message("Waiting for the daemon to be ready");
    let message = "Timed out waiting for the daemon to be ready.";
    several::within(timeout, message, ready(context)).await
}

async fn ready(context: &Context) -> Outcome {
    // A daemon of the user's own would never come up by itself.
    let client = context.client().await?;
    loop {
        match client.server().await {
            Ok(_) => return Ok(0),
            Err(err) if err.code == Code::PermissionDenied => {
                return Err(CommandError::from(err));
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}
