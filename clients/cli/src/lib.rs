//! The command line of pileus: reads what the user wants, asks the daemon, shows the answer. It
//! holds no state and does nothing that others could not do over the API.
//!
//! ```text
//! personality.rs   pileus, or as multipass           parse.rs         reads the line, by name
//! args.rs          the options of all commands      environment.rs   what the process was given
//! commands/        one file a command               place.rs         which daemon is meant
//! render/          answers as table, JSON, …        daemon.rs        connect, start the user's own
//! progress.rs      spinners on stderr               session.rs       exec and shell
//! error.rs         exit codes, how errors look      hints.rs         what to do next, by code
//! run/             the parts of run                 transfer/, sftp/  files of guests
//! complete.rs      live names for the shell         docs.rs          man pages, docs/cli.md
//! ```
//!
//! Next step on the way of the data: `clients/client/`.
#![deny(unsafe_code)]

mod aliases;
pub mod args;
mod client_settings;
mod cloud_init;
mod commands;
mod complete;
mod context;
mod daemon;
pub mod docs;
mod doctor;
pub mod environment;
pub mod error;
mod general_help;
pub mod hints;
mod parse;
pub mod personality;
mod place;
mod primary;
mod progress;
mod prompt;
mod pump;
pub mod render;
mod run;
mod session;
mod several;
mod sftp;
mod signals;
mod ssh_config;
mod streams;
mod terminal;
mod transfer;
mod usage;

use std::ffi::OsString;
use std::process::ExitCode;

pub use args::command;
pub use environment::Environment;
pub use parse::grammar;
pub use personality::Personality;

use crate::args::Command;
use crate::context::Context;

/// Runs one command line and returns the process's exit code.
pub fn run(args: impl IntoIterator<Item = OsString>, env: Environment) -> ExitCode {
    let cli = match parse::parse(args, &env) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let command = match cli.command {
        Some(command) => command,
        // The old way to ask for it.
        None if cli.version && env.personality.multipass() => Command::version(),
        None => return parse::no_command(cli.version, env.personality),
    };
    // One thread is enough: the work is done by the daemon.
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(err) => {
            eprintln!("The runtime could not be started: {err}");
            return ExitCode::from(2);
        }
    };
    let name = command.name();
    let personality = env.personality;
    let context = Context::new(&cli.global, env);
    let code = match runtime.block_on(command.run(&context)) {
        Ok(code) => code,
        Err(err) => err.show(name, personality),
    };
    // A thread may still wait for standard input; it must not hold up the end.
    runtime.shutdown_background();
    ExitCode::from(code)
}
