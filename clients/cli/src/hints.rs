//! What to do next, for codes whose errors carry no advice of their own.

use pileus_api::Code;

/// The general hint of a code; `None` where the message says all there is to do.
pub fn for_code(code: Code) -> Option<&'static str> {
    Some(match code {
        Code::ImageNotFound => "pileus find lists the images that can be launched.",
        Code::InstanceExists => "Choose another name, or delete that instance with --purge first.",
        Code::InstanceDeleted => "pileus recover brings it back; pileus purge removes it for good.",
        Code::SnapshotNotFound => "pileus list --snapshots shows the snapshots.",
        Code::SnapshotExists => "Choose another name with --name.",
        Code::CantResume => {
            "pileus stop --force drops the saved memory; the disk stays, and the instance can boot."
        }
        Code::TemplateNotFound => "pileus template list shows the templates.",
        Code::NoTemplate => {
            "pileus template create IMAGE makes one; without --warm the guest boots."
        }
        Code::SettingNotFound => "pileus get --keys lists the settings.",
        Code::WrongState => "pileus info shows the instance's state.",
        Code::InvalidCloudInit => {
            "User data begins with #cloud-config, #! or another header that cloud-init knows."
        }
        Code::DiskTooSmall => "Ask for a larger disk with --disk.",
        Code::ImageInUse => "Delete and purge the instances that use it first.",
        Code::ChecksumMismatch => "Check the checksum's source, then try again.",
        Code::NoSpace => "pileus image prune frees the space of unused images.",
        Code::NoMemory => "Stop an instance, or ask for less with --memory.",
        Code::QemuMissing | Code::QemuTooOld => {
            "Install QEMU 8.2 or newer (Debian: qemu-system-x86 and qemu-utils)."
        }
        Code::TunUnavailable => {
            "Load the tun module and give yourself access to /dev/net/tun, or ask an administrator."
        }
        Code::SubnetTaken | Code::PortTaken => "The daemon's log names what is in the way.",
        Code::NoAddress => "Purge instances that are no longer needed.",
        Code::FetchFailed => "Check the address and the network, then try again.",
        Code::StorageLocked => "Another pileusd uses this storage; stop it, or use its socket.",
        Code::BootTimeout | Code::GuestStopped => {
            "pileus logs shows the console; a longer bound is given with --timeout."
        }
        Code::CloudInitFailed => {
            "The instance runs: pileus exec NAME -- cloud-init status --long tells more."
        }
        Code::CloudInitTimeout => "A longer bound is given with --timeout.",
        Code::ShutdownTimeout => "pileus stop --force cuts the power.",
        Code::GuestUnreachable => "pileus logs shows the console; pileus restart may help.",
        Code::Interrupted => "Try the command again.",
        Code::Database | Code::Internal => {
            "This is a defect of pileus: please report it with the daemon's log."
        }
        // Their messages, or the advice that comes with them, say all there is to say.
        _ => return None,
    })
}
