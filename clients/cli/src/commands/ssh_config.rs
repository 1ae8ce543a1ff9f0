//! `pileus ssh-config`.

use pileus_api::SshInfo;

use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::several::{self, Group, Names};
use crate::ssh_config::{self, Folder};
use crate::terminal::tell;

/// Make a configuration for ssh, scp and rsync
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
With it, ssh NAME (or NAME.pileus) reaches an instance through the daemon, without any network of the guest.
--write keeps ~/.config/pileus/ssh up to date: the configuration, the instances' own keys and their host
keys. Write it anew after a launch; what belongs to instances that are gone is removed.

Once, as the first line of ~/.ssh/config:
  Include ~/.config/pileus/ssh/config

Examples:
  pileus ssh-config --write && rsync -a site/ web:/srv/site/
  pileus ssh-config web")]
pub struct Args {
    /// Names of instances; all if none is given
    #[arg(value_name = "NAME", add = complete::instances(), conflicts_with = "write")]
    pub names: Vec<String>,
    /// Write the files instead of showing the configuration
    #[arg(long)]
    pub write: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let client = context.client().await?;
    let names = Names {
        all: args.names.is_empty(),
        names: args.names.clone(),
    };
    let mut instances = several::select(&client, &names, Group::Operative).await?;
    instances.sort_by(|a, b| a.name.cmp(&b.name));
    let mut infos: Vec<SshInfo> = Vec::new();
    for instance in &instances {
        match client.ssh_info(instance.name.as_str()).await {
            Ok(info) => infos.push(info),
            Err(err) if names.all => {
                context.warn(&format!("{} is left out: {}", instance.name, err.message));
            }
            Err(err) => return Err(CommandError::from(err)),
        }
    }
    let folder = Folder::of(&context.env)?;
    let proxy = ssh_config::proxy(&context.env, &context.place)?;
    if !args.write {
        return context.print(&folder.text(&infos, &proxy)?);
    }
    folder.write(&infos, &proxy)?;
    if context.env.terminals.stderr {
        let path = folder.config();
        tell(&format!(
            "Wrote {}; ssh takes it by: Include {0}",
            path.display()
        ));
    }
    Ok(0)
}
