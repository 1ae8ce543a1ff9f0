//! Requests to the agent of a guest that lives: it stood still, got another name or a larger disk, or is
//! about to be saved. The guest's side: `agent/life.py`.

use std::time::Duration;

use pileus_base::{InstanceName, Result};
use serde_json::json;

use super::clone::hex;
use super::handle::Guest;
use crate::warm;

/// A word to the users.
const WALL_BOUND: Duration = Duration::from_secs(10);

impl Guest {
    /// Tells a guest that stood still what time it is, and gives it fresh randomness.
    pub async fn resumed(&self, bound: Duration) -> Result<()> {
        let (entropy, time) = (warm::entropy()?, warm::now());
        let args = json!({ "entropy": hex(&entropy), "time": time });
        self.tell("resumed", args, bound).await
    }

    /// Gives the guest another host name.
    pub async fn rename(&self, name: &InstanceName, bound: Duration) -> Result<()> {
        self.tell("rename", json!({ "hostname": name.as_str() }), bound)
            .await
    }

    /// Grows the root file system to the disk's size.
    pub async fn grow(&self, bound: Duration) -> Result<()> {
        self.tell("grow", json!({}), bound).await
    }

    /// Shows a line to everybody who is logged in.
    pub async fn wall(&self, text: &str) -> Result<()> {
        self.tell("wall", json!({ "text": text }), WALL_BOUND).await
    }

    /// Has the guest write what it holds back to its disk.
    pub async fn sync(&self, bound: Duration) -> Result<()> {
        self.tell("sync", json!({}), bound).await
    }

    async fn tell(&self, what: &str, args: serde_json::Value, bound: Duration) -> Result<()> {
        let asked = async {
            self.agent().wait_hello().await?;
            self.agent().request(what, args, bound).await.map(drop)
        };
        match tokio::time::timeout(bound, asked).await {
            Ok(told) => told,
            Err(_) => Err(pileus_base::Error::new(
                pileus_base::Code::GuestUnreachable,
                format!("The guest's agent did not answer to {what}"),
            )),
        }
    }
}
