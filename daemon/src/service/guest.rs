//! Commands in a guest.

use pileus_api::ExecRequest;
use pileus_base::Result;
use pileus_instances::guest::exec::{ExecSession, ExecSpec, Tty};

use super::Service;

impl Service {
    /// Runs a command (or a shell) in a running instance.
    pub async fn exec(&self, name: &str, request: ExecRequest) -> Result<ExecSession> {
        let instance = self.parts.registry.get_usable(name)?;
        let guest = instance.machine()?.guest()?;
        guest
            .exec(&ExecSpec {
                command: request.command,
                cwd: request.working_directory,
                env: request.env.into_iter().collect(),
                tty: request.tty.map(|tty| Tty {
                    term: tty.term,
                    cols: tty.cols.into(),
                    rows: tty.rows.into(),
                    modes: Vec::new(),
                }),
            })
            .await
    }
}
