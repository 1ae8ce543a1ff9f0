//! The commands that pileus uses, as types. Others go through [`crate::Client::execute`].

use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A command: its arguments are its fields.
pub trait Command: Serialize + Sync {
    const NAME: &'static str;
    type Reply: DeserializeOwned;
}

/// Commands without arguments whose reply says nothing but "done".
macro_rules! plain {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Serialize)]
        pub struct $name {}

        impl Command for $name {
            const NAME: &'static str = $text;
            type Reply = IgnoredAny;
        }
    )*};
}

plain! {
    /// Presses the power button; the guest decides what it does.
    SystemPowerdown = "system_powerdown";
    /// Pulls the reset line.
    SystemReset = "system_reset";
    /// Lets the processors run.
    Cont = "cont";
    /// Halts the processors.
    Stop = "stop";
    /// Ends QEMU at once, with no word to the guest.
    Quit = "quit";
}

/// Whether the processors run, and why not.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryStatus {}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Status {
    pub running: bool,
    /// QEMU's run state, such as `running`, `paused`, `shutdown`, `guest-panicked`, `io-error`.
    pub status: String,
}

impl Command for QueryStatus {
    const NAME: &'static str = "query-status";
    type Reply = Status;
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryCpusFast {}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Cpu {
    pub cpu_index: u32,
    /// The host's thread that runs it.
    pub thread_id: i32,
}

impl Command for QueryCpusFast {
    const NAME: &'static str = "query-cpus-fast";
    type Reply = Vec<Cpu>;
}

/// The disks as the guest sees them, in QEMU's own words.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryBlock {}

impl Command for QueryBlock {
    const NAME: &'static str = "query-block";
    type Reply = Vec<Value>;
}

/// Adds a device; `properties` depend on the driver.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceAdd {
    pub driver: String,
    pub id: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    #[serde(flatten)]
    pub properties: serde_json::Map<String, Value>,
}

impl Command for DeviceAdd {
    const NAME: &'static str = "device_add";
    type Reply = IgnoredAny;
}

/// Asks the guest to let a device go; done when the event `DEVICE_DELETED` comes.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceDel {
    pub id: String,
}

impl Command for DeviceDel {
    const NAME: &'static str = "device_del";
    type Reply = IgnoredAny;
}

/// Adds a network back end on a tap that was handed over with [`GetFd`] under the name `fd`.
#[derive(Debug, Clone, Serialize)]
pub struct NetdevAddTap {
    #[serde(rename = "type")]
    kind: &'static str,
    pub id: String,
    /// The name under which the descriptor was handed over.
    pub fd: String,
    vhost: bool,
}

impl NetdevAddTap {
    pub fn new(id: impl Into<String>, fd: impl Into<String>) -> Self {
        Self {
            kind: "tap",
            id: id.into(),
            fd: fd.into(),
            vhost: false,
        }
    }
}

impl Command for NetdevAddTap {
    const NAME: &'static str = "netdev_add";
    type Reply = IgnoredAny;
}

#[derive(Debug, Clone, Serialize)]
pub struct NetdevDel {
    pub id: String,
}

impl Command for NetdevDel {
    const NAME: &'static str = "netdev_del";
    type Reply = IgnoredAny;
}

/// Hands a descriptor over under a name ([`crate::Client::run_with_fd`]).
#[derive(Debug, Clone, Serialize)]
pub struct GetFd {
    pub fdname: String,
}

impl Command for GetFd {
    const NAME: &'static str = "getfd";
    type Reply = IgnoredAny;
}

/// Drops a descriptor that was handed over and not used.
#[derive(Debug, Clone, Serialize)]
pub struct CloseFd {
    pub fdname: String,
}

impl Command for CloseFd {
    const NAME: &'static str = "closefd";
    type Reply = IgnoredAny;
}

/// Adds a descriptor to a set, openable as `/dev/fdset/SET` ([`crate::Client::run_with_fd`]).
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddFd {
    /// `None` lets QEMU choose a new set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fdset_id: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub opaque: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct AddedFd {
    pub fdset_id: u32,
    /// The number in QEMU's process.
    pub fd: i32,
}

impl Command for AddFd {
    const NAME: &'static str = "add-fd";
    type Reply = AddedFd;
}

/// A property of an object in QEMU's tree.
#[derive(Debug, Clone, Serialize)]
pub struct QomGet {
    pub path: String,
    pub property: String,
}

impl Command for QomGet {
    const NAME: &'static str = "qom-get";
    type Reply = Value;
}

/// Changes a property of an object.
#[derive(Debug, Clone, Serialize)]
pub struct QomSet {
    pub path: String,
    pub property: String,
    pub value: Value,
}

impl Command for QomSet {
    const NAME: &'static str = "qom-set";
    type Reply = IgnoredAny;
}

/// The places for processors, and which of them are taken.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryHotpluggableCpus {}

#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct CpuPlace {
    #[serde(rename = "type")]
    pub kind: String,
    /// What `device_add` needs to name this place.
    pub props: serde_json::Map<String, Value>,
    /// The processor that is there.
    #[serde(default)]
    pub qom_path: Option<String>,
}

impl Command for QueryHotpluggableCpus {
    const NAME: &'static str = "query-hotpluggable-cpus";
    type Reply = Vec<CpuPlace>;
}

/// Memory from the start, and what was added, in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryMemorySizeSummary {}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemorySizes {
    pub base_memory: u64,
}

impl Command for QueryMemorySizeSummary {
    const NAME: &'static str = "query-memory-size-summary";
    type Reply = MemorySizes;
}

/// All sets of descriptors.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryFdsets {}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct FdSet {
    pub fdset_id: u32,
    pub fds: Vec<SetMember>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct SetMember {
    /// What was said of it when it was added.
    #[serde(default)]
    pub opaque: Option<String>,
}

impl Command for QueryFdsets {
    const NAME: &'static str = "query-fdsets";
    type Reply = Vec<FdSet>;
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RemoveFd {
    pub fdset_id: u32,
}

impl Command for RemoveFd {
    const NAME: &'static str = "remove-fd";
    type Reply = IgnoredAny;
}

/// Adds a node to the block graph.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevAdd {
    pub driver: String,
    pub node_name: String,
    #[serde(flatten)]
    pub properties: serde_json::Map<String, Value>,
}

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Reply = IgnoredAny;
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevDel {
    pub node_name: String,
}

impl Command for BlockdevDel {
    const NAME: &'static str = "blockdev-del";
    type Reply = IgnoredAny;
}

/// Grows (or shrinks) a node; the guest is told if it is a disk's top.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockResize {
    pub node_name: String,
    /// In bytes.
    pub size: u64,
}

impl Command for BlockResize {
    const NAME: &'static str = "block_resize";
    type Reply = IgnoredAny;
}

/// Puts the node `overlay`, which has no backing node, above `node`; what used `node` uses it.
#[derive(Debug, Clone, Serialize)]
pub struct BlockdevSnapshot {
    pub node: String,
    pub overlay: String,
}

impl Command for BlockdevSnapshot {
    const NAME: &'static str = "blockdev-snapshot";
    type Reply = IgnoredAny;
}

/// All named nodes, in QEMU's own words.
#[derive(Debug, Clone, Serialize)]
pub struct QueryNamedBlockNodes {
    /// Leaves out what is known from the backing node's own entry.
    pub flat: bool,
}

impl Command for QueryNamedBlockNodes {
    const NAME: &'static str = "query-named-block-nodes";
    type Reply = Vec<Value>;
}

/// The id that changes whenever the machine's place in time moves.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryVmGenerationId {}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct VmGenerationId {
    pub guid: String,
}

impl Command for QueryVmGenerationId {
    const NAME: &'static str = "query-vm-generation-id";
    type Reply = VmGenerationId;
}

/// Switches capabilities of saving and restoring; those not named stay as they are.
#[derive(Debug, Clone, Serialize)]
pub struct MigrateSetCapabilities {
    pub capabilities: Vec<MigrationCapability>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct MigrationCapability {
    pub capability: &'static str,
    pub state: bool,
}

impl Command for MigrateSetCapabilities {
    const NAME: &'static str = "migrate-set-capabilities";
    type Reply = IgnoredAny;
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrateSetParameters {
    /// Bytes a second.
    pub max_bandwidth: u64,
    /// In milliseconds: how long the rest of a running machine's memory may take when it is halted.
    pub downtime_limit: u64,
}

impl Command for MigrateSetParameters {
    const NAME: &'static str = "migrate-set-parameters";
    type Reply = IgnoredAny;
}

/// Begins to write the machine's state to `uri`; how it goes is told by [`QueryMigrate`].
#[derive(Debug, Clone, Serialize)]
pub struct Migrate {
    pub uri: String,
}

impl Command for Migrate {
    const NAME: &'static str = "migrate";
    type Reply = IgnoredAny;
}

/// Begins to read a state from `uri`; for a QEMU that was started with `-incoming defer`.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct MigrateIncoming {
    pub uri: String,
    /// From QEMU 9.1 on; an older one always ends if the state can't be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exit_on_error: Option<bool>,
}

impl Command for MigrateIncoming {
    const NAME: &'static str = "migrate-incoming";
    type Reply = IgnoredAny;
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct MigrateCancel {}

impl Command for MigrateCancel {
    const NAME: &'static str = "migrate_cancel";
    type Reply = IgnoredAny;
}

#[derive(Debug, Clone, Copy, Serialize)]
pub struct QueryMigrate {}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct Migration {
    /// Such as `setup`, `active`, `completed`, `failed`, `cancelled`; empty before the first one.
    pub status: String,
    pub error_desc: Option<String>,
}

impl Migration {
    /// Whether QEMU works at it, or waits to be told to go on.
    pub fn is_under_way(&self) -> bool {
        matches!(
            self.status.as_str(),
            "setup" | "wait-unplug" | "active" | "pre-switchover" | "device" | "cancelling"
        )
    }
}

impl Command for QueryMigrate {
    const NAME: &'static str = "query-migrate";
    type Reply = Migration;
}

/// Gives all disks to this QEMU, or leaves them to another one. From QEMU 10.0 on.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct BlockdevSetActive {
    pub active: bool,
}

impl Command for BlockdevSetActive {
    const NAME: &'static str = "blockdev-set-active";
    type Reply = IgnoredAny;
}

/// Goes on after the pause that the capability `pause-before-switchover` makes.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct MigrateContinue {
    /// The state that it pauses in.
    pub state: &'static str,
}

impl Command for MigrateContinue {
    const NAME: &'static str = "migrate-continue";
    type Reply = IgnoredAny;
}
