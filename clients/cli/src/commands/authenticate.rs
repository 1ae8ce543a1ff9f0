//! `pileus authenticate`.

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::prompt;

/// Prove to the daemon that this user may use it
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The passphrase that an administrator set; asked for if not given
    #[arg(value_name = "PASSPHRASE")]
    pub passphrase: Option<String>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Outcome {
    let passphrase = match args.passphrase {
        Some(passphrase) => passphrase,
        None => {
            let asked = prompt::secret(context, "Please enter passphrase: ").await?;
            asked.unwrap_or_default()
        }
    };
    if passphrase.is_empty() {
        return Err(CommandError::usage("No passphrase given"));
    }
    context.client().await?.authenticate(&passphrase).await?;
    Ok(0)
}
