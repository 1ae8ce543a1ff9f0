//! An instance's serial console: both ways, as long as its VM lives, for one client at a time.
//!
//! QEMU's end of the console takes one connection, lets others wait without a word, and stops the guest
//! when that one does not read. So who has it is decided here, and who reads slowly loses bytes
//! (`http/console.rs`); the console's log has all of them.

use pileus_base::{Code, Error, Result, files};
use pileus_instances::qemu::Paths;
use tokio::net::UnixStream;

use super::{Service, blocking};

/// Whoever holds this file's lock has the console.
const LOCK: &str = "console.lock";

/// The console, until it is dropped.
#[derive(Debug)]
pub struct Console {
    pub stream: UnixStream,
    _turn: files::Lock,
}

impl Service {
    /// Attaches to the console of an instance that has a VM, in whatever state.
    pub async fn console(&self, name: &str) -> Result<Console> {
        let instance = self.parts.registry.get_usable(name)?;
        let row = instance.row();
        if !row
            .process
            .is_some_and(pileus_base::process::ProcessId::is_alive)
        {
            return Err(Error::new(
                Code::WrongState,
                format!("instance \"{name}\" is not running"),
            )
            .advise(format!(
                "Start it, then attach while it boots; `pileus logs {name}` shows what it wrote last."
            )));
        }
        let layout = &self.parts.layout;
        let run = layout.instance_run(row.id);
        let paths = Paths::of(&run, &layout.instance(row.id));
        let turn = blocking(move || files::Lock::try_take(&run.join(LOCK))).await?;
        let Some(turn) = turn else {
            return Err(Error::new(
                Code::WrongState,
                format!("The console of \"{name}\" is in use by another client"),
            )
            .advise(format!(
                "Detach there (Ctrl-]); `pileus logs --follow {name}` shows the same output."
            )));
        };
        let stream = UnixStream::connect(paths.console()).await.map_err(|err| {
            Error::new(
                Code::GuestUnreachable,
                format!("The console of \"{name}\" can't be reached: {err}"),
            )
            .with_source(err)
        })?;
        Ok(Console {
            stream,
            _turn: turn,
        })
    }
}
