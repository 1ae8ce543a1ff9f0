//! The host's interfaces that instances can be connected to.

use pileus_api::HostNetwork;
use pileus_base::Result;
use pileus_networks::host;

use super::{Mode, Service, blocking};

impl Service {
    /// Bridges and Ethernet cards of the host, by name. A user's own daemon can't reach any: what its
    /// namespace holds is its own.
    pub async fn networks(&self) -> Result<Vec<HostNetwork>> {
        if let Mode::User(_) = self.parts.mode {
            return Ok(Vec::new());
        }
        let own = self.parts.network.bridge().to_owned();
        let found = blocking(move || Ok(host::interfaces(&own))).await?;
        Ok(found
            .into_iter()
            .map(|interface| HostNetwork {
                name: interface.name,
                kind: interface.kind.as_str().to_owned(),
                description: interface.description,
            })
            .collect())
    }
}
