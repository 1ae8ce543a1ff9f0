//! `pileus version`: works without a daemon and starts none.

use std::time::Duration;

use pileus_client::Client;

use crate::context::Context;
use crate::daemon;
use crate::error::Outcome;
use crate::render::{self, FormatOption};

/// Show version details
#[derive(Debug, Clone, Default, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub format: FormatOption,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let daemon = daemon_version(context).await;
    let personality = context.env.personality;
    let daemon = daemon.map(|told| personality.daemon_version(told));
    let text = render::version::render(personality, daemon.as_deref(), args.format.format);
    context.print(&text)
}

async fn daemon_version(context: &Context) -> Option<String> {
    if !daemon::answers(&context.place) {
        return None;
    }
    let client = Client::new(&context.place.socket).ok()?;
    let server = tokio::time::timeout(Duration::from_secs(5), client.server()).await;
    Some(server.ok()?.ok()?.version)
}
