//! `pileus networks`.

use pileus_api::HostNetwork;

use super::node::Node;
use super::{Format, csv_field, csv_quoted, table};

pub fn render(networks: &[HostNetwork], format: Format) -> String {
    match format {
        Format::Table if networks.is_empty() => "No network interfaces found.\n".to_owned(),
        Format::Table => {
            let row = |n: &HostNetwork| vec![n.name.clone(), n.kind.clone(), n.description.clone()];
            let columns = [("Name", 6), ("Type", 6), ("Description", 0)];
            table::table(&columns, &networks.iter().map(row).collect::<Vec<_>>())
        }
        Format::Json => {
            let list = networks.iter().map(|n| {
                Node::map([
                    ("name", Node::text(&n.name)),
                    ("type", Node::text(&n.kind)),
                    ("description", Node::text(&n.description)),
                ])
            });
            Node::map([("list", Node::List(list.collect()))]).to_json()
        }
        Format::Csv => {
            let mut out = "Name,Type,Description\n".to_owned();
            for n in networks {
                let (name, kind) = (csv_field(&n.name), csv_field(&n.kind));
                out.push_str(&format!("{name},{kind},{}\n", csv_quoted(&n.description)));
            }
            out
        }
        Format::Yaml => Node::map(networks.iter().map(|n| {
            let network = Node::map([
                ("type", Node::text(&n.kind)),
                ("description", Node::text(&n.description)),
            ]);
            (n.name.as_str(), Node::List(vec![network]))
        }))
        .to_yaml(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_formats() {
        let network = |name: &str, kind: &str, description: &str| HostNetwork {
            name: name.into(),
            kind: kind.into(),
            description: description.into(),
        };
        let networks = [
            network("br0", "bridge", "Network bridge with eth0, eth1"),
            network("eth0", "ethernet", "Ethernet device"),
        ];
        insta::assert_snapshot!("networks_table", render(&networks, Format::Table));
        insta::assert_snapshot!("networks_json", render(&networks, Format::Json));
        insta::assert_snapshot!("networks_csv", render(&networks, Format::Csv));
        insta::assert_snapshot!("networks_yaml", render(&networks, Format::Yaml));
        assert_eq!(render(&[], Format::Table), "No network interfaces found.\n");
        assert_eq!(render(&[], Format::Json), "{\n    \"list\": [\n    ]\n}\n");
    }
}
