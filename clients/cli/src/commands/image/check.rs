//! `pileus image verify` and `inspect`: whether an image is what it was, and what a file is.

use std::path::PathBuf;

use pileus_api::{ImageInspectQuery, OperationEvent, OperationState, Phase, VerifyRequest};
use pileus_base::{Error, ResultExt};

use crate::commands::launch;
use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Kind, Outcome};
use crate::render::image::did;
use crate::render::node::Node;
use crate::render::{self, Format};
use crate::signals::Signals;
use crate::streams::send::Source;

/// Read images of the store again and compare them with what came
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Each disk is read and hashed again, and so are kernel and initrd. If one is damaged the exit code is 2; remove it, and
it is fetched again when it is needed.")]
pub struct Verify {
    /// Tags, digests (or their first digits), or where they came from
    #[arg(value_name = "IMAGE", add = complete::stored_images())]
    pub images: Vec<String>,
    /// All images of the store
    #[arg(long)]
    pub all: bool,
}

pub(super) async fn verify(context: &Context, args: &Verify, format: Format) -> Outcome {
    match (args.images.is_empty(), args.all) {
        (true, false) => {
            return Err(CommandError::usage("An image or --all is required")
                .hint("pileus image list shows the images."));
        }
        (false, true) => {
            return Err(CommandError::usage(
                "Cannot specify images when --all option set",
            ));
        }
        _ => {}
    }
    let names = args.images.iter();
    let names = names.map(|image| super::named(context, image));
    let request = VerifyRequest {
        images: names.collect(),
        all: args.all,
    };
    let client = context.client().await?;
    let mut signals = Signals::to_end().io("Listening to signals")?;
    let operation = client.verify_images(&request).await?;
    let mut line = context.progress().line("the store");
    let followed = launch::follow(&client, operation, None, &mut signals, &mut line).await?;
    let (operation, signal) = followed;
    line.end(&operation);
    drop(line);
    match (operation.state, signal) {
        (OperationState::Succeeded, _) => {
            let count = operation.result.unwrap_or_default();
            let images = if count == "1" { "image" } else { "images" };
            let words = format!("Verified: {count} {images}\n");
            let verified = Node::Int(count.parse().unwrap_or_default());
            context.print(&did(&words, &[("verified", verified)], format))
        }
        (OperationState::Cancelled, Some(signal)) => {
            Err(launch::interrupted(signal, "Not all images were verified"))
        }
        _ => Err(CommandError::of_operation(operation)),
    }
}

/// Show what a file is, without keeping it
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The daemon judges the file as import does, and forgets it: what it is, digests, sizes, the machine that it wants, its
manifest. If import would refuse it, the rule that it breaks is shown and the exit code is 2.

Examples:
  pileus image inspect web.tar.zst
  curl -s https://example.org/web.tar.zst | pileus image inspect - --format json")]
pub struct Inspect {
    /// The image; - is standard input
    #[arg(value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    pub file: PathBuf,
}

pub(super) async fn inspect(context: &Context, args: &Inspect, format: Format) -> Outcome {
    let source = Source::open(context, &args.file, "An image", "pileus image inspect -")?;
    let client = context.client().await?;
    let mut line = context.progress().line("the image");
    line.event(&OperationEvent::Phase {
        phase: Phase::VerifyingImage,
    });
    let query = ImageInspectQuery {
        room: source.room(),
    };
    let upload = async |bytes| client.inspect_image(&query, bytes).await;
    let inspection = source.send(&mut line, upload).await?;
    drop(line);
    context.print(&render::image::inspected(&inspection, format))?;
    match inspection.refused {
        None => Ok(0),
        Some(refusal) => {
            let error = Error::from(refusal.error);
            Err(CommandError::new(Kind::Failed, error))
        }
    }
}
