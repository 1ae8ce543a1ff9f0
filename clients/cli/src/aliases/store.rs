//! The user's aliases: one file of JSON, as Multipass writes it. It is replaced as a whole while a lock is
//! held. One that can't be read is told of and left alone.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pileus_base::{Code, Error, Result, files};
use serde::{Deserialize, Serialize};

use crate::environment::Environment;
use crate::error::CommandError;

const MAX_FILE: u64 = 4 << 20;
/// How long another client may hold the lock.
const PATIENCE: Duration = Duration::from_secs(10);

/// The name of the context that is there from the beginning.
const DEFAULT: &str = "default";

/// What an alias stands for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alias {
    pub command: String,
    pub instance: String,
    #[serde(rename = "working-directory", default)]
    pub working_directory: Folder,
}

/// In which folder of the guest it runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Folder {
    /// The one that belongs to the current folder, if that is mounted.
    Map,
    /// The home.
    #[default]
    Default,
}

impl Folder {
    pub fn as_str(self) -> &'static str {
        match self {
            Folder::Map => "map",
            Folder::Default => "default",
        }
    }
}

pub type Context = BTreeMap<String, Alias>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aliases {
    #[serde(rename = "active-context")]
    pub active: String,
    pub contexts: BTreeMap<String, Context>,
}

impl Default for Aliases {
    fn default() -> Self {
        Self {
            active: DEFAULT.to_owned(),
            contexts: BTreeMap::from([(DEFAULT.to_owned(), Context::new())]),
        }
    }
}

impl Aliases {
    pub fn is_empty(&self) -> bool {
        self.contexts.values().all(Context::is_empty)
    }

    /// The context that names without one are looked up in.
    pub fn current(&mut self) -> &mut Context {
        self.contexts.entry(self.active.clone()).or_default()
    }

    /// Finds `alias` in the current context, or `context.alias`. Gives both names too.
    pub fn find(&self, name: &str) -> Option<(&str, &str, &Alias)> {
        let within = |context: &str, name: &str| {
            let (context, aliases) = self.contexts.get_key_value(context)?;
            let (name, alias) = aliases.get_key_value(name)?;
            Some((context.as_str(), name.as_str(), alias))
        };
        if let Some(found) = within(&self.active, name) {
            return Some(found);
        }
        // Both parts may have dots in them.
        let dots = name.match_indices('.');
        let mut parts = dots.map(|(at, _)| (&name[..at], &name[at + 1..]));
        parts.find_map(|(context, name)| within(context, name))
    }

    pub fn remove(&mut self, context: &str, name: &str) {
        if let Some(aliases) = self.contexts.get_mut(context) {
            aliases.remove(name);
        }
    }

    /// Removes the aliases of these instances.
    pub fn forget(&mut self, instances: &[&str]) {
        for context in self.contexts.values_mut() {
            context.retain(|_, alias| !instances.contains(&alias.instance.as_str()));
        }
    }

    /// Switches the context; one that is not there is made.
    pub fn prefer(&mut self, context: &str) {
        context.clone_into(&mut self.active);
        self.current();
    }

    /// An empty context that nobody uses vanishes.
    fn tidy(&mut self) {
        self.current();
        let active = &self.active;
        self.contexts
            .retain(|name, aliases| name == active || !aliases.is_empty());
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        if bytes.trim_ascii().is_empty() {
            return Some(Self::default());
        }
        if let Ok(aliases) = serde_json::from_slice(bytes) {
            return Some(aliases);
        }
        // As it was before there were contexts.
        let flat: Context = serde_json::from_slice(bytes).ok()?;
        Some(Self {
            contexts: BTreeMap::from([(DEFAULT.to_owned(), flat)]),
            ..Self::default()
        })
    }
}

/// Where the aliases of this user lie.
pub fn file(env: &Environment) -> Result<PathBuf> {
    let home = super::home(env)?;
    let config = env
        .variables
        .get(std::ffi::OsStr::new("XDG_CONFIG_HOME"))
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .unwrap_or_else(|| home.join(".config"));
    Ok(match env.personality.multipass() {
        true => config.join("multipass/multipass_aliases.json"),
        false => config.join("pileus/aliases.json"),
    })
}

/// What there is now; none if there is no file.
pub fn load(path: &Path) -> Result<Aliases> {
    if !path.exists() {
        return Ok(Aliases::default());
    }
    let bytes = files::read_bounded(path, MAX_FILE)?;
    Aliases::parse(&bytes).ok_or_else(|| {
        Error::new(
            Code::InvalidArgument,
            format!("The file of aliases is damaged: {}", path.display()),
        )
        .advise("Correct it, or move it away; it is left as it is.")
    })
}

/// Changes the aliases; gives what they were and what they are. A change that fails changes nothing.
pub fn change<T>(
    path: &Path,
    change: impl FnOnce(&mut Aliases) -> std::result::Result<T, CommandError>,
) -> std::result::Result<(Aliases, Aliases, T), CommandError> {
    if let Some(folder) = path.parent() {
        files::create_folder(folder, 0o700)?;
    }
    let _lock = lock(path)?;
    let before = load(path)?;
    let mut after = before.clone();
    let result = change(&mut after)?;
    after.tidy();
    if after != before || !path.exists() {
        let mut text = serde_json::to_vec_pretty(&after)
            .map_err(|err| Error::internal(format!("Writing the aliases: {err}")))?;
        text.push(b'\n');
        files::write_atomic(path, &text, 0o600)?;
    }
    Ok((before, after, result))
}

fn lock(path: &Path) -> Result<files::Lock> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(lock) = files::Lock::try_take(Path::new(&name))? {
            return Ok(lock);
        }
        if Instant::now() > deadline {
            let text = "Another program holds the aliases for too long";
            return Err(Error::new(Code::TimedOut, text));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alias(instance: &str) -> Alias {
        Alias {
            command: "ls".into(),
            instance: instance.into(),
            working_directory: Folder::Map,
        }
    }

    #[test]
    fn what_multipass_wrote_is_read_and_written_alike() {
        let text = r#"{"active-context":"default","contexts":{"default":{"wai":
            {"command":"whoami","instance":"foo","working-directory":"map"}},"x.y":{}}}"#;
        let mut aliases = Aliases::parse(text.as_bytes()).unwrap();
        let (context, name, found) = aliases.find("wai").unwrap();
        assert_eq!(
            (context, name, found.command.as_str()),
            ("default", "wai", "whoami")
        );
        aliases.tidy();
        assert_eq!(
            serde_json::to_string(&aliases).unwrap(),
            r#"{"active-context":"default","contexts":{"default":{"wai":{"command":"whoami","instance":"foo","working-directory":"map"}}}}"#
        );
        let old = br#"{"wai":{"command":"whoami","instance":"foo"}}"#;
        let old = Aliases::parse(old).unwrap();
        assert_eq!(
            old.find("default.wai").unwrap().2.working_directory,
            Folder::Default
        );
        assert_eq!(Aliases::parse(b"\n"), Some(Aliases::default()));
        for bad in [
            "{",
            "[]",
            "{\"a\":1}",
            "{\"active-context\":\"x\",\"contexts\":3}",
        ] {
            assert_eq!(Aliases::parse(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn names_are_looked_up_in_the_context() {
        let mut aliases = Aliases::default();
        aliases.current().insert("a.b".into(), alias("one"));
        aliases.prefer("my.ctx");
        aliases.current().insert("b".into(), alias("two"));
        let instance = |name: &str| aliases.find(name).map(|found| found.2.instance.as_str());
        assert_eq!(instance("b"), Some("two"));
        assert_eq!(instance("a.b"), None);
        assert_eq!(instance("default.a.b"), Some("one"));
        assert_eq!(instance("my.ctx.b"), Some("two"));
        assert_eq!(instance("default.b"), None);
        aliases.forget(&["two"]);
        aliases.prefer("default");
        aliases.tidy();
        assert_eq!(aliases.contexts.len(), 1);
    }

    #[test]
    fn a_damaged_file_is_named_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("c/aliases.json");
        let (_, after, ()) = change(&path, |aliases| {
            aliases.current().insert("x".into(), alias("foo"));
            Ok(())
        })
        .unwrap();
        assert_eq!(load(&path).unwrap(), after);
        std::fs::write(&path, "{\"active").unwrap();
        let err = change(&path, |_| Ok(())).unwrap_err();
        assert!(err.error.message.contains("c/aliases.json"), "{err:?}");
        assert_eq!(std::fs::read(&path).unwrap(), b"{\"active");
    }

    #[test]
    fn changes_of_many_at_once_are_all_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("aliases.json");
        std::thread::scope(|scope| {
            for i in 0..16 {
                let path = &path;
                scope.spawn(move || {
                    let add = |aliases: &mut Aliases| {
                        aliases.current().insert(format!("a{i}"), alias("foo"));
                        Ok(())
                    };
                    change(path, add).unwrap();
                });
            }
        });
        assert_eq!(load(&path).unwrap().current().len(), 16);
    }
}
