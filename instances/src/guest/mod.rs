//! The guest channel: how the host and a guest talk without any guest network. Two virtio-serial
//! ports, both Unix sockets on the host's side:
//!
//! ```text
//!  pileus.agent.0   JSON lines   agent.rs ── agent.py   boot stages, cloud-init's result, addresses
//!  pileus.ssh.0     SSH          ssh.rs ──── sshd -i    exec.rs: commands, shells; later files, mounts
//! ```
//!
//! The agent gets into the guest with the seed disk ([`seed`]): cloud-init's vendor-data holds it and
//! the instance's own keys ([`keys`]). The user's own cloud-init text is only checked ([`cloud_init`]),
//! never rewritten. Everything that comes from a guest is hostile until parsed by [`wire`].
//!
//! Next step on the way of the data: the guest itself, `agent.py`.

pub mod agent;
pub mod cloud_init;
pub mod exec;
pub mod handle;
pub mod keys;
pub mod quote;
pub mod seed;
pub mod ssh;
pub mod watch;
pub mod wire;

/// Name of the virtio-serial port for JSON lines; its host end is `agent.sock`.
pub const AGENT_PORT: &str = "pileus.agent.0";
/// Name of the virtio-serial port for SSH; its host end is `ssh.sock`.
pub const SSH_PORT: &str = "pileus.ssh.0";
/// The user that commands run as, in every guest.
pub const LOGIN_USER: &str = "ubuntu";
