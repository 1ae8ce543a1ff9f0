//! A small document tree that keeps its order, written as JSON (four spaces, empty lists and maps on
//! two lines) or as YAML, byte for byte as scripts of Multipass see them.

use std::fmt::Write;

#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    Null,
    Bool(bool),
    Int(u64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(String, Node)>),
}

impl Node {
    pub fn text(text: impl Into<String>) -> Self {
        Node::Text(text.into())
    }

    pub fn texts<T: ToString>(texts: impl IntoIterator<Item = T>) -> Self {
        Node::List(
            texts
                .into_iter()
                .map(|t| Node::Text(t.to_string()))
                .collect(),
        )
    }

    pub fn map<K: Into<String>>(entries: impl IntoIterator<Item = (K, Node)>) -> Self {
        Node::Map(entries.into_iter().map(|(k, v)| (k.into(), v)).collect())
    }

    /// `Null` for nothing.
    pub fn or_null(text: Option<impl Into<String>>) -> Self {
        text.map_or(Node::Null, Node::text)
    }

    /// The whole JSON document, ending with a newline.
    pub fn to_json(&self) -> String {
        let mut out = String::new();
        self.json(0, &mut out);
        out.push('\n');
        out
    }

    fn json(&self, depth: usize, out: &mut String) {
        let inner = "    ".repeat(depth + 1);
        let outer = "    ".repeat(depth);
        match self {
            Node::List(items) => {
                out.push_str("[\n");
                for (i, item) in items.iter().enumerate() {
                    out.push_str(&inner);
                    item.json(depth + 1, out);
                    out.push_str(if i + 1 < items.len() { ",\n" } else { "\n" });
                }
                out.push_str(&outer);
                out.push(']');
            }
            Node::Map(entries) => {
                out.push_str("{\n");
                for (i, (key, value)) in entries.iter().enumerate() {
                    out.push_str(&inner);
                    out.push_str(&json_text(key));
                    out.push_str(": ");
                    value.json(depth + 1, out);
                    out.push_str(if i + 1 < entries.len() { ",\n" } else { "\n" });
                }
                out.push_str(&outer);
                out.push('}');
            }
            Node::Text(text) => out.push_str(&json_text(text)),
            Node::Null => out.push_str("null"),
            // Writing to a String can't fail.
            Node::Bool(value) => drop(write!(out, "{value}")),
            Node::Int(value) => drop(write!(out, "{value}")),
            Node::Float(value) => drop(write!(out, "{value}")),
        }
    }

    /// The whole YAML document; this node must be a map.
    pub fn to_yaml(&self) -> String {
        let mut out = String::new();
        if let Node::Map(entries) = self {
            yaml_map(entries, 0, &mut out);
        }
        out
    }

    fn yaml_scalar(&self) -> Option<String> {
        Some(match self {
            Node::Null => "~".to_owned(),
            Node::Bool(value) => value.to_string(),
            Node::Int(value) => value.to_string(),
            Node::Float(value) => format!("{value:.2}"),
            Node::Text(text) => yaml_text(text),
            Node::List(_) | Node::Map(_) => return None,
        })
    }
}

fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

fn yaml_map(entries: &[(String, Node)], indent: usize, out: &mut String) {
    let pad = " ".repeat(indent);
    for (i, (key, value)) in entries.iter().enumerate() {
        // The first entry of a map in a list stands behind the list's dash.
        if i > 0 || !out.ends_with("- ") {
            out.push_str(&pad);
        }
        out.push_str(&yaml_text(key));
        out.push(':');
        match value {
            Node::List(items) => {
                out.push('\n');
                yaml_list(items, indent + 2, out);
            }
            Node::Map(entries) if entries.is_empty() => out.push_str(&format!("\n{pad}  {{}}\n")),
            Node::Map(entries) => {
                out.push('\n');
                yaml_map(entries, indent + 2, out);
            }
            scalar => {
                out.push(' ');
                out.push_str(&scalar.yaml_scalar().unwrap_or_default());
                out.push('\n');
            }
        }
    }
}

fn yaml_list(items: &[Node], indent: usize, out: &mut String) {
    let pad = " ".repeat(indent);
    if items.is_empty() {
        out.push_str(&format!("{pad}[]\n"));
    }
    for item in items {
        out.push_str(&pad);
        out.push_str("- ");
        match item {
            Node::Map(entries) => yaml_map(entries, indent + 2, out),
            Node::List(_) => out.push_str(&format!("{}\n", item.to_json().trim_end())),
            scalar => {
                out.push_str(&scalar.yaml_scalar().unwrap_or_default());
                out.push('\n');
            }
        }
    }
}

/// A YAML scalar: plain where every reader takes it for the same text (or for a number, which is
/// what scripts expect of versions and counts), else in double quotes as in JSON.
fn yaml_text(text: &str) -> String {
    const WORDS: [&str; 9] = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    let plain = text
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || " ._/+()-".contains(c))
        && text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '/')
        && !text.ends_with(' ')
        && !WORDS.contains(&text.to_ascii_lowercase().as_str());
    if plain {
        return text.to_owned();
    }
    json_text(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Node {
        Node::map([
            ("errors", Node::List(vec![])),
            (
                "foo",
                Node::List(vec![Node::map([
                    ("state", Node::text("Running")),
                    ("ipv4", Node::texts(["10.1.2.3"])),
                    ("none", Node::Null),
                    ("load", Node::List(vec![Node::Float(0.5)])),
                    ("empty", Node::map::<&str>([])),
                    ("deep", Node::map([("n", Node::Int(3))])),
                ])]),
            ),
        ])
    }

    #[test]
    fn json_as_scripts_know_it() {
        insta::assert_snapshot!(sample().to_json(), @r#"
        {
            "errors": [
            ],
            "foo": [
                {
                    "state": "Running",
                    "ipv4": [
                        "10.1.2.3"
                    ],
                    "none": null,
                    "load": [
                        0.5
                    ],
                    "empty": {
                    },
                    "deep": {
                        "n": 3
                    }
                }
            ]
        }
        "#);
        serde_json::from_str::<serde_json::Value>(&sample().to_json()).unwrap();
    }

    #[test]
    fn yaml_as_scripts_know_it() {
        insta::assert_snapshot!(sample().to_yaml(), @r#"
        errors:
          []
        foo:
          - state: Running
            ipv4:
              - 10.1.2.3
            none: ~
            load:
              - 0.50
            empty:
              {}
            deep:
              "n": 3
        "#);
    }

    #[test]
    fn text_that_yaml_would_misread_is_quoted() {
        for text in [
            "no", "Yes", "~", "", "a: b", "daily:13", "- x", "#c", "a\nb", "\x1b[m", "ü",
        ] {
            assert!(yaml_text(text).starts_with('"'), "{text}");
        }
        for text in ["Debian 13", "20260101", "10.0.0.1", "/home/u", "a-b"] {
            assert_eq!(yaml_text(text), text);
        }
    }
}
