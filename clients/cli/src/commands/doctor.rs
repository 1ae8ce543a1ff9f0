//! `pileus doctor`: whether this host has what pileus needs.

use pileus_api::Verdict;
use pileus_client::Client;

use crate::context::Context;
use crate::doctor::Host;
use crate::error::Outcome;
use crate::render::{self, FormatOption};

/// Check whether this host has what pileus needs
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Looks at the way to the daemon, the programs and permissions that are needed and, if a daemon answers, at
what it finds: virtualisation, QEMU, network, space. No daemon is started. Exit code 0 if all is good or
could only be better, 2 if something does not work.

Examples:
  pileus doctor
  pileus doctor --format json")]
pub struct Args {
    #[command(flatten)]
    pub format: FormatOption,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let host = Host {
        env: &context.env,
        place: &context.place,
        root: "/".into(),
    };
    let mut checks = host.checks();
    let mut info = None;
    if crate::daemon::answers(&context.place) {
        match Client::new(&context.place.socket)?.host().await {
            Ok(mut found) => {
                checks.append(&mut found.checks);
                info = Some(found);
            }
            Err(err) => checks.push(pileus_api::Check {
                name: "daemon".to_owned(),
                verdict: Verdict::Bad,
                message: format!("The daemon could not tell of the host: {}.", err.message),
                advice: Some("Restart the daemon; its log tells more.".to_owned()),
            }),
        }
    }
    let text = render::doctor::render(&checks, info.as_ref(), args.format.format);
    context.print(&text)?;
    let bad = checks.iter().any(|check| check.verdict == Verdict::Bad);
    Ok(if bad { 2 } else { 0 })
}
