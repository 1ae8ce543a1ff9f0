//! The settings that the client keeps itself, `client.…`: a file of `KEY = VALUE` lines in the user's
//! configuration folder, the same under both names. All others are the daemon's.

use std::fs;
use std::io;
use std::path::PathBuf;

use pileus_api::{InstanceName, Setting};
use pileus_base::{Code, Error, files};

use crate::environment::Environment;
use crate::error::CommandError;

/// The instance that `start`, `stop`, `restart`, `suspend` and `shell` mean if no name is given.
pub(crate) const PRIMARY: &str = "client.primary-name";
const PRIMARY_DEFAULT: &str = "primary";
/// The file is small; what is larger is not ours.
const LIMIT: u64 = 64 << 10;

/// Whether the client answers for this key, and not the daemon.
pub(crate) fn is_own(key: &str) -> bool {
    key.starts_with("client.")
}

/// The primary instance's name; `None` if the user wants none.
pub(crate) fn primary_name(env: &Environment) -> Result<Option<String>, CommandError> {
    let name = read(env, PRIMARY)?.unwrap_or_else(|| PRIMARY_DEFAULT.to_owned());
    Ok(Some(name).filter(|name| !name.is_empty()))
}

pub(crate) fn all(env: &Environment) -> Result<Vec<Setting>, CommandError> {
    Ok(vec![get(env, PRIMARY)?])
}

pub(crate) fn get(env: &Environment, key: &str) -> Result<Setting, CommandError> {
    check_key(key)?;
    Ok(Setting {
        key: key.to_owned(),
        value: primary_name(env)?.unwrap_or_default(),
        values: "an instance's name, or nothing".to_owned(),
    })
}

pub(crate) fn set(env: &Environment, key: &str, value: &str) -> Result<(), CommandError> {
    check_key(key)?;
    if !value.is_empty()
        && let Err(err) = value.parse::<InstanceName>()
    {
        let text = format!("Invalid setting '{key}={value}': {}", err.message);
        return Err(CommandError::usage(text));
    }
    let path = file(env).ok_or_else(|| {
        let text = "Settings of the client lie in the home folder, and HOME is not set";
        Error::new(Code::InvalidArgument, text)
    })?;
    let text = text(env)?;
    let others = text.lines().filter(|line| value_of(line, key).is_none());
    let mut lines: Vec<&str> = others.collect();
    let line = format!("{key} = {value}");
    lines.push(&line);
    if let Some(folder) = path.parent() {
        files::create_folder(folder, 0o700)?;
    }
    files::write_atomic(&path, (lines.join("\n") + "\n").as_bytes(), 0o600)?;
    Ok(())
}

fn check_key(key: &str) -> Result<(), CommandError> {
    if key == PRIMARY {
        return Ok(());
    }
    let text = format!("Unrecognized settings key: '{key}'");
    Err(CommandError::usage(text))
}

fn file(env: &Environment) -> Option<PathBuf> {
    Some(env.config_folder.as_ref()?.join("pileus.conf"))
}

fn text(env: &Environment) -> Result<String, CommandError> {
    let Some(path) = file(env) else {
        return Ok(String::new());
    };
    match fs::metadata(&path) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        _ => {}
    }
    let bytes = files::read_bounded(&path, LIMIT)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last line counts.
fn read(env: &Environment, key: &str) -> Result<Option<String>, CommandError> {
    let text = text(env)?;
    let value = text
        .lines()
        .filter_map(|line| value_of(line, key))
        .next_back();
    Ok(value.map(str::to_owned))
}

fn value_of<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (found, value) = line.split_once('=')?;
    (found.trim() == key).then(|| value.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_primary_name_is_kept_and_can_be_none() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("pileus");
        let env = Environment {
            config_folder: Some(folder.clone()),
            ..Default::default()
        };
        assert_eq!(primary_name(&env).unwrap().as_deref(), Some("primary"));
        set(&env, PRIMARY, "main").unwrap();
        assert_eq!(primary_name(&env).unwrap().as_deref(), Some("main"));
        let path = folder.join("pileus.conf");
        fs::write(&path, "# mine\nother=1\nclient.primary-name=x\n").unwrap();
        set(&env, PRIMARY, "").unwrap();
        assert_eq!(primary_name(&env).unwrap(), None);
        let kept = fs::read_to_string(&path).unwrap();
        assert_eq!(kept, "# mine\nother=1\nclient.primary-name = \n");
    }

    #[test]
    fn bad_keys_and_values_are_usage_errors() {
        let env = Environment::default();
        for (key, value, text) in [
            (
                "client.nope",
                "",
                "Unrecognized settings key: 'client.nope'\n",
            ),
            (
                PRIMARY,
                "1a",
                "Invalid setting 'client.primary-name=1a': Invalid instance name supplied: 1a\n",
            ),
        ] {
            let err = set(&env, key, value).unwrap_err();
            assert_eq!((err.exit_code(), err.text("set").as_str()), (1, text));
        }
        assert_eq!(set(&env, PRIMARY, "a").unwrap_err().exit_code(), 2);
    }
}
