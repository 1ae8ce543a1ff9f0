//! `pileus restart`.

use pileus_api::{Code, InstanceState, StartRequest};
use pileus_base::Error;

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::primary;
use crate::several::{self, Group, Names};

/// Restart instances
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub names: Names,
    /// Wait so many seconds at most; the work goes on after that
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub timeout: Option<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let timeout = several::timeout(args.timeout.as_deref())?;
    let names = primary::or_primary(context, &args.names)?;
    let client = context.client().await?;
    let instances = several::select(&client, &names, Group::Operative).await?;
    let not_running = instances
        .iter()
        .filter(|i| !matches!(i.state, InstanceState::Running | InstanceState::Unknown));
    let errors: Vec<_> = not_running
        .map(|instance| {
            let text = format!("Instance '{}' is not running", instance.name);
            let err = Error::new(Code::WrongState, text);
            (instance.name.to_string(), CommandError::from(err))
        })
        .collect();
    // All that --all can mean are those that run.
    if !errors.is_empty() && (!names.all || context.multipass()) {
        return Err(CommandError::several(errors));
    }
    let names: Vec<_> = instances
        .into_iter()
        .filter(|i| errors.iter().all(|(name, _)| name != i.name.as_str()))
        .map(|instance| instance.name)
        .collect();
    let request = StartRequest { timeout };
    let work = several::operate(context, &client, &names, async |client, name| {
        client.restart(name, &request).await
    });
    several::within_daemons(timeout, "Timed out waiting for instance to restart.", work).await
}
