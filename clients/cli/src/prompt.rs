//! Questions to the person at the terminal. Where standard input or output is no terminal nobody is
//! asked: each command says what it does then.

use std::io::{self, BufRead, Write};
use std::os::fd::AsFd;

use pileus_base::Error;
use rustix::termios::{self, LocalModes, OptionalActions, Termios};

use crate::context::Context;
use crate::error::CommandError;
use crate::session;
use crate::signals::Signals;

/// Whether there is somebody to ask.
pub(crate) fn live(context: &Context) -> bool {
    let terminals = context.env.terminals;
    terminals.stdin && terminals.stdout
}

/// Asks until the answer is understood; the Enter key alone is a yes, the end of input a no.
pub(crate) async fn confirmed(context: &Context, question: &str) -> Result<bool, CommandError> {
    context.print(&format!("{question} (Yes/no): "))?;
    loop {
        let Some(answer) = answer().await? else {
            return Ok(false);
        };
        match understood(&answer) {
            Some(yes) => return Ok(yes),
            None => context.print("Please answer Yes/no: ")?,
        };
    }
}

fn understood(answer: &str) -> Option<bool> {
    match answer.to_ascii_lowercase().as_str() {
        "" | "y" | "yes" => Some(true),
        "n" | "no" => Some(false),
        _ => None,
    }
}

/// A line of standard input, after a prompt if somebody is there; `None` at its end.
pub(crate) async fn line(context: &Context, prompt: &str) -> Result<Option<String>, CommandError> {
    if live(context) {
        context.print(prompt)?;
    }
    answer().await
}

/// As [`line`], but what is typed is not shown.
pub(crate) async fn secret(
    context: &Context,
    prompt: &str,
) -> Result<Option<String>, CommandError> {
    if !live(context) {
        return answer().await;
    }
    // Before the question: a quick hand answers at once.
    let quiet = Quiet::enter().map_err(|err| Error::io("Setting up the terminal", err))?;
    context.print(prompt)?;
    let line = answer().await;
    drop(quiet);
    // The Enter key was not shown either.
    context.print("\n")?;
    line
}

/// A line, without its end; a signal ends the wait, so that the terminal can be set right.
async fn answer() -> Result<Option<String>, CommandError> {
    let mut signals = Signals::to_end().map_err(|err| Error::io("Listening to signals", err))?;
    let read = tokio::task::spawn_blocking(|| {
        let mut line = String::new();
        let len = io::stdin().lock().read_line(&mut line)?;
        let line = line.trim_end_matches(['\n', '\r']).to_owned();
        io::Result::Ok((len > 0).then_some(line))
    });
    tokio::select! {
        read = read => {
            let read = read.map_err(|err| Error::internal(format!("Reading a line: {err}")))?;
            read.map_err(|err| Error::io("Reading standard input", err).into())
        }
        signal = signals.next() => Err(session::ended_by(signal)),
    }
}

/// A terminal that does not show what is typed, until this is dropped.
struct Quiet(Termios);

impl Quiet {
    fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = termios::tcgetattr(stdin.as_fd())?;
        let mut quiet = before.clone();
        quiet.local_modes -= LocalModes::ECHO;
        termios::tcsetattr(stdin.as_fd(), OptionalActions::Drain, &quiet)?;
        Ok(Self(before))
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = termios::tcsetattr(io::stdin().as_fd(), OptionalActions::Drain, &self.0);
        let _ = io::stdout().flush();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers() {
        for yes in ["", "y", "Yes", "YES"] {
            assert_eq!(understood(yes), Some(true), "{yes}");
        }
        for no in ["n", "No", "NO"] {
            assert_eq!(understood(no), Some(false), "{no}");
        }
        for what in ["yep", "1", " "] {
            assert_eq!(understood(what), None, "{what}");
        }
    }
}
