//! `pileus info`.

use futures_util::future::join_all;
use pileus_api::{Instance, InstanceState};
use pileus_client::Client;

use crate::complete;
use crate::context::Context;
use crate::error::Outcome;
use crate::render::{self, FormatOption};
use crate::several::{self, Group, Names};

/// Display information about instances
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Names of instances; all if none is given
    #[arg(value_name = "NAME", add = complete::instances())]
    pub names: Vec<String>,
    #[command(flatten)]
    pub format: FormatOption,
    /// The old way to ask for all
    #[arg(long, hide = true)]
    pub all: bool,
    /// Only what the daemon knows without the guest
    #[arg(long, hide = true)]
    pub no_runtime_information: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let names = Names {
        names: args.names.clone(),
        all: args.all || args.names.is_empty(),
    };
    if args.all {
        context.warn("the option --all is not needed any more: info shows all if no name is given");
    }
    let client = context.client().await?;
    let mut instances = several::select(&client, &names, Group::All).await?;
    if names.all {
        instances.sort_by(|a, b| a.name.cmp(&b.name));
    }
    if args.no_runtime_information {
        for instance in &mut instances {
            instance.report = None;
            instance.ipv4.clear();
        }
    } else {
        refresh(&client, &mut instances).await;
    }
    context.print(&render::info::render(&instances, args.format.format))
}

/// Asks for what the guests tell at this moment, which a list does not hold. An instance that is gone
/// meanwhile is shown as it was.
async fn refresh(client: &Client, instances: &mut [Instance]) {
    let asked = instances.iter_mut().map(|instance| async {
        if instance.deleted || instance.state == InstanceState::Stopped {
            return;
        }
        if let Ok(now) = client.instance(instance.name.as_str()).await {
            *instance = now;
        }
    });
    join_all(asked).await;
}
