//! `pileus help`.

use crate::args;
use crate::context::Context;
use crate::error::{CommandError, Outcome};

/// Display help about a command
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The command; a list of all if not given
    #[arg(value_name = "COMMAND")]
    pub command: Vec<String>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    let mut root = args::command();
    root.build();
    let mut command = &mut root;
    for name in &args.command {
        command = command.find_subcommand_mut(name).ok_or_else(|| {
            CommandError::usage(format!("Error: Unknown Command: '{name}'"))
                .hint("pileus help lists the commands.")
        })?;
    }
    let help = command.render_help();
    if context.env.terminals.stdout {
        // Colours as the terminal and NO_COLOR allow.
        let _ = command.print_help();
        return Ok(0);
    }
    context.print(&help.to_string())
}
