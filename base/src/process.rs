//! Which process is meant: a pid alone is reused, so a process is named by pid *and* start time.

use std::fs;

use serde::{Deserialize, Serialize};

use crate::{Code, Error, Result, ResultExt};

/// A process of this boot, as it can be found again after a restart of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// Clock ticks after boot, field 22 of `/proc/PID/stat`.
    pub start_time: u64,
}

impl ProcessId {
    /// Names the process that has this pid now.
    pub fn of(pid: i32) -> Option<Self> {
        Some(Self {
            pid,
            start_time: start_time(pid)?,
        })
    }

    /// Whether that very process still exists (a zombie counts as gone).
    pub fn is_alive(self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }

    /// What it was started with, its name first.
    pub fn command_line(self) -> Result<Vec<String>> {
        let bytes = fs::read(format!("/proc/{}/cmdline", self.pid)).io("Reading a command line")?;
        // That of a process that is just ending is empty.
        if bytes.is_empty() || !self.is_alive() {
            return Err(Error::new(
                Code::Io,
                format!("The process {} is gone", self.pid),
            ));
        }
        let args = bytes.split(|byte| *byte == 0);
        let mut args: Vec<_> = args
            .map(|a| String::from_utf8_lossy(a).into_owned())
            .collect();
        // A zero ends each argument.
        args.pop();
        Ok(args)
    }
}

fn start_time(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the command name in parentheses and may hold anything, also `)`.
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_process_lives_and_another_start_time_does_not() {
        let me = ProcessId::of(std::process::id().cast_signed()).unwrap();
        assert!(me.is_alive());
        let args: Vec<_> = std::env::args().collect();
        assert_eq!(me.command_line().unwrap(), args);
        let other = ProcessId {
            start_time: me.start_time + 1,
            ..me
        };
        assert!(!other.is_alive());
        assert!(ProcessId::of(i32::MAX).is_none());
    }
}
