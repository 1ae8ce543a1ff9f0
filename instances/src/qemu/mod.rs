//! The hypervisor: everything that pileus knows about QEMU, and nothing about why a machine runs.
//!
//! In the order of a start:
//! * [`host`]: which QEMU and which accelerator this host has;
//! * [`spec`]: what a machine is, in our words;
//! * [`argv`]: the same in QEMU's words (pure, snapshot-tested);
//! * [`process`]: from words to a process that outlives us, and how it is found, watched, killed;
//! * [`vm`]: the running machine: start, adopt, power, hot-plug, events;
//! * [`log`]: keeps the console's and QEMU's own log bounded.
//!
//! **QEMU opens nothing private by name.** The daemon opens disks, seed, logs and taps, binds the
//! sockets, and hands descriptors over. So QEMU can run under a user id of its own that may read
//! none of our folders. Next step up: `instances/src/machine/` (who decides); down: `instances/qmp/`.

pub mod argv;
pub mod host;
pub mod log;
pub mod process;
pub mod spec;
pub mod vm;

pub use host::Qemu;
pub use pileus_base::Mac;
pub use process::{Confinement, Exit};
pub use spec::{Accelerator, AcceleratorChoice, Boot, Disk, MachineSpec, Paths, Port};
pub use vm::{PowerState, Vm, VmEvent};
