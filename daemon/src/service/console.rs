//! An instance's serial console.

use pileus_base::Result;
use pileus_instances::guest::console::Console;

use super::Service;

impl Service {
    /// Attaches to the console of an instance that has a VM, also while it boots; one client at a time.
    pub async fn console(&self, name: &str) -> Result<Console> {
        let instance = self.parts.registry.get_usable(name)?;
        let guest = instance.machine_soon().await?.guest()?;
        guest.console().await
    }
}
