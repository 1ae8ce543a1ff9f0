//! `pileus alias`.

use std::path::Path;

use pileus_api::Code;

use crate::aliases::store::{Alias, Folder};
use crate::aliases::{self, scripts};
use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::parse;

/// Create an alias
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
An alias is a name for a command in an instance: pileus NAME runs it, and so does the script NAME in a
folder that can be added to PATH. It belongs to the current context (see pileus prefer).

Examples:
  pileus alias web:htop
  pileus alias web:/usr/bin/psql db
  pileus db -- shop")]
pub struct Args {
    /// The instance and the command, and the alias's name if it is not to be that of the command
    #[arg(value_name = "INSTANCE:COMMAND [NAME]", num_args = 0..)]
    pub words: Vec<String>,
    /// Do not follow the current folder into a mount
    #[arg(short, long)]
    pub no_map_working_directory: bool,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let (definition, name) = match args.words.as_slice() {
        [definition] => (definition, None),
        [definition, name] => (definition, Some(name.as_str())),
        _ => return Err(CommandError::usage("Wrong number of arguments given")),
    };
    let (instance, command) = match definition.split_once(':') {
        None | Some((_, "")) => return Err(CommandError::usage("No command given")),
        Some(("", _)) => return Err(CommandError::usage("No instance name given")),
        Some(parts) => parts,
    };
    let name = name.or_else(|| Path::new(command).file_name()?.to_str());
    let Some(name) = name.filter(|name| aliases::is_file_name(name)) else {
        return Err(CommandError::usage("Alias has to be a valid filename"));
    };
    exists(context, instance).await?;
    if parse::is_command(context.env.personality, name) {
        let text = format!("Alias name '{name}' clashes with a command name");
        return Err(CommandError::usage(text));
    }
    let alias = Alias {
        command: command.to_owned(),
        instance: instance.to_owned(),
        working_directory: match args.no_map_working_directory {
            true => Folder::Default,
            false => Folder::Map,
        },
    };
    let (before, ()) = aliases::change(&context.env, |aliases| {
        let current = aliases.current();
        if current.contains_key(name) {
            let text = format!("Alias '{name}' already exists in current context");
            return Err(CommandError::usage(text));
        }
        current.insert(name.to_owned(), alias);
        Ok(())
    })?;
    let folder = scripts::folder(&context.env)?;
    if before.is_empty() && !scripts::is_in_path(&context.env, &folder) {
        let program = context.env.personality.program();
        let folder = folder.display();
        return context.print(&format!(
            "To call aliases without `{program}` in front, add this to your shell's configuration \
             (.bashrc, .zshrc or the like):\n\nPATH=\"$PATH:{folder}\"\n"
        ));
    }
    Ok(0)
}

async fn exists(context: &Context, instance: &str) -> Result<(), CommandError> {
    match context.client().await?.instance(instance).await {
        Ok(_) => Ok(()),
        Err(err) if err.code == Code::InstanceNotFound => {
            let text = format!("Instance '{instance}' does not exist");
            Err(CommandError::usage(text))
        }
        Err(err) => Err(err.into()),
    }
}
