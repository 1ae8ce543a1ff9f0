//! `pileus set`: changes a setting of the daemon.

use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};

/// Change a setting of the daemon
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  pileus set local.warm=off")]
pub struct Args {
    /// The setting's key and value; the value may be a word of its own
    #[arg(value_name = "KEY[=VALUE]", add = complete::settings())]
    pub setting: String,
    /// The value, if it is not behind the key
    #[arg(value_name = "VALUE", allow_hyphen_values = true)]
    pub value: Option<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let (key, value) = match (&args.value, args.setting.split_once('=')) {
        (Some(value), None) => (args.setting.as_str(), value.as_str()),
        (None, Some((key, value))) => (key, value),
        _ => {
            let text = "error: a key and one value are needed: KEY=VALUE or KEY VALUE";
            return Err(CommandError::usage(text)
                .hint("pileus get lists the settings and what they may be."));
        }
    };
    if key.is_empty() {
        return Err(CommandError::usage("error: the key is missing"));
    }
    context.client().await?.set(key, value).await?;
    Ok(0)
}
