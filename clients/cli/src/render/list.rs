//! `pileus list`.

use std::net::Ipv4Addr;

use pileus_api::Instance;

use super::node::Node;
use super::{Format, csv_field, csv_quoted, image_title, state, table};

/// Instances in the order in which they are to be shown.
pub fn render(instances: &[Instance], format: Format, addresses: bool) -> String {
    let shown: Vec<Shown> = instances.iter().map(|i| Shown::of(i, addresses)).collect();
    match format {
        Format::Table => as_table(&shown),
        Format::Json => as_json(&shown),
        Format::Csv => as_csv(&shown),
        Format::Yaml => as_yaml(&shown),
    }
}

struct Shown<'a> {
    name: &'a str,
    state: &'static str,
    ipv4: &'a [Ipv4Addr],
    release: String,
}

impl<'a> Shown<'a> {
    fn of(instance: &'a Instance, addresses: bool) -> Self {
        let gone = instance.deleted || !addresses;
        Self {
            name: instance.name.as_str(),
            state: state(instance),
            ipv4: if gone { &[] } else { &instance.ipv4 },
            release: image_title(instance),
        }
    }
}

fn as_table(shown: &[Shown]) -> String {
    if shown.is_empty() {
        return "No instances found.\n".to_owned();
    }
    let mut rows = Vec::new();
    for one in shown {
        let first = one
            .ipv4
            .first()
            .map_or("--".to_owned(), Ipv4Addr::to_string);
        rows.push(vec![
            one.name.to_owned(),
            one.state.to_owned(),
            first,
            one.release.clone(),
        ]);
        for more in one.ipv4.iter().skip(1) {
            rows.push(vec![String::new(), String::new(), more.to_string()]);
        }
    }
    let columns = [("Name", 24), ("State", 18), ("IPv4", 17), ("Image", 0)];
    table::table(&columns, &rows)
}

fn as_json(shown: &[Shown]) -> String {
    let list = shown.iter().map(|one| {
        Node::map([
            ("name", Node::text(one.name)),
            ("state", Node::text(one.state)),
            ("ipv4", Node::texts(one.ipv4)),
            ("release", Node::text(&one.release)),
        ])
    });
    Node::map([("list", Node::List(list.collect()))]).to_json()
}

fn as_csv(shown: &[Shown]) -> String {
    let mut out = "Name,State,IPv4,IPv6,Release,AllIPv4\n".to_owned();
    for one in shown {
        let all: Vec<String> = one.ipv4.iter().map(Ipv4Addr::to_string).collect();
        out.push_str(&format!(
            "{},{},{},,{},{}\n",
            one.name,
            one.state,
            all.first().map_or("", String::as_str),
            csv_field(&one.release),
            csv_quoted(&all.join(","))
        ));
    }
    out
}

fn as_yaml(shown: &[Shown]) -> String {
    Node::map(shown.iter().map(|one| {
        let instance = Node::map([
            ("state", Node::text(one.state)),
            ("ipv4", Node::texts(one.ipv4)),
            ("release", Node::text(&one.release)),
        ]);
        (one.name, Node::List(vec![instance]))
    }))
    .to_yaml()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::render::samples;

    #[test]
    fn all_formats() {
        let instances = samples::instances();
        insta::assert_snapshot!("list_table", render(&instances, Format::Table, true));
        insta::assert_snapshot!("list_json", render(&instances, Format::Json, true));
        insta::assert_snapshot!("list_csv", render(&instances, Format::Csv, true));
        insta::assert_snapshot!("list_yaml", render(&instances, Format::Yaml, true));
    }

    #[test]
    fn nothing_to_show() {
        assert_eq!(render(&[], Format::Table, true), "No instances found.\n");
        assert_eq!(
            render(&[], Format::Json, true),
            "{\n    \"list\": [\n    ]\n}\n"
        );
        assert_eq!(render(&[], Format::Yaml, true), "");
        assert_eq!(
            render(&[], Format::Csv, true),
            "Name,State,IPv4,IPv6,Release,AllIPv4\n"
        );
    }

    #[test]
    fn addresses_can_be_left_out() {
        let text = render(&samples::instances(), Format::Table, false);
        assert!(!text.contains("10."), "{text}");
    }
}
