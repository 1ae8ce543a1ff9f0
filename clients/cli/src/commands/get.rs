//! `pileus get`: the daemon's settings. The client knows none of them.

use crate::complete;
use crate::context::Context;
use crate::error::Outcome;
use crate::render::{self, FormatOption};

/// Show settings of the daemon
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The setting's key; all settings are listed if not given
    #[arg(value_name = "KEY", add = complete::settings())]
    pub key: Option<String>,
    /// List only the keys
    #[arg(long, conflicts_with = "key")]
    pub keys: bool,
    #[command(flatten)]
    pub format: FormatOption,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let client = context.client().await?;
    let format = args.format.format;
    if let Some(key) = &args.key {
        let setting = client.setting(key).await?;
        return context.print(&render::settings::one(&setting, format));
    }
    let settings = client.settings().await?;
    let text = match args.keys {
        true => settings.iter().map(|s| format!("{}\n", s.key)).collect(),
        false => render::settings::all(&settings, format),
    };
    context.print(&text)
}
