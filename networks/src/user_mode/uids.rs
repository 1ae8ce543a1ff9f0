//! The id maps of the user's namespace: root inside is the user outside, and ids 1 to 65535 are the
//! user's subordinate ids when /etc/subuid and /etc/subgid grant them (newuidmap checks and writes
//! that; only it may). Without them the namespace has one id.

use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::{Uid, User, getgid, getuid};
use pileus_base::{Code, Error, Result};

use crate::tools;

/// Ids inside beyond root: with fewer, `nobody` (65534) would not exist.
const NEEDED: u32 = 65535;

/// Writes the maps of a process that has just made a user namespace. Returns whether they are full.
pub(super) fn map(pid: i32) -> Result<bool> {
    match full(pid) {
        Ok(()) => Ok(true),
        Err(reason) => {
            tracing_line(&format!("the namespace has one id only: {reason}"));
            single(pid)?;
            Ok(false)
        }
    }
}

/// The keeper has no log but its standard error, which is a file.
fn tracing_line(line: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{line}");
}

fn full(pid: i32) -> Result<(), String> {
    let name = User::from_uid(getuid())
        .ok()
        .flatten()
        .map(|user| user.name);
    for (program, file, own) in [
        ("newuidmap", "/etc/subuid", getuid().as_raw()),
        ("newgidmap", "/etc/subgid", getgid().as_raw()),
    ] {
        let path = tools::find(program, "uidmap").map_err(|err| err.message)?;
        let text = std::fs::read_to_string(file).map_err(|err| format!("{file}: {err}"))?;
        let first = range(&text, name.as_deref(), getuid())
            .ok_or_else(|| format!("{file} grants this user no {NEEDED} ids"))?;
        run(&path, &[pid.cast_unsigned(), 0, own, 1, 1, first, NEEDED])?;
    }
    Ok(())
}

fn run(program: &Path, numbers: &[u32]) -> Result<(), String> {
    let output = Command::new(program)
        .args(numbers.iter().map(u32::to_string))
        .stdin(Stdio::null())
        .output()
        .map_err(|err| format!("{}: {err}", program.display()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
}

/// First id of a large enough range in a file of `NAME-OR-UID:FIRST:COUNT` lines.
fn range(text: &str, name: Option<&str>, uid: Uid) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut parts = line.trim().split(':');
        let (who, first, count) = (parts.next()?, parts.next()?, parts.next()?);
        let mine = Some(who) == name || who == uid.to_string();
        let enough = count.parse::<u32>().is_ok_and(|count| count >= NEEDED);
        if mine && enough {
            first.parse().ok()
        } else {
            None
        }
    })
}

fn single(pid: i32) -> Result<()> {
    let write = |file: &str, text: &str| {
        std::fs::write(format!("/proc/{pid}/{file}"), text).map_err(|err| {
            Error::new(
                Code::PermissionDenied,
                format!("A user namespace can't be set up ({file}): {err}"),
            )
            .with_source(err)
        })
    };
    // A uid map that newuidmap wrote before newgidmap failed can't be written again; it may stay.
    let has_uids =
        std::fs::read_to_string(format!("/proc/{pid}/uid_map")).is_ok_and(|map| !map.is_empty());
    if !has_uids {
        write("uid_map", &format!("0 {} 1\n", getuid()))?;
    }
    write("setgroups", "deny")?;
    write("gid_map", &format!("0 {} 1\n", getgid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_by_name_and_by_number() {
        let text =
            "alice:100000:65536\nbob:165536:1000\n1001:300000:65536\nbroken\nbob:400000:65535\n";
        let uid = Uid::from_raw;
        assert_eq!(range(text, Some("alice"), uid(1000)), Some(100_000));
        assert_eq!(range(text, Some("bob"), uid(1002)), Some(400_000));
        assert_eq!(range(text, None, uid(1001)), Some(300_000));
        assert_eq!(range(text, Some("eve"), uid(1009)), None);
    }
}
