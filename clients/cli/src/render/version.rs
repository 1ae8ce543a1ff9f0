//! `pileus version`: the client's version, and the daemon's if one answers.

use super::node::Node;
use super::{Format, csv_field};
use crate::personality::Personality;

pub fn render(personality: Personality, daemon: Option<&str>, format: Format) -> String {
    let client = personality.version();
    let (program, service) = (personality.program(), personality.daemon());
    let mut versions = vec![(program, Node::text(client))];
    versions.extend(daemon.map(|version| (service, Node::text(version))));
    match format {
        Format::Table => {
            let mut out = format!("{program:<12}{client}\n");
            if let Some(daemon) = daemon {
                out.push_str(&format!("{service:<12}{daemon}\n"));
            }
            out
        }
        Format::Json => Node::map(versions).to_json(),
        Format::Yaml => Node::map(versions).to_yaml(),
        Format::Csv => {
            let header = match personality {
                Personality::Pileus => "Pileus,Pileusd",
                Personality::Multipass => "Multipass,Multipassd",
            };
            format!(
                "{header},Title,Description,URL\n{},{},,,\n",
                csv_field(client),
                csv_field(daemon.unwrap_or_default())
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: &str = env!("CARGO_PKG_VERSION");

    #[test]
    fn one_line_without_a_daemon_two_with() {
        let pileus = |daemon, format| render(Personality::Pileus, daemon, format);
        assert_eq!(pileus(None, Format::Table), format!("pileus      {OWN}\n"));
        assert_eq!(
            pileus(Some("1.2.4"), Format::Table),
            format!("pileus      {OWN}\npileusd     1.2.4\n")
        );
        assert_eq!(pileus(None, Format::Yaml), format!("pileus: {OWN}\n"));
        assert_eq!(
            pileus(Some("1.2.4"), Format::Csv),
            format!("Pileus,Pileusd,Title,Description,URL\n{OWN},1.2.4,,,\n")
        );
    }

    #[test]
    fn as_multipass() {
        let multipass = |daemon, format| render(Personality::Multipass, daemon, format);
        let both = Some("1.16.3");
        assert_eq!(multipass(None, Format::Table), "multipass   1.16.3\n");
        assert_eq!(
            multipass(both, Format::Table),
            "multipass   1.16.3\nmultipassd  1.16.3\n"
        );
        assert_eq!(
            multipass(both, Format::Json),
            "{\n    \"multipass\": \"1.16.3\",\n    \"multipassd\": \"1.16.3\"\n}\n"
        );
        assert_eq!(
            multipass(both, Format::Yaml),
            "multipass: 1.16.3\nmultipassd: 1.16.3\n"
        );
        assert_eq!(
            multipass(None, Format::Csv),
            "Multipass,Multipassd,Title,Description,URL\n1.16.3,,,,\n"
        );
    }
}
