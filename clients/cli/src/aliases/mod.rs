//! Names of the user's own for commands in instances. All of it is the client's: the daemon knows none.
//!
//! ```text
//! store.rs      the file             scripts.rs    a script for each in a folder for PATH
//! ```

pub mod scripts;
pub mod store;

use std::ffi::OsString;
use std::path::PathBuf;

use pileus_base::{Code, Error, InstanceName, Result};
use pileus_client::Client;

use self::store::{Aliases, Folder};
use crate::environment::Environment;
use crate::error::CommandError;
use crate::personality::Personality;
use crate::terminal;

fn home(env: &Environment) -> Result<PathBuf> {
    env.folders.home.clone().ok_or_else(|| {
        Error::new(
            Code::InvalidArgument,
            "Aliases lie in the home folder, and HOME is not set",
        )
    })
}

/// Whether this is one name in a folder.
pub(crate) fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains('/') && !name.contains('\0')
}

/// A command line whose command, the word at `at`, is none of ours: rewritten to the `exec` that this
/// alias stands for, or `None` if it is no alias.
pub(crate) fn rewrite(args: &[OsString], at: usize, env: &Environment) -> Option<Vec<OsString>> {
    let name = args.get(at)?.to_str()?;
    let aliases = match store::file(env).and_then(|path| store::load(&path)) {
        Ok(aliases) => aliases,
        Err(err) => {
            terminal::tell(&err.message);
            return None;
        }
    };
    let (_, _, alias) = aliases.find(name)?;
    // From the file; an option in its place would be one of exec.
    alias.instance.parse::<InstanceName>().ok()?;
    let mut line: Vec<OsString> = args[..at].to_vec();
    line.push("exec".into());
    if alias.working_directory == Folder::Default {
        line.push("--no-map-working-directory".into());
    }
    line.extend([&alias.instance, "--", &alias.command].map(OsString::from));
    let rest = &args[at + 1..];
    let rest = rest.strip_prefix(&[OsString::from("--")]).unwrap_or(rest);
    line.extend_from_slice(rest);
    Some(line)
}

/// Changes the file and then the scripts.
pub(crate) fn change<T>(
    env: &Environment,
    change: impl FnOnce(&mut Aliases) -> Result<T, CommandError>,
) -> Result<(Aliases, T), CommandError> {
    let (before, after, result) = store::change(&store::file(env)?, change)?;
    scripts::sync(env, &scripts::folder(env)?, &before, &after)?;
    Ok((before, result))
}

/// Drops the aliases of those of these instances that are gone for good. What can't be done is a warning:
/// the instances are gone all the same.
pub(crate) async fn forget_gone(env: &Environment, client: &Client, names: &[InstanceName]) {
    let names: Vec<&str> = names.iter().map(InstanceName::as_str).collect();
    if !both(env).iter().any(|env| any_of(env, &names)) {
        return;
    }
    let Ok(there) = client.instances().await else {
        return;
    };
    let is_there = |name: &str| there.iter().any(|i| i.name.as_str() == name);
    let gone: Vec<&str> = names.into_iter().filter(|name| !is_there(name)).collect();
    forget(env, &gone);
}

/// As [`forget_gone`], of instances that are known to be gone.
pub(crate) fn forget(env: &Environment, instances: &[&str]) {
    for env in &both(env) {
        if !any_of(env, instances) {
            continue;
        }
        let forgotten = change(env, |aliases| {
            aliases.forget(instances);
            Ok(())
        });
        if let Err(err) = forgotten {
            warn(&err.error);
        }
    }
}

/// The surroundings under each name of this program: both have aliases, and the instances are the same.
fn both(env: &Environment) -> [Environment; 2] {
    [Personality::Pileus, Personality::Multipass].map(|personality| Environment {
        personality,
        ..env.clone()
    })
}

/// Whether any alias belongs to one of these instances.
fn any_of(env: &Environment, instances: &[&str]) -> bool {
    let Ok(path) = store::file(env) else {
        return false;
    };
    match store::load(&path) {
        Ok(aliases) => {
            let mut all = aliases.contexts.values().flat_map(|found| found.values());
            all.any(|alias| instances.contains(&alias.instance.as_str()))
        }
        Err(err) => {
            warn(&err);
            false
        }
    }
}

fn warn(err: &Error) {
    let text = &err.message;
    terminal::tell(&format!("warning: the aliases were not changed: {text}"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_becomes_an_exec() {
        let dir = tempfile::tempdir().unwrap();
        let mut env = Environment::default();
        env.folders.home = Some(dir.path().into());
        let line = |text: &str| text.split(' ').map(OsString::from).collect::<Vec<_>>();
        assert_eq!(rewrite(&line("pileus wai"), 1, &env), None);
        let file = store::file(&env).unwrap();
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(
            &file,
            r#"{"active-context":"c","contexts":{"c":{
            "wai":{"command":"whoami","instance":"foo","working-directory":"map"},
            "bad":{"command":"x","instance":"-n","working-directory":"map"}},
            "d":{"ll":{"command":"/bin/ls","instance":"bar","working-directory":"default"}}}}"#,
        )
        .unwrap();
        for (before, after) in [
            ("pileus -v wai", "pileus -v exec foo -- whoami"),
            ("pileus wai -- a b", "pileus exec foo -- whoami a b"),
            ("pileus wai -l -- b", "pileus exec foo -- whoami -l -- b"),
            (
                "pileus d.ll -l",
                "pileus exec --no-map-working-directory bar -- /bin/ls -l",
            ),
        ] {
            let words = line(before);
            let at = usize::from(words[1] == "-v") + 1;
            assert_eq!(rewrite(&words, at, &env), Some(line(after)), "{before}");
        }
        for unknown in ["pileus ll", "pileus bad", "pileus c.x"] {
            assert_eq!(rewrite(&line(unknown), 1, &env), None, "{unknown}");
        }
        forget(&env, &["bar", "other"]);
        let aliases = store::load(&file).unwrap();
        assert!(aliases.find("wai").is_some() && aliases.find("d.ll").is_none());
    }
}
