//! Under which name this program was called. `pileus` is itself; a link `multipass` to it answers as
//! Multipass 1.16 does, so that scripts and tools written for that work unchanged.
//!
//! All that differs by name is asked of this type, in these places and no others:
//!
//! ```text
//! parse.rs         which commands and options there are      usage.rs    texts of bad command lines
//! error.rs         how errors look (no code, no hint)        help.rs     the list of commands
//! environment.rs   MULTIPASS_STORAGE                         render/     what pileus tells beyond
//! commands/X.rs    what only one of them allows: ask `context.multipass()`
//! ```

use std::ffi::OsStr;
use std::path::Path;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Personality {
    #[default]
    Pileus,
    /// As Multipass 1.16.
    Multipass,
}

impl Personality {
    /// By the first word of the command line: its last part, so that a link anywhere will do.
    pub fn of_program(word: Option<&OsStr>) -> Self {
        let name = word.and_then(|word| Path::new(word).file_name());
        match name {
            Some(name) if name == "multipass" => Personality::Multipass,
            _ => Personality::Pileus,
        }
    }

    pub fn multipass(self) -> bool {
        self == Personality::Multipass
    }

    /// The name of this program for usage, help and messages.
    pub fn program(self) -> &'static str {
        match self {
            Personality::Pileus => "pileus",
            Personality::Multipass => "multipass",
        }
    }

    /// The daemon's name for messages.
    pub fn daemon(self) -> &'static str {
        match self {
            Personality::Pileus => "pileusd",
            Personality::Multipass => "multipassd",
        }
    }

    /// A message of the client, as it reads under this name. Only fixed phrases of our own are changed,
    /// so that no path and no guest's word ever is.
    pub fn retell(self, message: &str) -> String {
        const PHRASES: [(&str, &str); 7] = [
            (
                "cannot connect to the pileus socket",
                "cannot connect to the multipass socket",
            ),
            ("ensure pileusd is running", "ensure multipassd is running"),
            (
                "pileus socket access denied",
                "multipass socket access denied",
            ),
            (
                "Please ensure that pileus can",
                "Please ensure that Multipass can",
            ),
            (
                "You have to `pileus set local.bridged-network",
                "You have to `multipass set local.bridged-network",
            ),
            (
                "set as bridged interface, use `pileus set",
                "set as bridged interface, use `multipass set",
            ),
            ("See `pileus networks`", "See `multipass networks`"),
        ];
        if !self.multipass() {
            return message.to_owned();
        }
        PHRASES
            .iter()
            .fold(message.to_owned(), |text, (ours, theirs)| {
                text.replacen(ours, theirs, 1)
            })
    }

    /// The version that it says it is: tools ask for 1.14.1 or newer.
    pub fn version(self) -> &'static str {
        match self {
            Personality::Pileus => env!("CARGO_PKG_VERSION"),
            Personality::Multipass => "1.16.3",
        }
    }

    /// The same for the daemon, which says what it is itself.
    pub fn daemon_version(self, told: String) -> String {
        match self {
            Personality::Pileus => told,
            Personality::Multipass => self.version().to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_name_changes_it() {
        let of = |word: &str| Personality::of_program(Some(OsStr::new(word)));
        for word in ["multipass", "/usr/local/bin/multipass", "./multipass"] {
            assert_eq!(of(word), Personality::Multipass, "{word}");
        }
        for word in ["pileus", "/opt/multipass/pileus", "multipass.sh", "", "/"] {
            assert_eq!(of(word), Personality::Pileus, "{word}");
        }
        assert_eq!(Personality::of_program(None), Personality::Pileus);
    }
}
