//! Instances: what a client asks for and what it is told.

use std::net::Ipv4Addr;
use std::time::Duration;

use pileus_base::{Digest, InstanceName, Phase, Size, SnapshotName};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use uuid::Uuid;

use crate::Timestamp;
use crate::blob::Blob;
use crate::error::ErrorBody;

/// The states of an instance; the machine that moves between them is drawn in
/// `instances/src/machine/mod.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceState {
    /// Its disk is being made.
    Creating,
    Stopped,
    Starting,
    Running,
    Restarting,
    Stopping,
    /// Its memory is being written to disk.
    Suspending,
    /// Its memory is on disk; `start` goes on where it was.
    Suspended,
    /// The hypervisor runs, the guest does not answer.
    Unknown,
}

impl InstanceState {
    pub const ALL: [InstanceState; 9] = [
        InstanceState::Creating,
        InstanceState::Stopped,
        InstanceState::Starting,
        InstanceState::Running,
        InstanceState::Restarting,
        InstanceState::Stopping,
        InstanceState::Suspending,
        InstanceState::Suspended,
        InstanceState::Unknown,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            InstanceState::Creating => "creating",
            InstanceState::Stopped => "stopped",
            InstanceState::Starting => "starting",
            InstanceState::Running => "running",
            InstanceState::Restarting => "restarting",
            InstanceState::Stopping => "stopping",
            InstanceState::Suspending => "suspending",
            InstanceState::Suspended => "suspended",
            InstanceState::Unknown => "unknown",
        }
    }
}

/// Asks for a new instance. What is not given gets its default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LaunchRequest {
    /// `debian-13`, `build:debian-13`, `file:///…`, `https://…` or a digest of the store.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// What the image's file must hash to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checksum: Option<Digest>,
    /// A random name if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<InstanceName>,
    /// 1 or more; 1 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    /// Bytes; at least 512 MiB; 1 GiB if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    /// Bytes; at least 1 GiB and the image's own size; 5 GiB (or the image's size) if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Size>,
    /// User data for cloud-init: YAML, a script, MIME, an include list, or any of them gzipped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<Blob>,
    /// Network configuration for cloud-init (YAML, version 1 or 2), instead of ours. A guest that has one
    /// always boots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_config: Option<Blob>,
    /// A machine definition (machine.json, version 1): what it says goes before what the image's own says;
    /// `cpus` and `memory` go before both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<serde_json::Value>,
    /// Networks of the host that it is connected to besides pileus's own. A guest that has any always
    /// boots.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<LaunchNetwork>,
    /// IANA name of the guest's time zone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timezone: Option<String>,
    /// Seconds for the boot, and again for cloud-init; 300 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// Whether to start from a template; `auto` if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warm: Option<Warm>,
    /// Seconds after which the instance is deleted for good unless the lease is renewed; its VM ends
    /// with the daemon too. For throw-away instances; without it an instance stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<u64>,
    /// Keep what the guest writes in memory (a tmpfs) instead of on disk. Only with a lease.
    #[serde(default)]
    pub disk_in_memory: bool,
}

/// A network of the host that a new instance is to be connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LaunchNetwork {
    /// As the list of networks has it; `bridged` is the one of `local.bridged-network`.
    pub name: String,
    #[serde(default)]
    pub mode: NetworkMode,
    /// Of the guest's card; a random one if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<String>,
}

/// Whether a guest sets its further card up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetworkMode {
    /// By DHCP.
    #[default]
    Auto,
    /// The card is there, and nothing more.
    Manual,
}

/// A network of the host that an instance is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceNetwork {
    pub name: String,
    pub mode: NetworkMode,
    pub mac: String,
}

/// Whether a launch starts from a template.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Warm {
    /// If there is one that fits; otherwise the guest boots.
    #[default]
    Auto,
    /// Always boot.
    Never,
    /// Fail if there is none that fits.
    Require,
}

/// Where an instance's first run came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Origin {
    /// It booted.
    Cold {
        /// Why it did not start from a template; none if nobody expected it to.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        reason: Option<String>,
    },
    /// It started from this template.
    Warm { template: String },
    /// It was forked from this instance.
    Fork { of: InstanceName },
    /// It is a clone of this instance, or of a snapshot of it.
    Clone {
        of: InstanceName,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        snapshot: Option<SnapshotName>,
    },
    /// It was imported from an archive.
    Import,
}

/// Renews a lease.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaseRequest {
    /// From now on; 0 ends the lease and keeps the instance.
    pub seconds: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct PortQuery {
    /// A TCP port on the guest's loopback.
    pub port: u16,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartRequest {
    /// Seconds for the boot, and again for cloud-init; 300 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// Cut the power instead of asking the guest.
    #[serde(default)]
    pub force: bool,
    /// Seconds that the guest has to shut down; 300 if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<u64>,
    /// Minutes from now; users in the guest are told. A start takes it back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delay_minutes: Option<u64>,
    /// Take back a stop that was asked for with a delay, and nothing else.
    #[serde(default)]
    pub cancel: bool,
}

/// What happens to an instance when the host has started again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Autostart {
    /// It runs again if it ran when the host went down.
    #[default]
    Last,
    /// It is started.
    Always,
    Never,
}

/// What happens when an instance's VM ends although nobody wanted it to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnCrash {
    /// It stays as it is.
    #[default]
    Stop,
    /// It is started again, three times in ten minutes at most.
    Restart,
}

/// What was set and holds from the next boot on.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pending {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
}

/// What a suspended instance goes on from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Suspended {
    #[schema(value_type = String, format = "date-time")]
    pub at: Timestamp,
    /// Bytes on the host's disk.
    pub bytes: u64,
    /// The machine that it needs, `pc-q35-10.0`.
    pub machine_type: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct DeleteQuery {
    /// Delete for good instead of moving to the trash.
    #[serde(default)]
    pub purge: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct LogQuery {
    /// Keep the reply open and send what is added.
    #[serde(default)]
    pub follow: bool,
    /// Only the last so many lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    pub id: Uuid,
    pub name: InstanceName,
    pub state: InstanceState,
    /// In the trash: `recover` brings it back, `purge` ends it.
    pub deleted: bool,
    pub image: InstanceImage,
    pub cpus: u32,
    pub memory: Size,
    pub disk: Size,
    pub mac: String,
    /// What its machine consists of.
    #[serde(default)]
    pub hardware: InstanceHardware,
    /// The host's networks that it has cards in, from its next boot on.
    #[serde(default)]
    pub networks: Vec<InstanceNetwork>,
    /// Addresses while it runs; the one on pileus's own network first.
    #[schema(value_type = Vec<String>, format = "ipv4")]
    pub ipv4: Vec<Ipv4Addr>,
    #[schema(value_type = String, format = "date-time")]
    pub created_at: Timestamp,
    #[schema(value_type = Option<String>, format = "date-time")]
    pub started_at: Option<Timestamp>,
    /// Where its first run came from.
    pub origin: Origin,
    /// When it is deleted unless the lease is renewed; none for one that stays.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub lease_expires_at: Option<Timestamp>,
    /// When it will be shut down, if that was asked for with a delay.
    #[schema(value_type = Option<String>, format = "date-time")]
    pub shutdown_at: Option<Timestamp>,
    pub suspended: Option<Suspended>,
    /// What was set while it ran and holds from its next boot on.
    pub pending: Option<Pending>,
    /// How many snapshots it has.
    pub snapshots: u32,
    pub autostart: Autostart,
    pub on_crash: OnCrash,
    /// How long each phase of the last launch or start took.
    pub phases: Vec<PhaseTime>,
    /// What cloud-init said of the instance's first boot.
    pub cloud_init: Option<CloudInit>,
    /// Why the instance is in this state, if something went wrong.
    pub last_error: Option<ErrorBody>,
    /// What the guest last told of itself, while it runs.
    pub report: Option<GuestReport>,
}

/// What an instance's machine has, in the words of machine.json. What the image or the launch did not choose is as in every
/// machine of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceHardware {
    /// QEMU's name of chipset and version, `pc-q35-10.0`; nothing before its first start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
    /// The network cards, `virtio-net-pci`.
    pub network: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usb: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub graphics: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sound: Option<String>,
    /// What is plugged into the USB controller: `usb-kbd`, `usb-mouse`, `usb-tablet`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keyboard_layout: Option<String>,
    /// What the firmware says that the machine's id is, if that is not the instance's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uuid: Option<Uuid>,
    /// The Unix socket of its display (VNC) on the daemon's host, while it runs with graphics. Who can reach it can see and
    /// type.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display: Option<String>,
}

/// Processors; their product is the number of CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Topology {
    pub sockets: u32,
    pub cores: u32,
    pub threads: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct InstanceImage {
    pub digest: Digest,
    /// What was asked for, `debian-13`.
    pub source: String,
    pub os: String,
    pub release: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PhaseTime {
    pub phase: Phase,
    pub milliseconds: u64,
}

impl PhaseTime {
    pub fn new(phase: Phase, took: Duration) -> Self {
        Self {
            phase,
            milliseconds: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CloudInit {
    pub status: CloudInitStatus,
    pub errors: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum CloudInitStatus {
    Running,
    Done,
    /// Done, with warnings.
    Degraded,
    Error,
    /// The image has no cloud-init, or it is disabled.
    Absent,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuestReport {
    /// `Debian GNU/Linux 13 (trixie)`.
    pub os: String,
    pub kernel: String,
    pub cpus: u32,
    /// Averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    pub memory: Usage,
    /// Of the root file system.
    pub disk: Usage,
    pub uptime_seconds: u64,
}

/// Bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Usage {
    pub used: u64,
    pub total: u64,
}
