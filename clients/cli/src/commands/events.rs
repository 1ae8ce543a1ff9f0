//! `pileus events`: what changes in the daemon, as it happens.

use clap::ValueEnum;
use futures_util::StreamExt;
use pileus_api::{Code, Event, OperationState};
use pileus_base::Error;

use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::terminal::harmless;

/// Show what changes, as it happens
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
One line for each change, until Ctrl-C. With --format json each line is one JSON object.

Examples:
  pileus events --instance web
  pileus events --format json | jq 'select(.type == \"instance\")'")]
pub struct Args {
    /// Only those of this instance
    #[arg(long, value_name = "NAME", add = complete::instances())]
    pub instance: Option<String>,
    /// How to write each event
    #[arg(long, value_enum, default_value_t, hide_default_value = true)]
    pub format: Format,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    #[default]
    Table,
    /// One object a line
    Json,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let mut events = Box::pin(context.client().await?.events().await?);
    while let Some(event) = events.next().await {
        let event = event?;
        if args
            .instance
            .as_ref()
            .is_some_and(|name| !is_of(&event, name))
        {
            continue;
        }
        let line = match args.format {
            Format::Json => serde_json::to_string(&event)
                .map_err(|err| Error::internal(format!("Writing an event: {err}")))?,
            Format::Table => {
                let now = jiff::Zoned::now().strftime("%H:%M:%S").to_string();
                format!("{now}  {}", harmless(&text(&event)))
            }
        };
        context.print(&format!("{line}\n"))?;
    }
    let text = "The daemon has ended";
    Err(CommandError::from(Error::new(
        Code::DaemonUnreachable,
        text,
    )))
}

/// Whether an event tells of an instance. Missed ones may have.
fn is_of(event: &Event, wanted: &str) -> bool {
    match event {
        Event::Instance { name, .. } | Event::InstancePurged { name, .. } => {
            name.as_str() == wanted
        }
        Event::Operation { operation } => operation.target == wanted,
        Event::Lagged { .. } => true,
        Event::Images | Event::Templates => false,
    }
}

fn text(event: &Event) -> String {
    match event {
        Event::Instance {
            name,
            state,
            deleted,
            ..
        } => {
            let state = if *deleted { "deleted" } else { state.as_str() };
            format!("instance   {name}  {state}")
        }
        Event::InstancePurged { name, .. } => format!("instance   {name}  purged"),
        Event::Operation { operation } => {
            let state = match operation.state {
                OperationState::Running => "begins",
                OperationState::Succeeded => "succeeded",
                OperationState::Failed => "failed",
                OperationState::Cancelled => "cancelled",
            };
            let why = operation.error.as_ref();
            let why = why.map_or(String::new(), |error| format!(": {}", error.message));
            let (kind, target) = (operation.kind.as_str(), &operation.target);
            format!("operation  {target}  {kind} {state}{why}")
        }
        Event::Images => "images     changed".to_owned(),
        Event::Templates => "templates  changed".to_owned(),
        Event::Lagged { missed } => format!("{missed} events were missed"),
    }
}
