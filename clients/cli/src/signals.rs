//! The signals that a command handles itself instead of being ended by them.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A received signal: its number and its name without SIG.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received {
    pub number: u8,
    pub name: &'static str,
}

pub(crate) struct Signals(Vec<(Signal, Received)>);

const INT: Received = Received {
    number: 2,
    name: "INT",
};
const TERM: Received = Received {
    number: 15,
    name: "TERM",
};
const HUP: Received = Received {
    number: 1,
    name: "HUP",
};
const QUIT: Received = Received {
    number: 3,
    name: "QUIT",
};

impl Signals {
    /// Ctrl-C and its like: the wish to end.
    pub fn to_end() -> io::Result<Self> {
        Self::of(&[INT, TERM])
    }

    /// All that are passed on to a command in a guest.
    pub fn to_forward() -> io::Result<Self> {
        Self::of(&[INT, TERM, HUP, QUIT])
    }

    fn of(which: &[Received]) -> io::Result<Self> {
        let listen = |received: &Received| {
            let kind = SignalKind::from_raw(received.number.into());
            Ok((signal(kind)?, *received))
        };
        which
            .iter()
            .map(listen)
            .collect::<io::Result<_>>()
            .map(Self)
    }

    /// The next of them; may be dropped and called again.
    pub async fn next(&mut self) -> Received {
        let waits = self.0.iter_mut().map(|(signal, received)| {
            Box::pin(async {
                signal.recv().await;
                *received
            })
        });
        futures_util::future::select_all(waits).await.0
    }
}

/// The number of a signal by its name without SIG, for the exit code of a command that it ended.
pub(crate) fn number(name: &str) -> Option<u8> {
    const NAMES: [(&str, u8); 20] = [
        ("HUP", 1),
        ("INT", 2),
        ("QUIT", 3),
        ("ILL", 4),
        ("TRAP", 5),
        ("ABRT", 6),
        ("BUS", 7),
        ("FPE", 8),
        ("KILL", 9),
        ("USR1", 10),
        ("SEGV", 11),
        ("USR2", 12),
        ("PIPE", 13),
        ("ALRM", 14),
        ("TERM", 15),
        ("CONT", 18),
        ("STOP", 19),
        ("TSTP", 20),
        ("XCPU", 24),
        ("SYS", 31),
    ];
    let name = name.strip_prefix("SIG").unwrap_or(name);
    NAMES.iter().find(|(n, _)| *n == name).map(|(_, n)| *n)
}
