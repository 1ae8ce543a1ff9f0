//! `pileus image`: the store's images. One file a family of actions.
//!
//! ```text
//! list.rs      list, info                    transfer.rs  import, export (files of this program's user)
//! pull.rs      pull                          check.rs     verify, inspect
//! remove.rs    remove, prune                 tags.rs      tag, untag
//! pack.rs      pack                          build.rs     build
//! ```

mod build;
mod check;
mod list;
mod pack;
mod pull;
mod remove;
mod tags;
mod transfer;

use pileus_api::Operation;
use pileus_base::{Error, Result};

use crate::commands::launch;
use crate::context::Context;
use crate::error::Outcome;
use crate::render::Format;

/// Show, bring, share, check and remove images
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
    Info(list::Info),
    Pull(pull::Args),
    Import(transfer::Import),
    Export(transfer::Export),
    Pack(pack::Args),
    Build(build::Args),
    Tag(tags::Tag),
    Untag(tags::Untag),
    Inspect(check::Inspect),
    Verify(check::Verify),
    Prune(remove::Prune),
    #[command(visible_alias = "rm")]
    Remove(remove::Remove),
}

pub(crate) async fn run(context: &Context, args: Args) -> Outcome {
    let format = args.format;
    match args.action.unwrap_or(Action::List) {
        Action::List => list::list(context, format).await,
        Action::Info(args) => list::info(context, &args, format).await,
        Action::Pull(args) => pull::run(context, &args, format).await,
        Action::Import(args) => transfer::import(context, &args, format).await,
        Action::Export(args) => transfer::export(context, &args, format).await,
        Action::Pack(args) => pack::run(context, &args, format).await,
        Action::Build(args) => build::run(context, &args, format).await,
        Action::Tag(args) => tags::tag(context, &args, format).await,
        Action::Untag(args) => tags::untag(context, &args, format).await,
        Action::Inspect(args) => check::inspect(context, &args, format).await,
        Action::Verify(args) => check::verify(context, &args, format).await,
        Action::Prune(args) => remove::prune(context, &args, format).await,
        Action::Remove(args) => remove::remove(context, &args, format).await,
    }
}

/// An image of the store as the daemon knows it: a file's path, which it may have come from, is made whole.
fn named(context: &Context, image: &str) -> String {
    launch::absolute(image, &context.env.current_folder)
}

/// The digest of the image that an operation brought.
fn result_of(operation: Operation) -> Result<String> {
    operation
        .result
        .ok_or_else(|| Error::internal("The daemon does not name the image"))
}
