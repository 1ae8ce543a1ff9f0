//! `pileus verify-unique`: what instances share that must be an instance's own.

use std::collections::{BTreeMap, BTreeSet};

use pileus_api::Identity;

use super::node::Node;
use super::{Format, csv_field, table};

/// An item of the identities, compared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compared {
    pub item: String,
    /// How many instances have it at all.
    pub present: usize,
    pub shared: Vec<Shared>,
}

/// A value that several instances have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shared {
    pub value: String,
    pub instances: Vec<String>,
}

/// Compares every item between all instances, in the order in which the guests tell them.
pub fn compare(identities: &[Identity]) -> Vec<Compared> {
    let mut order: Vec<&str> = Vec::new();
    for item in identities.iter().flat_map(|identity| &identity.items) {
        if !order.contains(&item.name.as_str()) {
            order.push(&item.name);
        }
    }
    let compared = order.into_iter().map(|name| {
        let mut present = 0;
        let mut owners: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for identity in identities {
            let items = identity.items.iter().filter(|item| item.name == name);
            // What one instance has twice it does not share with another.
            let values: BTreeSet<&str> = items
                .flat_map(|item| &item.values)
                .filter(|value| !value.is_empty())
                .map(String::as_str)
                .collect();
            present += usize::from(!values.is_empty());
            for value in values {
                owners
                    .entry(value)
                    .or_default()
                    .push(identity.name.to_string());
            }
        }
        let shared = owners.into_iter().filter(|(_, owners)| owners.len() > 1);
        let shared = shared.map(|(value, instances)| Shared {
            value: value.to_owned(),
            instances,
        });
        Compared {
            item: name.to_owned(),
            present,
            shared: shared.collect(),
        }
    });
    compared.collect()
}

impl Compared {
    /// `-` if no instance has such a thing.
    fn word(&self) -> &'static str {
        match (self.present, self.shared.is_empty()) {
            (0, _) => "-",
            (_, true) => "yes",
            (_, false) => "no",
        }
    }
}

pub fn render(items: &[Compared], format: Format) -> String {
    match format {
        Format::Table => {
            let row = |item: &Compared| vec![item.item.clone(), item.word().to_owned()];
            let rows: Vec<_> = items.iter().map(row).collect();
            let mut out = table::table(&[("Item", 24), ("Unique", 0)], &rows);
            let shared = items
                .iter()
                .flat_map(|i| i.shared.iter().map(move |s| (i, s)));
            for (n, (item, shared)) in shared.enumerate() {
                if n == 0 {
                    out.push('\n');
                }
                let names = shared.instances.join(", ");
                let line = format!("{}: {names} share {}", item.item, shared.value);
                out.push_str(&crate::terminal::harmless(&line.replace('\n', " ")));
                out.push('\n');
            }
            out
        }
        Format::Json => document(items).to_json(),
        Format::Yaml => document(items).to_yaml(),
        Format::Csv => {
            let mut out = "Item,Unique,Value,Instances\n".to_owned();
            let mut line = |fields: [&str; 4]| {
                out.push_str(&fields.map(csv_field).join(","));
                out.push('\n');
            };
            for item in items {
                if item.shared.is_empty() {
                    line([&item.item, item.word(), "", ""]);
                }
                for shared in &item.shared {
                    let names = shared.instances.join(";");
                    line([&item.item, item.word(), &shared.value, &names]);
                }
            }
            out
        }
    }
}

fn document(items: &[Compared]) -> Node {
    let node = |item: &Compared| {
        let unique = match item.present {
            0 => Node::Null,
            _ => Node::Bool(item.shared.is_empty()),
        };
        let shared = item.shared.iter().map(|shared| {
            Node::map([
                ("value", Node::text(&shared.value)),
                ("instances", Node::texts(&shared.instances)),
            ])
        });
        Node::map([
            ("item", Node::text(&item.item)),
            ("unique", unique),
            ("shared", Node::List(shared.collect())),
        ])
    };
    let unique = items.iter().all(|item| item.shared.is_empty());
    Node::map([
        ("unique", Node::Bool(unique)),
        ("items", Node::List(items.iter().map(node).collect())),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    #[test]
    fn all_formats() {
        let items = compare(&samples::identities());
        insta::assert_snapshot!("identity_table", render(&items, Format::Table));
        insta::assert_snapshot!("identity_json", render(&items, Format::Json));
        insta::assert_snapshot!("identity_csv", render(&items, Format::Csv));
        insta::assert_snapshot!("identity_yaml", render(&items, Format::Yaml));
    }

    #[test]
    fn every_pair_counts_and_nothing_is_shared_with_oneself() {
        let items = compare(&samples::identities());
        let of = |name: &str| items.iter().find(|item| item.item == name).unwrap();
        assert_eq!(of("machine-id").word(), "yes");
        // Only the first and the last share one of their keys.
        assert_eq!(of("ssh-host-key").shared[0].instances, ["a", "c"]);
        assert_eq!(of("dbus-id").word(), "-");
        // One has it, twice; the others have none.
        assert_eq!((of("mac").present, of("mac").word()), (1, "yes"));
    }
}
