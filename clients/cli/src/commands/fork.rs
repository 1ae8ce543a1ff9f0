//! `pileus fork`: clones of a running instance, its memory included.

use pileus_api::{ForkRequest, InstanceName, OperationState, Phase};

use super::launch;
use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::progress::stood_still;
use crate::terminal::tell;

/// Clone a running instance, its memory included
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
The instance stands still while its memory is taken; the clones go on from that moment, each with an
identity of its own. Their names are printed, one a line.

Example:
  pileus fork web -n 3")]
pub struct Args {
    /// Name of the instance
    #[arg(value_name = "NAME", add = complete::instances())]
    pub source: String,
    /// How many clones [default: 1, or one for each name]
    #[arg(short = 'n', long, value_name = "N", allow_hyphen_values = true)]
    pub count: Option<String>,
    /// Name of a clone; NAME-fork1, NAME-fork2, … if not given
    #[arg(long, value_name = "NAME")]
    pub name: Vec<String>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let request = request(args)?;
    let client = context.client().await?;
    let reply = client.fork(&args.source, &request).await?;
    let mut line = context.progress().line(&args.source);
    let operation = client
        .follow(reply.operation, |event| line.event(event))
        .await?;
    line.end(&operation);
    drop(line);
    if operation.state != OperationState::Succeeded {
        return Err(CommandError::of_operation(operation));
    }
    let pause = operation.phases.iter().find(|p| p.phase == Phase::Halted);
    if let Some(pause) = pause.filter(|_| context.env.terminals.stderr || context.verbose > 0) {
        tell(&stood_still(&args.source, pause.milliseconds));
    }
    let names: String = reply.names.iter().map(|name| format!("{name}\n")).collect();
    context.print(&names)
}

fn request(args: &Args) -> Result<ForkRequest, CommandError> {
    let count = match args.count.as_deref() {
        None => None,
        Some(text) => match text.parse::<u32>() {
            Ok(count) if (1..=100).contains(&count) => Some(count),
            _ => {
                let text = format!("error: '{text}' clones can't be made; 1 to 100 can");
                return Err(CommandError::usage(text));
            }
        },
    };
    let names = args.name.iter().map(|name| launch::name(name));
    let names: Vec<InstanceName> = names.collect::<Result<_, _>>()?;
    if count.is_some_and(|count| names.len() > count as usize) {
        return Err(CommandError::usage(
            "error: more names were given than clones are to be made",
        ));
    }
    Ok(ForkRequest { count, names })
}
