//! `pileus list --snapshots`, and what `pileus info` tells of snapshots.

use std::collections::BTreeMap;

use pileus_api::Snapshot;

use super::node::Node;
use super::{Format, View, csv_field, csv_quoted, seconds, table};

/// So many characters of a comment's first line are shown in a table.
const COMMENT: usize = 50;

/// Snapshots in the order in which they are to be shown.
pub fn list(snapshots: &[Snapshot], view: &View) -> String {
    match view.format {
        Format::Table if snapshots.is_empty() => "No snapshots found.\n".to_owned(),
        Format::Table => {
            let row = |s: &Snapshot| {
                vec![
                    s.instance.to_string(),
                    s.name.to_string(),
                    or_dashes(s.parent.as_ref()),
                    or_dashes(Some(short(&s.comment)).filter(|comment| !comment.is_empty())),
                ]
            };
            let columns = [
                ("Instance", 11),
                ("Snapshot", 11),
                ("Parent", 9),
                ("Comment", 0),
            ];
            table::table(&columns, &snapshots.iter().map(row).collect::<Vec<_>>())
        }
        Format::Json => {
            let node = |s: &Snapshot| {
                Node::map([
                    ("parent", Node::text(parent(s))),
                    ("comment", Node::text(&s.comment)),
                ])
            };
            let info = by_instance(snapshots).into_iter().map(|(name, snapshots)| {
                let snapshots = snapshots.into_iter().map(|s| (s.name.as_str(), node(s)));
                (name, Node::map(snapshots))
            });
            Node::map([("errors", Node::List(vec![])), ("info", Node::map(info))]).to_json()
        }
        Format::Yaml => {
            let node = |s: &Snapshot| {
                let fields = Node::map([
                    ("parent", or_null(parent(s))),
                    ("comment", or_null(s.comment.clone())),
                ]);
                Node::map([(s.name.as_str(), Node::List(vec![fields]))])
            };
            Node::map(by_instance(snapshots).into_iter().map(|(name, snapshots)| {
                (name, Node::List(snapshots.into_iter().map(node).collect()))
            }))
            .to_yaml()
        }
        Format::Csv => {
            let mut out = "Instance,Snapshot,Parent,Comment\n".to_owned();
            for s in snapshots {
                let comment = csv_quoted(&s.comment);
                out.push_str(&format!(
                    "{},{},{},{comment}\n",
                    s.instance,
                    s.name,
                    parent(s)
                ));
            }
            out
        }
    }
}

/// What `info` tells of one snapshot, for people.
pub(super) fn as_table(s: &Snapshot, view: &View) -> String {
    let mut out = String::new();
    let mut line = |label: &str, value: &str| {
        let value = if value.is_empty() { "--" } else { value };
        out.push_str(&format!("{:<16}{value}\n", format!("{label}:")));
    };
    let below = format!("\n{:16}", "");
    let children: Vec<&str> = s.children.iter().map(|name| name.as_str()).collect();
    line("Snapshot", s.name.as_str());
    line("Instance", s.instance.as_str());
    line("Size", &s.size.to_string());
    line("CPU(s)", &s.cpus.to_string());
    line("Disk space", &s.disk.to_string());
    line("Memory size", &s.memory.to_string());
    line("Mounts", "");
    line("Created", &view.time(seconds(s.created_at)));
    line("Parent", &parent(s));
    line("Children", &children.join(&below));
    line("Comment", &s.comment.replace('\n', &below));
    if !view.multipass {
        line("Memory saved", if s.with_memory { "yes" } else { "no" });
    }
    out
}

/// What `info` tells of some snapshots of one instance, as JSON.
pub(super) fn as_json(snapshots: &[Snapshot], view: &View) -> Node {
    let node = |s: &Snapshot| {
        let mut fields = vec![
            ("size", Node::text(s.size.to_string())),
            ("cpu_count", Node::text(s.cpus.to_string())),
            ("disk_space", Node::text(s.disk.to_string())),
            ("memory_size", Node::text(s.memory.to_string())),
            ("mounts", Node::map::<&str>([])),
            ("created", Node::text(view.time(s.created_at))),
            ("parent", Node::text(parent(s))),
            ("children", Node::texts(&s.children)),
            ("comment", Node::text(&s.comment)),
        ];
        fields.extend(own_fields(s, view));
        Node::map(fields)
    };
    Node::map(snapshots.iter().map(|s| (s.name.as_str(), node(s))))
}

/// The same as YAML.
pub(super) fn as_yaml(snapshots: &[Snapshot], view: &View) -> Node {
    let node = |s: &Snapshot| {
        let children = match s.children.as_slice() {
            [] => Node::Null,
            children => Node::texts(children),
        };
        let mut fields = vec![
            ("size", Node::text(s.size.to_string())),
            ("cpu_count", Node::text(s.cpus.to_string())),
            ("disk_space", Node::text(s.disk.to_string())),
            ("memory_size", Node::text(s.memory.to_string())),
            ("mounts", Node::Null),
            ("created", Node::text(view.time(s.created_at))),
            ("parent", or_null(parent(s))),
            ("children", children),
            ("comment", or_null(s.comment.clone())),
        ];
        fields.extend(own_fields(s, view));
        Node::map([(s.name.as_str(), Node::map(fields))])
    };
    Node::List(snapshots.iter().map(node).collect())
}

/// What only pileus tells.
fn own_fields(s: &Snapshot, view: &View) -> Vec<(&'static str, Node)> {
    if view.multipass {
        return Vec::new();
    }
    vec![
        ("id", Node::text(s.id.to_string())),
        ("head", Node::Bool(s.head)),
        ("with_memory", Node::Bool(s.with_memory)),
        ("size_bytes", Node::Int(s.size.bytes())),
    ]
}

pub(super) fn as_csv<'a>(snapshots: impl Iterator<Item = &'a Snapshot>, view: &View) -> String {
    let mut out = "Snapshot,Instance,CPU(s),Disk space,Memory size,Mounts,Created,Parent,Children,\
                   Comment\n"
        .to_owned();
    for s in snapshots {
        let children: Vec<&str> = s.children.iter().map(|name| name.as_str()).collect();
        let fields = [
            s.name.to_string(),
            s.instance.to_string(),
            s.cpus.to_string(),
            s.disk.to_string(),
            s.memory.to_string(),
            String::new(),
            csv_field(&view.time(s.created_at)),
            parent(s),
            children.join(";"),
            csv_quoted(&s.comment),
        ];
        out.push_str(&fields.join(","));
        out.push('\n');
    }
    out
}

fn parent(snapshot: &Snapshot) -> String {
    let parent = snapshot.parent.as_ref();
    parent.map_or(String::new(), ToString::to_string)
}

fn or_dashes(text: Option<impl ToString>) -> String {
    text.map_or("--".to_owned(), |text| text.to_string())
}

fn or_null(text: String) -> Node {
    Node::or_null(Some(text).filter(|text| !text.is_empty()))
}

/// A comment for a table's cell: its first line, and not too much of that.
fn short(comment: &str) -> String {
    let line = comment.lines().next().unwrap_or_default();
    let cut: String = line.chars().take(COMMENT).collect();
    if cut.len() < comment.len() {
        return cut + "…";
    }
    cut
}

/// Keeps the order within an instance.
fn by_instance(snapshots: &[Snapshot]) -> Vec<(&str, Vec<&Snapshot>)> {
    let mut order: Vec<&str> = Vec::new();
    let mut all: BTreeMap<&str, Vec<&Snapshot>> = BTreeMap::new();
    for snapshot in snapshots {
        let name = snapshot.instance.as_str();
        if !order.contains(&name) {
            order.push(name);
        }
        all.entry(name).or_default().push(snapshot);
    }
    order
        .into_iter()
        .map(|name| (name, all.remove(name).unwrap_or_default()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    #[test]
    fn list_in_all_formats() {
        let snapshots = samples::snapshots();
        // Both names write the same.
        for multipass in [false, true] {
            let list = |format| list(&snapshots, &View::sample(format, multipass));
            insta::assert_snapshot!("snapshot_list_table", list(Format::Table));
            insta::assert_snapshot!("snapshot_list_json", list(Format::Json));
            insta::assert_snapshot!("snapshot_list_csv", list(Format::Csv));
            insta::assert_snapshot!("snapshot_list_yaml", list(Format::Yaml));
        }
    }

    #[test]
    fn nothing_to_list() {
        let none = |format| list(&[], &View::sample(format, true));
        assert_eq!(none(Format::Table), "No snapshots found.\n");
        assert_eq!(none(Format::Csv), "Instance,Snapshot,Parent,Comment\n");
        assert_eq!(
            none(Format::Json),
            "{\n    \"errors\": [\n    ],\n    \"info\": {\n    }\n}\n"
        );
    }

    #[test]
    fn long_comments_are_cut() {
        assert_eq!(short("a"), "a");
        assert_eq!(short("a\nb"), "a…");
        assert_eq!(short(&"ü".repeat(50)), "ü".repeat(50));
        assert_eq!(short(&"ü".repeat(51)), format!("{}…", "ü".repeat(50)));
    }
}
