//! The daemon's command line and what it says about the folders. The environment is read here and
//! nowhere below.

use std::path::PathBuf;

use clap::{CommandFactory, FromArgMatches, Parser};
use pileus_base::Layout;
use pileus_base::layout::UserFolders;
use pileus_images::hosts::simplestreams::UBUNTU;
use pileus_instances::qemu::AcceleratorChoice;

use crate::service::settings::{Settings, WarmMode};

/// The daemon of pileus: owns the instances and serves the API on a Unix socket.
#[derive(Debug, Parser)]
#[command(name = "pileusd", version, about)]
pub struct Args {
    /// Keep everything below this folder (data/, cache/, run/).
    #[arg(long, value_name = "DIR", env = "PILEUS_STORAGE")]
    pub storage: Option<PathBuf>,

    /// Serve the API on this socket.
    #[arg(long, value_name = "PATH", env = "PILEUS_SOCKET")]
    pub socket: Option<PathBuf>,

    /// Group whose members may use a system daemon's socket.
    #[arg(long, value_name = "NAME", default_value = "pileus")]
    pub group: String,

    /// Name of the private network's bridge; two daemons in one network need two.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "pileus0",
        env = "PILEUS_BRIDGE"
    )]
    pub bridge: String,

    /// The hypervisor to use instead of the one on the PATH.
    #[arg(long, value_name = "PROGRAM", env = "PILEUS_QEMU")]
    pub qemu: Option<PathBuf>,

    /// What runs the guests' instructions: auto, kvm or tcg.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "auto",
        env = "PILEUS_ACCELERATOR"
    )]
    pub accelerator: AcceleratorChoice,

    /// Where the images with Ubuntu's names are; an empty text for nowhere.
    #[arg(
        long,
        value_name = "URL",
        default_value = UBUNTU,
        env = "PILEUS_IMAGE_HOST"
    )]
    pub image_host: String,

    /// When templates are made and used unless `pileus set local.warm` says otherwise: auto, manual or
    /// off.
    #[arg(long, value_name = "WHEN", default_value = "auto", env = "PILEUS_WARM")]
    pub warm: WarmMode,

    /// Leave disks' layers as they are: those that snapshots need no more are not merged in the background.
    #[arg(long)]
    pub keep_layers: bool,

    /// What to log: error, warn, info, debug, trace, or a filter such as `pileusd=debug`.
    #[arg(
        long,
        value_name = "FILTER",
        default_value = "info",
        env = "PILEUS_LOG"
    )]
    pub log: String,

    /// Log as JSON, a line an event.
    #[arg(long)]
    pub log_json: bool,

    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Print the OpenAPI document of the API and end.
    #[command(hide = true)]
    Openapi,
}

/// The release of Multipass that a daemon called `multipassd` (a link) stands for; the client's
/// `personality.rs` says the same.
const MULTIPASS: &str = "1.16.3";

fn is_multipassd() -> bool {
    let program = std::env::args_os().next().map(PathBuf::from);
    program.is_some_and(|program| program.ends_with("multipassd"))
}

impl Args {
    /// The command line of this process. Ends it after `--help`, `--version` or an error.
    pub fn of_process() -> Self {
        let mut grammar = Self::command();
        if is_multipassd() {
            grammar = grammar.name("multipassd").version(MULTIPASS);
        }
        let matches = grammar.get_matches();
        Self::from_arg_matches(&matches).unwrap_or_else(|err| err.exit())
    }

    /// What holds as long as no setting says otherwise.
    pub fn settings(&self) -> Settings {
        Settings {
            warm: self.warm,
            ..Settings::default()
        }
    }

    /// The folder that was given. Called by the name `multipassd` (a link) its variable MULTIPASS_STORAGE
    /// comes before our own, but not before the option.
    fn storage(&self) -> Option<PathBuf> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let by_option = self
            .storage
            .as_ref()
            .filter(|storage| Some(storage.as_os_str()) != variable("PILEUS_STORAGE").as_deref());
        match (by_option, variable("MULTIPASS_STORAGE")) {
            (None, Some(storage)) if is_multipassd() => Some(storage.into()),
            _ => self.storage.clone(),
        }
    }

    /// Where everything lies, by the options or by who we are.
    pub fn layout(&self, uid: u32) -> Layout {
        let folder = |name: &str| {
            std::env::var_os(name)
                .map(PathBuf::from)
                .filter(|path| path.is_absolute())
        };
        match &self.storage() {
            Some(dir) => Layout::below(&std::path::absolute(dir).unwrap_or(dir.clone()), uid),
            None if uid == 0 => Layout::system(),
            None => Layout::user(&UserFolders {
                home: folder("HOME"),
                data_home: folder("XDG_DATA_HOME"),
                cache_home: folder("XDG_CACHE_HOME"),
                runtime_dir: folder("XDG_RUNTIME_DIR"),
                uid,
            }),
        }
    }
}
