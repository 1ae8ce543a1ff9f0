//! `pileus prefer`.

use crate::aliases;
use crate::context::Context;
use crate::error::{CommandError, Outcome};

/// Switch the current alias context
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Aliases of the current context are called by their names alone, those of others by CONTEXT.NAME. A context
is made when it is first preferred, and it is gone when it is empty and another one is preferred.

Example:
  pileus prefer work")]
pub struct Args {
    /// Name of the context
    #[arg(value_name = "NAME", num_args = 0..)]
    pub names: Vec<String>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    let [name] = args.names.as_slice() else {
        return Err(CommandError::usage("Wrong number of arguments given"));
    };
    if !aliases::is_file_name(name) {
        let text = "The name of a context has to be a valid filename";
        return Err(CommandError::usage(text));
    }
    aliases::change(&context.env, |aliases| {
        aliases.prefer(name);
        Ok(())
    })?;
    Ok(0)
}
