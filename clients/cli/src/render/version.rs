//! `pileus version`: the client's version, and the daemon's if one answers.

use super::node::Node;
use super::{Format, csv_field};

pub fn render(client: &str, daemon: Option<&str>, format: Format) -> String {
    let mut versions = vec![("pileus", Node::text(client))];
    versions.extend(daemon.map(|version| ("pileusd", Node::text(version))));
    match format {
        Format::Table => {
            let mut out = format!("{:<12}{client}\n", "pileus");
            if let Some(daemon) = daemon {
                out.push_str(&format!("{:<12}{daemon}\n", "pileusd"));
            }
            out
        }
        Format::Json => Node::map(versions).to_json(),
        Format::Yaml => Node::map(versions).to_yaml(),
        Format::Csv => format!(
            "Pileus,Pileusd,Title,Description,URL\n{},{},,,\n",
            csv_field(client),
            csv_field(daemon.unwrap_or_default())
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_without_a_daemon_two_with() {
        assert_eq!(render("1.2.3", None, Format::Table), "pileus      1.2.3\n");
        assert_eq!(
            render("1.2.3", Some("1.2.4"), Format::Table),
            "pileus      1.2.3\npileusd     1.2.4\n"
        );
        assert_eq!(render("1.2.3", None, Format::Yaml), "pileus: 1.2.3\n");
        assert_eq!(
            render("1.2.3", Some("1.2.4"), Format::Json),
            "{\n    \"pileus\": \"1.2.3\",\n    \"pileusd\": \"1.2.4\"\n}\n"
        );
        assert_eq!(
            render("1.2.3", Some("1.2.4"), Format::Csv),
            "Pileus,Pileusd,Title,Description,URL\n1.2.3,1.2.4,,,\n"
        );
    }
}
