//! What a command line that can't work is answered with under the name `multipass`. Under `pileus` the
//! parser's own texts stand, which say more.

use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Goes to standard output, as there.
pub(crate) fn unknown_command(word: &str) -> String {
    format!(
        "Error: Unknown command or alias '{word}' (try \"multipass help\" or \"multipass aliases\")\n"
    )
}

/// For standard error.
pub(crate) fn text(err: &clap::Error, command: &str) -> String {
    let context = |kind| match err.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => texts.first().cloned(),
        _ => None,
    };
    let argument = context(ContextKind::InvalidArg).unwrap_or_default();
    let value = context(ContextKind::InvalidValue).unwrap_or_default();
    let mut text = match err.kind() {
        ErrorKind::UnknownArgument if argument.starts_with('-') => {
            let option = argument.trim_start_matches('-');
            format!("Unknown option '{option}'.")
        }
        ErrorKind::UnknownArgument | ErrorKind::TooManyValues => too_many(command).to_owned(),
        ErrorKind::MissingRequiredArgument => too_few(command).to_owned(),
        ErrorKind::InvalidValue if argument.starts_with("--format") && !value.is_empty() => {
            "Invalid format type given.".to_owned()
        }
        ErrorKind::InvalidValue if value.is_empty() => {
            let option = argument.split([' ', '=']).next().unwrap_or_default();
            format!("Missing value after '{option}'.")
        }
        ErrorKind::ArgumentConflict if command == "exec" => {
            "Options --working-directory and --no-map-working-directory clash".to_owned()
        }
        _ => {
            let text = err.to_string();
            let line = text.lines().next().unwrap_or_default();
            line.trim_start_matches("error: ").to_owned()
        }
    };
    text.push('\n');
    if command == "exec" && err.kind() == ErrorKind::UnknownArgument {
        text.push_str(
            "\nOptions to the inner command should come after \"--\", like this:\n\
             multipass exec <instance> -- <command> <arguments>\n",
        );
    }
    text
}

fn too_many(command: &str) -> &'static str {
    match command {
        "list" | "ls" | "purge" | "version" | "networks" | "aliases" | "wait-ready" => {
            "This command takes no arguments"
        }
        "launch" | "snapshot" | "restore" | "clone" | "authenticate" | "auth" => {
            "Too many arguments supplied"
        }
        "find" | "prefer" => "Wrong number of arguments",
        "alias" => "Wrong number of arguments given",
        "set" => "Need exactly one key-value pair (in <key>=<value> form).",
        "get" => "Need exactly one setting key.",
        _ => "Too many arguments given",
    }
}

fn too_few(command: &str) -> &'static str {
    match command {
        "snapshot" => "Need the name of an instance to snapshot.",
        "restore" => "Need the name of a snapshot to restore.",
        "clone" => "Please provide the name of the source instance.",
        "alias" => "Wrong number of arguments given",
        "set" => "Need exactly one key-value pair (in <key>=<value> form).",
        "mount" | "umount" | "unmount" | "transfer" | "copy-files" => "Not enough arguments given",
        _ => "Wrong number of arguments",
    }
}
