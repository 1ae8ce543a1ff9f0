//! What the process was given by its surroundings, read once in `main` and passed in from there.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;

use pileus_base::layout::UserFolders;

use crate::personality::Personality;

#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// Under which name the program was called.
    pub personality: Personality,
    pub folders: UserFolders,
    /// The folder of this program's own settings: `$XDG_CONFIG_HOME/pileus`. None without a home.
    pub config_folder: Option<PathBuf>,
    /// PILEUS_SOCKET; under the name `multipass` the path of MULTIPASS_SERVER_ADDRESS comes first
    pub socket: Option<PathBuf>,
    /// PILEUS_STORAGE; under the name `multipass` MULTIPASS_STORAGE comes first
    pub storage: Option<PathBuf>,
    /// TERM
    pub term: String,
    /// PATH
    pub search_path: OsString,
    /// The folder of the running program.
    pub own_folder: Option<PathBuf>,
    /// The path by which the program was called, if it was a path and no mere name.
    pub called_by: Option<PathBuf>,
    pub current_folder: PathBuf,
    pub terminals: Terminals,
    /// All variables, for those that a command in a guest is to get.
    pub variables: BTreeMap<OsString, OsString>,
}

/// Which of the standard streams are terminals.
#[derive(Debug, Clone, Copy, Default)]
pub struct Terminals {
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

impl Environment {
    pub fn of_process() -> Self {
        let path = |name| {
            env::var_os(name)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        let personality = Personality::of_program(env::args_os().next().as_deref());
        let multipass = |name| path(name).filter(|_| personality.multipass());
        let config = path("XDG_CONFIG_HOME").or_else(|| Some(path("HOME")?.join(".config")));
        Self {
            personality,
            config_folder: config.map(|folder| folder.join("pileus")),
            folders: UserFolders {
                home: path("HOME"),
                data_home: path("XDG_DATA_HOME"),
                cache_home: path("XDG_CACHE_HOME"),
                runtime_dir: path("XDG_RUNTIME_DIR"),
                uid: rustix::process::getuid().as_raw(),
            },
            socket: multipass("MULTIPASS_SERVER_ADDRESS")
                .and_then(|address| Some(PathBuf::from(address.to_str()?.strip_prefix("unix:")?)))
                .or_else(|| path("PILEUS_SOCKET")),
            storage: multipass("MULTIPASS_STORAGE").or_else(|| path("PILEUS_STORAGE")),
            term: env::var("TERM").unwrap_or_default(),
            search_path: env::var_os("PATH").unwrap_or_default(),
            own_folder: env::current_exe()
                .ok()
                .and_then(|exe| exe.parent().map(PathBuf::from)),
            called_by: env::args_os()
                .next()
                .map(PathBuf::from)
                .filter(|word| word.components().count() > 1)
                .and_then(|word| std::path::absolute(word).ok()),
            current_folder: env::current_dir().unwrap_or_else(|_| "/".into()),
            terminals: Terminals {
                stdin: std::io::stdin().is_terminal(),
                stdout: std::io::stdout().is_terminal(),
                stderr: std::io::stderr().is_terminal(),
            },
            variables: env::vars_os().collect(),
        }
    }

    pub fn is_root(&self) -> bool {
        self.folders.uid == 0
    }
}

/// The IANA name of this machine's time zone, from TZ or /etc/localtime.
pub fn time_zone() -> Option<String> {
    jiff::tz::TimeZone::try_system()
        .ok()?
        .iana_name()
        // What is said when the machine has no time zone set.
        .filter(|name| *name != "Etc/Unknown")
        .map(str::to_owned)
}
