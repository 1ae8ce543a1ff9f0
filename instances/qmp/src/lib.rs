//! The wire to QEMU: its machine protocol (QMP), one JSON object a line over a Unix socket.
//!
//! * [`Client`] (`client.rs`): greeting, commands with ids and deadlines, events, descriptors;
//! * `message.rs`: what a line can be; what is unknown passes through;
//! * [`commands`]: the commands that pileus uses, typed.
//!
//! It knows nothing of machines or of pileus. Next step: `instances/src/qemu/vm.rs`, which speaks it.
#![forbid(unsafe_code)]

pub mod client;
pub mod commands;
mod error;
mod message;

pub use client::{Client, Events, Options};
pub use commands::Command;
pub use error::QmpError;
pub use message::{Event, Version};
