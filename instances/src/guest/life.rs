//! Requests to the agent of a guest that lives: it stood still, got another name or a larger disk, or is
//! about to be saved. The guest's side: `agent/life.py`.

use std::time::Duration;

use pileus_base::{Code, Error, InstanceName, Result};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::clone::hex;
use super::handle::Guest;
use crate::warm;

/// A word to the users.
const WALL_BOUND: Duration = Duration::from_secs(10);

/// What a guest can take while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CanGrow {
    /// Processors that it is prepared for in all.
    pub cpus: u32,
    pub memory: bool,
}

impl Guest {
    /// Tells a guest that stood still what time it is, gives it fresh randomness, and has it end what is
    /// left of the connections that it had then. To be called when its processors run again.
    pub async fn resumed(&self, bound: Duration) -> Result<()> {
        let began = Instant::now();
        let until = began + bound;
        self.heard("resumed", until).await?;
        let heard = began.elapsed();
        // Now, because the guest may have needed a while to answer.
        let (entropy, time) = (warm::entropy()?, warm::now());
        let args = json!({ "entropy": hex(&entropy), "time": time });
        let told = self.ask("resumed", args, until).await;
        tracing::debug!(?heard, answered = ?began.elapsed(), "the guest knows that it stood still");
        match told {
            // Saved under an older pileus: its agent knows this much.
            Err(err) if err.code == Code::ExecFailed && err.message.contains("unknown request") => {
                let args = json!({ "unix": warm::now() });
                self.ask("set-time", args, until).await
            }
            told => told,
        }
    }

    /// Gives the guest another host name. What its seed says must have been changed before: cloud-init
    /// asks it at the next boot.
    pub async fn rename(&self, name: &InstanceName, bound: Duration) -> Result<()> {
        let args = json!({ "hostname": name.as_str() });
        self.tell("rename", args, bound).await
    }

    /// Grows the root's partition and file system to the disk's size.
    pub async fn grow(&self, bound: Duration) -> Result<()> {
        self.tell("grow", json!({}), bound).await
    }

    /// What the guest could take if its machine got more. Memory is taken as soon as it is there.
    pub async fn can_grow(&self, bound: Duration) -> Result<CanGrow> {
        let until = Instant::now() + bound;
        self.heard("can-grow", until).await?;
        let left = until.saturating_duration_since(Instant::now());
        let told = self.agent().request("can-grow", json!({}), left).await?;
        let cpus = told.get("cpus").and_then(Value::as_u64).unwrap_or(0);
        Ok(CanGrow {
            cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
            memory: told.get("memory") == Some(&Value::Bool(true)),
        })
    }

    /// Has the guest use so many processors.
    pub async fn take_cpus(&self, cpus: u32, bound: Duration) -> Result<()> {
        self.tell("take-cpus", json!({ "cpus": cpus }), bound).await
    }

    /// Shows a message to everybody who is logged in; what can't be printed is left out.
    pub async fn wall(&self, text: &str) -> Result<()> {
        self.tell("wall", json!({ "text": text }), WALL_BOUND).await
    }

    /// Has the guest write to its disks what it holds back.
    pub async fn sync(&self, bound: Duration) -> Result<()> {
        self.tell("sync", json!({}), bound).await
    }

    /// The bound holds for the agent's first sign of life and the answer together.
    async fn tell(&self, what: &str, args: Value, bound: Duration) -> Result<()> {
        let until = Instant::now() + bound;
        self.heard(what, until).await?;
        self.ask(what, args, until).await
    }

    async fn heard(&self, what: &str, until: Instant) -> Result<()> {
        match timeout_at(until, self.agent().wait_hello()).await {
            Ok(hello) => hello.map(drop),
            Err(_) => Err(Error::new(
                Code::GuestUnreachable,
                format!("The guest has no agent that could be asked for {what}"),
            )),
        }
    }

    async fn ask(&self, what: &str, args: Value, until: Instant) -> Result<()> {
        let left = until.saturating_duration_since(Instant::now());
        self.agent().request(what, args, left).await.map(drop)
    }
}

#[cfg(test)]
#[path = "life_tests.rs"]
mod tests;
