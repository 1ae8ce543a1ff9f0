//! `pileus logs`: the console of an instance. On a terminal it is text only: what the guest writes
//! can't move the cursor, change the title or answer for the user.

use futures_util::StreamExt;
use pileus_api::LogQuery;

use crate::complete;
use crate::context::Context;
use crate::error::Outcome;
use crate::terminal::Harmless;

/// Show the console log of an instance
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Name of the instance
    #[arg(value_name = "NAME", add = complete::instances())]
    pub name: String,
    /// Go on and show what is added
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last so many lines
    #[arg(short = 'n', long, value_name = "N")]
    pub lines: Option<u32>,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let client = context.client().await?;
    let query = LogQuery {
        follow: args.follow,
        tail: args.lines,
    };
    let mut log = Box::pin(client.log(&args.name, &query).await?);
    let mut filter = context.env.terminals.stdout.then(Harmless::default);
    while let Some(part) = log.next().await {
        let part = part?;
        match &mut filter {
            Some(filter) => context.print(&filter.pass(&part))?,
            None => context.write(&part)?,
        };
    }
    Ok(0)
}
