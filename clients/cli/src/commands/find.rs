//! `pileus find`. What a search text means is the daemon's to know.

use pileus_api::CatalogQuery;

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::images::Found;
use crate::render::{self, FormatOption};

/// Display available images to create instances from
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  pileus find                   all images
  pileus find 24.04             that one; a codename or the first digits of a digest do as well
  pileus find daily:            all of an image host")]
pub struct Args {
    /// A name, alias or part of one, behind an image host's name or not; all images if not given
    #[arg(value_name = "[REMOTE:]STRING")]
    pub search: Option<String>,
    #[command(flatten)]
    pub format: FormatOption,
    /// Ask the image hosts again
    #[arg(long)]
    pub force_update: bool,
    /// Show images that are out of support too
    #[arg(long)]
    pub show_unsupported: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let search = args.search.as_deref().unwrap_or_default();
    if search.matches(':').count() > 1 {
        return Err(CommandError::usage(
            "Invalid remote and search string supplied",
        ));
    }
    let query = CatalogQuery {
        search: Some(search.to_owned()).filter(|search| !search.is_empty()),
        unsupported: args.show_unsupported,
        refresh: args.force_update,
    };
    let entries = context.client().await?.catalog_of(&query).await?;
    let found: Vec<_> = entries.iter().map(Found::of).collect();
    context.print(&render::images::found(&found, args.format.format))
}
