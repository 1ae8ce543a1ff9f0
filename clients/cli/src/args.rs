//! The command line's grammar: global options and the list of commands. Each command's own options
//! stand in its file under `commands/`. How a line is read by it: `parse.rs`.

use std::path::PathBuf;

use clap::{ArgAction, Args, CommandFactory, Parser, Subcommand};

use crate::commands::{
    alias, aliases, authenticate, clone, completions, console, delete, doctor, events, exec,
    export, find, fork, get, help, image, import, info, launch, list, logs, mount, networks,
    prefer, purge, recover, rename, restart, restore, run, set, shell, snapshot, ssh_config,
    ssh_proxy, start, stop, suspend, template, top, transfer, umount, unalias, verify_unique,
    version, wait, wait_ready,
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
    Suspend(suspend::Args),
    Delete(delete::Args),
    Recover(recover::Args),
    Purge(purge::Args),
    Snapshot(snapshot::Args),
    Restore(restore::Args),
    Clone(clone::Args),
    Rename(rename::Args),
    Export(export::Args),
    Import(import::Args),
    Exec(exec::Args),
    #[command(visible_aliases = ["sh", "connect"])]
    Shell(shell::Args),
    #[command(visible_alias = "copy-files")]
    Transfer(transfer::Args),
    Logs(logs::Args),
    Console(console::Args),
    Top(top::Args),
    Events(events::Args),
    Wait(wait::Args),
    SshConfig(ssh_config::Args),
    #[command(hide = true)]
    SshProxy(ssh_proxy::Args),
    Alias(alias::Args),
    Aliases(aliases::Args),
    Unalias(unalias::Args),
    Prefer(prefer::Args),
    Networks(networks::Args),
    Doctor(doctor::Args),
    Fork(fork::Args),
    VerifyUnique(verify_unique::Args),
    Find(find::Args),
    #[command(visible_alias = "images")]
    Image(image::Args),
    Template(template::Args),
    Get(get::Args),
    Set(set::Args),
    Mount(mount::Args),
    #[command(visible_alias = "unmount")]
    Umount(umount::Args),
    #[command(visible_alias = "auth")]
    Authenticate(authenticate::Args),
    WaitReady(wait_ready::Args),
    Version(version::Args),
    Completions(completions::Args),
    Help(help::Args),
}

impl Command {
    /// `version`, as if it had been given.
    pub(crate) fn version() -> Self {
        Command::Version(version::Args::default())
    }

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
            Command::Suspend(_) => "suspend",
            Command::Delete(_) => "delete",
            Command::Recover(_) => "recover",
            Command::Purge(_) => "purge",
            Command::Snapshot(_) => "snapshot",
            Command::Restore(_) => "restore",
            Command::Clone(_) => "clone",
            Command::Rename(_) => "rename",
            Command::Export(_) => "export",
            Command::Import(_) => "import",
            Command::Exec(_) => "exec",
            Command::Shell(_) => "shell",
            Command::Transfer(_) => "transfer",
            Command::Logs(_) => "logs",
            Command::Console(_) => "console",
            Command::Top(_) => "top",
            Command::Events(_) => "events",
            Command::Wait(_) => "wait",
            Command::SshConfig(_) => "ssh-config",
            Command::SshProxy(_) => "ssh-proxy",
            Command::Alias(_) => "alias",
            Command::Aliases(_) => "aliases",
            Command::Unalias(_) => "unalias",
            Command::Prefer(_) => "prefer",
            Command::Networks(_) => "networks",
            Command::Doctor(_) => "doctor",
            Command::Fork(_) => "fork",
            Command::VerifyUnique(_) => "verify-unique",
            Command::Find(_) => "find",
            Command::Image(_) => "image",
            Command::Template(_) => "template",
            Command::Get(_) => "get",
            Command::Set(_) => "set",
            Command::Mount(_) => "mount",
            Command::Umount(_) => "umount",
            Command::Authenticate(_) => "authenticate",
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
            Command::Suspend(args) => suspend::run(context, &args).await,
            Command::Delete(args) => delete::run(context, &args).await,
            Command::Recover(args) => recover::run(context, &args).await,
            Command::Purge(_) => purge::run(context).await,
            Command::Snapshot(args) => snapshot::run(context, args).await,
            Command::Restore(args) => restore::run(context, &args).await,
            Command::Clone(args) => clone::run(context, &args).await,
            Command::Rename(args) => rename::run(context, &args).await,
            Command::Export(args) => export::run(context, &args).await,
            Command::Import(args) => import::run(context, &args).await,
            Command::Exec(args) => exec::run(context, args).await,
            Command::Shell(args) => shell::run(context, args).await,
            Command::Transfer(args) => transfer::run(context, &args).await,
            Command::Logs(args) => logs::run(context, &args).await,
            Command::Console(args) => console::run(context, &args).await,
            Command::Top(args) => top::run(context, &args).await,
            Command::Events(args) => events::run(context, &args).await,
            Command::Wait(args) => wait::run(context, &args).await,
            Command::SshConfig(args) => ssh_config::run(context, &args).await,
            Command::SshProxy(args) => ssh_proxy::run(context, &args).await,
            Command::Alias(args) => alias::run(context, &args).await,
            Command::Aliases(args) => aliases::run(context, &args),
            Command::Unalias(args) => unalias::run(context, &args),
            Command::Prefer(args) => prefer::run(context, &args),
            Command::Networks(args) => networks::run(context, &args).await,
            Command::Doctor(args) => doctor::run(context, &args).await,
            Command::Fork(args) => fork::run(context, &args).await,
            Command::VerifyUnique(args) => verify_unique::run(context, &args).await,
            Command::Find(args) => find::run(context, &args).await,
            Command::Image(args) => image::run(context, args).await,
            Command::Template(args) => template::run(context, args).await,
            Command::Get(args) => get::run(context, &args).await,
            Command::Set(args) => set::run(context, &args).await,
            Command::Mount(args) => mount::run(&args),
            Command::Umount(args) => umount::run(&args),
            Command::Authenticate(args) => authenticate::run(context, args).await,
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

#[cfg(test)]
mod tests {
    use std::ffi::OsString;

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
        assert_eq!((args.targets.len(), args.purge), (2, true));
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
            "pileus image",
            "pileus image ls",
            "pileus image info web --format yaml",
            "pileus image pull",
            "pileus image pull debian-13 --refresh --checksum sha256:00",
            "pileus image import - -t web",
            "pileus image export web - --force",
            "pileus image verify --all",
            "pileus image verify a b",
            "pileus image inspect x.img --format json",
            "pileus image prune -n --older-than 30d --keep-bytes 20G",
            "pileus image prune --all-unused",
            "pileus image tag abcd web",
            "pileus image tag --remove web",
            "pileus image untag a b",
            "pileus image rm a b --force",
            "pileus -vvvv list",
            "pileus template ls --format json",
            "pileus template create debian-13 -c2 -m 2G",
            "pileus get --keys",
            "pileus set local.warm=off",
            "pileus set local.warm off",
            "pileus verify-unique a b c",
            "pileus fork a -n 3 --name x --name y",
            "pileus list -vvvv --socket /x",
            "pileus stop --time 5 a",
            "pileus stop -t +5",
            "pileus stop -c a b",
            "pileus suspend --all",
            "pileus snapshot a -n b -m c",
            "pileus snapshot a --comment c --with-memory",
            "pileus restore a.b -d",
            "pileus clone a.b -nc",
            "pileus rename a b",
            "pileus delete a a.b -p",
            "pileus info --snapshots a",
            "pileus list --snapshots --format csv",
            "pileus launch --no-wait",
            "pileus launch --network eth0 --network name=br0 --bridged --mount /tmp:/x",
            "pileus mount /tmp a:/x b -u 1:2 --gid-map 3:4 -t native",
            "pileus unmount a:/x",
            "pileus auth secret",
            "pileus shell",
            "pileus get --raw client.primary-name",
        ] {
            assert!(parsed(line).is_some(), "{line}");
        }
        for line in [
            "pileus list x",
            "pileus find --only-images",
            "pileus find --only-blueprints",
            "pileus rename a",
            "pileus suspend --time 5 a",
            "pileus launch a b",
            "pileus list --format xml",
            "pileus purge x",
            "pileus run",
            "pileus run --rm --keep debian-13",
            "pileus run --warm --cold debian-13",
            "pileus run --keep --tmpfs debian-13",
            "pileus verify-unique a",
            "pileus template",
            "pileus image info",
            "pileus image import",
            "pileus image export web",
            "pileus image inspect",
            "pileus image tag web",
            "pileus image tag a b --remove c",
            "pileus image untag",
            "pileus image remove",
            "pileus image prune --all-unused --older-than 1d",
            "pileus image prune --keep-bytes much",
            "pileus image nope",
            "pileus launch --warm --cold",
        ] {
            assert!(parsed(line).is_none(), "{line}");
        }
    }
}
