//! `pileus get`: settings of the daemon.

use pileus_api::Setting;

use super::node::Node;
use super::{Format, csv_field, table};
use crate::terminal::harmless;

/// One setting; for people its value alone.
pub fn one(setting: &Setting, format: Format) -> String {
    match format {
        Format::Table => format!("{}\n", harmless(&setting.value)),
        Format::Json => node(setting).to_json(),
        Format::Yaml => node(setting).to_yaml(),
        Format::Csv => csv(std::slice::from_ref(setting)),
    }
}

pub fn all(settings: &[Setting], format: Format) -> String {
    let document = || {
        let settings = settings.iter().map(node).collect();
        Node::map([("settings", Node::List(settings))])
    };
    match format {
        Format::Table if settings.is_empty() => "No settings found.\n".to_owned(),
        Format::Table => {
            let row = |s: &Setting| vec![s.key.clone(), s.value.clone(), s.values.clone()];
            let columns = [("Key", 24), ("Value", 12), ("May be", 0)];
            table::table(&columns, &settings.iter().map(row).collect::<Vec<_>>())
        }
        Format::Json => document().to_json(),
        Format::Yaml => document().to_yaml(),
        Format::Csv => csv(settings),
    }
}

fn node(setting: &Setting) -> Node {
    Node::map([
        ("key", Node::text(&setting.key)),
        ("value", Node::text(&setting.value)),
        ("values", Node::text(&setting.values)),
    ])
}

fn csv(settings: &[Setting]) -> String {
    let mut out = "Key,Value,Values\n".to_owned();
    for setting in settings {
        let fields = [&setting.key, &setting.value, &setting.values];
        out.push_str(&fields.map(|field| csv_field(field)).join(","));
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
        let settings = samples::settings();
        insta::assert_snapshot!("settings_table", all(&settings, Format::Table));
        insta::assert_snapshot!("settings_json", all(&settings, Format::Json));
        insta::assert_snapshot!("settings_csv", all(&settings, Format::Csv));
        insta::assert_snapshot!("settings_yaml", all(&settings, Format::Yaml));
        assert_eq!(one(&settings[0], Format::Table), "auto\n");
    }
}
