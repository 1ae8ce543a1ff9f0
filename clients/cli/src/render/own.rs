//! What `info` tells of an instance that only pileus has. Nothing of it is shown under the name
//! `multipass`.

use pileus_api::{
    Autostart, CloudInitStatus, Instance, InstanceHardware, InstanceNetwork, NetworkMode, OnCrash,
    Origin, Pending, Phase, PhaseTime, Size, Topology,
};

use super::node::Node;
use super::seconds;

/// The card that a machine has if nobody chose another.
const USUAL_NETWORK: &str = "virtio-net-pci";

/// What only pileus tells.
pub(super) fn lines(instance: &Instance, line: &mut impl FnMut(&str, &str)) {
    if let Some(pending) = &instance.pending {
        line("At next boot", &pending_text(pending));
    }
    if let Some(suspended) = &instance.suspended {
        let size = Size(suspended.bytes);
        line(
            "Suspended",
            &format!("at {} ({size} on disk)", seconds(suspended.at)),
        );
    }
    if let Some(time) = &instance.shutdown_at {
        line("Shuts down", &format!("at {}", seconds(*time)));
    }
    if !instance.networks.is_empty() {
        let networks = instance.networks.iter().map(network_text);
        line(
            "Networks",
            &networks.collect::<Vec<_>>().join(&format!("\n{:16}", "")),
        );
    }
    if let Some(text) = hardware_text(&instance.hardware) {
        line("Hardware", &text);
    }
    if let Some(display) = &instance.hardware.display {
        line("Display", display);
    }
    if instance.autostart != Autostart::default() {
        line("Autostart", autostart_word(instance.autostart));
    }
    if instance.on_crash != OnCrash::default() {
        line("On crash", on_crash_word(instance.on_crash));
    }
    line("Origin", &origin_text(&instance.origin));
    if let Some(time) = &instance.lease_expires_at {
        line("Lease", &format!("until {}", seconds(*time)));
    }
    if let Some(cloud_init) = &instance.cloud_init {
        let mut text = cloud_init_word(cloud_init.status).to_owned();
        for error in &cloud_init.errors {
            text.push_str(&format!("\n{:20}{error}", ""));
        }
        line("Cloud-init", &text);
    }
    if let Some(error) = &instance.last_error {
        line("Last error", &format!("{} ({})", error.message, error.code));
    }
    if !instance.phases.is_empty() {
        line(
            phases_label(&instance.phases),
            &phases_text(&instance.phases),
        );
    }
}

/// What the image or the launch chose; nothing for a machine as any other.
fn hardware_text(hardware: &InstanceHardware) -> Option<String> {
    let old = |machine: &&String| machine.starts_with("pc-i440fx");
    let chipset = hardware.machine_type.as_ref().filter(old).cloned();
    let topology = hardware.topology.map(|each| {
        let Topology {
            sockets,
            cores,
            threads,
        } = each;
        format!("{sockets} x {cores} x {threads} CPU(s)")
    });
    let network = Some(&hardware.network).filter(|card| *card != USUAL_NETWORK && !card.is_empty());
    let layout = hardware.keyboard_layout.as_ref();
    let chosen = [
        chipset,
        topology,
        network.cloned(),
        hardware.usb.clone(),
        hardware.graphics.clone(),
        hardware.sound.clone(),
    ];
    let inputs = hardware.inputs.iter().cloned();
    let last = [
        layout.map(|layout| format!("keyboard layout {layout}")),
        hardware.uuid.map(|uuid| format!("UUID {uuid}")),
    ];
    let all: Vec<_> = chosen
        .into_iter()
        .flatten()
        .chain(inputs)
        .chain(last.into_iter().flatten())
        .collect();
    (!all.is_empty()).then(|| all.join(&format!("\n{:16}", "")))
}

fn hardware_node(hardware: &InstanceHardware) -> Node {
    let topology = hardware.topology.map_or(Node::Null, |each| {
        Node::map([
            ("sockets", Node::Int(each.sockets.into())),
            ("cores", Node::Int(each.cores.into())),
            ("threads", Node::Int(each.threads.into())),
        ])
    });
    let or_null = |text: &Option<String>| Node::or_null(text.as_ref());
    Node::map([
        ("machine_type", or_null(&hardware.machine_type)),
        ("topology", topology),
        ("network", Node::text(&hardware.network)),
        ("usb", or_null(&hardware.usb)),
        ("graphics", or_null(&hardware.graphics)),
        ("sound", or_null(&hardware.sound)),
        ("inputs", Node::texts(&hardware.inputs)),
        ("keyboard_layout", or_null(&hardware.keyboard_layout)),
        (
            "uuid",
            Node::or_null(hardware.uuid.map(|uuid| uuid.to_string())),
        ),
        ("display", or_null(&hardware.display)),
    ])
}

fn network_text(network: &InstanceNetwork) -> String {
    let manual = match network.mode {
        NetworkMode::Auto => "",
        NetworkMode::Manual => ", manual",
    };
    format!("{} ({}{manual})", network.name, network.mac)
}

fn network_node(network: &InstanceNetwork) -> Node {
    let mode = match network.mode {
        NetworkMode::Auto => "auto",
        NetworkMode::Manual => "manual",
    };
    Node::map([
        ("name", Node::text(&network.name)),
        ("mode", Node::text(mode)),
        ("mac", Node::text(&network.mac)),
    ])
}

fn pending_text(pending: &Pending) -> String {
    let cpus = pending.cpus.map(|cpus| format!("{cpus} CPU(s)"));
    let memory = pending.memory.map(|memory| format!("{memory} of memory"));
    [cpus, memory]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
        .join(", ")
}

fn autostart_word(autostart: Autostart) -> &'static str {
    match autostart {
        Autostart::Last => "last",
        Autostart::Always => "always",
        Autostart::Never => "never",
    }
}

fn on_crash_word(on_crash: OnCrash) -> &'static str {
    match on_crash {
        OnCrash::Stop => "stop",
        OnCrash::Restart => "restart",
    }
}

/// Where the first run came from.
fn origin_text(origin: &Origin) -> String {
    match origin {
        Origin::Cold { reason: None } => "cold".to_owned(),
        Origin::Cold {
            reason: Some(reason),
        } => format!("cold: {reason}"),
        Origin::Warm { template } => format!("warm {template}"),
        Origin::Fork { of } => format!("fork of {of}"),
        Origin::Clone { of, snapshot: None } => format!("clone of {of}"),
        Origin::Clone {
            of,
            snapshot: Some(snapshot),
        } => format!("clone of {of}.{snapshot}"),
        Origin::Import => "imported".to_owned(),
    }
}

fn origin_node(origin: &Origin) -> Node {
    match origin {
        Origin::Cold { reason } => Node::map([
            ("kind", Node::text("cold")),
            ("reason", Node::or_null(reason.as_deref())),
        ]),
        Origin::Warm { template } => Node::map([
            ("kind", Node::text("warm")),
            ("template", Node::text(template)),
        ]),
        Origin::Fork { of } => Node::map([
            ("kind", Node::text("fork")),
            ("of", Node::text(of.as_str())),
        ]),
        Origin::Clone { of, snapshot } => Node::map([
            ("kind", Node::text("clone")),
            ("of", Node::text(of.as_str())),
            (
                "snapshot",
                Node::or_null(snapshot.as_ref().map(|snapshot| snapshot.as_str())),
            ),
        ]),
        Origin::Import => Node::map([("kind", Node::text("import"))]),
    }
}

fn cloud_init_word(status: CloudInitStatus) -> &'static str {
    match status {
        CloudInitStatus::Running => "running",
        CloudInitStatus::Done => "done",
        CloudInitStatus::Degraded => "degraded",
        CloudInitStatus::Error => "error",
        CloudInitStatus::Absent => "absent",
    }
}

/// Only a launch makes the instance's disk, or restores a template.
fn phases_label(phases: &[PhaseTime]) -> &'static str {
    if phases.iter().any(|p| p.phase == Phase::Suspending) {
        return "Suspend";
    }
    let launches = [Phase::Configuring, Phase::Restoring];
    if phases.iter().any(|p| launches.contains(&p.phase)) {
        "Launch"
    } else {
        "Start"
    }
}

fn phases_text(phases: &[PhaseTime]) -> String {
    let seconds = |ms: u64| format!("{}.{}s", ms / 1000, ms % 1000 / 100);
    let mut text = seconds(phases.iter().map(|p| p.milliseconds).sum());
    for phase in phases {
        let time = seconds(phase.milliseconds);
        text.push_str(&format!(
            "\n{:20}{:<16} {time:>7}",
            "",
            phase.phase.as_str()
        ));
    }
    text
}

/// What pileus tells beyond the known fields; they come last.
pub(super) fn fields(instance: &Instance) -> Vec<(&'static str, Node)> {
    let mut fields = vec![
        ("id", Node::text(instance.id.to_string())),
        ("image", Node::text(&instance.image.source)),
        ("cpus", Node::Int(instance.cpus.into())),
        ("memory_size", Node::Int(instance.memory.bytes())),
        ("disk_size", Node::Int(instance.disk.bytes())),
        ("mac", Node::text(&instance.mac)),
        (
            "networks",
            Node::List(instance.networks.iter().map(network_node).collect()),
        ),
        ("hardware", hardware_node(&instance.hardware)),
        ("created", Node::text(instance.created_at.to_string())),
        (
            "started",
            Node::or_null(instance.started_at.map(|time| time.to_string())),
        ),
        ("origin", origin_node(&instance.origin)),
        (
            "lease_expires",
            Node::or_null(instance.lease_expires_at.map(|time| time.to_string())),
        ),
        ("autostart", Node::text(autostart_word(instance.autostart))),
        ("on_crash", Node::text(on_crash_word(instance.on_crash))),
        (
            "shutdown_at",
            Node::or_null(instance.shutdown_at.map(|time| time.to_string())),
        ),
    ];
    if let Some(suspended) = &instance.suspended {
        let entries = [
            ("at", Node::text(suspended.at.to_string())),
            ("bytes", Node::Int(suspended.bytes)),
            ("machine_type", Node::text(&suspended.machine_type)),
        ];
        fields.push(("suspended", Node::map(entries)));
    }
    if let Some(pending) = &instance.pending {
        let cpus = pending.cpus.map(|n| ("cpus", Node::Int(n.into())));
        let memory = pending
            .memory
            .map(|n| ("memory_size", Node::Int(n.bytes())));
        fields.push(("pending", Node::map(cpus.into_iter().chain(memory))));
    }
    let phases = instance.phases.iter();
    let phases = phases.map(|p| (p.phase.as_str(), Node::Int(p.milliseconds)));
    fields.push(("phases", Node::map(phases)));
    if let Some(cloud_init) = &instance.cloud_init {
        let status = Node::text(cloud_init_word(cloud_init.status));
        let errors = Node::texts(&cloud_init.errors);
        fields.push((
            "cloud_init",
            Node::map([("status", status), ("errors", errors)]),
        ));
    }
    if let Some(error) = &instance.last_error {
        let code = Node::text(error.code.as_str());
        let message = Node::text(&error.message);
        fields.push((
            "last_error",
            Node::map([("code", code), ("message", message)]),
        ));
    }
    fields
}
