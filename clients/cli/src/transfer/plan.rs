//! Which way a transfer goes, from the words of the command line.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::error::CommandError;

/// A path in a guest, relative to the user's home unless it begins with a slash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Remote {
    pub instance: String,
    /// Never empty: `.` is the home.
    pub path: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Plan {
    /// Host to guest.
    Put { from: Vec<PathBuf>, to: Remote },
    /// Guest to host.
    Get { from: Vec<Remote>, to: PathBuf },
    /// Standard input to a file of a guest.
    PutStream { to: Remote },
    /// A file of a guest to standard output.
    GetStream { from: Remote },
}

enum Word {
    Stream,
    Local(PathBuf),
    Remote(Remote),
}

impl Plan {
    pub fn of(words: &[OsString]) -> Result<Self, CommandError> {
        let usage = |text: &str| Err(CommandError::usage(text));
        let Some((target, sources)) = words.split_last().filter(|(_, s)| !s.is_empty()) else {
            return usage("Not enough arguments given");
        };
        let streams = words.iter().filter(|word| *word == "-").count();
        if streams > 1 {
            return usage("Only one '-' allowed");
        }
        if streams == 1 && words.len() > 2 {
            return usage("Only two arguments allowed when using '-'");
        }
        let mut local = Vec::new();
        let mut remote = Vec::new();
        for source in sources {
            match Word::of(source) {
                Word::Stream => {
                    return match Word::of(target) {
                        Word::Remote(to) => Ok(Self::PutStream { to }),
                        _ => usage("Target must be inside an instance"),
                    };
                }
                Word::Local(path) => local.push(path),
                Word::Remote(path) => remote.push(path),
            }
        }
        match Word::of(target) {
            Word::Stream => match remote.pop() {
                Some(from) => Ok(Self::GetStream { from }),
                None => usage("Source must be from inside an instance"),
            },
            Word::Remote(_) if !remote.is_empty() => {
                usage("Cannot specify an instance name for both source and destination")
            }
            Word::Remote(to) => Ok(Self::Put { from: local, to }),
            Word::Local(_) if remote.is_empty() => {
                usage("An instance name is needed for either source or destination")
            }
            Word::Local(_) if !local.is_empty() => {
                usage("All sources must be from inside an instance")
            }
            Word::Local(to) => Ok(Self::Get { from: remote, to }),
        }
    }
}

impl Word {
    fn of(word: &OsStr) -> Self {
        let bytes = word.as_bytes();
        if bytes == b"-" {
            return Self::Stream;
        }
        let Some(colon) = bytes.iter().position(|byte| *byte == b':') else {
            return Self::Local(word.into());
        };
        let (name, path) = (&bytes[..colon], &bytes[colon + 1..]);
        // `./a:b` is a file of the host; no name of an instance has a slash.
        if name.is_empty() || name.contains(&b'/') {
            return Self::Local(word.into());
        }
        // A shell leaves the tilde behind a colon alone.
        let path = match path {
            b"" | b"~" | b"~/" => b".",
            path => path.strip_prefix(b"~/").unwrap_or(path),
        };
        Self::Remote(Remote {
            instance: String::from_utf8_lossy(name).into_owned(),
            path: path.to_vec(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plan(line: &str) -> Result<Plan, String> {
        let words: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
        Plan::of(&words).map_err(|err| err.text("transfer").trim_end().to_owned())
    }

    fn remote(instance: &str, path: &str) -> Remote {
        Remote {
            instance: instance.into(),
            path: path.into(),
        }
    }

    #[test]
    fn every_form() {
        for (line, expected) in [
            (
                "a b/c foo:d",
                Plan::Put {
                    from: vec!["a".into(), "b/c".into()],
                    to: remote("foo", "d"),
                },
            ),
            (
                "foo:a bar:/b:c .",
                Plan::Get {
                    from: vec![remote("foo", "a"), remote("bar", "/b:c")],
                    to: ".".into(),
                },
            ),
            (
                "- foo:",
                Plan::PutStream {
                    to: remote("foo", "."),
                },
            ),
            (
                "foo:~/x -",
                Plan::GetStream {
                    from: remote("foo", "x"),
                },
            ),
            (
                "./a:b foo:~",
                Plan::Put {
                    from: vec!["./a:b".into()],
                    to: remote("foo", "."),
                },
            ),
        ] {
            assert_eq!(plan(line).unwrap(), expected, "{line}");
        }
    }

    #[test]
    fn every_refusal() {
        for (line, text) in [
            ("", "Not enough arguments given"),
            ("a", "Not enough arguments given"),
            ("- -", "Only one '-' allowed"),
            ("- a foo:b", "Only two arguments allowed when using '-'"),
            ("foo:a b -", "Only two arguments allowed when using '-'"),
            ("- b", "Target must be inside an instance"),
            ("b -", "Source must be from inside an instance"),
            (
                "foo:a bar:b",
                "Cannot specify an instance name for both source and destination",
            ),
            (
                "a foo:b bar:c",
                "Cannot specify an instance name for both source and destination",
            ),
            (
                "a b",
                "An instance name is needed for either source or destination",
            ),
            ("a foo:b c", "All sources must be from inside an instance"),
        ] {
            assert_eq!(plan(line).unwrap_err(), text, "{line}");
        }
    }
}
