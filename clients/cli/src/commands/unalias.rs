//! `pileus unalias`.

use crate::aliases;
use crate::context::Context;
use crate::error::{CommandError, Outcome};

/// Remove aliases
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Example:
  pileus unalias htop work.psql")]
pub struct Args {
    /// Names of aliases: those of the current context, or CONTEXT.NAME
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
    /// All aliases of the current context
    #[arg(long)]
    pub all: bool,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    match (args.names.is_empty(), args.all) {
        (true, false) => {
            return Err(CommandError::usage("Name argument or --all is required"));
        }
        (false, true) => {
            let text = "Cannot specify name(s) when --all option set";
            return Err(CommandError::usage(text));
        }
        _ => {}
    }
    aliases::change(&context.env, |aliases| {
        if args.all {
            aliases.current().clear();
            return Ok(());
        }
        let mut found = Vec::new();
        let mut missing = Vec::new();
        for name in &args.names {
            match aliases.find(name) {
                Some((context, name, _)) => found.push((context.to_owned(), name.to_owned())),
                None => missing.push(name.as_str()),
            }
        }
        if !missing.is_empty() {
            let word = if missing.len() > 1 {
                "aliases"
            } else {
                "alias"
            };
            let text = format!("Nonexistent {word}: {}.", missing.join(", "));
            return Err(CommandError::usage(text));
        }
        for (context, name) in found {
            aliases.remove(&context, &name);
        }
        Ok(())
    })?;
    Ok(0)
}
