//! `pileus image info`, `inspect`, and what `pull` and `import` say: all about one image.

use pileus_api::{Digest, ImageDetails, Inspection, Size};
use serde_json::Value;

use super::images::stored_entries;
use super::node::Node;
use super::{Format, csv_field, seconds};
use crate::terminal::harmless;

/// All about one image of the store.
pub fn info(details: &ImageDetails, format: Format) -> String {
    match format {
        Format::Table => table(&lines(details)),
        Format::Json => node(details).to_json(),
        Format::Yaml => node(details).to_yaml(),
        Format::Csv => csv(details),
    }
}

/// What is said when an image came into the store; programs get all about it.
pub fn came(how: &str, details: &ImageDetails, format: Format) -> String {
    match format {
        Format::Table => {
            let digest = details.image.digest.short();
            match details.image.tags.as_slice() {
                [] => format!("{how}: {digest}\n"),
                tags => format!("{how}: {digest} ({})\n", tags.join(", ")),
            }
        }
        _ => info(details, format),
    }
}

/// What is said when something was done: `words` to people, which may be none; to programs what it was done to.
pub fn did(words: &str, done: &[(&str, Node)], format: Format) -> String {
    let document = || Node::map(done.iter().map(|(key, value)| (*key, value.clone())));
    match format {
        Format::Table => words.to_owned(),
        Format::Json => document().to_json(),
        Format::Yaml => document().to_yaml(),
        Format::Csv => {
            let columns: Vec<_> = done.iter().map(|(key, _)| column(key)).collect();
            let fields: Vec<_> = done.iter().map(|(_, value)| field(value)).collect();
            format!("{}\n{}\n", columns.join(","), fields.join(","))
        }
    }
}

/// `untagged` as the head of a column.
fn column(key: &str) -> String {
    let (first, rest) = key.split_at(key.len().min(1));
    first.to_ascii_uppercase() + rest
}

fn field(value: &Node) -> String {
    match value {
        Node::Int(number) => number.to_string(),
        Node::Text(text) => csv_field(text),
        Node::List(list) => {
            let texts = list.iter().filter_map(|node| match node {
                Node::Text(text) => Some(text.as_str()),
                _ => None,
            });
            csv_field(&texts.collect::<Vec<_>>().join(";"))
        }
        _ => String::new(),
    }
}

fn lines(details: &ImageDetails) -> Vec<(&'static str, String)> {
    let image = &details.image;
    let system = format!("{} {}", image.os, image.release);
    let kernel = match (image.direct_boot, details.initrd) {
        (false, _) => "--",
        (true, false) => "beside the disk, without initrd",
        (true, true) => "beside the disk, with initrd",
    };
    let or_none = |texts: &[String]| match texts {
        [] => "--".to_owned(),
        texts => texts.join(", "),
    };
    let mut lines = vec![
        ("Digest", image.digest.to_string()),
        (
            "Disk digest",
            or_dash(details.disk_digest.as_ref().map(ToString::to_string)),
        ),
        ("Tags", or_none(&image.tags)),
        ("Title", details.title.clone()),
        ("Image", system.trim().to_owned()),
        ("Version", image.version.clone()),
        ("Architecture", details.arch.clone()),
        ("Source", image.source.clone()),
        ("Disk", image.virtual_size.to_string()),
        ("Least disk", details.min_disk.to_string()),
        ("Takes", image.disk_usage.to_string()),
        ("Kernel", kernel.to_owned()),
    ];
    lines.extend(details.cmdline.clone().map(|text| ("Command line", text)));
    lines.extend(details.machine.as_ref().map(|m| ("Machine", pairs(m))));
    let made_of = details.made_of.as_ref();
    lines.extend(made_of.map(|text| ("Made of", several(text.lines()))));
    lines.push(("Created", seconds(image.created_at).to_string()));
    let used = image.used_at.map(|time| seconds(time).to_string());
    lines.push(("Last used", or_dash(used)));
    lines.push(("Used by", or_none(&image.used_by)));
    if !details.templates.is_empty() {
        lines.push(("Templates", or_none(&details.templates)));
    }
    lines.retain(|(_, value)| !value.is_empty());
    lines
}

fn table(lines: &[(&str, String)]) -> String {
    let line = |(label, value): &(&str, String)| format!("{:<16}{value}\n", format!("{label}:"));
    harmless(&lines.iter().map(line).collect::<String>()).into_owned()
}

fn or_dash(text: Option<String>) -> String {
    text.unwrap_or_else(|| "--".to_owned())
}

/// A document in few words: its plain values, one a line.
fn pairs(value: &Value) -> String {
    let mut all = Vec::new();
    flatten("", value, &mut all);
    several(all.iter().map(String::as_str))
}

/// Lines below each other behind a label.
fn several<'a>(lines: impl Iterator<Item = &'a str>) -> String {
    lines.collect::<Vec<_>>().join(&format!("\n{:16}", ""))
}

fn flatten(name: &str, value: &Value, all: &mut Vec<String>) {
    let inner = |key: &str| match name {
        "" => key.to_owned(),
        name => format!("{name}.{key}"),
    };
    match value {
        Value::Null => {}
        Value::Object(map) => {
            for (key, value) in map {
                flatten(&inner(key), value, all);
            }
        }
        Value::Array(list) => {
            for (n, value) in list.iter().enumerate() {
                flatten(&inner(&n.to_string()), value, all);
            }
        }
        Value::String(text) => all.push(format!("{name}: {text}")),
        plain => all.push(format!("{name}: {plain}")),
    }
}

fn node(details: &ImageDetails) -> Node {
    let mut entries = stored_entries(&details.image);
    let disk_digest = details.disk_digest.as_ref().map(ToString::to_string);
    entries.extend([
        ("title", Node::text(&details.title)),
        ("codename", Node::text(&details.codename)),
        ("arch", Node::text(&details.arch)),
        ("min_disk", Node::Int(details.min_disk.bytes())),
        ("cmdline", Node::or_null(details.cmdline.as_ref())),
        ("initrd", Node::Bool(details.initrd)),
        ("disk_digest", Node::or_null(disk_digest)),
        ("machine", of_value(details.machine.as_ref())),
        ("made_of", Node::or_null(details.made_of.as_ref())),
        ("templates", Node::texts(&details.templates)),
    ]);
    Node::map(entries)
}

fn of_value(value: Option<&Value>) -> Node {
    match value {
        None | Some(Value::Null) => Node::Null,
        Some(Value::Bool(value)) => Node::Bool(*value),
        Some(Value::Number(number)) => match number.as_u64() {
            Some(number) => Node::Int(number),
            None => Node::Float(number.as_f64().unwrap_or_default()),
        },
        Some(Value::String(text)) => Node::text(text),
        Some(Value::Array(list)) => Node::List(list.iter().map(|v| of_value(Some(v))).collect()),
        Some(Value::Object(map)) => {
            Node::map(map.iter().map(|(key, v)| (key.as_str(), of_value(Some(v)))))
        }
    }
}

fn csv(details: &ImageDetails) -> String {
    let image = &details.image;
    let fields = [
        image.digest.to_string(),
        text(details.disk_digest.as_ref()),
        image.tags.join(";"),
        details.title.clone(),
        image.os.clone(),
        image.release.clone(),
        image.version.clone(),
        details.arch.clone(),
        image.source.clone(),
        image.virtual_size.bytes().to_string(),
        details.min_disk.bytes().to_string(),
        image.disk_usage.bytes().to_string(),
        image.direct_boot.to_string(),
        image.created_at.to_string(),
        text(image.used_at),
        image.used_by.join(";"),
        details.templates.join(";"),
        text(details.machine.as_ref()),
        details.made_of.clone().unwrap_or_default(),
    ];
    let mut out = "Digest,Disk digest,Tags,Title,OS,Release,Version,Architecture,Source,Virtual size,\
                   Least disk,Disk usage,Direct boot,Created,Used,Used by,Templates,Machine,Made of\n"
        .to_owned();
    out.push_str(&fields.map(|field| csv_field(&field)).join(","));
    out.push('\n');
    out
}

/// What a file is.
pub fn inspected(found: &Inspection, format: Format) -> String {
    let refused = found.refused.as_ref();
    let document = || {
        let digest =
            |digest: &Option<Digest>| Node::or_null(digest.as_ref().map(Digest::to_string));
        let size = |size: Option<Size>| size.map_or(Node::Null, |size| Node::Int(size.bytes()));
        let refusal = refused.map_or(Node::Null, |refusal| {
            Node::map([
                ("rule", Node::or_null(refusal.rule.as_ref())),
                ("code", Node::text(refusal.error.code.as_str())),
                ("message", Node::text(&refusal.error.message)),
            ])
        });
        Node::map([
            ("kind", Node::text(&found.kind)),
            ("digest", digest(&found.digest)),
            ("size", size(found.size)),
            ("virtual_size", size(found.virtual_size)),
            ("disk_usage", size(found.disk_usage)),
            ("disk_digest", digest(&found.disk_digest)),
            ("machine", of_value(found.machine.as_ref())),
            ("manifest", of_value(found.manifest.as_ref())),
            ("warnings", Node::texts(&found.warnings)),
            ("stored", Node::Bool(found.stored)),
            ("refused", refusal),
        ])
    };
    match format {
        Format::Table => table(&inspected_lines(found)),
        Format::Json => document().to_json(),
        Format::Yaml => document().to_yaml(),
        Format::Csv => {
            let bytes = |size: Option<Size>| size.map_or(String::new(), |s| s.bytes().to_string());
            let fields = [
                found.kind.clone(),
                text(found.digest.as_ref()),
                bytes(found.size),
                bytes(found.virtual_size),
                bytes(found.disk_usage),
                text(found.disk_digest.as_ref()),
                found.stored.to_string(),
                refused.map_or(String::new(), |r| r.error.code.as_str().to_owned()),
                refused.and_then(|r| r.rule.clone()).unwrap_or_default(),
            ];
            let fields = fields.map(|field| csv_field(&field)).join(",");
            let columns =
                "Kind,Digest,Size,Virtual size,Disk usage,Disk digest,Stored,Refused,Rule";
            format!("{columns}\n{fields}\n")
        }
    }
}

/// Nothing as nothing.
fn text<T: ToString>(value: Option<T>) -> String {
    value.map_or(String::new(), |value| value.to_string())
}

fn inspected_lines(found: &Inspection) -> Vec<(&'static str, String)> {
    let mut lines = vec![
        ("Kind", found.kind.clone()),
        ("Digest", text(found.digest.as_ref())),
        ("Disk digest", text(found.disk_digest.as_ref())),
        ("Size", text(found.size)),
        ("Disk", text(found.virtual_size)),
        ("Takes", text(found.disk_usage)),
        (
            "Machine",
            found.machine.as_ref().map_or(String::new(), pairs),
        ),
        (
            "Manifest",
            found.manifest.as_ref().map_or(String::new(), pairs),
        ),
        (
            "Warnings",
            several(found.warnings.iter().map(String::as_str)),
        ),
    ];
    if let Some(refusal) = &found.refused {
        let rule = refusal.rule.as_deref();
        let rule = rule.unwrap_or(refusal.error.code.as_str());
        lines.push(("Refused", format!("{} ({rule})", refusal.error.message)));
    } else {
        let stored = if found.stored { "yes" } else { "no" };
        lines.push(("In the store", stored.to_owned()));
    }
    lines.retain(|(_, value)| !value.is_empty());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    #[test]
    fn details_in_all_formats() {
        let [rich, poor] = samples::image_details().try_into().unwrap();
        insta::assert_snapshot!("image_table", info(&rich, Format::Table));
        insta::assert_snapshot!("image_poor", info(&poor, Format::Table));
        insta::assert_snapshot!("image_json", info(&rich, Format::Json));
        insta::assert_snapshot!("image_csv", info(&rich, Format::Csv));
        insta::assert_snapshot!("image_yaml", info(&rich, Format::Yaml));
        assert_eq!(
            came("Pulled", &rich, Format::Table),
            "Pulled: abababababab (web, base/web-1)\n"
        );
        assert_eq!(
            came("Pulled", &poor, Format::Table),
            "Pulled: cdcdcdcdcdcd\n"
        );
        assert_eq!(
            came("Pulled", &poor, Format::Json),
            info(&poor, Format::Json)
        );
    }

    #[test]
    fn what_was_done_in_all_formats() {
        let done = [
            ("untagged", Node::texts(["a", "b,c"])),
            ("count", Node::Int(2)),
        ];
        let did = |format| did("Both are gone\n", &done, format);
        assert_eq!(did(Format::Table), "Both are gone\n");
        let json: Value = serde_json::from_str(&did(Format::Json)).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"untagged": ["a", "b,c"], "count": 2})
        );
        assert_eq!(
            did(Format::Yaml),
            "untagged:\n  - a\n  - \"b,c\"\ncount: 2\n"
        );
        assert_eq!(did(Format::Csv), "Untagged,Count\n\"a;b,c\",2\n");
    }

    #[test]
    fn inspections_in_all_formats() {
        let [fine, refused] = samples::inspections().try_into().unwrap();
        insta::assert_snapshot!("inspected_table", inspected(&fine, Format::Table));
        insta::assert_snapshot!("inspected_json", inspected(&fine, Format::Json));
        insta::assert_snapshot!("refused_table", inspected(&refused, Format::Table));
        insta::assert_snapshot!("refused_json", inspected(&refused, Format::Json));
        insta::assert_snapshot!("refused_csv", inspected(&refused, Format::Csv));
    }
}
