//! The guest channel: how the host and a guest talk without any guest network. Virtio-serial ports, all
//! of them Unix sockets on the host's side:
//!
//! ```text
//!  pileus.agent.0   JSON lines   agent.rs ── agent.py   boot stages, cloud-init's result, addresses
//!  pileus.ssh.0…3   SSH          ssh.rs ──── sshd -i    exec.rs: commands, shells, files; later mounts
//! ```
//!
//! The agent gets into the guest with the seed disk ([`seed`]): cloud-init's vendor-data holds it and
//! the instance's own keys ([`keys`]). The user's own cloud-init text is only checked ([`cloud_init`]),
//! never rewritten. Everything that comes from a guest is hostile until parsed by [`wire`].
//!
//! The serial console ([`console`]) needs nothing of the guest.
//!
//! A template's guest is made quiet and its clones become somebody by requests of [`clone`].
//!
//! Next step on the way of the data: the guest itself, `agent/channel.py`.

pub mod agent;
pub mod clone;
pub mod cloud_init;
pub mod console;
pub mod exec;
pub mod handle;
#[cfg(test)]
mod in_agent;
pub mod keys;
mod life;
pub mod port;
pub mod quote;
pub mod seed;
pub mod ssh;
pub mod watch;
pub mod wire;

/// The user that commands run as, in every guest.
pub const LOGIN_USER: &str = "ubuntu";

/// Makes a guest forget who it is, gives back what it doesn't use and powers it off: a script for root's `sh`.
pub const CLEAN_UP: &str = include_str!("clean.sh");
