//! `pileus start`.

use pileus_api::{Code, Instance, InstanceState, StartRequest};
use pileus_base::Error;

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::primary;
use crate::several::{self, Group, Names, Unusable};

/// Start instances
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
    let wanted = primary::or_primary(context, &args.names)?;
    let client = context.client().await?;
    let instances = client.instances().await?;
    let instances = if wanted.all {
        instances.into_iter().filter(|i| !i.deleted).collect()
    } else {
        match several::choose(instances, &wanted.names, Group::Operative) {
            Ok(instances) => instances,
            Err(errors) => match errors.as_slice() {
                [Unusable::Missing(name)]
                    if wanted.names.len() == 1 && primary::is(context, name)? =>
                {
                    primary::launch(context, name, args.timeout.clone()).await?;
                    return Ok(0);
                }
                errors => return Err(missing(errors)),
            },
        }
    };
    // One that runs already is started as the user wants it, if it is to go on running.
    let started = |i: &Instance| i.state == InstanceState::Running && i.shutdown_at.is_none();
    let names: Vec<_> = instances
        .into_iter()
        .filter(|instance| !started(instance))
        .map(|instance| instance.name)
        .collect();
    let request = StartRequest { timeout };
    let work = several::operate(context, &client, &names, async |client, name| {
        client.start(name, &request).await
    });
    several::within_daemons(timeout, "Timed out waiting for instance to start.", work).await
}

/// This command has texts of its own for names that can't be used.
fn missing(errors: &[Unusable]) -> CommandError {
    let mut all = Error::new(Code::InstanceNotFound, "instance(s) missing");
    for error in errors {
        all.details.push(match error {
            Unusable::Missing(name) => format!("Instance '{name}' does not exist."),
            Unusable::Deleted(name) => format!(
                "Instance '{name}' is deleted. Use 'recover' to recover it or 'purge' to \
                 permanently delete it."
            ),
            // No snapshots are named here.
            other @ Unusable::NoSnapshot(_) => other.text(),
        });
    }
    all.into()
}
