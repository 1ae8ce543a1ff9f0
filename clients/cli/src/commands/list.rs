//! `pileus list`.

use pileus_api::Instance;

use crate::client_settings;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::{self, FormatOption};

/// List all available instances or snapshots
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(flatten)]
    pub format: FormatOption,
    /// List the snapshots of all instances
    #[arg(long)]
    pub snapshots: bool,
    /// Leave the addresses out
    #[arg(long, hide = true)]
    pub no_ipv4: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    if args.snapshots && args.no_ipv4 {
        return Err(CommandError::usage(
            "IP addresses are not applicable in conjunction with listing snapshots",
        ));
    }
    let client = context.client().await?;
    let primary = client_settings::primary_name(&context.env)?;
    if args.snapshots {
        let mut snapshots = client.all_snapshots().await?;
        snapshots.sort_by_key(|s| {
            let name = s.instance.to_string();
            (Some(&name) != primary.as_ref(), name, s.created_at)
        });
        let view = context.view(args.format);
        return context.print(&render::snapshots::list(&snapshots, &view));
    }
    let mut instances = client.instances().await?;
    sort(&mut instances, primary.as_deref());
    let text = render::list::render(&instances, args.format.format, !args.no_ipv4);
    context.print(&text)
}

/// The primary instance first, the others by name.
pub(crate) fn sort(instances: &mut [Instance], primary: Option<&str>) {
    instances.sort_by_key(|i| (Some(i.name.as_str()) != primary, i.name.to_string()));
}
