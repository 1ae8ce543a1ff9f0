//! `pileus stop`: now, later, or not after all.

use pileus_api::{Code, Instance, InstanceState, StopRequest};

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::primary;
use crate::several::{self, Group, Names};

/// Stop running instances
#[derive(Debug, Clone, Default, clap::Args)]
#[command(after_help = "\
Examples:
  pileus stop web --time 10      in ten minutes; users in the guest are told
  pileus stop web --cancel       not after all")]
pub struct Args {
    #[command(flatten)]
    pub names: Names,
    /// Stop in so many minutes
    #[arg(short, long, value_name = "MINUTES", allow_hyphen_values = true)]
    pub time: Option<String>,
    /// Take back a stop that was asked for with --time
    #[arg(short, long)]
    pub cancel: bool,
    /// Cut the power instead of asking the guest to shut down
    #[arg(long)]
    pub force: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let request = request(args)?;
    let names = primary::or_primary(context, &args.names)?;
    let client = context.client().await?;
    let instances = several::select(&client, &names, Group::Operative).await?;
    let wanted = |instance: &Instance| match instance.state {
        InstanceState::Stopped => false,
        // It uses nothing, and stopping it would lose its memory.
        InstanceState::Suspended if names.all && !args.force => context.multipass(),
        _ => !args.cancel || instance.shutdown_at.is_some(),
    };
    let names: Vec<_> = instances
        .into_iter()
        .filter(wanted)
        .map(|instance| instance.name)
        .collect();
    let done = several::operate(context, &client, &names, async |client, name| {
        client.stop(name, &request).await
    });
    done.await.map_err(|mut err| {
        if matches!(err.error.code, Code::WrongState | Code::ShutdownTimeout) && !args.force {
            let text = "Use --force to power it off.".to_owned();
            match context.multipass() {
                true => err.error.details.push(text),
                false if err.error.advice.is_none() => err.hints.push(text),
                false => {}
            }
        }
        err
    })
}

fn request(args: &Args) -> Result<StopRequest, CommandError> {
    if args.time.is_some() && args.cancel {
        return Err(CommandError::usage(
            "Cannot set 'time' and 'cancel' options at the same time",
        ));
    }
    if args.force && (args.time.is_some() || args.cancel) {
        return Err(CommandError::usage(
            "Cannot set 'force' along with 'time' or 'cancel' options at the same time",
        ));
    }
    let minutes = args.time.as_deref().map(minutes).transpose()?;
    Ok(StopRequest {
        force: args.force,
        delay_minutes: minutes.filter(|minutes| *minutes > 0),
        cancel: args.cancel,
        ..Default::default()
    })
}

fn minutes(text: &str) -> Result<u64, CommandError> {
    let digits = text.strip_prefix('+').unwrap_or(text);
    let number = digits.bytes().all(|b| b.is_ascii_digit());
    match digits.parse::<u64>() {
        // Ten years: what is more can only be a slip.
        Ok(minutes) if number && minutes <= 5_256_000 => Ok(minutes),
        _ => Err(CommandError::usage("Time must be in digit form")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn minutes_are_digits_with_or_without_a_plus() {
        for (text, expected) in [("0", 0), ("5", 5), ("+10", 10), ("007", 7)] {
            assert_eq!(minutes(text).unwrap(), expected, "{text}");
        }
        for bad in ["", "+", "++1", "-1", "1m", "1.5", "now", "99999999", "+ 1"] {
            let err = minutes(bad).unwrap_err();
            assert_eq!(err.text("stop"), "Time must be in digit form\n", "{bad}");
            assert_eq!(err.exit_code(), 1);
        }
    }

    #[test]
    fn what_excludes_each_other_is_told() {
        let args = |time: Option<&str>, cancel, force| Args {
            time: time.map(str::to_owned),
            cancel,
            force,
            ..Default::default()
        };
        let text = |args: Args| request(&args).unwrap_err().text("stop");
        let both = "Cannot set 'time' and 'cancel' options at the same time\n";
        assert_eq!(text(args(Some("1"), true, false)), both);
        assert_eq!(text(args(Some("1"), true, true)), both);
        let force = "Cannot set 'force' along with 'time' or 'cancel' options at the same time\n";
        assert_eq!(text(args(Some("1"), false, true)), force);
        assert_eq!(text(args(None, true, true)), force);
        let later = request(&args(Some("+3"), false, false)).unwrap();
        assert_eq!((later.delay_minutes, later.cancel), (Some(3), false));
        let now = request(&args(Some("0"), false, false)).unwrap();
        assert_eq!(now, StopRequest::default());
    }
}
