//! Which daemon is meant, and whether it may be started from here. First answer wins:
//!
//! ```text
//! --socket PATH        --storage DIR        PILEUS_SOCKET        PILEUS_STORAGE
//! /run/pileus/pileusd.sock, if a daemon answers there or the caller is root
//! the user's own daemon
//! ```

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use pileus_base::Layout;

use crate::args::Global;
use crate::environment::Environment;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub socket: PathBuf,
    /// How to start a daemon for this place, if that is the client's to do.
    pub start: Option<Start>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Start {
    /// `--storage` of the daemon.
    pub storage: Option<PathBuf>,
    /// Where the daemon's output goes.
    pub log: PathBuf,
}

impl Place {
    pub fn find(global: &Global, env: &Environment) -> Self {
        Self::choose(global, env, |socket| UnixStream::connect(socket).is_ok())
    }

    fn choose(global: &Global, env: &Environment, answers: impl Fn(&Path) -> bool) -> Self {
        let given = |socket: &Path| Self {
            socket: env.current_folder.join(socket),
            start: None,
        };
        let below = |storage: &Path| {
            // The daemon runs in another folder, so the path must hold everywhere.
            let storage = env.current_folder.join(storage);
            Self::own(
                &Layout::below(&storage, env.folders.uid),
                Some(&storage),
                env,
            )
        };
        match (&global.socket, &global.storage, &env.socket, &env.storage) {
            (Some(socket), ..) => return given(socket),
            (_, Some(storage), ..) => return below(storage),
            (_, _, Some(socket), _) => return given(socket),
            (.., Some(storage)) => return below(storage),
            _ => {}
        }
        let system = Layout::system().socket();
        if env.is_root() || answers(&system) {
            return given(&system);
        }
        Self::own(&Layout::user(&env.folders), None, env)
    }

    fn own(layout: &Layout, storage: Option<&Path>, env: &Environment) -> Self {
        Self {
            socket: layout.socket(),
            start: (!env.is_root()).then(|| Start {
                storage: storage.map(PathBuf::from),
                log: layout.cache.join("pileusd.log"),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user() -> Environment {
        let mut env = Environment {
            current_folder: "/work".into(),
            ..Default::default()
        };
        env.folders.uid = 1000;
        env.folders.home = Some("/home/u".into());
        env.folders.runtime_dir = Some("/run/user/1000".into());
        env
    }

    fn socket(global: &Global, env: &Environment, system: bool) -> (String, bool) {
        let place = Place::choose(global, env, |_| system);
        (place.socket.display().to_string(), place.start.is_some())
    }

    #[test]
    fn the_nearest_answer_wins() {
        let mut env = user();
        let mut global = Global::default();
        let own = "/run/user/1000/pileus/pileusd.sock".to_owned();
        assert_eq!(socket(&global, &env, false), (own, true));
        let system = "/run/pileus/pileusd.sock".to_owned();
        assert_eq!(socket(&global, &env, true), (system.clone(), false));
        env.storage = Some("s".into());
        let below = "/work/s/run/pileusd.sock".to_owned();
        assert_eq!(socket(&global, &env, true), (below, true));
        env.socket = Some("/x.sock".into());
        assert_eq!(socket(&global, &env, true), ("/x.sock".into(), false));
        global.storage = Some("/t".into());
        let below = "/t/run/pileusd.sock".to_owned();
        assert_eq!(socket(&global, &env, true), (below, true));
        global.socket = Some("y.sock".into());
        assert_eq!(socket(&global, &env, true), ("/work/y.sock".into(), false));
        let mut root = user();
        root.folders.uid = 0;
        assert_eq!(socket(&Global::default(), &root, false), (system, false));
    }
}
