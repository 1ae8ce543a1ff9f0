//! Calls about the host that the daemon runs on.

use pileus_api::{AuthenticateRequest, HostInfo, HostNetwork, InstanceUsage, SshInfo, routes};
use pileus_base::Result;
use reqwest::Method;

use crate::Client;
use crate::http::{ANSWER, instance_path};

impl Client {
    /// What the host has, and whether all is there that pileus needs.
    pub async fn host(&self) -> Result<HostInfo> {
        self.get(routes::HOST).await
    }

    pub async fn networks(&self) -> Result<Vec<HostNetwork>> {
        self.get(routes::NETWORKS).await
    }

    /// What each running instance has used of the host so far.
    pub async fn usage(&self) -> Result<Vec<InstanceUsage>> {
        self.get(routes::USAGE).await
    }

    pub async fn ssh_info(&self, name: &str) -> Result<SshInfo> {
        self.get(&instance_path(routes::INSTANCE_SSH, name)?).await
    }

    pub async fn authenticate(&self, passphrase: &str) -> Result<()> {
        let passphrase = passphrase.to_owned();
        let request = self
            .request(Method::POST, routes::AUTHENTICATE)
            .timeout(ANSWER);
        self.send(request.json(&AuthenticateRequest { passphrase }))
            .await?;
        Ok(())
    }
}
