//! `pileus info`: the fields that users of Multipass know, and then what only pileus tells.

use pileus_api::{CloudInitStatus, GuestReport, Instance, Origin, Phase, PhaseTime, Size};

use super::node::Node;
use super::{Format, csv_field, image_title, state};
use crate::terminal::harmless;

pub fn render(instances: &[Instance], format: Format) -> String {
    match format {
        Format::Table if instances.is_empty() => "No instances found.\n".to_owned(),
        Format::Table => {
            let all: Vec<String> = instances.iter().map(as_table).collect();
            harmless(&all.join("\n")).into_owned()
        }
        Format::Json => Node::map([
            ("errors", Node::List(vec![])),
            (
                "info",
                Node::map(instances.iter().map(|i| (i.name.as_str(), as_json(i)))),
            ),
        ])
        .to_json(),
        Format::Csv => as_csv(instances),
        Format::Yaml => {
            let errors = ("errors", Node::List(vec![Node::Null]));
            let all = instances
                .iter()
                .map(|i| (i.name.as_str(), Node::List(vec![as_yaml(i)])));
            Node::map(std::iter::once(errors).chain(all)).to_yaml()
        }
    }
}

/// What the guest tells of itself, while it is to be shown.
fn report(instance: &Instance) -> Option<&GuestReport> {
    instance.report.as_ref().filter(|_| !instance.deleted)
}

fn load_text(report: &GuestReport) -> String {
    let load = report.load.map(|n| format!("{n:.2}"));
    load.join(" ")
}

fn as_table(instance: &Instance) -> String {
    let mut out = String::new();
    let mut line = |label: &str, value: &str| {
        let value = if value.is_empty() { "--" } else { value };
        out.push_str(&format!("{:<16}{value}\n", format!("{label}:")));
    };
    let report = report(instance);
    let told = |tell: fn(&GuestReport) -> String| report.map_or(String::new(), tell);
    let addresses: Vec<String> = instance.ipv4.iter().map(ToString::to_string).collect();
    line("Name", instance.name.as_str());
    line("State", state(instance));
    line("Snapshots", "0");
    line("IPv4", &addresses.join(&format!("\n{:16}", "")));
    line("Release", &told(|r| r.os.clone()));
    line(
        "Image hash",
        &format!(
            "{} ({})",
            instance.image.digest.short(),
            image_title(instance)
        ),
    );
    line("CPU(s)", &told(|r| r.cpus.to_string()));
    line("Load", &told(load_text));
    line("Disk usage", &told(|r| usage(r.disk.used, r.disk.total)));
    line(
        "Memory usage",
        &told(|r| usage(r.memory.used, r.memory.total)),
    );
    line("Mounts", "");
    line("Origin", &origin_text(&instance.origin));
    if let Some(time) = &instance.lease_expires_at {
        line("Lease", &format!("until {time}"));
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
    out
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
    }
}

fn usage(used: u64, total: u64) -> String {
    format!("{} out of {}", Size(used), Size(total))
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

fn as_json(instance: &Instance) -> Node {
    let report = report(instance);
    let told = |tell: fn(&GuestReport) -> String| Node::text(report.map_or(String::new(), tell));
    let disk = report.map_or(vec![], |r| {
        vec![
            ("used", Node::text(r.disk.used.to_string())),
            ("total", Node::text(r.disk.total.to_string())),
        ]
    });
    let memory = report.map_or(vec![], |r| {
        vec![
            ("used", Node::Int(r.memory.used)),
            ("total", Node::Int(r.memory.total)),
        ]
    });
    let load = report.map_or(vec![], |r| r.load.map(Node::Float).to_vec());
    let mut entries = vec![
        ("state", Node::text(state(instance))),
        ("image_hash", Node::text(instance.image.digest.hex())),
        ("image_release", Node::text(&instance.image.release)),
        ("release", told(|r| r.os.clone())),
        ("cpu_count", told(|r| r.cpus.to_string())),
        ("snapshot_count", Node::text("0")),
        ("load", Node::List(load)),
        ("disks", Node::map([("sda1", Node::map(disk))])),
        ("memory", Node::map(memory)),
        ("ipv4", Node::texts(&instance.ipv4)),
        ("mounts", Node::map::<&str>([])),
    ];
    entries.extend(own_fields(instance));
    Node::map(entries)
}

/// What pileus tells beyond the known fields; they come last.
fn own_fields(instance: &Instance) -> Vec<(&'static str, Node)> {
    let mut fields = vec![
        ("id", Node::text(instance.id.to_string())),
        ("image", Node::text(&instance.image.source)),
        ("cpus", Node::Int(instance.cpus.into())),
        ("memory_size", Node::Int(instance.memory.bytes())),
        ("disk_size", Node::Int(instance.disk.bytes())),
        ("mac", Node::text(&instance.mac)),
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
    ];
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

fn as_yaml(instance: &Instance) -> Node {
    let report = report(instance);
    let told = |tell: fn(&GuestReport) -> String| Node::or_null(report.map(tell));
    let mut entries = vec![
        ("state", Node::text(state(instance))),
        ("snapshot_count", Node::Int(0)),
        ("image_hash", Node::text(instance.image.digest.hex())),
        ("image_release", Node::text(&instance.image.release)),
        ("release", told(|r| r.os.clone())),
        ("cpu_count", told(|r| r.cpus.to_string())),
    ];
    if let Some(report) = report {
        let load = report.load.map(Node::Float);
        entries.push(("load", Node::List(load.to_vec())));
    }
    let disk = Node::map([
        ("used", told(|r| r.disk.used.to_string())),
        ("total", told(|r| r.disk.total.to_string())),
    ]);
    let memory = Node::map([
        ("usage", told(|r| r.memory.used.to_string())),
        ("total", told(|r| r.memory.total.to_string())),
    ]);
    entries.push(("disks", Node::List(vec![Node::map([("sda1", disk)])])));
    entries.push(("memory", memory));
    entries.push(("ipv4", Node::texts(&instance.ipv4)));
    entries.push(("mounts", Node::Null));
    entries.extend(own_fields(instance));
    Node::map(entries)
}

fn as_csv(instances: &[Instance]) -> String {
    let mut out = "Name,State,Ipv4,Ipv6,Release,Image hash,Image release,Load,Disk usage,\
                   Disk total,Memory usage,Memory total,Mounts,AllIPv4,CPU(s),Snapshots\n"
        .to_owned();
    for instance in instances {
        let report = report(instance);
        let told = |tell: fn(&GuestReport) -> String| report.map_or(String::new(), tell);
        let addresses: Vec<String> = instance.ipv4.iter().map(ToString::to_string).collect();
        let fields = [
            instance.name.to_string(),
            state(instance).to_owned(),
            addresses.first().cloned().unwrap_or_default(),
            String::new(),
            told(|r| r.os.clone()),
            instance.image.digest.hex().to_owned(),
            instance.image.release.clone(),
            told(load_text),
            told(|r| r.disk.used.to_string()),
            told(|r| r.disk.total.to_string()),
            told(|r| r.memory.used.to_string()),
            told(|r| r.memory.total.to_string()),
            String::new(),
            addresses.join(";"),
            told(|r| r.cpus.to_string()),
            "0".to_owned(),
        ];
        let fields: Vec<String> = fields.iter().map(|field| csv_field(field)).collect();
        out.push_str(&fields.join(","));
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    #[test]
    fn all_formats() {
        let instances = samples::instances();
        insta::assert_snapshot!("info_table", render(&instances, Format::Table));
        insta::assert_snapshot!("info_json", render(&instances, Format::Json));
        insta::assert_snapshot!("info_csv", render(&instances, Format::Csv));
        insta::assert_snapshot!("info_yaml", render(&instances, Format::Yaml));
    }

    #[test]
    fn json_and_yaml_are_what_readers_expect() {
        let json = render(&samples::instances(), Format::Json);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let running = &json["info"]["foo"];
        assert_eq!(running["cpu_count"], "2");
        assert!(running["disks"]["sda1"]["used"].is_string());
        assert!(running["memory"]["used"].is_u64());
        assert!(running["load"][0].is_f64());
        let stopped = &json["info"]["bar"];
        assert_eq!(stopped["cpu_count"], "");
        assert_eq!(stopped["disks"], serde_json::json!({"sda1": {}}));
        assert_eq!(stopped["memory"], serde_json::json!({}));
        assert_eq!(stopped["load"], serde_json::json!([]));
    }

    #[test]
    fn a_guest_can_not_drive_the_terminal() {
        let mut instances = samples::instances();
        if let Some(report) = &mut instances[0].report {
            report.os = "evil\x1b]0;x\x07\x1b[2J".to_owned();
        }
        assert!(!render(&instances, Format::Table).contains('\x1b'));
    }

    #[test]
    fn nothing_to_show() {
        assert_eq!(render(&[], Format::Table), "No instances found.\n");
        assert_eq!(render(&[], Format::Yaml), "errors:\n  - ~\n");
    }
}
