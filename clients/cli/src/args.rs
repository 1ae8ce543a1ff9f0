//! The command line's grammar: global options and the list of commands. Each command's own options
//! stand in its file under `commands/`.

use std::ffi::OsString;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};

use crate::commands::{
    completions, delete, exec, find, fork, get, help, images, info, launch, list, logs, purge,
    recover, restart, run, set, shell, start, stop, template, verify_unique, version, wait_ready,
};
use crate::context::Context;
use crate::error::Outcome;

#[derive(Debug, Parser)]
#[command(
    name = "pileus",
    about = "Linux machines in seconds, on your own computer",
    after_help = "A first machine: pileus launch --name demo && pileus shell demo",
    disable_help_subcommand = true,
    disable_version_flag = true,
    max_term_width = 100
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    /// Show the version
    #[arg(short = 'V', long, hide = true)]
    pub version: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Options that every command takes.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Show what the daemon logs while it works; repeat for more
    #[arg(short, long, action = ArgAction::Count, global = true, display_order = 1000)]
    pub verbose: u8,
    /// Talk to the daemon at this socket [env: PILEUS_SOCKET]
    #[arg(long, value_name = "PATH", global = true, display_order = 1001)]
    #[arg(conflicts_with = "storage")]
    pub socket: Option<PathBuf>,
    /// Talk to the daemon of this storage folder [env: PILEUS_STORAGE]
    #[arg(long, value_name = "DIR", global = true, display_order = 1002)]
    pub storage: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Launch(launch::Args),
    Run(Box<run::Args>),
    #[command(visible_alias = "ls")]
    List(list::Args),
    Info(info::Args),
    Start(start::Args),
    Stop(stop::Args),
    Restart(restart::Args),
    Delete(delete::Args),
    Recover(recover::Args),
    Purge(purge::Args),
    Exec(exec::Args),
    #[command(visible_aliases = ["sh", "connect"])]
    Shell(shell::Args),
    Logs(logs::Args),
    Fork(fork::Args),
    VerifyUnique(verify_unique::Args),
    Find(find::Args),
    Images(images::Args),
    Template(template::Args),
    Get(get::Args),
    Set(set::Args),
    WaitReady(wait_ready::Args),
    Version(version::Args),
    Completions(completions::Args),
    Help(help::Args),
}

impl Command {
    /// The name under which errors are shown.
    pub fn name(&self) -> &'static str {
        match self {
            Command::Launch(_) => "launch",
            Command::Run(_) => "run",
            Command::List(_) => "list",
            Command::Info(_) => "info",
            Command::Start(_) => "start",
            Command::Stop(_) => "stop",
            Command::Restart(_) => "restart",
            Command::Delete(_) => "delete",
            Command::Recover(_) => "recover",
            Command::Purge(_) => "purge",
            Command::Exec(_) => "exec",
            Command::Shell(_) => "shell",
            Command::Logs(_) => "logs",
            Command::Fork(_) => "fork",
            Command::VerifyUnique(_) => "verify-unique",
            Command::Find(_) => "find",
            Command::Images(_) => "images",
            Command::Template(_) => "template",
            Command::Get(_) => "get",
            Command::Set(_) => "set",
            Command::WaitReady(_) => "wait-ready",
            Command::Version(_) => "version",
            Command::Completions(_) => "completions",
            Command::Help(_) => "help",
        }
    }

    pub(crate) async fn run(self, context: &Context) -> Outcome {
        match self {
            Command::Launch(args) => launch::run(context, args).await,
            Command::Run(args) => run::run(context, *args).await,
            Command::List(args) => list::run(context, &args).await,
            Command::Info(args) => info::run(context, &args).await,
            Command::Start(args) => start::run(context, &args).await,
            Command::Stop(args) => stop::run(context, &args).await,
            Command::Restart(args) => restart::run(context, &args).await,
            Command::Delete(args) => delete::run(context, &args).await,
            Command::Recover(args) => recover::run(context, &args).await,
            Command::Purge(_) => purge::run(context).await,
            Command::Exec(args) => exec::run(context, args).await,
            Command::Shell(args) => shell::run(context, args).await,
            Command::Logs(args) => logs::run(context, &args).await,
            Command::Fork(args) => fork::run(context, &args).await,
            Command::VerifyUnique(args) => verify_unique::run(context, &args).await,
            Command::Find(args) => find::run(context, &args).await,
            Command::Images(args) => images::run(context, args).await,
            Command::Template(args) => template::run(context, args).await,
            Command::Get(args) => get::run(context, &args).await,
            Command::Set(args) => set::run(context, &args).await,
            Command::WaitReady(args) => wait_ready::run(context, &args).await,
            Command::Version(args) => version::run(context, &args).await,
            Command::Completions(args) => completions::run(context, &args),
            Command::Help(args) => help::run(context, &args),
        }
    }
}

/// The whole grammar, for man pages, the reference and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses a command line; what can't be parsed is shown, and an exit code is returned.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Cli, ExitCode> {
    let args: Vec<OsString> = args.into_iter().collect();
    Cli::try_parse_from(&args).map_err(|err| {
        // A reader that closed the pipe has seen enough.
        let _ = err.print();
        match err.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
            _ if is_run(&args) => ExitCode::from(run::FAILED),
            _ => ExitCode::from(1),
        }
    })
}

/// Whether a line that can't be parsed is one of `pileus run`, whose exit codes belong to the command.
fn is_run(args: &[OsString]) -> bool {
    let matches = Cli::command()
        .ignore_errors(true)
        .try_get_matches_from(args);
    matches.is_ok_and(|matches| matches.subcommand_name() == Some("run"))
}

/// `pileus` alone shows the help but is no success; `pileus --version` is `pileus version` without
/// asking the daemon.
pub fn no_command(version: bool) -> ExitCode {
    if version {
        let text = format!("pileus {}\n", env!("CARGO_PKG_VERSION"));
        // A reader that is gone needs no version.
        let _ = std::io::stdout().write_all(text.as_bytes());
        return ExitCode::SUCCESS;
    }
    let _ = Cli::command().print_help();
    ExitCode::from(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<Command> {
        let args = line.split(' ').map(OsString::from);
        Cli::try_parse_from(args).ok()?.command
    }

    #[test]
    fn the_grammar_holds() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_stand_anywhere_and_may_be_attached() {
        for line in [
            "pileus launch debian-13 --name n -c 2 -m 1G -d 5G",
            "pileus launch -c2 -d5G --mem=1G -nn debian-13",
            "pileus launch --cpus 2 -m1G debian-13 --disk=5G --name=n",
        ] {
            let Some(Command::Launch(args)) = parsed(line) else {
                panic!("{line}");
            };
            assert_eq!(args.image.as_deref(), Some("debian-13"), "{line}");
            assert_eq!(args.name.as_deref(), Some("n"), "{line}");
            assert_eq!(args.cpus.as_deref(), Some("2"), "{line}");
            assert_eq!(args.memory.as_deref(), Some("1G"), "{line}");
            assert_eq!(args.disk.as_deref(), Some("5G"), "{line}");
        }
        let Some(Command::Delete(args)) = parsed("pileus delete a b --purge -vv") else {
            panic!("delete");
        };
        assert_eq!((args.names.names.len(), args.purge), (2, true));
    }

    #[test]
    fn exec_splits_its_line() {
        for (line, dir, command) in [
            ("pileus exec foo ls", None, vec!["ls"]),
            ("pileus exec foo ls -l /", None, vec!["ls", "-l", "/"]),
            ("pileus exec foo -- ls -l", None, vec!["ls", "-l"]),
            ("pileus exec -n foo -- ls", None, vec!["ls"]),
            ("pileus exec foo -d /tmp -- pwd", Some("/tmp"), vec!["pwd"]),
            ("pileus exec foo -d /tmp pwd", Some("/tmp"), vec!["pwd"]),
            (
                "pileus exec foo --working-directory=/tmp -- a -- b",
                Some("/tmp"),
                vec!["a", "--", "b"],
            ),
        ] {
            let Some(Command::Exec(args)) = parsed(line) else {
                panic!("{line}");
            };
            assert_eq!(args.name, "foo", "{line}");
            assert_eq!(args.working_directory.as_deref(), dir, "{line}");
            assert_eq!(args.command, command, "{line}");
        }
        assert!(parsed("pileus exec foo").is_none());
        assert!(parsed("pileus exec foo -d /x -n -- ls").is_none());
    }

    #[test]
    fn run_splits_its_line() {
        for line in [
            "pileus run -it --rm -c2 -e A=1 -e B debian-13 -- ls -l --all",
            "pileus run -i -t debian-13 -c 2 --env A=1 --env B ls -l --all",
        ] {
            let Some(Command::Run(args)) = parsed(line) else {
                panic!("{line}");
            };
            assert_eq!(args.image, "debian-13", "{line}");
            assert_eq!(args.command, ["ls", "-l", "--all"], "{line}");
            assert_eq!(args.env, ["A=1", "B"], "{line}");
            assert!(args.tty && !args.no_tty, "{line}");
        }
        let is_run = |line: &str| is_run(&line.split(' ').map(OsString::from).collect::<Vec<_>>());
        assert!(is_run("pileus --socket /x run --nope"));
        assert!(!is_run("pileus launch run --nope"));
    }

    #[test]
    fn synonyms_and_old_forms() {
        for line in [
            "pileus ls --format=json",
            "pileus list --no-ipv4",
            "pileus sh foo",
            "pileus connect foo",
            "pileus info --all",
            "pileus info --no-runtime-information foo --format yaml",
            "pileus find --force-update --show-unsupported",
            "pileus images",
            "pileus images --format json",
            "pileus images list --format json",
            "pileus -vvvv list",
            "pileus template ls --format json",
            "pileus template create debian-13 -c2 -m 2G",
            "pileus get --keys",
            "pileus set local.warm=off",
            "pileus set local.warm off",
            "pileus verify-unique a b c",
            "pileus fork a -n 3 --name x --name y",
            "pileus list -vvvv --socket /x",
        ] {
            assert!(parsed(line).is_some(), "{line}");
        }
        for line in [
            "pileus stop --time 5 a",
            "pileus list x",
            "pileus launch a b",
            "pileus list --format xml",
            "pileus purge x",
            "pileus run",
            "pileus run --rm --keep debian-13",
            "pileus run --warm --cold debian-13",
            "pileus run --keep --tmpfs debian-13",
            "pileus verify-unique a",
            "pileus template",
            "pileus launch --warm --cold",
        ] {
            assert!(parsed(line).is_none(), "{line}");
        }
    }
}
