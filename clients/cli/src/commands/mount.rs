//! `pileus mount`: its grammar. Mounts are not there yet, and it says so.

use std::path::Path;

use pileus_base::{Code, Error};

use crate::error::{CommandError, Outcome};

/// Mount a local directory in the instance (not there yet)
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Local folder
    #[arg(value_name = "SOURCE")]
    pub source: String,
    /// Instances, and where in them
    #[arg(value_name = "NAME[:PATH]", required = true)]
    pub targets: Vec<String>,
    /// User ids of host and instance that belong together
    #[arg(short, long, value_name = "HOST:INSTANCE")]
    pub uid_map: Vec<String>,
    /// Group ids of host and instance that belong together
    #[arg(short, long, value_name = "HOST:INSTANCE")]
    pub gid_map: Vec<String>,
    /// How it is mounted: classic or native
    #[arg(
        short = 't',
        long = "type",
        value_name = "TYPE",
        default_value = "classic"
    )]
    #[arg(hide_default_value = true)]
    pub kind: String,
}

pub(crate) fn run(args: &Args) -> Outcome {
    if !matches!(args.kind.as_str(), "classic" | "native") {
        return Err(CommandError::usage(format!(
            "error: Bad mount type '{}' specified, please use 'classic' or 'native'",
            args.kind
        )));
    }
    for (what, maps) in [("UID", &args.uid_map), ("GID", &args.gid_map)] {
        if let Some(bad) = maps.iter().find(|map| !is_map(map)) {
            return Err(CommandError::usage(format!(
                "Invalid {what} map given: {bad}"
            )));
        }
    }
    source(&args.source)?;
    Err(not_yet())
}

fn is_map(text: &str) -> bool {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.split_once(':')
        .is_some_and(|(host, instance)| number(host) && number(instance))
}

/// Refuses what can't be the source of a mount.
pub(crate) fn source(path: &str) -> Result<(), CommandError> {
    let refuse = |why: &str| Err(CommandError::usage(format!("Source path \"{path}\" {why}")));
    let path = Path::new(path);
    match path.metadata() {
        Err(_) => refuse("does not exist"),
        Ok(metadata) if !metadata.is_dir() => refuse("is not a directory"),
        Ok(_) if path.read_dir().is_err() => refuse("is not readable"),
        Ok(_) => Ok(()),
    }
}

pub(crate) fn not_yet() -> CommandError {
    Error::new(
        Code::InvalidArgument,
        "Mounts are not there yet in this version",
    )
    .advise("pileus transfer copies files and folders both ways.")
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_not_be_mounted_is_refused_first() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(path("file"), "").unwrap();
        let args = |source: &str| Args {
            source: source.to_owned(),
            targets: vec!["foo".into()],
            uid_map: vec!["0:1000".into()],
            gid_map: vec![],
            kind: "classic".into(),
        };
        let text = |args: &Args| {
            let err = run(args).unwrap_err();
            (
                err.exit_code(),
                err.text("mount")
                    .lines()
                    .next()
                    .unwrap_or_default()
                    .to_owned(),
            )
        };
        let none = path("none");
        let expected = format!("Source path \"{none}\" does not exist");
        assert_eq!(text(&args(&none)), (1, expected));
        let file = path("file");
        let expected = format!("Source path \"{file}\" is not a directory");
        assert_eq!(text(&args(&file)), (1, expected));
        let good = args(&path("."));
        assert_eq!(text(&good).0, 2);
        let bad = Args {
            kind: "nfs".into(),
            ..good.clone()
        };
        assert_eq!(text(&bad).0, 1);
        for map in ["1", ":1", "a:1", "1:1:1", "-1:1"] {
            let bad = Args {
                gid_map: vec![map.into()],
                ..good.clone()
            };
            assert_eq!(text(&bad), (1, format!("Invalid GID map given: {map}")));
        }
    }
}
