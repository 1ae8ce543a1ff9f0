//! `pileus shell`.

use pileus_api::{Code, Instance, StartRequest, Timestamp};
use pileus_base::Error;

use crate::context::Context;
use crate::error::Outcome;
use crate::{complete, primary, session, several};

/// Open a shell on an instance
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
With standard input from a pipe or file, its lines are run and the shell ends.
An instance that is stopped or suspended is started first.")]
pub struct Args {
    /// Name of the instance; the primary one if not given
    #[arg(value_name = "NAME", add = complete::instances())]
    pub name: Option<String>,
    /// Seconds for the start of a stopped instance
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub timeout: Option<String>,
}

pub(crate) async fn run(context: &Context, args: Args) -> Outcome {
    let timeout = several::timeout(args.timeout.as_deref())?;
    let name = match args.name {
        Some(name) => name,
        None => primary::name(context)?,
    };
    let client = context.client().await?;
    match client.instance(&name).await {
        Ok(instance) => ends_soon(&instance, context.env.personality.program())?,
        Err(err) if err.code == Code::InstanceNotFound && primary::is(context, &name)? => {
            primary::launch(context, &name, args.timeout).await?;
        }
        Err(err) => return Err(err.into()),
    }
    let start = StartRequest { timeout };
    session::run(context, &name, Vec::new(), None, start).await
}

/// Nobody is let in who would be thrown out at once.
fn ends_soon(instance: &Instance, program: &str) -> Result<(), Error> {
    let Some(at) = instance.shutdown_at else {
        return Ok(());
    };
    if at.as_second() - Timestamp::now().as_second() >= 60 {
        return Ok(());
    }
    let name = &instance.name;
    let text = format!(
        "instance \"{name}\" is scheduled to shut down in less than a minute, use '{program} stop \
         --cancel {name}' to cancel the shutdown."
    );
    Err(Error::new(Code::WrongState, text))
}
