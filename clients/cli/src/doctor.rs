//! What a client can see of the host by itself, with or without a daemon. What only the daemon sees it tells
//! itself (`GET /v1/host`).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use pileus_api::{Check, Verdict};
use rustix::fs::Access;

use crate::environment::Environment;
use crate::place::Place;

/// Identities that a user's own daemon needs for its guests' files.
const SUBORDINATES: u64 = 65_536;

/// What is looked at; tests bring their own.
pub(crate) struct Host<'a> {
    pub env: &'a Environment,
    pub place: &'a Place,
    /// `/`
    pub root: PathBuf,
}

impl Host<'_> {
    pub fn checks(&self) -> Vec<Check> {
        let mut checks = vec![self.socket(), self.daemon()];
        if self.place.start.is_some() && !self.env.is_root() {
            checks.push(self.subordinates());
        }
        if self.place.start.is_some() {
            checks.push(self.tun());
        }
        checks
    }

    fn socket(&self) -> Check {
        let path = &self.place.socket;
        let shown = path.display();
        let failed = match UnixStream::connect(path) {
            Ok(_) => return good("socket", format!("A daemon answers at {shown}.")),
            Err(err) => err.kind(),
        };
        match failed {
            io::ErrorKind::PermissionDenied => {
                let group = self.group_of(path);
                let group = group.unwrap_or_else(|| "that owns the socket".to_owned());
                bad(
                    "socket",
                    format!("You may not use the socket {shown}."),
                    format!(
                        "Ask an administrator to add you to the group {group}, then log in anew."
                    ),
                )
            }
            _ if self.place.start.is_some() => good(
                "socket",
                format!("No daemon runs at {shown}; the next command starts one."),
            ),
            io::ErrorKind::ConnectionRefused => bad(
                "socket",
                format!("The daemon of {shown} has ended."),
                "Start it: systemctl start pileusd, or pileusd as root.",
            ),
            _ => bad(
                "socket",
                format!("There is no daemon at {shown}."),
                "Start it: systemctl start pileusd, or pileusd as root; or name another one with \
                 --socket or --storage.",
            ),
        }
    }

    /// The name of the group that owns a file.
    fn group_of(&self, path: &Path) -> Option<String> {
        let id = fs::metadata(path).ok()?.gid().to_string();
        let groups = fs::read_to_string(self.root.join("etc/group")).ok()?;
        groups.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == id).then(|| name.to_owned())
        })
    }

    fn daemon(&self) -> Check {
        match crate::daemon::find_program(self.env) {
            Some(path) => good(
                "pileusd",
                format!("The daemon's program is {}.", path.display()),
            ),
            None if self.place.start.is_some() => bad(
                "pileusd",
                "The daemon's program is neither beside this one nor in PATH.".to_owned(),
                "Install pileusd beside pileus.",
            ),
            None => Check {
                verdict: Verdict::Warning,
                ..bad(
                    "pileusd",
                    "The daemon's program is neither beside this one nor in PATH.".to_owned(),
                    "It is only needed to start a daemon from here.",
                )
            },
        }
    }

    /// Ranges of user and group ids that belong to the user, and the programs that hand them out.
    fn subordinates(&self) -> Check {
        let name = "subordinate-ids";
        for file in ["subuid", "subgid"] {
            if self.range(file) >= SUBORDINATES {
                continue;
            }
            let user = self.user().unwrap_or_else(|| "USER".to_owned());
            return warning(
                name,
                format!("/etc/{file} gives you no {SUBORDINATES} ids: images can't be built here."),
                format!(
                    "An administrator can: usermod --add-subuids 100000-165535 \
                     --add-subgids 100000-165535 {user}"
                ),
            );
        }
        for program in ["newuidmap", "newgidmap"] {
            if self.find(program).is_none() {
                return warning(
                    name,
                    format!("{program} is not installed: images can't be built here."),
                    "Install uidmap.",
                );
            }
        }
        good(
            name,
            "You have ids of your own for what runs in user namespaces.".to_owned(),
        )
    }

    /// How many ids the user has been given.
    fn range(&self, file: &str) -> u64 {
        let text = fs::read_to_string(self.root.join("etc").join(file)).unwrap_or_default();
        let uid = self.env.folders.uid.to_string();
        let user = self.user();
        let of_user = |line: &str| {
            let mut fields = line.trim().split(':');
            let owner = fields.next()?;
            if owner != uid && Some(owner) != user.as_deref() {
                return None;
            }
            fields.nth(1)?.parse::<u64>().ok()
        };
        text.lines().filter_map(of_user).max().unwrap_or(0)
    }

    fn user(&self) -> Option<String> {
        let uid = self.env.folders.uid.to_string();
        let users = fs::read_to_string(self.root.join("etc/passwd")).ok()?;
        users.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next()?;
            (fields.nth(1)? == uid).then(|| name.to_owned())
        })
    }

    fn find(&self, program: &str) -> Option<PathBuf> {
        let mut folders = std::env::split_paths(&self.env.search_path);
        folders.find_map(|folder| {
            let path = folder.join(program);
            rustix::fs::access(&path, Access::EXEC_OK)
                .ok()
                .map(|()| path)
        })
    }

    fn tun(&self) -> Check {
        let path = self.root.join("dev/net/tun");
        let opened = fs::OpenOptions::new().read(true).write(true).open(&path);
        match opened {
            Ok(_) => good("tun", "/dev/net/tun can be opened.".to_owned()),
            Err(err) if err.kind() == io::ErrorKind::NotFound => bad(
                "tun",
                "There is no /dev/net/tun: instances would have no network.".to_owned(),
                "Load the module: modprobe tun.",
            ),
            Err(err) => bad(
                "tun",
                format!("/dev/net/tun can't be opened ({err}): instances would have no network."),
                "Give yourself read and write access to it, or ask an administrator.",
            ),
        }
    }
}

fn good(name: &str, message: String) -> Check {
    Check {
        name: name.to_owned(),
        verdict: Verdict::Good,
        message,
        advice: None,
    }
}

fn warning(name: &str, message: String, advice: impl Into<String>) -> Check {
    Check {
        name: name.to_owned(),
        verdict: Verdict::Warning,
        message,
        advice: Some(advice.into()),
    }
}

fn bad(name: &str, message: String, advice: impl Into<String>) -> Check {
    Check {
        verdict: Verdict::Bad,
        ..warning(name, message, advice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::Start;

    fn verdicts(host: &Host<'_>) -> Vec<(String, Verdict)> {
        let checks = host.checks();
        checks.into_iter().map(|c| (c.name, c.verdict)).collect()
    }

    #[test]
    fn what_is_missing_is_told_with_advice() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("dev/net")).unwrap();
        let mut env = Environment {
            search_path: root.join("bin").into(),
            ..Default::default()
        };
        env.folders.uid = 1000;
        let place = Place {
            socket: root.join("sock"),
            start: Some(Start {
                storage: None,
                log: root.join("log"),
            }),
        };
        let host = Host {
            env: &env,
            place: &place,
            root: root.clone(),
        };
        let word = |name: &str, verdict| (name.to_owned(), verdict);
        assert_eq!(
            verdicts(&host),
            [
                word("socket", Verdict::Good),
                word("pileusd", Verdict::Bad),
                word("subordinate-ids", Verdict::Warning),
                word("tun", Verdict::Bad),
            ]
        );
        for check in host.checks() {
            assert!(
                check.verdict == Verdict::Good || check.advice.is_some(),
                "{check:?}"
            );
        }
        // All of it is put right.
        fs::write(root.join("etc/passwd"), "me:x:1000:1000::/:/bin/sh\n").unwrap();
        fs::write(root.join("etc/subuid"), "you:1:65536\nme:100000:65536\n").unwrap();
        fs::write(root.join("etc/subgid"), "1000:100000:65536\n").unwrap();
        fs::write(root.join("dev/net/tun"), "").unwrap();
        fs::create_dir(root.join("bin")).unwrap();
        for program in ["pileusd", "newuidmap", "newgidmap"] {
            let path = root.join("bin").join(program);
            fs::write(&path, "#!/bin/sh\n").unwrap();
            pileus_base::files::set_mode(&path, 0o755).unwrap();
        }
        let _listener = std::os::unix::net::UnixListener::bind(&place.socket).unwrap();
        assert!(
            host.checks().iter().all(|c| c.verdict == Verdict::Good),
            "{:?}",
            host.checks()
        );
    }

    #[test]
    fn a_socket_that_was_named_must_have_a_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let env = Environment::default();
        let place = Place {
            socket: dir.path().join("sock"),
            start: None,
        };
        let host = Host {
            env: &env,
            place: &place,
            root: dir.path().to_owned(),
        };
        assert_eq!(host.checks()[0].verdict, Verdict::Bad);
        assert!(host.checks()[0].message.starts_with("There is no daemon"));
        drop(std::os::unix::net::UnixListener::bind(&place.socket).unwrap());
        assert!(host.checks()[0].message.ends_with("has ended."));
    }
}
