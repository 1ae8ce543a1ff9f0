//! The hypervisor: everything that pileus knows about QEMU, and nothing about why a machine runs.
//!
//! In the order of a start:
//! * [`host`]: which QEMU and which accelerator this host has;
//! * [`spec`]: what a machine is, in our words; [`hardware`]: what an image may choose of it;
//! * [`argv`]: the same in QEMU's words (pure, snapshot-tested);
//! * [`process`]: from words to a process that outlives us, and how it is found, watched, killed;
//! * [`loan`]: lets QEMU's user open a file of memory for a moment;
//! * [`vm`]: the running machine: start, adopt, power, hot-plug, events;
//! * [`saved`]: saves a machine to a file and restores it; [`disk`]: grows and snapshots its disk;
//!   [`grow`]: more processors and memory while it runs;
//! * [`log`]: keeps the console's and QEMU's own log bounded.
//!
//! **QEMU opens nothing private by name.** The daemon opens disks, seed, logs and taps, binds the
//! sockets, and hands descriptors over. So QEMU can run under a user id of its own that may read
//! none of our folders. Next step up: `instances/src/machine/` (who decides); down: `instances/qmp/`.

pub mod argv;
pub mod disk;
pub mod grow;
pub mod hardware;
pub mod host;
pub mod loan;
pub mod log;
mod loose_tap;
pub mod process;
pub mod saved;
pub mod spec;
pub mod vm;

pub use argv::extra_nics;
pub use hardware::Hardware;
pub use host::Qemu;
pub(crate) use loose_tap::make as loose_tap;
pub use pileus_base::Mac;
pub use process::{Confinement, Exit};
pub use saved::Stream;
pub use spec::{
    Accelerator, AcceleratorChoice, Boot, Disk, Growth, MachineSpec, Memory, Nic, Paths, Port,
};
pub use vm::{PowerState, Vm, VmEvent};
