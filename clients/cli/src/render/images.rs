//! `pileus find` (what can be launched) and `pileus image list` (what the store holds).

use pileus_api::{CatalogEntry, Image, PruneReply, PrunedImage, Size};

use super::node::Node;
use super::{Format, csv_field, table};

/// An image under the name by which it is launched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    pub key: String,
    pub aliases: Vec<String>,
    pub remote: String,
    pub os: String,
    pub release: String,
    pub version: String,
}

impl Found {
    pub fn of(entry: &CatalogEntry) -> Self {
        let key = match entry.remote.as_str() {
            "" | "release" => entry.name.clone(),
            remote => format!("{remote}:{}", entry.name),
        };
        let usable = |alias: &&String| alias.len() > 1 && *alias != "default";
        Self {
            key,
            aliases: entry.aliases.iter().filter(usable).cloned().collect(),
            remote: entry.remote.clone(),
            os: entry.os.clone(),
            release: entry.release.clone(),
            version: entry.version.clone(),
        }
    }

    fn title(&self) -> String {
        format!("{} {}", self.os, self.release).trim().to_owned()
    }
}

pub fn found(images: &[Found], format: Format) -> String {
    let fields = |image: &Found, yaml: bool| {
        let aliases = ("aliases", Node::texts(&image.aliases));
        let plain = [
            ("os", Node::text(&image.os)),
            ("release", Node::text(&image.release)),
            ("version", Node::text(&image.version)),
        ];
        let remote = ("remote", Node::text(&image.remote));
        if yaml {
            let [os, release, version] = plain;
            Node::map([aliases, os, release, version, remote])
        } else {
            let [os, release, version] = plain;
            Node::map([os, release, version, aliases, remote])
        }
    };
    let document = |yaml: bool| {
        let images = images.iter().map(|i| (i.key.as_str(), fields(i, yaml)));
        Node::map([
            ("errors", Node::List(vec![])),
            ("images", Node::map(images)),
        ])
    };
    match format {
        Format::Table if images.is_empty() => "No images found.\n".to_owned(),
        Format::Table => {
            let row = |i: &Found| {
                vec![
                    i.key.clone(),
                    i.aliases.join(","),
                    i.version.clone(),
                    i.title(),
                ]
            };
            let rows: Vec<_> = images.iter().map(row).collect();
            let columns = [
                ("Image", 28),
                ("Aliases", 18),
                ("Version", 17),
                ("Description", 0),
            ];
            table::table(&columns, &rows) + "\n"
        }
        Format::Json => document(false).to_json(),
        Format::Yaml => document(true).to_yaml(),
        Format::Csv => {
            let mut out = "Image,Remote,Aliases,OS,Release,Version,Type\n".to_owned();
            for image in images {
                let fields = [
                    &image.key,
                    &image.remote,
                    &image.aliases.join(";"),
                    &image.os,
                    &image.release,
                    &image.version,
                    "Cloud Image",
                ];
                out.push_str(&fields.map(csv_field).join(","));
                out.push('\n');
            }
            out
        }
    }
}

pub fn stored(images: &[Image], format: Format) -> String {
    match format {
        Format::Table if images.is_empty() => "No images in the store.\n".to_owned(),
        Format::Table => {
            let row = |i: &Image| {
                let title = format!("{} {}", i.os, i.release);
                let users = match i.used_by.as_slice() {
                    [] => "--".to_owned(),
                    users => users.join(","),
                };
                let tags = match i.tags.as_slice() {
                    [] => "--".to_owned(),
                    tags => tags.join(","),
                };
                vec![
                    i.digest.short().to_owned(),
                    tags,
                    title.trim().to_owned(),
                    i.version.clone(),
                    i.virtual_size.to_string(),
                    i.disk_usage.to_string(),
                    users,
                    i.source.clone(),
                ]
            };
            let columns = [
                ("Digest", 14),
                ("Tags", 10),
                ("Image", 14),
                ("Version", 10),
                ("Disk", 9),
                ("Takes", 9),
                ("Used by", 14),
                ("Source", 0),
            ];
            table::table(&columns, &images.iter().map(row).collect::<Vec<_>>())
        }
        Format::Json => {
            let images = images.iter().map(stored_node).collect();
            Node::map([("images", Node::List(images))]).to_json()
        }
        Format::Yaml => {
            let images = images.iter().map(stored_node).collect();
            Node::map([("images", Node::List(images))]).to_yaml()
        }
        Format::Csv => {
            let mut out = "Digest,OS,Release,Version,Source,Virtual size,Disk usage,\
                           Direct boot,Created,Used,Used by,Tags\n"
                .to_owned();
            for i in images {
                let fields = [
                    i.digest.to_string(),
                    i.os.clone(),
                    i.release.clone(),
                    i.version.clone(),
                    i.source.clone(),
                    i.virtual_size.bytes().to_string(),
                    i.disk_usage.bytes().to_string(),
                    i.direct_boot.to_string(),
                    i.created_at.to_string(),
                    i.used_at.map_or(String::new(), |time| time.to_string()),
                    i.used_by.join(";"),
                    i.tags.join(";"),
                ];
                let fields: Vec<_> = fields.iter().map(|f| csv_field(f)).collect();
                out.push_str(&fields.join(","));
                out.push('\n');
            }
            out
        }
    }
}

fn stored_node(image: &Image) -> Node {
    Node::map(stored_entries(image))
}

pub(super) fn stored_entries(image: &Image) -> Vec<(&'static str, Node)> {
    vec![
        ("digest", Node::text(image.digest.to_string())),
        ("os", Node::text(&image.os)),
        ("release", Node::text(&image.release)),
        ("version", Node::text(&image.version)),
        ("source", Node::text(&image.source)),
        ("virtual_size", Node::Int(image.virtual_size.bytes())),
        ("disk_usage", Node::Int(image.disk_usage.bytes())),
        ("direct_boot", Node::Bool(image.direct_boot)),
        ("created", Node::text(image.created_at.to_string())),
        ("used", Node::or_null(image.used_at.map(|t| t.to_string()))),
        ("used_by", Node::texts(&image.used_by)),
        ("tags", Node::texts(&image.tags)),
    ]
}

/// What was removed, or what would be.
pub fn pruned(reply: &PruneReply, dry_run: bool, format: Format) -> String {
    let document = || {
        let node = |image: &PrunedImage| {
            Node::map([
                ("digest", Node::text(image.digest.to_string())),
                ("source", Node::text(&image.source)),
                ("freed", Node::Int(image.freed.bytes())),
            ])
        };
        let removed = reply.removed.iter().map(node).collect();
        Node::map([
            ("dry_run", Node::Bool(dry_run)),
            ("removed", Node::List(removed)),
        ])
    };
    match format {
        Format::Table => pruned_text(reply, dry_run),
        Format::Json => document().to_json(),
        Format::Yaml => document().to_yaml(),
        Format::Csv => {
            let mut out = "Digest,Source,Freed\n".to_owned();
            for image in &reply.removed {
                let (digest, freed) = (&image.digest, image.freed.bytes());
                out.push_str(&format!("{digest},{},{freed}\n", csv_field(&image.source)));
            }
            out
        }
    }
}

fn pruned_text(reply: &PruneReply, dry_run: bool) -> String {
    if reply.removed.is_empty() {
        return "No unused images found.\n".to_owned();
    }
    let (removed, freed) = match dry_run {
        true => ("Would remove", "Would free"),
        false => ("Removed", "Freed"),
    };
    let mut out = String::new();
    let mut all = 0_u64;
    for image in &reply.removed {
        out.push_str(&format!(
            "{removed} {} ({})\n",
            image.digest.short(),
            image.freed
        ));
        all = all.saturating_add(image.freed.bytes());
    }
    out + &format!("{freed} {}\n", Size(all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    #[test]
    fn found_in_all_formats() {
        let images: Vec<Found> = samples::catalog().iter().map(Found::of).collect();
        insta::assert_snapshot!("find_table", found(&images, Format::Table));
        insta::assert_snapshot!("find_json", found(&images, Format::Json));
        insta::assert_snapshot!("find_csv", found(&images, Format::Csv));
        insta::assert_snapshot!("find_yaml", found(&images, Format::Yaml));
        assert_eq!(found(&[], Format::Table), "No images found.\n");
        assert_eq!(found(&[], Format::Yaml), "errors:\n  []\nimages:\n  {}\n");
    }

    #[test]
    fn stored_in_all_formats() {
        let images = samples::images();
        insta::assert_snapshot!("images_table", stored(&images, Format::Table));
        insta::assert_snapshot!("images_json", stored(&images, Format::Json));
        insta::assert_snapshot!("images_csv", stored(&images, Format::Csv));
        insta::assert_snapshot!("images_yaml", stored(&images, Format::Yaml));
    }

    #[test]
    fn pruned_says_what_was_freed() {
        let reply = samples::pruned();
        assert_eq!(
            pruned(&reply, false, Format::Table),
            "Removed cdcdcdcdcdcd (427.0MiB)\nFreed 427.0MiB\n"
        );
        assert_eq!(
            pruned(&reply, true, Format::Table),
            "Would remove cdcdcdcdcdcd (427.0MiB)\nWould free 427.0MiB\n"
        );
        insta::assert_snapshot!("pruned_json", pruned(&reply, true, Format::Json));
        insta::assert_snapshot!("pruned_csv", pruned(&reply, false, Format::Csv));
    }
}
