//! `pileus image pull`: an image into the store, launching nothing.

use pileus_api::{OperationState, PullRequest};
use pileus_base::ResultExt;

use crate::commands::launch;
use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::{self, Format};
use crate::signals::Signals;

/// Bring an image into the store
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Whatever launch takes is taken here; the daemon reads files and addresses. A later launch of it begins at once.

Examples:
  pileus image pull debian-13
  pileus image pull https://example.org/web.tar.zst --checksum sha256:…")]
pub struct Args {
    /// A name (see pileus find), file or address; the default image if not given
    #[arg(value_name = "IMAGE", add = complete::images())]
    pub image: Option<String>,
    /// What it must hash to, as it is fetched (before it is unpacked)
    #[arg(long, value_name = "DIGEST")]
    pub checksum: Option<String>,
    /// Ask for the newest and get it again, also if the store has it
    #[arg(long)]
    pub refresh: bool,
}

pub(super) async fn run(context: &Context, args: &Args, format: Format) -> Outcome {
    let folder = &context.env.current_folder;
    let image = args.image.as_deref();
    let request = PullRequest {
        image: image.map(|image| launch::absolute(image, folder)),
        checksum: args.checksum.as_deref().map(str::parse).transpose()?,
        refresh: args.refresh,
    };
    let client = context.client().await?;
    let mut signals = Signals::to_end().io("Listening to signals")?;
    let operation = client.pull_image(&request).await?;
    let mut line = context.progress().line("the image");
    let followed = launch::follow(&client, operation, None, &mut signals, &mut line).await?;
    let (operation, signal) = followed;
    line.end(&operation);
    drop(line);
    match (operation.state, signal) {
        (OperationState::Succeeded, _) => {
            let digest = super::result_of(operation)?;
            let details = client.image(&digest).await?;
            context.print(&render::image::came("Pulled", &details, format))
        }
        (OperationState::Cancelled, Some(signal)) => {
            Err(launch::interrupted(signal, "Nothing was kept"))
        }
        _ => Err(CommandError::of_operation(operation)),
    }
}
