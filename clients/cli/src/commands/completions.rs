//! `pileus completions`: the line that a shell's start file needs. The line asks this program for
//! the script at each start of the shell, so that both are always of the same version.

use clap::ValueEnum;

use crate::context::Context;
use crate::error::Outcome;

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Shell {
    Bash,
    Zsh,
    Fish,
}

/// Print the line that turns on completion in a shell
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
Examples:
  pileus completions bash >> ~/.bashrc
  pileus completions zsh >> ~/.zshrc
  pileus completions fish >> ~/.config/fish/config.fish")]
pub struct Args {
    /// The shell
    #[arg(value_enum)]
    pub shell: Shell,
}

pub(crate) fn run(context: &Context, args: &Args) -> Outcome {
    context.print(match args.shell {
        Shell::Bash => "source <(COMPLETE=bash pileus)\n",
        Shell::Zsh => "source <(COMPLETE=zsh pileus)\n",
        Shell::Fish => "COMPLETE=fish pileus | source\n",
    })
}
