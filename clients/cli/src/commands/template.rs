//! `pileus template`: saved machines that launches start from.

use std::path::Path;

use pileus_api::{OperationState, TemplateRequest};
use pileus_base::Error;

use super::launch;
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::{self, Format};
use crate::signals::Signals;
use crate::{complete, several};

/// Make, show and remove templates: saved machines that launches start from
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    pub action: Action,
    /// How to write the answer
    #[arg(
        long,
        value_enum,
        default_value_t,
        hide_default_value = true,
        global = true
    )]
    pub format: Format,
}

#[derive(Debug, Clone, clap::Subcommand)]
pub enum Action {
    /// Boot a machine once and save it
    Create {
        /// An image's name (see pileus find), file, address or digest; the default image if not given
        #[arg(value_name = "IMAGE", add = complete::images())]
        image: Option<String>,
        /// Number of CPUs [default: 1]
        #[arg(short, long, value_name = "N", allow_hyphen_values = true)]
        cpus: Option<String>,
        /// Memory, at least 512M [default: 1G]
        #[arg(
            short,
            long,
            alias = "mem",
            value_name = "SIZE",
            allow_hyphen_values = true
        )]
        memory: Option<String>,
        /// Seconds for the boot, and again for cloud-init
        #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
        timeout: Option<String>,
    },
    /// List the templates
    #[command(visible_alias = "ls")]
    List,
    /// Show all about a template
    Info {
        /// The template's ID, or the beginning of it
        #[arg(value_name = "ID", add = complete::templates())]
        id: String,
    },
    /// Delete templates
    #[command(visible_alias = "rm")]
    Delete {
        /// IDs of templates, or their beginnings
        #[arg(value_name = "ID", required = true, add = complete::templates())]
        ids: Vec<String>,
    },
    /// Delete the templates that no launch would use any more
    Prune {
        /// Delete all that can go
        #[arg(long)]
        all: bool,
    },
}

pub(crate) async fn run(context: &Context, args: Args) -> Outcome {
    let format = args.format;
    match args.action {
        Action::Create {
            image,
            cpus,
            memory,
            timeout,
        } => {
            let folder = &context.env.current_folder;
            let shape = [&cpus, &memory, &timeout].map(|text| text.as_deref());
            let request = request(image.as_deref(), shape, folder)?;
            create(context, &request).await
        }
        Action::List => {
            let templates = context.client().await?.templates().await?;
            context.print(&render::templates::list(&templates, format))
        }
        Action::Info { id } => {
            let template = context.client().await?.template(&id).await?;
            context.print(&render::templates::info(&template, format))
        }
        Action::Delete { ids } => delete(context, &ids, format).await,
        Action::Prune { all } => {
            let pruned = context.client().await?.prune_templates(all).await?;
            context.print(&render::templates::pruned(&pruned, format))
        }
    }
}

fn request(
    image: Option<&str>,
    [cpus, memory, timeout]: [Option<&str>; 3],
    folder: &Path,
) -> Result<TemplateRequest, CommandError> {
    let memory = memory.map(|text| launch::size("memory", text, launch::MIN_MEMORY));
    Ok(TemplateRequest {
        image: image.map(|image| launch::absolute(image, folder)),
        cpus: cpus.map(launch::cpus).transpose()?,
        memory: memory.transpose()?,
        timeout: several::timeout(timeout)?,
    })
}

async fn create(context: &Context, request: &TemplateRequest) -> Outcome {
    let client = context.client().await?;
    let mut signals = Signals::to_end().map_err(|err| Error::io("Listening to signals", err))?;
    let operation = client.create_template(request).await?;
    let mut line = context.progress().line("the template");
    // The daemon bounds it by itself.
    let followed = launch::follow(&client, operation, None, &mut signals, &mut line).await?;
    let (operation, signal) = followed;
    line.end(&operation);
    drop(line);
    match (operation.state, signal) {
        (OperationState::Succeeded, _) => {
            let what = operation.result.as_ref().unwrap_or(&operation.target);
            context.print(&format!("Ready: {what}\n"))
        }
        (OperationState::Cancelled, Some(signal)) => {
            Err(launch::interrupted(signal, "No template was made"))
        }
        _ if request.timeout.is_some() => Err(CommandError::of_operation(operation).by_time()),
        _ => Err(CommandError::of_operation(operation)),
    }
}

async fn delete(context: &Context, ids: &[String], format: Format) -> Outcome {
    let client = context.client().await?;
    let mut removed = Vec::new();
    let mut failed = Vec::new();
    // One after the other, so that two beginnings of one ID don't meet.
    for id in ids {
        match client.delete_template(id).await {
            Ok(template) => removed.push(template),
            Err(err) => failed.push((id.clone(), CommandError::from(err))),
        }
    }
    if !removed.is_empty() || failed.is_empty() {
        context.print(&render::templates::pruned(&removed, format))?;
    }
    match failed.is_empty() {
        true => Ok(0),
        false => Err(CommandError::several(failed)),
    }
}
