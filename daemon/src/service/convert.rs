//! From what the daemon knows of an instance to what the API tells of it.

use pileus_api::{
    CloudInitStatus, Instance as ApiInstance, InstanceHardware, InstanceImage, InstanceNetwork,
    InstanceState, NetworkMode, Pending, Suspended, Topology,
};
use pileus_base::{Digest, Layout};
use pileus_instances::qemu::Paths;

use super::registry::Instance;
use crate::state::instances::{ExtraNic, InstanceRow, Spec, Stage};

pub fn instance(instance: &Instance) -> ApiInstance {
    let row = instance.row();
    let snapshot = instance.snapshot();
    let state = snapshot.as_ref().map_or(state(&row), |s| s.state);
    let live = !matches!(state, InstanceState::Stopped | InstanceState::Suspended);
    let (ipv4, report) = match &snapshot {
        Some(snapshot) if live => (snapshot.addresses.clone(), snapshot.report.clone()),
        _ => (Vec::new(), None),
    };
    let cloud_init = snapshot
        .and_then(|s| s.cloud_init)
        .or(row.history.cloud_init)
        // A guest that ended while cloud-init ran did not finish it.
        .filter(|c| live || c.status != CloudInitStatus::Running);
    let hardware = hardware(&row.spec);
    ApiInstance {
        id: row.id,
        name: row.name,
        state,
        deleted: row.deleted,
        image: row.spec.image.unwrap_or_else(unknown_image),
        cpus: row.spec.cpus,
        memory: row.spec.memory,
        disk: row.spec.disk,
        mac: row.mac.to_string(),
        hardware,
        networks: row.spec.extra_nics.iter().map(network).collect(),
        ipv4,
        created_at: row.created_at,
        started_at: row.started_at,
        origin: row.spec.origin,
        lease_expires_at: row.lease,
        shutdown_at: row.shutdown_at,
        suspended: row.spec.suspended.map(|saved| Suspended {
            at: saved.at,
            bytes: saved.bytes,
            machine_type: saved.machine_type,
        }),
        pending: (row.spec.pending != Pending::default()).then_some(row.spec.pending),
        snapshots: u32::try_from(row.snapshots.len()).unwrap_or(u32::MAX),
        autostart: row.spec.autostart,
        on_crash: row.spec.on_crash,
        phases: row.history.phases,
        cloud_init,
        last_error: row.history.last_error,
        report,
    }
}

/// The socket of its display comes from who knows where sockets are ([`with_display`]).
fn hardware(spec: &Spec) -> InstanceHardware {
    let has = &spec.hardware;
    InstanceHardware {
        machine_type: spec.machine_type.clone(),
        topology: has.topology.map(|each| Topology {
            sockets: each.sockets,
            cores: each.cores,
            threads: each.threads,
        }),
        network: has.nic.as_str().to_owned(),
        usb: has.usb.map(|usb| usb.as_str().to_owned()),
        graphics: has.graphics.map(|card| card.as_str().to_owned()),
        sound: has.sound.map(|card| card.as_str().to_owned()),
        inputs: has.inputs.iter().map(|i| i.as_str().to_owned()).collect(),
        keyboard_layout: has.keyboard_layout.clone(),
        uuid: has.uuid,
        display: None,
    }
}

/// The same, saying where its display is while there is one.
pub fn with_display(mut instance: ApiInstance, layout: &Layout) -> ApiInstance {
    let runs = !matches!(
        instance.state,
        InstanceState::Creating | InstanceState::Stopped | InstanceState::Suspended
    );
    if runs && instance.hardware.graphics.is_some() {
        let (run, folder) = (
            layout.instance_run(instance.id),
            layout.instance(instance.id),
        );
        let display = Paths::of(&run, &folder).display();
        instance.hardware.display = Some(display.to_string_lossy().into_owned());
    }
    instance
}

fn network(nic: &ExtraNic) -> InstanceNetwork {
    InstanceNetwork {
        name: nic.network.clone(),
        mode: match nic.auto {
            true => NetworkMode::Auto,
            false => NetworkMode::Manual,
        },
        mac: nic.mac.to_string(),
    }
}

/// While the image is still being fetched.
fn unknown_image() -> InstanceImage {
    InstanceImage {
        digest: Digest::from_bytes([0; 32]),
        source: String::new(),
        os: String::new(),
        release: String::new(),
    }
}

/// The state that the API shows.
pub fn state(row: &InstanceRow) -> InstanceState {
    match row.stage {
        Stage::Is(state) => state,
        Stage::Purging => InstanceState::Stopped,
    }
}
