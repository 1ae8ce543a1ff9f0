//! What every command gets: the surroundings, the way to the daemon, and the way out.

use std::io::{self, Write};

use pileus_client::Client;

use crate::args::Global;
use crate::environment::Environment;
use crate::error::{CommandError, Outcome};
use crate::place::Place;
use crate::progress::Progress;
use crate::render::{FormatOption, View};
use crate::{daemon, terminal};

pub(crate) struct Context {
    pub env: Environment,
    pub place: Place,
    pub verbose: u8,
}

impl Context {
    pub fn new(global: &Global, env: Environment) -> Self {
        Self {
            place: Place::find(global, &env),
            verbose: global.verbose,
            env,
        }
    }

    /// Whether this program was called by the name `multipass` and has to behave as that does.
    pub fn multipass(&self) -> bool {
        self.env.personality.multipass()
    }

    /// A client of a daemon that answers; starts the user's own daemon if that is missing.
    pub async fn client(&self) -> Result<Client, CommandError> {
        daemon::connect(&self.place, &self.env).await
    }

    pub fn progress(&self) -> Progress {
        let terminal = self.env.terminals.stderr;
        Progress::new(terminal, self.verbose > 0).silent(self.multipass() && !terminal)
    }

    /// How answers are to be written.
    pub fn view(&self, format: FormatOption) -> View {
        View {
            format: format.format,
            multipass: self.multipass(),
            zone: jiff::tz::TimeZone::system(),
        }
    }

    /// Writes data to standard output.
    pub fn print(&self, text: &str) -> Outcome {
        self.write(text.as_bytes())
    }

    pub fn write(&self, bytes: &[u8]) -> Outcome {
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush())?;
        Ok(0)
    }

    /// Tells the user something that is not an error.
    pub fn warn(&self, text: &str) {
        terminal::tell(&format!("warning: {text}"));
    }
}
