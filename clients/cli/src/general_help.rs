//! The list of commands as `multipass help` shows it. Tools read its lines, so the short texts are
//! fixed. Under `pileus` the grammar itself makes the list.

pub(crate) const ABOUT: &str = "Make and use virtual machines on this computer.";

/// The commands that there are under the name `multipass`.
const COMMANDS: &[(&str, &str)] = &[
    ("alias", "Create an alias"),
    ("aliases", "List available aliases"),
    ("authenticate", "Authenticate client"),
    ("clone", "Clone an instance"),
    ("delete", "Delete instances and snapshots"),
    ("exec", "Run a command on an instance"),
    ("find", "Display available images to create instances from"),
    ("get", "Get a configuration setting"),
    ("help", "Display help about a command"),
    ("info", "Display information about instances or snapshots"),
    ("launch", "Create and start an Ubuntu instance"),
    ("list", "List all available instances or snapshots"),
    ("mount", "Mount a local directory in the instance"),
    ("networks", "List available network interfaces"),
    ("prefer", "Switch the current alias context"),
    ("purge", "Purge all deleted instances permanently"),
    ("recover", "Recover deleted instances"),
    ("restart", "Restart instances"),
    ("restore", "Restore an instance from a snapshot"),
    ("set", "Set a configuration setting"),
    ("shell", "Open a shell on an instance"),
    ("snapshot", "Take a snapshot of an instance"),
    ("start", "Start instances"),
    ("stop", "Stop running instances"),
    ("suspend", "Suspend running instances"),
    ("transfer", "Transfer files between the host and instances"),
    ("umount", "Unmount a directory from an instance"),
    ("unalias", "Remove aliases"),
    ("version", "Show version details"),
    ("wait-ready", "Wait for the Multipass daemon to be ready"),
];

/// Long options of the shared commands that only pileus has; not shown under `multipass`.
const OWN_OPTIONS: &[&str] = &[
    "checksum",
    "network-config",
    "warm",
    "cold",
    "wait",
    "no-wait",
    "with-memory",
    "disk-only",
    "socket",
    "storage",
];

/// What a command of Multipass does; `None` for one that it does not have.
pub(crate) fn summary(command: &str) -> Option<&'static str> {
    let found = COMMANDS.iter().find(|(name, _)| *name == command);
    found.map(|(_, summary)| *summary)
}

pub(crate) fn is_own_option(long: &str) -> bool {
    OWN_OPTIONS.contains(&long)
}

/// What `multipass help` shows.
pub(crate) fn text() -> String {
    let mut out = format!(
        "Usage: multipass [options] <command>\n{ABOUT}\n\n\
         Options:\n  -h, --help     Displays help on commandline options\n  \
         -v, --verbose  Increase logging verbosity, up to four times\n\n\
         Available commands:\n"
    );
    for (name, summary) in COMMANDS {
        out.push_str(&format!("  {name:<14}{summary}\n"));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args;

    #[test]
    fn every_command_of_multipass_is_in_the_grammar() {
        for (name, _) in COMMANDS {
            let root = args::command();
            let there = root.get_subcommands().any(|c| c.get_name() == *name);
            assert!(there, "{name}");
        }
    }

    #[test]
    fn its_lines_are_those_that_tools_look_for() {
        let text = text();
        let lines = text.lines().filter(|line| {
            let rest = line.strip_prefix("  ");
            rest.is_some_and(|rest| !rest.starts_with(['-', ' ']))
        });
        assert_eq!(lines.count(), COMMANDS.len());
        assert!(text.contains("\n  wait-ready    Wait for the Multipass daemon to be ready\n"));
        assert!(
            text.contains("\n  ls") || !text.contains("alias:"),
            "no synonyms"
        );
    }
}
