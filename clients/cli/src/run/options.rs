//! What `pileus run` is given as text.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pileus_api::Size;
use pileus_base::Error;

use crate::error::CommandError;

/// A port of this host that leads to a port of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Publish {
    /// Port 0: any that is free.
    pub host: SocketAddr,
    pub guest: u16,
}

/// A file or folder to copy. Which side is which depends on the option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Copy {
    pub from: String,
    pub to: Option<String>,
}

/// Seconds, or a text like `90s`, `1m30s`, `2h`.
pub(crate) fn duration(text: &str) -> Result<Duration, CommandError> {
    let seconds = match text.parse::<f64>() {
        Ok(seconds) => Some(seconds),
        Err(_) => text
            .parse::<jiff::SignedDuration>()
            .ok()
            .map(|duration| duration.as_secs_f64()),
    };
    // Ten years: what is more can only be a slip.
    match seconds {
        Some(seconds) if seconds > 0.0 && seconds <= 315_360_000.0 => {
            Ok(Duration::from_secs_f64(seconds))
        }
        _ => Err(CommandError::usage(format!(
            "error: '{text}' is not a duration; it may be 90, 90s, 1m30s, 2h"
        ))),
    }
}

pub(crate) fn size(text: &str) -> Result<u64, CommandError> {
    let size: Result<Size, Error> = text.parse();
    size.map(Size::bytes)
        .map_err(|err| CommandError::usage(err.message))
}

/// Reads `[ADDR:]HOSTPORT:GUESTPORT`.
pub(crate) fn publish(text: &str) -> Result<Publish, CommandError> {
    let parsed = || {
        let (rest, guest) = text.rsplit_once(':')?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => {
                let address = address
                    .strip_prefix('[')
                    .map_or(Some(address), |inner| inner.strip_suffix(']'))?;
                (address.parse::<IpAddr>().ok()?, host)
            }
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
        };
        let guest = guest.parse::<u16>().ok().filter(|port| *port > 0)?;
        let host = SocketAddr::new(address, host.parse().ok()?);
        Some(Publish { host, guest })
    };
    parsed().ok_or_else(|| {
        CommandError::usage(format!(
            "error: '{text}' is not [ADDRESS:]HOSTPORT:GUESTPORT; an example is 8080:80"
        ))
    })
}

/// Reads `FROM[:TO]`. A file of this host whose name has a colon in it may be meant as a whole.
pub(crate) fn copy(text: &str, folder: Option<&Path>) -> Result<Copy, CommandError> {
    let whole = folder.is_some_and(|folder| folder.join(text).symlink_metadata().is_ok());
    let (from, to) = match text.split_once(':') {
        Some((from, to)) if !whole => (from, Some(to.to_owned())),
        _ => (text, None),
    };
    if from.is_empty() || to.as_deref() == Some("") || text.contains('\0') {
        let text = format!("error: '{text}' does not name what to copy; it may be FROM or FROM:TO");
        return Err(CommandError::usage(text));
    }
    let from = from.to_owned();
    Ok(Copy { from, to })
}

/// The variables for the command: those of files, then those given one by one. A name alone passes
/// this process's own value on, if it has one.
pub(crate) fn variables(
    files: &[PathBuf],
    given: &[String],
    own: &BTreeMap<OsString, OsString>,
) -> Result<BTreeMap<String, String>, CommandError> {
    let mut all = BTreeMap::new();
    let mut add = |text: &str| {
        let (name, value) = match text.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => {
                let own = own.get(std::ffi::OsStr::new(text));
                (
                    text,
                    own.and_then(|value| value.to_str().map(str::to_owned)),
                )
            }
        };
        let letters = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let digit = |b: &u8| b.is_ascii_digit();
        if name.is_empty()
            || !name.bytes().all(letters)
            || name.as_bytes().first().is_some_and(digit)
        {
            return Err(CommandError::usage(format!(
                "error: '{name}' is not the name of an environment variable"
            )));
        }
        if let Some(value) = value {
            all.insert(name.to_owned(), value);
        }
        Ok(())
    };
    for file in files {
        let text = std::fs::read_to_string(file).map_err(|err| {
            CommandError::usage(format!("error: {} can't be read: {err}", file.display()))
        })?;
        for line in text.lines().map(str::trim_start) {
            if !line.is_empty() && !line.starts_with('#') {
                add(line)?;
            }
        }
    }
    for text in given {
        add(text)?;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [
            ("90", 90_000),
            ("0.5", 500),
            ("1m30s", 90_000),
            ("2h", 7_200_000),
        ] {
            assert_eq!(duration(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for bad in ["0", "-1", "-5s", "", "x", "nan", "inf", "1e99", "0s"] {
            assert_eq!(duration(bad).unwrap_err().kind.exit_code(), 1, "{bad}");
        }
    }

    #[test]
    fn ports() {
        for (text, host, guest) in [
            ("8080:80", "127.0.0.1:8080", 80),
            ("0:80", "127.0.0.1:0", 80),
            ("0.0.0.0:8080:80", "0.0.0.0:8080", 80),
            ("[::1]:8080:80", "[::1]:8080", 80),
        ] {
            let expected = Publish {
                host: host.parse().unwrap(),
                guest,
            };
            assert_eq!(publish(text).unwrap(), expected, "{text}");
        }
        for bad in [
            "80", "a:80", "80:0", "80:70000", "x:1:2", "[::1:1:2", ":80", "1:2:3", "",
        ] {
            assert!(publish(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn copies() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("a:b"), "").unwrap();
        let read = |text: &str, here: bool| {
            let copy = copy(text, here.then_some(dir.path())).ok()?;
            Some((copy.from, copy.to))
        };
        let pair = |from: &str, to: Option<&str>| Some((from.to_owned(), to.map(str::to_owned)));
        assert_eq!(read("x", true), pair("x", None));
        assert_eq!(read("x:/y", true), pair("x", Some("/y")));
        assert_eq!(read("a:b", true), pair("a:b", None));
        assert_eq!(read("a:b", false), pair("a", Some("b")));
        for bad in ["", ":x", "x:"] {
            assert_eq!(read(bad, false), None, "{bad}");
        }
    }

    #[test]
    fn environment() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("env");
        std::fs::write(&file, "# a remark\n\nA=1\nB=two words=2\nOWN\n").unwrap();
        let own = BTreeMap::from([("OWN".into(), "mine".into()), ("HIDDEN".into(), "x".into())]);
        let given = ["A=3".to_owned(), "NONE".to_owned(), "E=".to_owned()];
        let all = variables(&[file], &given, &own).unwrap();
        let expected = [("A", "3"), ("B", "two words=2"), ("E", ""), ("OWN", "mine")];
        let expected = expected.map(|(name, value)| (name.to_owned(), value.to_owned()));
        assert_eq!(all, BTreeMap::from(expected));
        for bad in ["=x", "1A=x", "A B=x", "a-b"] {
            assert!(variables(&[], &[bad.to_owned()], &own).is_err(), "{bad}");
        }
    }
}
