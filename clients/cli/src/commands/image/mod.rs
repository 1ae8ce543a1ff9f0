//! `pileus image`: the store's images. One file a family of actions; each action's `run` is called from here.
//!
//! ```text
//! list.rs      list, info                    transfer.rs  import, export (streams of this program)
//! pull.rs      pull                          check.rs     verify, inspect
//! remove.rs    remove, prune                 tags.rs      tag, untag
//! ```

mod list;
mod remove;

use crate::context::Context;
use crate::error::Outcome;
use crate::render::Format;

/// Show, bring, check, tag and remove the images in the store
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub action: Option<Action>,
    /// How to write the answer
    #[arg(
        long,
        value_enum,
        default_value_t,
        hide_default_value = true,
        global = true
    )]
    pub format: Format,
}

#[derive(Debug, Clone, clap::Subcommand)]
pub enum Action {
    /// List the images (what happens if no action is given)
    #[command(visible_alias = "ls")]
    List,
    /// Remove all images that no instance uses
    Prune,
    #[command(visible_alias = "rm")]
    Remove(remove::Args),
}

pub(crate) async fn run(context: &Context, args: Args) -> Outcome {
    let format = args.format;
    match args.action.unwrap_or(Action::List) {
        Action::List => list::list(context, format).await,
        Action::Prune => remove::prune(context).await,
        Action::Remove(args) => remove::run(context, &args).await,
    }
}
