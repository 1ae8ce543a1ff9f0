//! `pileus info`: the fields that users of Multipass know, and then what only pileus tells.

use pileus_api::{GuestReport, Instance, InstanceName, Size, Snapshot};

use super::node::Node;
use super::{Format, View, csv_field, image_title, own, snapshots, state};
use crate::terminal::harmless;

/// An instance's share of the answer: itself, some of its snapshots, or both.
#[derive(Debug, Clone)]
pub struct Shown {
    pub name: InstanceName,
    pub instance: Option<Instance>,
    pub snapshots: Vec<Snapshot>,
}

impl Shown {
    #[cfg(test)]
    fn instances(instances: Vec<Instance>) -> Vec<Self> {
        let shown = |instance: Instance| Self {
            name: instance.name.clone(),
            instance: Some(instance),
            snapshots: Vec::new(),
        };
        instances.into_iter().map(shown).collect()
    }

    /// Whether there is anything of it.
    fn is_something(&self) -> bool {
        self.instance.is_some() || !self.snapshots.is_empty()
    }
}

/// `nothing` is what people read if there is nothing.
pub fn render(shown: &[Shown], nothing: &str, view: &View) -> String {
    let shown: Vec<&Shown> = shown.iter().filter(|one| one.is_something()).collect();
    match view.format {
        Format::Table if shown.is_empty() => format!("{nothing}\n"),
        Format::Table => {
            let blocks = shown.iter().flat_map(|one| {
                let instance = one.instance.iter().map(|i| as_table(i, view));
                let snapshots = one.snapshots.iter();
                instance.chain(snapshots.map(|s| snapshots::as_table(s, view)))
            });
            harmless(&blocks.collect::<Vec<_>>().join("\n")).into_owned()
        }
        Format::Json => {
            let all = shown.iter().map(|one| {
                let mut entries = one.instance.as_ref().map_or(vec![], |i| as_json(i, view));
                if !one.snapshots.is_empty() {
                    let node = snapshots::as_json(&one.snapshots, view);
                    entries.push(("snapshots", node));
                }
                (one.name.as_str(), Node::map(entries))
            });
            Node::map([("errors", Node::List(vec![])), ("info", Node::map(all))]).to_json()
        }
        Format::Csv if shown.iter().any(|one| one.instance.is_some()) => {
            as_csv(shown.iter().filter_map(|one| one.instance.as_ref()))
        }
        Format::Csv if nothing.contains("snapshots") || !shown.is_empty() => {
            snapshots::as_csv(shown.iter().flat_map(|one| &one.snapshots), view)
        }
        Format::Csv => as_csv([].into_iter()),
        Format::Yaml => {
            let errors = ("errors", Node::List(vec![Node::Null]));
            let all = shown.iter().map(|one| {
                let mut entries = one.instance.as_ref().map_or(vec![], |i| as_yaml(i, view));
                if !one.snapshots.is_empty() {
                    let node = snapshots::as_yaml(&one.snapshots, view);
                    entries.push(("snapshots", node));
                }
                (one.name.as_str(), Node::List(vec![Node::map(entries)]))
            });
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

fn as_table(instance: &Instance, view: &View) -> String {
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
    line("Snapshots", &instance.snapshots.to_string());
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
    if !view.multipass {
        own::lines(instance, &mut line);
    }
    out
}

fn usage(used: u64, total: u64) -> String {
    format!("{} out of {}", Size(used), Size(total))
}

fn as_json(instance: &Instance, view: &View) -> Vec<(&'static str, Node)> {
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
        ("snapshot_count", Node::text(instance.snapshots.to_string())),
        ("load", Node::List(load)),
        ("disks", Node::map([("sda1", Node::map(disk))])),
        ("memory", Node::map(memory)),
        ("ipv4", Node::texts(&instance.ipv4)),
        ("mounts", Node::map::<&str>([])),
    ];
    if !view.multipass {
        entries.extend(own::fields(instance));
    }
    entries
}

fn as_yaml(instance: &Instance, view: &View) -> Vec<(&'static str, Node)> {
    let report = report(instance);
    let told = |tell: fn(&GuestReport) -> String| Node::or_null(report.map(tell));
    let mut entries = vec![
        ("state", Node::text(state(instance))),
        ("snapshot_count", Node::Int(instance.snapshots.into())),
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
    if !view.multipass {
        entries.extend(own::fields(instance));
    }
    entries
}

fn as_csv<'a>(instances: impl Iterator<Item = &'a Instance>) -> String {
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
            instance.snapshots.to_string(),
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

    fn show(instances: Vec<Instance>, format: Format) -> String {
        let view = View::sample(format, false);
        render(&Shown::instances(instances), "No instances found.", &view)
    }

    #[test]
    fn all_formats() {
        let show = |format| show(samples::instances(), format);
        insta::assert_snapshot!("info_table", show(Format::Table));
        insta::assert_snapshot!("info_json", show(Format::Json));
        insta::assert_snapshot!("info_csv", show(Format::Csv));
        insta::assert_snapshot!("info_yaml", show(Format::Yaml));
    }

    #[test]
    fn all_formats_as_multipass() {
        let shown = Shown::instances(samples::instances());
        let show = |format| render(&shown, "No instances found.", &View::sample(format, true));
        insta::assert_snapshot!("multipass_info_table", show(Format::Table));
        insta::assert_snapshot!("multipass_info_json", show(Format::Json));
        insta::assert_snapshot!("info_csv", show(Format::Csv));
        insta::assert_snapshot!("multipass_info_yaml", show(Format::Yaml));
    }

    fn with_snapshots(instance: bool) -> Vec<Shown> {
        let mut shown = Shown::instances(samples::instances());
        shown.truncate(2);
        for one in &mut shown {
            let snapshots = samples::snapshots().into_iter();
            one.snapshots = snapshots.filter(|s| s.instance == one.name).collect();
            one.instance.take_if(|_| !instance);
        }
        shown
    }

    #[test]
    fn snapshots_in_all_formats() {
        for (multipass, name) in [(false, ""), (true, "multipass_")] {
            let show = |format| {
                let view = View::sample(format, multipass);
                render(&with_snapshots(false), "No snapshots found.", &view)
            };
            insta::assert_snapshot!(format!("{name}info_snapshots_table"), show(Format::Table));
            insta::assert_snapshot!(format!("{name}info_snapshots_json"), show(Format::Json));
            insta::assert_snapshot!(format!("{name}info_snapshots_csv"), show(Format::Csv));
            insta::assert_snapshot!(format!("{name}info_snapshots_yaml"), show(Format::Yaml));
        }
    }

    #[test]
    fn an_instance_and_its_snapshots_share_one_object() {
        let view = View::sample(Format::Json, true);
        let json = render(&with_snapshots(true), "", &view);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["info"]["foo"]["state"], "Running");
        assert_eq!(
            json["info"]["foo"]["snapshots"]["second"]["parent"],
            "snapshot1"
        );
        assert_eq!(json["info"]["foo"]["snapshot_count"], "2");
    }

    /// pileus tells more than Multipass, but nothing of another type.
    #[test]
    fn what_both_tell_is_the_same() {
        let json = |multipass| {
            let view = View::sample(Format::Json, multipass);
            let shown = Shown::instances(samples::instances());
            let json: serde_json::Value = serde_json::from_str(&render(&shown, "", &view)).unwrap();
            json["info"].clone()
        };
        let (own, theirs) = (json(false), json(true));
        for (name, fields) in theirs.as_object().unwrap() {
            for (field, value) in fields.as_object().unwrap() {
                assert_eq!(&own[name][field], value, "{name} {field}");
            }
        }
    }

    #[test]
    fn json_and_yaml_are_what_readers_expect() {
        let json = show(samples::instances(), Format::Json);
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
        for instance in &mut instances {
            if let Some(report) = &mut instance.report {
                report.os = "evil\x1b]0;x\x07\x1b[2J".to_owned();
            }
        }
        assert!(!show(instances, Format::Table).contains('\x1b'));
    }

    #[test]
    fn nothing_to_show() {
        assert_eq!(show(vec![], Format::Table), "No instances found.\n");
        assert_eq!(show(vec![], Format::Yaml), "errors:\n  - ~\n");
        let view = View::sample(Format::Csv, true);
        let text = render(&[], "No snapshots found.", &view);
        assert!(text.starts_with("Snapshot,Instance,CPU(s),"), "{text}");
    }
}
