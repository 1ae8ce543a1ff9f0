//! `pileus doctor`.

use pileus_api::{Check, HostInfo, Size, Verdict};

use super::node::Node;
use super::{Format, csv_field, csv_quoted};
use crate::terminal::harmless;

pub fn render(checks: &[Check], host: Option<&HostInfo>, format: Format) -> String {
    match format {
        Format::Table => as_table(checks, host),
        Format::Json => document(checks, host).to_json(),
        Format::Yaml => document(checks, host).to_yaml(),
        Format::Csv => {
            let mut out = "Check,Verdict,Message,Advice\n".to_owned();
            for check in checks {
                out.push_str(&format!(
                    "{},{},{},{}\n",
                    csv_field(&check.name),
                    word(check.verdict),
                    csv_quoted(&check.message),
                    csv_quoted(check.advice.as_deref().unwrap_or_default()),
                ));
            }
            out
        }
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Good => "good",
        Verdict::Warning => "warning",
        Verdict::Bad => "bad",
    }
}

fn as_table(checks: &[Check], host: Option<&HostInfo>) -> String {
    let longest = checks.iter().map(|check| check.name.chars().count() + 2);
    let width = longest.max().unwrap_or(0).max(18);
    let mut out = format!("{:<width$}{:<9}Found\n", "Check", "Verdict");
    for check in checks {
        let verdict = word(check.verdict);
        out.push_str(&format!(
            "{:<width$}{verdict:<9}{}\n",
            check.name, check.message
        ));
        if let Some(advice) = &check.advice {
            out.push_str(&format!("{:<width$}{:<9}→ {advice}\n", "", ""));
        }
    }
    if let Some(host) = host {
        out.push_str(&format!(
            "\n{} processors, {} of {} memory available, {} space available\n",
            host.cpus,
            Size(host.memory_available),
            Size(host.memory),
            Size(host.space_available)
        ));
    }
    let count = |verdict| checks.iter().filter(|c| c.verdict == verdict).count();
    out.push_str(&match (count(Verdict::Bad), count(Verdict::Warning)) {
        (0, 0) => "All is well.\n".to_owned(),
        (0, warnings) => format!("It works; {warnings} could be better.\n"),
        (bad, _) => format!("It does not work as it is: {bad} bad.\n"),
    });
    harmless(&out).into_owned()
}

fn document(checks: &[Check], host: Option<&HostInfo>) -> Node {
    let checks = checks.iter().map(|check| {
        Node::map([
            ("name", Node::text(&check.name)),
            ("verdict", Node::text(word(check.verdict))),
            ("message", Node::text(&check.message)),
            ("advice", Node::or_null(check.advice.as_deref())),
        ])
    });
    let host = host.map_or(Node::Null, |host| {
        Node::map([
            ("cpus", Node::Int(host.cpus.into())),
            ("memory", Node::Int(host.memory)),
            ("memory_available", Node::Int(host.memory_available)),
            ("space_available", Node::Int(host.space_available)),
        ])
    });
    Node::map([("checks", Node::List(checks.collect())), ("host", host)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_formats() {
        let check = |name: &str, verdict, message: &str, advice: Option<&str>| Check {
            name: name.into(),
            verdict,
            message: message.into(),
            advice: advice.map(str::to_owned),
        };
        let checks = [
            check("socket", Verdict::Good, "A daemon answers.", None),
            check(
                "virtualisation",
                Verdict::Warning,
                "No KVM.",
                Some("Turn it on."),
            ),
            check(
                "space",
                Verdict::Bad,
                "0 bytes, \"full\".",
                Some("Make room."),
            ),
        ];
        let host = HostInfo {
            cpus: 2,
            memory: 8 << 30,
            memory_available: 5 << 30,
            space_available: 0,
            checks: vec![],
        };
        insta::assert_snapshot!("doctor_table", render(&checks, Some(&host), Format::Table));
        insta::assert_snapshot!("doctor_json", render(&checks, Some(&host), Format::Json));
        insta::assert_snapshot!("doctor_csv", render(&checks, None, Format::Csv));
        insta::assert_snapshot!("doctor_yaml", render(&checks, None, Format::Yaml));
    }
}
