//! Instances: from "start this machine" down to QEMU, and up from QEMU to a guest that takes commands.
//!
//! `machine/` owns an instance (one task, the state machine), `qemu/` makes and watches the process
//! over QMP (`qmp/`, a crate of its own), `guest/` talks to the system inside (agent, seed, SSH).
//! Nothing here knows HTTP or the database; the daemon passes a journal and the wiring in.

pub mod driver;
pub mod guest;
pub mod machine;
pub mod qemu;
mod running;
pub mod template;
pub mod warm;
