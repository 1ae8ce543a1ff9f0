//! A configuration for `ssh`, `scp` and `rsync` to reach instances by their names. They go through the
//! daemon (`pileus ssh-proxy`), so that they need no network of the guest; each instance has a key of its
//! own, and its host key is pinned.
//!
//! ```text
//! ~/.config/pileus/ssh/   config        to be included by ~/.ssh/config
//!                         known_hosts   the instances' host keys
//!                         keys/NAME     private keys, mode 0600
//! ```

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use pileus_api::SshInfo;
use pileus_base::{Code, Error, Result, ResultExt, files};

use crate::environment::Environment;
use crate::place::Place;

/// Where the files lie.
#[derive(Debug, Clone)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub fn of(env: &Environment) -> Result<Self> {
        let given = env.variables.get(OsStr::new("XDG_CONFIG_HOME"));
        let given = given.map(PathBuf::from).filter(|path| path.is_absolute());
        let home = || env.folders.home.as_ref().map(|home| home.join(".config"));
        let config = given.or_else(home).ok_or_else(|| {
            let text = "The configuration lies in the home folder, and HOME is not set";
            Error::new(Code::InvalidArgument, text)
        })?;
        Ok(Self(config.join("pileus/ssh")))
    }

    pub fn config(&self) -> PathBuf {
        self.0.join("config")
    }

    fn known_hosts(&self) -> PathBuf {
        self.0.join("known_hosts")
    }

    fn keys(&self) -> PathBuf {
        self.0.join("keys")
    }

    /// The file that `ssh` includes.
    pub fn text(&self, instances: &[SshInfo], proxy: &str) -> Result<String> {
        let mut out = String::from("# Made by pileus ssh-config.\n");
        for instance in instances {
            let name = &instance.name;
            let known = quoted(&self.known_hosts())?;
            let key = quoted(&self.keys().join(name.as_str()))?;
            let user = one_word(&instance.user)?;
            out.push_str(&format!(
                "\nHost {name} {name}.pileus\n    \
                 HostName {name}.pileus\n    \
                 User {user}\n    \
                 Port {port}\n    \
                 HostKeyAlias {name}.pileus\n    \
                 UserKnownHostsFile {known}\n    \
                 StrictHostKeyChecking yes\n    \
                 IdentityFile {key}\n    \
                 IdentitiesOnly yes\n    \
                 ProxyCommand {proxy} {name} %p\n",
                port = instance.port,
            ));
        }
        Ok(out)
    }

    fn known_hosts_text(instances: &[SshInfo]) -> Result<String> {
        let mut out = String::new();
        for instance in instances {
            let mut key = instance.host_key.split_ascii_whitespace();
            let (Some(kind), Some(key)) = (key.next(), key.next()) else {
                let text = format!("The host key of {} can't be understood", instance.name);
                return Err(Error::internal(text));
            };
            out.push_str(&format!("{}.pileus {kind} {key}\n", instance.name));
        }
        Ok(out)
    }

    /// Writes all files; keys of instances that are gone are removed.
    pub fn write(&self, instances: &[SshInfo], proxy: &str) -> Result<()> {
        let keys = self.keys();
        files::create_folder(&keys, 0o700)?;
        for folder in [&self.0, &keys] {
            files::set_mode(folder, 0o700)?;
        }
        let mut kept = BTreeSet::new();
        for instance in instances {
            let mut key = instance.private_key.clone();
            // What ssh does not read without.
            if !key.ends_with('\n') {
                key.push('\n');
            }
            let name = instance.name.as_str();
            files::write_atomic(&keys.join(name), key.as_bytes(), 0o600)?;
            kept.insert(name);
        }
        let known = Self::known_hosts_text(instances)?;
        files::write_atomic(&self.known_hosts(), known.as_bytes(), 0o600)?;
        let config = self.text(instances, proxy)?;
        files::write_atomic(&self.config(), config.as_bytes(), 0o600)?;
        let what = format!("Looking into {}", keys.display());
        for entry in std::fs::read_dir(&keys).io(&what)? {
            let name = entry.io(&what)?.file_name();
            if !name.to_str().is_some_and(|name| kept.contains(name)) {
                files::remove_file(&keys.join(name))?;
            }
        }
        Ok(())
    }
}

/// What `ssh` runs, without the name of the instance and the port. The place stands in it, so that it is
/// the same daemon whatever the environment says then.
pub(crate) fn proxy(env: &Environment, place: &Place) -> Result<String> {
    let program = env.own_folder.as_ref().map(|folder| folder.join("pileus"));
    let program = program.filter(|path| path.is_file());
    let mut words = vec![program.unwrap_or_else(|| "pileus".into())];
    match &place.start {
        None => words.extend(["--socket".into(), place.socket.clone()]),
        Some(start) => {
            if let Some(storage) = &start.storage {
                words.extend(["--storage".into(), storage.clone()]);
            }
        }
    }
    words.push("ssh-proxy".into());
    let words: Vec<String> = words
        .iter()
        .map(|word| shell(word))
        .collect::<Result<_>>()?;
    Ok(words.join(" "))
}

/// A word for the shell that `ssh` hands the line to, after it has looked for `%`.
fn shell(path: &Path) -> Result<String> {
    let text = printable(path)?;
    let plain = text
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "/._-+".contains(c));
    let text = text.replace('%', "%%");
    Ok(match plain {
        true => text,
        false => format!("'{}'", text.replace('\'', "'\\''")),
    })
}

/// A path in the configuration.
fn quoted(path: &Path) -> Result<String> {
    let text = printable(path)?;
    if text.contains('"') {
        return Err(unusable(path));
    }
    Ok(format!("\"{}\"", text.replace('%', "%%")))
}

fn printable(path: &Path) -> Result<&str> {
    let text = path
        .to_str()
        .filter(|text| !text.chars().any(char::is_control));
    text.ok_or_else(|| unusable(path))
}

fn unusable(path: &Path) -> Error {
    let text = format!("{} can't stand in a configuration of ssh", path.display());
    Error::new(Code::InvalidArgument, text)
}

fn one_word(text: &str) -> Result<&str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    if !text.is_empty() && !text.starts_with('-') && text.chars().all(plain) {
        return Ok(text);
    }
    let text = format!("The user name {text:?} can't stand in a configuration of ssh");
    Err(Error::new(Code::InvalidArgument, text))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::place::Start;

    fn info(name: &str) -> SshInfo {
        SshInfo {
            name: name.parse().unwrap(),
            user: "ubuntu".into(),
            address: "10.1.2.3".parse().unwrap(),
            port: 22,
            private_key: "-----KEY-----".into(),
            host_key: "ssh-ed25519 AAAA root@host".into(),
        }
    }

    #[test]
    fn the_file_that_ssh_includes() {
        let folder = Folder("/home/a b/50%".into());
        let text = folder.text(&[info("web")], "pileus ssh-proxy").unwrap();
        insta::assert_snapshot!("ssh_config", text);
        let evil = SshInfo {
            user: "x\nProxyCommand evil".into(),
            ..info("web")
        };
        assert!(folder.text(&[evil], "p").is_err());
    }

    #[test]
    fn the_proxy_finds_the_same_daemon() {
        let env = Environment::default();
        let mut place = Place {
            socket: "/run/it's 5%".into(),
            start: None,
        };
        let line = proxy(&env, &place).unwrap();
        assert_eq!(line, r"pileus --socket '/run/it'\''s 5%%' ssh-proxy");
        place.start = Some(Start {
            storage: Some("/srv/p".into()),
            log: "/l".into(),
        });
        assert_eq!(
            proxy(&env, &place).unwrap(),
            "pileus --storage /srv/p ssh-proxy"
        );
        place.start = Some(Start {
            storage: None,
            log: "/l".into(),
        });
        assert_eq!(proxy(&env, &place).unwrap(), "pileus ssh-proxy");
    }

    #[test]
    fn keys_are_private_and_go_with_their_instances() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder(dir.path().join("ssh"));
        folder.write(&[info("web"), info("db")], "p").unwrap();
        let key = dir.path().join("ssh/keys/web");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&key), mode(key.parent().unwrap())), (0o600, 0o700));
        assert_eq!(std::fs::read(&key).unwrap(), b"-----KEY-----\n");
        folder.write(&[info("db")], "p").unwrap();
        assert!(!key.exists() && dir.path().join("ssh/keys/db").exists());
        let known = std::fs::read_to_string(dir.path().join("ssh/known_hosts")).unwrap();
        assert_eq!(known, "db.pileus ssh-ed25519 AAAA\n");
    }
}
