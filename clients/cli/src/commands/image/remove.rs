//! `pileus image remove` and `prune`: images that nobody needs.

use pileus_api::{ImagePruneQuery, Size};

use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::image::did;
use crate::render::node::Node;
use crate::render::{self, Format};

/// Remove images
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
An image that an instance or a template stands on stays, whatever is said.")]
pub struct Remove {
    /// Tags, digests (or their first digits), or where they came from
    #[arg(value_name = "IMAGE", required = true, add = complete::stored_images())]
    pub images: Vec<String>,
    /// Also one that has a tag; its tags go with it
    #[arg(short, long)]
    pub force: bool,
}

pub(super) async fn remove(context: &Context, args: &Remove, format: Format) -> Outcome {
    let client = context.client().await?;
    let mut failed = Vec::new();
    for image in &args.images {
        let name = super::named(context, image);
        if let Err(err) = client.remove_image(&name, args.force).await {
            failed.push((image.clone(), CommandError::from(err)));
        }
    }
    match failed.is_empty() {
        true => {
            let removed = Node::texts(&args.images);
            context.print(&did("", &[("removed", removed)], format))
        }
        false => Err(CommandError::several(failed)),
    }
}

/// Remove images that nobody uses
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Images that an instance or a template stands on and images with a tag stay. Without bounds all others go; with bounds
the least recently used, until the bounds hold.

Examples:
  pileus image prune --dry-run
  pileus image prune --older-than 30d
  pileus image prune --keep-bytes 20G")]
pub struct Prune {
    /// All that nobody uses (what happens if no bound is given)
    #[arg(long, conflicts_with_all = ["older_than", "keep_bytes"])]
    pub all_unused: bool,
    /// Those that were not used for so long: 45m, 12h, 30d, 4w
    #[arg(long, value_name = "AGE")]
    pub older_than: Option<String>,
    /// What all images together may take
    #[arg(long, value_name = "SIZE")]
    pub keep_bytes: Option<Size>,
    /// Only show what would go
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

pub(super) async fn prune(context: &Context, args: &Prune, format: Format) -> Outcome {
    let query = ImagePruneQuery {
        older_than: args.older_than.clone(),
        keep_bytes: args.keep_bytes.map(Size::bytes),
        dry_run: args.dry_run,
    };
    let reply = context.client().await?.prune_images(&query).await?;
    context.print(&render::images::pruned(&reply, args.dry_run, format))
}
