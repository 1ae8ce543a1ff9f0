//! The program `pileus`. All of it is in the library beside this file, so that tests, man pages and
//! the reference can be made from the same code. Next step: `lib.rs`.

use std::process::ExitCode;

use clap_complete::CompleteEnv;
use pileus::Personality;

fn main() -> ExitCode {
    // Ends the process if the shell asked for completions. The script names the program as it is
    // found in PATH, wherever the copy lies that wrote it.
    let personality = Personality::of_program(std::env::args_os().next().as_deref());
    CompleteEnv::with_factory(move || pileus::grammar(personality))
        .completer(personality.program())
        .complete();
    pileus::run(std::env::args_os(), pileus::Environment::of_process())
}
