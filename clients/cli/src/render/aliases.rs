//! `pileus aliases`.

use super::node::Node;
use super::{Format, csv_field, table};
use crate::aliases::store::{Alias, Aliases};

pub(crate) fn render(aliases: &Aliases, format: Format) -> String {
    match format {
        Format::Table => as_table(aliases),
        Format::Json => as_json(aliases),
        Format::Csv => as_csv(aliases),
        Format::Yaml => as_yaml(aliases),
    }
}

/// Each alias with its context, the current one marked.
fn all(aliases: &Aliases) -> impl Iterator<Item = (String, &String, &Alias)> {
    aliases.contexts.iter().flat_map(|(context, found)| {
        let mark = if *context == aliases.active { "*" } else { "" };
        let shown = format!("{context}{mark}");
        found
            .iter()
            .map(move |(name, alias)| (shown.clone(), name, alias))
    })
}

fn as_table(aliases: &Aliases) -> String {
    if aliases.is_empty() {
        return "No aliases defined.\n".to_owned();
    }
    let rows: Vec<Vec<String>> = all(aliases)
        .map(|(context, name, alias)| {
            let folder = alias.working_directory.as_str().to_owned();
            let (instance, command) = (alias.instance.clone(), alias.command.clone());
            vec![name.clone(), instance, command, context, folder]
        })
        .collect();
    let columns = [
        ("Alias", 7),
        ("Instance", 10),
        ("Command", 9),
        ("Context", 9),
        ("Working directory", 0),
    ];
    table::table(&columns, &rows)
}

fn as_json(aliases: &Aliases) -> String {
    let contexts = aliases.contexts.iter().map(|(context, found)| {
        let found = found.iter().map(|(name, alias)| {
            let alias = Node::map([
                ("command", Node::text(&alias.command)),
                ("instance", Node::text(&alias.instance)),
                (
                    "working-directory",
                    Node::text(alias.working_directory.as_str()),
                ),
            ]);
            (name.as_str(), alias)
        });
        (context.as_str(), Node::map(found))
    });
    Node::map([
        ("active-context", Node::text(&aliases.active)),
        ("contexts", Node::map(contexts)),
    ])
    .to_json()
}

fn as_csv(aliases: &Aliases) -> String {
    let mut out = "Alias,Instance,Command,Working directory,Context\n".to_owned();
    for (context, name, alias) in all(aliases) {
        let folder = alias.working_directory.as_str();
        let fields = [
            name,
            alias.instance.as_str(),
            &alias.command,
            folder,
            &context,
        ];
        out.push_str(&fields.map(csv_field).join(","));
        out.push('\n');
    }
    out
}

fn as_yaml(aliases: &Aliases) -> String {
    let contexts = aliases.contexts.iter().map(|(context, found)| {
        let found = found.iter().map(|(name, alias)| {
            Node::map([
                ("alias", Node::text(name)),
                ("command", Node::text(&alias.command)),
                ("instance", Node::text(&alias.instance)),
                (
                    "working-directory",
                    Node::text(alias.working_directory.as_str()),
                ),
            ])
        });
        (context.as_str(), Node::List(found.collect()))
    });
    Node::map([
        ("active_context", Node::text(&aliases.active)),
        ("aliases", Node::map(contexts)),
    ])
    .to_yaml()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aliases::store::Folder;

    fn sample() -> Aliases {
        let alias = |command: &str, working_directory| Alias {
            command: command.into(),
            instance: "foo".into(),
            working_directory,
        };
        let mut aliases = Aliases::default();
        let current = aliases.current();
        current.insert("wai".into(), alias("whoami", Folder::Map));
        current.insert("ll".into(), alias("/bin/ls", Folder::Default));
        aliases.prefer("work");
        aliases
            .current()
            .insert("db".into(), alias("psql", Folder::Map));
        aliases
    }

    #[test]
    fn all_formats() {
        insta::assert_snapshot!("aliases_table", render(&sample(), Format::Table));
        insta::assert_snapshot!("aliases_json", render(&sample(), Format::Json));
        insta::assert_snapshot!("aliases_csv", render(&sample(), Format::Csv));
        insta::assert_snapshot!("aliases_yaml", render(&sample(), Format::Yaml));
    }

    #[test]
    fn none() {
        let none = Aliases::default();
        assert_eq!(render(&none, Format::Table), "No aliases defined.\n");
        let json: serde_json::Value = serde_json::from_str(&render(&none, Format::Json)).unwrap();
        let expected =
            serde_json::json!({"active-context": "default", "contexts": {"default": {}}});
        assert_eq!(json, expected);
        assert_eq!(
            render(&none, Format::Yaml),
            "active_context: default\naliases:\n  default:\n    []\n"
        );
    }
}
