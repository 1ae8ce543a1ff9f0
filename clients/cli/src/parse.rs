//! From the words of a command line to a command: under which name, by which alias, and what is said of
//! a line that can't work. The grammar itself stands in `args.rs`.

use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::FromArgMatches;
use clap::error::ErrorKind;

use crate::args::{Cli, command};
use crate::commands::run;
use crate::environment::Environment;
use crate::personality::Personality;
use crate::{general_help, usage};

/// The grammar under a name. Under `multipass` help shows nothing that Multipass does not have.
pub fn grammar(personality: Personality) -> clap::Command {
    let root = command();
    if !personality.multipass() {
        return root;
    }
    let shown = |arg: clap::Arg| {
        let ours = arg.get_long().is_some_and(general_help::is_own_option);
        let hidden = ours || arg.is_hide_set();
        let help = arg.get_help().map(ToString::to_string);
        let help = help.map(|help| help.replace("pileus", "multipass"));
        arg.hide(hidden).help(help.unwrap_or_default())
    };
    root.name("multipass")
        .bin_name("multipass")
        .about(general_help::ABOUT)
        .after_help("")
        .mut_args(shown)
        .mut_subcommands(|command| {
            let Some(summary) = general_help::summary(command.get_name()) else {
                return command.hide(true);
            };
            let command = command.about(summary).after_help("").mut_args(shown);
            if command.get_name() == "exec" {
                // Options of the inner command need the `--`.
                return command.mut_arg("command", |arg| arg.trailing_var_arg(false));
            }
            command
        })
}

/// Whether a word is a command under this name, or a synonym of one.
pub fn is_command(personality: Personality, word: &str) -> bool {
    let root = command();
    let mut commands = root.get_subcommands();
    let found =
        commands.find(|c| c.get_name() == word || c.get_all_aliases().any(|alias| alias == word));
    found.is_some_and(|command| {
        !personality.multipass() || general_help::summary(command.get_name()).is_some()
    })
}

/// Where the command stands in a line: the first word that is no option nor an option's value.
fn command_at(args: &[OsString]) -> Option<usize> {
    let mut at = 1;
    loop {
        match args.get(at)?.to_string_lossy().as_ref() {
            "--socket" | "--storage" => at += 2,
            option if option.starts_with('-') => at += 1,
            _ => return Some(at),
        }
    }
}

/// Parses a command line; what can't be parsed is shown, and an exit code is returned.
pub fn parse(args: impl IntoIterator<Item = OsString>, env: &Environment) -> Result<Cli, ExitCode> {
    let personality = env.personality;
    let mut args: Vec<OsString> = args.into_iter().collect();
    if let Some(at) = command_at(&args) {
        let word = args[at].to_string_lossy().into_owned();
        if !is_command(personality, &word) {
            match crate::aliases::rewrite(&args, at, env) {
                Some(rewritten) => args = rewritten,
                None if personality.multipass() => {
                    show(&usage::unknown_command(&word));
                    return Err(ExitCode::from(1));
                }
                // The parser suggests near misses.
                None => {}
            }
        }
    }
    let matches = grammar(personality).try_get_matches_from(&args);
    let parsed = matches.and_then(|matches| Cli::from_arg_matches(&matches));
    parsed.map_err(|err| ExitCode::from(explain(&err, &args, personality)))
}

/// Shows why a line can't be parsed, or the help that it asks for; returns the exit code.
fn explain(err: &clap::Error, args: &[OsString], personality: Personality) -> u8 {
    let at = command_at(args);
    let help = matches!(
        err.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    );
    match (help, personality) {
        (true, Personality::Multipass) if at.is_none() => show(&general_help::text()),
        (false, Personality::Multipass) => {
            let command = at.map(|at| args[at].to_string_lossy()).unwrap_or_default();
            // Nothing is left to do when standard error is gone.
            let _ = std::io::stderr().write_all(usage::text(err, &command).as_bytes());
        }
        // A reader that closed the pipe has seen enough.
        _ => drop(err.print()),
    }
    match help {
        true => 0,
        // Its exit codes belong to the command.
        false if at.is_some_and(|at| args[at] == "run") => run::FAILED,
        false => 1,
    }
}

/// Writes to standard output; a reader that closed the pipe has seen enough.
fn show(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Without a command the help is shown, but that is no success; `pileus --version` is `pileus version`
/// without asking the daemon.
pub fn no_command(version: bool, personality: Personality) -> ExitCode {
    if version {
        let (program, version) = (personality.program(), personality.version());
        show(&format!("{program} {version}\n"));
        return ExitCode::SUCCESS;
    }
    if personality.multipass() {
        show(&general_help::text());
    } else {
        let _ = command().print_help();
    }
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::Command;

    fn as_multipass(line: &str) -> Result<Option<Command>, String> {
        let args = line.split(' ').map(OsString::from);
        let grammar = grammar(Personality::Multipass);
        let matches = grammar.try_get_matches_from(args);
        let parsed = matches.and_then(|matches| Cli::from_arg_matches(&matches));
        let word = line.split(' ').nth(1).unwrap_or_default();
        parsed
            .map(|cli| cli.command)
            .map_err(|err| usage::text(&err, word))
    }

    #[test]
    fn the_other_names_grammar_holds() {
        grammar(Personality::Multipass).debug_assert();
        for line in [
            "multipass launch 24.04 --name n -c 2 --mem 1G",
            "multipass launch -c1 -d5G --name=n 24.04 --timeout 300 --cloud-init -",
            "multipass launch --network name=eth0,mode=manual --bridged --mount /tmp:/x",
            "multipass ls --format=json",
            "multipass list -vvvv --no-ipv4",
            "multipass info --all",
            "multipass info foo foo.snap --format yaml --no-runtime-information",
            "multipass find --format=json --force-update",
            "multipass delete n --purge a",
            "multipass stop foo -t 5",
            "multipass copy-files a b",
            "multipass set local.driver=qemu",
            "multipass networks --format csv",
            "multipass aliases --format json",
        ] {
            assert!(as_multipass(line).is_ok(), "{line}");
        }
    }

    #[test]
    fn exec_takes_options_anywhere_before_two_dashes() {
        for (line, dir, no_map, command) in [
            ("multipass exec foo ls", None, false, vec!["ls"]),
            (
                "multipass exec foo ls a b",
                None,
                false,
                vec!["ls", "a", "b"],
            ),
            ("multipass exec foo -- ls -l", None, false, vec!["ls", "-l"]),
            ("multipass exec -n foo -- ls", None, true, vec!["ls"]),
            (
                "multipass exec foo -n -- ls -n",
                None,
                true,
                vec!["ls", "-n"],
            ),
            (
                "multipass exec foo -d /t -- pwd",
                Some("/t"),
                false,
                vec!["pwd"],
            ),
            (
                "multipass exec foo pwd -d /t",
                Some("/t"),
                false,
                vec!["pwd"],
            ),
            (
                "multipass exec foo -- a -- b",
                None,
                false,
                vec!["a", "--", "b"],
            ),
        ] {
            let Ok(Some(Command::Exec(args))) = as_multipass(line) else {
                panic!("{line}");
            };
            assert_eq!(args.name, "foo", "{line}");
            assert_eq!(args.working_directory.as_deref(), dir, "{line}");
            assert_eq!(args.no_map_working_directory, no_map, "{line}");
            assert_eq!(args.command, command, "{line}");
        }
    }

    #[test]
    fn what_can_not_work_has_the_other_names_texts() {
        let hint = "\nOptions to the inner command should come after \"--\", like this:\n\
                    multipass exec <instance> -- <command> <arguments>";
        for (line, text) in [
            ("multipass list --nope", "Unknown option 'nope'."),
            ("multipass list -x", "Unknown option 'x'."),
            (
                "multipass find --only-images",
                "Unknown option 'only-images'.",
            ),
            ("multipass list --format xml", "Invalid format type given."),
            ("multipass list x", "This command takes no arguments"),
            ("multipass purge x", "This command takes no arguments"),
            ("multipass version x", "This command takes no arguments"),
            ("multipass wait-ready x", "This command takes no arguments"),
            ("multipass launch a b", "Too many arguments supplied"),
            ("multipass launch --name", "Missing value after '--name'."),
            ("multipass find a b", "Wrong number of arguments"),
            ("multipass shell a b", "Too many arguments given"),
            ("multipass exec foo", "Wrong number of arguments"),
            ("multipass exec", "Wrong number of arguments"),
            (
                "multipass exec foo ls -l",
                &format!("Unknown option 'l'.\n{hint}"),
            ),
            (
                "multipass exec foo ls --all",
                &format!("Unknown option 'all'.\n{hint}"),
            ),
            (
                "multipass exec foo -d /x -n -- ls",
                "Options --working-directory and --no-map-working-directory clash",
            ),
            ("multipass mount /tmp", "Not enough arguments given"),
            (
                "multipass set",
                "Need exactly one key-value pair (in <key>=<value> form).",
            ),
        ] {
            let err = as_multipass(line).unwrap_err();
            assert_eq!(err, format!("{text}\n"), "{line}");
        }
    }

    #[test]
    fn only_its_own_commands_are_known_under_the_other_name() {
        for word in [
            "launch",
            "ls",
            "sh",
            "connect",
            "unmount",
            "auth",
            "copy-files",
        ] {
            assert!(is_command(Personality::Multipass, word), "{word}");
        }
        for word in [
            "run", "fork", "rename", "template", "logs", "doctor", "image", "images", "nope", "",
        ] {
            assert!(!is_command(Personality::Multipass, word), "{word}");
        }
        assert!(is_command(Personality::Pileus, "rename"));
    }

    #[test]
    fn the_command_is_found_behind_the_options() {
        let command = |line: &str| {
            let args: Vec<OsString> = line.split(' ').map(OsString::from).collect();
            command_at(&args).map(|at| args[at].clone())
        };
        assert_eq!(command("pileus --socket /x run --nope").unwrap(), "run");
        assert_eq!(command("pileus -vv launch run --nope").unwrap(), "launch");
        assert_eq!(command("pileus -vv"), None);
    }
}
