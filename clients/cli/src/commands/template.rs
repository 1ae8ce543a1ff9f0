//! `pileus template`: saved machines that launches start from.

use std::path::Path;

use futures_util::future::join_all;
use pileus_api::{Code, OperationState, Template, TemplateRequest};
use pileus_base::Error;
use pileus_client::Client;

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
            let request = request(image.as_deref(), cpus, memory, timeout, folder)?;
            create(context, &request).await
        }
        Action::List => {
            let templates = context.client().await?.templates().await?;
            context.print(&render::templates::list(&templates, format))
        }
        Action::Info { id } => {
            let client = context.client().await?;
            let template = match is_whole(&id) {
                true => client.template(&id).await?,
                false => by_beginning(&client.templates().await?, &id)?.clone(),
            };
            context.print(&render::templates::info(&template, format))
        }
        Action::Delete { ids } => delete(context, &ids).await,
        Action::Prune { all } => {
            let pruned = context.client().await?.prune_templates(all).await?;
            context.print(&render::templates::pruned(&pruned, format))
        }
    }
}

fn request(
    image: Option<&str>,
    cpus: Option<String>,
    memory: Option<String>,
    timeout: Option<String>,
    folder: &Path,
) -> Result<TemplateRequest, CommandError> {
    let memory = memory.map(|text| launch::size("memory", &text, launch::MIN_MEMORY));
    Ok(TemplateRequest {
        image: image.map(|image| launch::absolute(image, folder)),
        cpus: cpus.map(|text| launch::cpus(&text)).transpose()?,
        memory: memory.transpose()?,
        timeout: several::timeout(timeout.as_deref())?,
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
            context.print(&format!("Created: {}\n", operation.target))
        }
        (OperationState::Cancelled, Some(signal)) => {
            Err(launch::interrupted(signal, "No template was made"))
        }
        _ if request.timeout.is_some() => Err(CommandError::of_operation(operation).by_time()),
        _ => Err(CommandError::of_operation(operation)),
    }
}

async fn delete(context: &Context, ids: &[String]) -> Outcome {
    let client = context.client().await?;
    let ids = resolve(&client, ids).await?;
    let work = ids.into_iter().map(|id| {
        let client = &client;
        async move {
            let result = client.delete_template(&id).await;
            (id, result)
        }
    });
    let failed: Vec<_> = join_all(work)
        .await
        .into_iter()
        .filter_map(|(id, result)| Some((id, CommandError::from(result.err()?))))
        .collect();
    match failed.is_empty() {
        true => Ok(0),
        false => Err(CommandError::several(failed)),
    }
}

/// Whole IDs from those that may be shortened, each once.
async fn resolve(client: &Client, ids: &[String]) -> Result<Vec<String>, CommandError> {
    let mut whole: Vec<String> = Vec::new();
    let mut templates = None;
    for id in ids {
        let id = if is_whole(id) {
            id.clone()
        } else {
            if templates.is_none() {
                templates = Some(client.templates().await?);
            }
            by_beginning(templates.as_deref().unwrap_or_default(), id)?
                .id
                .clone()
        };
        if !whole.contains(&id) {
            whole.push(id);
        }
    }
    Ok(whole)
}

fn is_whole(id: &str) -> bool {
    id.len() == 16
}

/// The one template whose ID begins so.
fn by_beginning<'a>(templates: &'a [Template], text: &str) -> Result<&'a Template, Error> {
    let start = text.to_ascii_lowercase();
    let mut matching = templates
        .iter()
        .filter(|template| start.len() >= 4 && template.id.starts_with(&start));
    match (matching.next(), matching.next()) {
        (Some(template), None) => Ok(template),
        (Some(_), Some(_)) => Err(Error::new(
            Code::InvalidArgument,
            format!("More than one template has an ID that begins with \"{text}\""),
        )
        .advise("Give more digits of the ID.")),
        _ => Err(Error::new(
            Code::TemplateNotFound,
            format!("No template has an ID that begins with \"{text}\""),
        )
        .advise("pileus template list shows them; give 4 digits or more.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    #[test]
    fn an_id_may_be_shortened_to_what_is_clear() {
        let templates = samples::templates();
        let id = |text: &str| by_beginning(&templates, text).map(|template| template.id.as_str());
        assert_eq!(id("0123").unwrap(), "0123456789abcdef");
        assert_eq!(id("0123456789ABCD").unwrap(), "0123456789abcdef");
        assert_eq!(id("012").unwrap_err().code, Code::TemplateNotFound);
        assert_eq!(id("ffff").unwrap_err().code, Code::TemplateNotFound);
        let twice = [templates[0].clone(), templates[0].clone()];
        let err = by_beginning(&twice, "0123").unwrap_err();
        assert_eq!(err.code, Code::InvalidArgument);
    }
}
