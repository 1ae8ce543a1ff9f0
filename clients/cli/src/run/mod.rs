//! The parts of `pileus run` (the flow is in `commands/run.rs`):
//!
//! ```text
//! options.rs   what is given as text: durations, variables, ports, copies
//! machine.rs   the throw-away instance: launched, kept alive by its lease, deleted
//! publish.rs   ports of this host that lead into the guest
//! copy.rs      files in and out, as tar over exec:   pack.rs writes it, unpack.rs takes a guest's
//! ```

pub(crate) mod copy;
pub(crate) mod machine;
pub(crate) mod options;
mod pack;
pub(crate) mod publish;
mod unpack;
