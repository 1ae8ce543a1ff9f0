//! `pileus template`: saved machines.

use pileus_api::{InstanceImage, PrunedTemplate, Size, Template};

use super::node::Node;
use super::{Format, csv_field, table};
use crate::terminal::harmless;

pub fn list(templates: &[Template], format: Format) -> String {
    let document = || {
        let templates = templates.iter().map(node).collect();
        Node::map([("templates", Node::List(templates))])
    };
    match format {
        Format::Table if templates.is_empty() => "No templates found.\n".to_owned(),
        Format::Table => {
            let columns = [
                ("ID", 18),
                ("State", 10),
                ("Image", 14),
                ("CPUs", 6),
                ("Memory", 9),
                ("Takes", 9),
                ("Instances", 11),
                ("Source", 0),
            ];
            table::table(&columns, &templates.iter().map(row).collect::<Vec<_>>())
        }
        Format::Json => document().to_json(),
        Format::Yaml => document().to_yaml(),
        Format::Csv => csv(templates),
    }
}

fn row(template: &Template) -> Vec<String> {
    vec![
        template.id.clone(),
        template.state.as_str().to_owned(),
        title(&template.image),
        template.cpus.to_string(),
        template.memory.to_string(),
        takes(template).to_string(),
        template.instances.to_string(),
        template.image.source.clone(),
    ]
}

fn takes(template: &Template) -> Size {
    let sizes = (template.memory_used.bytes(), template.disk_used.bytes());
    Size(sizes.0.saturating_add(sizes.1))
}

fn title(image: &InstanceImage) -> String {
    format!("{} {}", image.os, image.release).trim().to_owned()
}

/// All about one template.
pub fn info(template: &Template, format: Format) -> String {
    match format {
        Format::Table => {
            let used = template.last_used_at;
            let place = if template.in_memory {
                "in memory"
            } else {
                "on disk"
            };
            let lines = [
                ("ID", template.id.clone()),
                ("State", template.state.as_str().to_owned()),
                ("Image", title(&template.image)),
                ("Source", template.image.source.clone()),
                ("Image hash", template.image.digest.short().to_owned()),
                ("CPU(s)", template.cpus.to_string()),
                ("Memory", template.memory.to_string()),
                ("Disk", template.disk.to_string()),
                ("Machine", template.machine_type.clone()),
                ("Accelerator", template.accelerator.clone()),
                ("QEMU", template.qemu.clone()),
                ("Saved memory", format!("{} {place}", template.memory_used)),
                ("Saved disk", template.disk_used.to_string()),
                ("Instances", template.instances.to_string()),
                ("Created", template.created_at.to_string()),
                ("Last used", used.map_or("--".to_owned(), |t| t.to_string())),
            ];
            let line =
                |(label, value): &(&str, String)| format!("{:<16}{value}\n", format!("{label}:"));
            harmless(&lines.iter().map(line).collect::<String>()).into_owned()
        }
        Format::Json => node(template).to_json(),
        Format::Yaml => node(template).to_yaml(),
        Format::Csv => csv(std::slice::from_ref(template)),
    }
}

fn node(template: &Template) -> Node {
    let used = template.last_used_at.map(|time| time.to_string());
    Node::map([
        ("id", Node::text(&template.id)),
        ("state", Node::text(template.state.as_str())),
        ("image_hash", Node::text(template.image.digest.hex())),
        ("image", Node::text(&template.image.source)),
        ("os", Node::text(&template.image.os)),
        ("release", Node::text(&template.image.release)),
        ("cpus", Node::Int(template.cpus.into())),
        ("memory_size", Node::Int(template.memory.bytes())),
        ("disk_size", Node::Int(template.disk.bytes())),
        ("machine_type", Node::text(&template.machine_type)),
        ("accelerator", Node::text(&template.accelerator)),
        ("qemu", Node::text(&template.qemu)),
        ("created", Node::text(template.created_at.to_string())),
        ("used", Node::or_null(used)),
        ("memory_used", Node::Int(template.memory_used.bytes())),
        ("disk_used", Node::Int(template.disk_used.bytes())),
        ("in_memory", Node::Bool(template.in_memory)),
        ("instances", Node::Int(template.instances.into())),
    ])
}

fn csv(templates: &[Template]) -> String {
    let mut out = "ID,State,Image hash,Image,OS,Release,CPUs,Memory,Disk,Machine,Accelerator,QEMU,\
                   Created,Used,Memory used,Disk used,In memory,Instances\n"
        .to_owned();
    for t in templates {
        let fields = [
            t.id.clone(),
            t.state.as_str().to_owned(),
            t.image.digest.hex().to_owned(),
            t.image.source.clone(),
            t.image.os.clone(),
            t.image.release.clone(),
            t.cpus.to_string(),
            t.memory.bytes().to_string(),
            t.disk.bytes().to_string(),
            t.machine_type.clone(),
            t.accelerator.clone(),
            t.qemu.clone(),
            t.created_at.to_string(),
            t.last_used_at
                .map_or(String::new(), |time| time.to_string()),
            t.memory_used.bytes().to_string(),
            t.disk_used.bytes().to_string(),
            t.in_memory.to_string(),
            t.instances.to_string(),
        ];
        out.push_str(&fields.map(|field| csv_field(&field)).join(","));
        out.push('\n');
    }
    out
}

pub fn pruned(pruned: &[PrunedTemplate], format: Format) -> String {
    let document = || {
        let node = |p: &PrunedTemplate| {
            Node::map([
                ("id", Node::text(&p.id)),
                ("freed", Node::Int(p.freed.bytes())),
            ])
        };
        Node::map([("removed", Node::List(pruned.iter().map(node).collect()))])
    };
    match format {
        Format::Table if pruned.is_empty() => "No unused templates found.\n".to_owned(),
        Format::Table => {
            let mut all = 0_u64;
            let mut out = String::new();
            for template in pruned {
                out.push_str(&format!("Removed {} ({})\n", template.id, template.freed));
                all = all.saturating_add(template.freed.bytes());
            }
            out + &format!("Freed {}\n", Size(all))
        }
        Format::Json => document().to_json(),
        Format::Yaml => document().to_yaml(),
        Format::Csv => {
            let line = |p: &PrunedTemplate| format!("{},{}\n", csv_field(&p.id), p.freed.bytes());
            "ID,Freed\n".to_owned() + &pruned.iter().map(line).collect::<String>()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    #[test]
    fn all_formats() {
        let templates = samples::templates();
        insta::assert_snapshot!("templates_table", list(&templates, Format::Table));
        insta::assert_snapshot!("templates_json", list(&templates, Format::Json));
        insta::assert_snapshot!("templates_csv", list(&templates, Format::Csv));
        insta::assert_snapshot!("templates_yaml", list(&templates, Format::Yaml));
        assert_eq!(list(&[], Format::Table), "No templates found.\n");
        insta::assert_snapshot!("template_table", info(&templates[0], Format::Table));
        insta::assert_snapshot!("template_json", info(&templates[0], Format::Json));
    }

    #[test]
    fn pruned_says_what_was_freed() {
        let one = PrunedTemplate {
            id: "0123456789abcdef".into(),
            freed: Size::mib(330),
        };
        let text = "Removed 0123456789abcdef (330.0MiB)\nFreed 330.0MiB\n";
        assert_eq!(pruned(&[one], Format::Table), text);
        assert_eq!(pruned(&[], Format::Table), "No unused templates found.\n");
    }
}
