//! How a command ends badly: the exit code, and what is shown on standard error.
//!
//! ```text
//! COMMAND failed: MESSAGE
//! code: CODE; phase: PHASE        (of an operation)
//! DETAIL …
//! hint: …
//! ```
//!
//! Under the name `multipass` there are no codes and no hints.

use std::io;

use pileus_api::{Code, Operation, Phase};
use pileus_base::Error;

use crate::personality::Personality;
use crate::{hints, terminal};

/// What a command returns: the exit code of a success, or an error.
pub type Outcome = Result<u8, CommandError>;

/// Which kind of failure it is; decides on the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The command line can't work.
    Usage,
    Failed,
    /// The client's own `--timeout` was over.
    TimedOut,
    /// The way to a command in the guest broke.
    Channel,
    /// The reader of standard output is gone: nothing is shown.
    ClosedPipe,
    /// A signal ended the command.
    Signal(u8),
}

impl Kind {
    pub fn exit_code(self) -> u8 {
        match self {
            Kind::Usage => 1,
            Kind::Failed => 2,
            Kind::TimedOut => 5,
            Kind::Channel => 255,
            Kind::ClosedPipe => 128 + 13,
            Kind::Signal(number) => 128 + number,
        }
    }
}

#[derive(Debug)]
pub struct CommandError {
    pub kind: Kind,
    pub error: Box<Error>,
    pub hints: Vec<String>,
    /// In which phase an operation failed; its code is shown then.
    operation: Option<Option<Phase>>,
    /// Instead of the one that the kind has.
    exit_code: Option<u8>,
}

impl CommandError {
    pub fn new(kind: Kind, error: Error) -> Self {
        Self {
            kind,
            error: Box::new(error),
            hints: Vec::new(),
            operation: None,
            exit_code: None,
        }
    }

    /// Gives the error another exit code than the one of its kind.
    #[must_use]
    pub fn with_exit_code(mut self, code: u8) -> Self {
        self.exit_code = Some(code);
        self
    }

    pub fn exit_code(&self) -> u8 {
        self.exit_code.unwrap_or_else(|| self.kind.exit_code())
    }

    /// The user's mistake on the command line: shown without the command's name.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Kind::Usage, Error::new(Code::InvalidArgument, message))
    }

    /// A mistake that is only seen when the command is carried out; details are shown below.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Error::new(Code::InvalidArgument, "Invalid arguments supplied")
            .detail(detail)
            .into()
    }

    /// A bound that the user gave was reached in the daemon: the exit code is that of a time-out.
    #[must_use]
    pub fn by_time(mut self) -> Self {
        if matches!(self.error.code, Code::BootTimeout | Code::CloudInitTimeout) {
            self.kind = Kind::TimedOut;
        }
        self
    }

    pub fn timed_out(message: impl Into<String>) -> Self {
        Self::new(Kind::TimedOut, Error::new(Code::TimedOut, message))
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// The error of an operation that did not succeed.
    pub fn of_operation(operation: Operation) -> Self {
        let phase = operation.phase;
        let error = match pileus_client::into_result(operation) {
            Ok(_) => Error::internal("The operation succeeded"),
            Err(error) => error,
        };
        let mut err = Self::from(error);
        err.operation = Some(phase);
        err
    }

    /// One error for several instances; a single one stays as it is.
    pub fn several(mut errors: Vec<(String, CommandError)>) -> Self {
        if errors.len() == 1 {
            return errors.remove(0).1;
        }
        let mut all = Error::new(Code::InvalidArgument, "The following errors occurred:");
        let mut hints = Vec::new();
        for (name, err) in errors {
            let message = &err.error.message;
            all.details.push(if message.contains(&name) {
                message.clone()
            } else {
                format!("{name}: {message}")
            });
            let details = err.error.details.iter().map(|line| format!("    {line}"));
            all.details.extend(details);
            hints.extend(err.all_hints());
        }
        hints.dedup();
        Self {
            hints,
            ..Self::new(Kind::Failed, all)
        }
    }

    fn all_hints(&self) -> Vec<String> {
        let mut all = self.hints.clone();
        if let Some(advice) = &self.error.advice {
            all.push(advice.clone());
        } else if all.is_empty() && self.kind != Kind::Usage {
            all.extend(hints::for_code(self.error.code).map(str::to_owned));
        }
        all
    }

    /// What is shown on standard error for a command of this name.
    pub fn text(&self, command: &str) -> String {
        self.text_as(command, Personality::Pileus)
    }

    /// The same under another name of the program.
    pub fn text_as(&self, command: &str, personality: Personality) -> String {
        if self.kind == Kind::ClosedPipe {
            return String::new();
        }
        if personality.multipass() {
            return self.multipass_text(command);
        }
        let mut lines = Vec::new();
        lines.push(match self.kind {
            Kind::Usage | Kind::TimedOut => self.error.message.clone(),
            _ => format!("{command} failed: {}", self.error.message),
        });
        if let Some(phase) = self.operation {
            let phase = phase.map_or(String::new(), |phase| {
                format!("; phase: {}", phase.as_str())
            });
            lines.push(format!("code: {}{phase}", self.error.code));
        }
        lines.extend(self.error.details.iter().cloned());
        lines.extend(self.all_hints().iter().map(|hint| format!("hint: {hint}")));
        shown(&lines)
    }

    fn multipass_text(&self, command: &str) -> String {
        let message = Personality::Multipass.retell(&self.error.message);
        let details = self.error.details.iter();
        let details = details.map(|detail| Personality::Multipass.retell(detail));
        let first = match self.kind {
            Kind::Usage | Kind::TimedOut => message,
            _ => format!("{command} failed: {message}"),
        };
        let lines: Vec<String> = std::iter::once(first).chain(details).collect();
        shown(&lines)
    }

    /// Shows the error and returns the exit code.
    pub fn show(&self, command: &str, personality: Personality) -> u8 {
        use std::io::Write;
        let text = self.text_as(command, personality);
        // Nothing is left to do when standard error is gone as well.
        let _ = io::stderr().write_all(text.as_bytes());
        self.exit_code()
    }
}

/// Guests and images have a say in these lines; they must not drive the terminal.
fn shown(lines: &[String]) -> String {
    let mut text = terminal::harmless(&lines.join("\n")).into_owned();
    text.push('\n');
    text
}

impl From<Error> for CommandError {
    fn from(error: Error) -> Self {
        Self::new(Kind::Failed, error)
    }
}

/// Errors of writing to standard output.
impl From<io::Error> for CommandError {
    fn from(err: io::Error) -> Self {
        let kind = match err.kind() {
            io::ErrorKind::BrokenPipe => Kind::ClosedPipe,
            _ => Kind::Failed,
        };
        Self::new(kind, no_room(Error::io("Writing to standard output", err)))
    }
}

/// What fills up where this program writes is not the daemon's storage: images that are pruned there make no room.
pub(crate) fn no_room(err: Error) -> Error {
    match err.code {
        Code::NoSpace => err.advise("Make room there, or write it elsewhere."),
        _ => err,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_this_program_writes_no_pruned_image_makes_room() {
        let full = io::Error::from_raw_os_error(28);
        let said = CommandError::from(full).text("list");
        assert!(
            said.ends_with("\nhint: Make room there, or write it elsewhere.\n"),
            "{said}"
        );
    }

    #[test]
    fn a_missing_instance_stands_alone_on_its_line() {
        let missing = |name: &str| {
            let text = format!("instance \"{name}\" does not exist");
            (
                name.to_owned(),
                Error::new(Code::InstanceNotFound, text).into(),
            )
        };
        let err = CommandError::several(vec![missing("a"), missing("b")]);
        assert_eq!(
            err.text("info"),
            "info failed: The following errors occurred:\n\
             instance \"a\" does not exist\ninstance \"b\" does not exist\n"
        );
        assert_eq!(err.kind.exit_code(), 2);
    }

    #[test]
    fn an_error_shows_details_without_control_characters_and_one_hint() {
        let err = Error::new(Code::BootTimeout, "No sign of life")
            .detail("\x1b[31mpanic\x1b[0m\x07")
            .advise("Look at the log.");
        let text = CommandError::from(err).text("launch");
        assert_eq!(
            text,
            "launch failed: No sign of life\npanic\nhint: Look at the log.\n"
        );
    }

    #[test]
    fn under_the_other_name_there_are_no_hints_and_no_codes() {
        let mut err = CommandError::from(
            Error::new(Code::BootTimeout, "No sign of life")
                .detail("the console's tail")
                .advise("pileus logs shows more."),
        );
        err.operation = Some(Some(Phase::Booting));
        assert_eq!(
            err.text_as("launch", Personality::Multipass),
            "launch failed: No sign of life\nthe console's tail\n"
        );
        let err = Error::new(
            Code::DaemonUnreachable,
            "cannot connect to the pileus socket",
        )
        .detail("Please ensure pileusd is running and '/x/pileusd.sock' is accessible");
        assert_eq!(
            CommandError::from(err).text_as("list", Personality::Multipass),
            "list failed: cannot connect to the multipass socket\n\
             Please ensure multipassd is running and '/x/pileusd.sock' is accessible\n"
        );
    }

    #[test]
    fn usage_is_shown_plainly() {
        let err = CommandError::usage("Name argument or --all is required");
        assert_eq!(err.text("stop"), "Name argument or --all is required\n");
        assert_eq!(err.kind.exit_code(), 1);
    }
}
