//! The command line of pileus: reads what the user wants, asks the daemon, shows the answer. It
//! holds no state and does nothing that others could not do over the API.
//!
//! ```text
//! args.rs          the options of all commands      environment.rs   what the process was given
//! commands/        one file a command               place.rs         which daemon is meant
//! render/          answers as table, JSON, …        daemon.rs        connect, start the user's own
//! progress.rs      spinners on stderr               session.rs       exec and shell
//! error.rs         exit codes, how errors look      hints.rs         what to do next, by code
//! run/             the parts of run
//! complete.rs      live names for the shell         docs.rs          man pages, docs/cli.md
//! ```
//!
//! Next step on the way of the data: `clients/client/`.
#![deny(unsafe_code)]

mod aliases;
pub mod args;
mod cloud_init;
mod commands;
mod complete;
mod context;
mod daemon;
pub mod docs;
pub mod environment;
pub mod error;
pub mod hints;
pub mod personality;
mod place;
mod progress;
pub mod render;
mod run;
mod session;
mod several;
mod signals;
mod terminal;

use std::ffi::OsString;
use std::process::ExitCode;

pub use args::command;
pub use environment::Environment;
pub use personality::Personality;

use crate::context::Context;

/// Runs one command line and returns the process's exit code.
pub fn run(args: impl IntoIterator<Item = OsString>, env: Environment) -> ExitCode {
    let cli = match args::parse(args) {
        Ok(cli) => cli,
        Err(code) => return code,
    };
    let Some(command) = cli.command else {
        return args::no_command(cli.version);
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
    let context = Context::new(&cli.global, env);
    let code = match runtime.block_on(command.run(&context)) {
        Ok(code) => code,
        Err(err) => err.show(name),
    };
    // A thread may still wait for standard input; it must not hold up the end.
    runtime.shutdown_background();
    ExitCode::from(code)
}
