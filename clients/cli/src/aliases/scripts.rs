//! A script for each alias, so that it can be called by its name alone: `CONTEXT.ALIAS`, and `ALIAS` where
//! only one context has it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pileus_base::{Result, files};

use super::store::Aliases;
use crate::environment::Environment;

/// The folder that belongs into PATH.
pub fn folder(env: &Environment) -> Result<PathBuf> {
    let home = super::home(env)?;
    let data = env.folders.data_home.clone();
    let data = data.unwrap_or_else(|| home.join(".local/share"));
    Ok(data.join(env.personality.program()).join("bin"))
}

/// Whether the shell finds the scripts already.
pub fn is_in_path(env: &Environment, folder: &Path) -> bool {
    std::env::split_paths(&env.search_path).any(|path| path == folder)
}

/// Makes the scripts of what is new, and removes those of what is gone.
pub fn sync(env: &Environment, folder: &Path, before: &Aliases, after: &Aliases) -> Result<()> {
    let old = names(before);
    let new = names(after);
    for name in old.keys().filter(|name| !new.contains_key(*name)) {
        files::remove_file(&folder.join(name))?;
    }
    if new.is_empty() {
        return Ok(());
    }
    files::create_folder(folder, 0o755)?;
    let program = program(env);
    for (name, target) in new {
        let path = folder.join(&name);
        let text = script(&program, &target);
        if std::fs::read(&path).ok().as_deref() != Some(text.as_bytes()) {
            files::write_atomic(&path, text.as_bytes(), 0o755)?;
        }
    }
    Ok(())
}

/// Names of scripts, each with the alias that it calls, context and all.
fn names(aliases: &Aliases) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    let all = || {
        let contexts = aliases.contexts.iter();
        contexts.flat_map(|(context, found)| found.keys().map(move |name| (context, name)))
    };
    for (context, name) in all() {
        let full = format!("{context}.{name}");
        if all().filter(|(_, other)| *other == name).count() == 1 {
            names.insert(name.clone(), full.clone());
        }
        names.insert(full.clone(), full);
    }
    // What could leave the folder was not written by us.
    names.retain(|name, _| super::is_file_name(name));
    names
}

fn script(program: &Path, alias: &str) -> String {
    let program = quoted(&program.to_string_lossy());
    let alias = match alias
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
    {
        true => alias.to_owned(),
        false => quoted(alias),
    };
    format!("#!/bin/sh\n\n{program} {alias} -- \"${{@}}\"\n")
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        if "\"\\$`".contains(c) {
            out.push('\\');
        }
        out.push(c);
    }
    out.push('"');
    out
}

/// This program, by the name under which it was called.
fn program(env: &Environment) -> PathBuf {
    let name = env.personality.program();
    // A link may lie anywhere.
    let called = env.called_by.as_ref().filter(|path| path.ends_with(name));
    if let Some(called) = called.filter(|path| path.is_file()) {
        return called.clone();
    }
    let path = std::env::split_paths(&env.search_path);
    let mut folders = env.own_folder.clone().into_iter().chain(path);
    let found = folders.find_map(|folder| {
        let program = folder.join(name);
        program.is_file().then_some(program)
    });
    found.unwrap_or_else(|| name.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aliases::store::{Alias, Folder};

    fn alias() -> Alias {
        Alias {
            command: "ls".into(),
            instance: "foo".into(),
            working_directory: Folder::Map,
        }
    }

    #[test]
    fn scripts_call_the_link_by_which_they_were_made() {
        let dir = tempfile::tempdir().unwrap();
        let [own, link] = ["own", "link"].map(|name| dir.path().join(name));
        for folder in [&own, &link] {
            std::fs::create_dir(folder).unwrap();
            std::fs::write(folder.join("pileus"), "").unwrap();
        }
        let mut env = Environment {
            own_folder: Some(own.clone()),
            ..Default::default()
        };
        assert_eq!(program(&env), own.join("pileus"));
        env.called_by = Some(link.join("pileus"));
        assert_eq!(program(&env), link.join("pileus"));
        // By another name, or what is gone.
        for other in [link.join("other"), dir.path().join("none/pileus")] {
            env.called_by = Some(other);
            assert_eq!(program(&env), own.join("pileus"));
        }
    }

    #[test]
    fn scripts_follow_the_aliases() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("bin");
        let env = Environment {
            own_folder: Some("/opt/a b".into()),
            ..Default::default()
        };
        let none = Aliases::default();
        let mut one = none.clone();
        one.current().insert("ll".into(), alias());
        one.current().insert("../x".into(), alias());
        sync(&env, &folder, &none, &one).unwrap();
        let scripts = || {
            let entries = std::fs::read_dir(&folder).unwrap();
            let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = names.collect();
            names.sort();
            names
        };
        assert_eq!(scripts(), ["default.ll", "ll"]);
        let text = std::fs::read_to_string(folder.join("ll")).unwrap();
        assert_eq!(text, "#!/bin/sh\n\n\"pileus\" default.ll -- \"${@}\"\n");
        // The same name in another context: neither has the short one.
        let mut two = one.clone();
        two.prefer("other");
        two.current().insert("ll".into(), alias());
        sync(&env, &folder, &one, &two).unwrap();
        assert_eq!(scripts(), ["default.ll", "other.ll"]);
        sync(&env, &folder, &two, &none).unwrap();
        assert!(scripts().is_empty());
        assert!(script(Path::new("/a\"$(x)"), "a b").contains("\"/a\\\"\\$(x)\" \"a b\" -- "));
    }
}
