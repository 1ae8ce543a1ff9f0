//! `pileus help`.

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::{general_help, parse};

/// Display help about a command
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// The command; a list of all if not given
    #[arg(value_name = "COMMAND")]
    pub command: Vec<String>,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    let personality = context.env.personality;
    if personality.multipass() && args.command.is_empty() {
        return context.print(&general_help::text());
    }
    let mut root = parse::grammar(personality);
    root.build();
    let mut command = &mut root;
    for name in &args.command {
        let found = command.find_subcommand_mut(name);
        let found = found.filter(|found| !personality.multipass() || !found.is_hide_set());
        command = found.ok_or_else(|| {
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
