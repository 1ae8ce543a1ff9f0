//! Reads this machine's own package sources, to build from the mirror that it already uses. Both
//! forms of files are understood (deb822 `.sources`, one-line `.list`); nothing is changed.

use std::path::Path;

use pileus_base::files;

/// One place and suite that binary packages come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    pub uri: String,
    pub suite: String,
    pub components: Vec<String>,
}

/// The mirrors of a Debian machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mirror {
    pub archive: String,
    /// The archive of security updates, if it is a place of its own.
    pub security: Option<String>,
}

/// Where Debian's packages come from on this machine; `None` if it isn't a Debian, or if nothing
/// usable is configured. `etc` is the folder `/etc`.
pub fn mirror(etc: &Path) -> Option<Mirror> {
    let release =
        read(&etc.join("os-release")).or_else(|| read(&etc.join("../usr/lib/os-release")))?;
    let value = |name: &str| {
        release
            .lines()
            .filter_map(|line| line.split_once('='))
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.trim_matches(['"', '\'']).to_owned())
    };
    if value("ID")? != "debian" {
        return None;
    }
    choose(&sources(etc), &value("VERSION_CODENAME")?)
}

fn choose(sources: &[Source], codename: &str) -> Option<Mirror> {
    let security_suite = format!("{codename}-security");
    let of = |suite: &str| {
        sources
            .iter()
            .find(|source| source.suite == suite && source.components.iter().any(|c| c == "main"))
            .map(|source| source.uri.clone())
    };
    Some(Mirror {
        archive: of(codename).or_else(|| of("stable"))?,
        security: of(&security_suite).or_else(|| of("stable-security")),
    })
}

/// All enabled sources of binary packages over http or https.
pub fn sources(etc: &Path) -> Vec<Source> {
    let apt = etc.join("apt");
    let mut files = vec![apt.join("sources.list")];
    if let Ok(entries) = std::fs::read_dir(apt.join("sources.list.d")) {
        let mut more: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
        more.sort();
        files.extend(more);
    }
    let mut all = Vec::new();
    for file in files {
        let Some(text) = read(&file) else { continue };
        match file.extension().and_then(|ext| ext.to_str()) {
            Some("sources") => all.extend(parse_deb822(&text)),
            Some("list") => all.extend(parse_lines(&text)),
            _ => {}
        }
    }
    all
}

fn read(path: &Path) -> Option<String> {
    String::from_utf8(files::read_bounded(path, 1 << 20).ok()?).ok()
}

/// A URI that can stand in a `deb` line that we write.
fn is_usable(uri: &str) -> bool {
    (uri.starts_with("http://") || uri.starts_with("https://"))
        && uri
            .bytes()
            .all(|b| b.is_ascii_graphic() && b != b'[' && b != b']')
}

fn cross(uris: &[&str], suites: &[&str], components: &[&str]) -> Vec<Source> {
    let mut all = Vec::new();
    for uri in uris.iter().filter(|uri| is_usable(uri)) {
        for suite in suites {
            all.push(Source {
                uri: (*uri).to_owned(),
                suite: (*suite).to_owned(),
                components: components.iter().map(|c| (*c).to_owned()).collect(),
            });
        }
    }
    all
}

fn parse_deb822(text: &str) -> Vec<Source> {
    let mut all = Vec::new();
    let mut stanza: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            all.extend(of_stanza(&std::mem::take(&mut stanza)));
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = stanza.last_mut() {
                value.push(' ');
                value.push_str(line.trim());
            }
        } else if let Some((key, value)) = line.split_once(':') {
            stanza.push((key.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    all
}

fn of_stanza(stanza: &[(String, String)]) -> Vec<Source> {
    let words = |name: &str| -> Vec<&str> {
        stanza
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.split_whitespace().collect())
            .unwrap_or_default()
    };
    let off = words("enabled").first().is_some_and(|word| {
        matches!(
            word.to_ascii_lowercase().as_str(),
            "no" | "false" | "0" | "off"
        )
    });
    if off || !words("types").contains(&"deb") {
        return Vec::new();
    }
    cross(&words("uris"), &words("suites"), &words("components"))
}

fn parse_lines(text: &str) -> Vec<Source> {
    text.lines().flat_map(parse_line).collect()
}

fn parse_line(line: &str) -> Vec<Source> {
    let line = line.split('#').next().unwrap_or_default().trim();
    let Some(rest) = line
        .strip_prefix("deb")
        .filter(|rest| rest.starts_with([' ', '\t', '[']))
    else {
        return Vec::new();
    };
    let mut rest = rest.trim_start();
    if let Some(options) = rest.strip_prefix('[') {
        let Some((_, after)) = options.split_once(']') else {
            return Vec::new();
        };
        rest = after;
    }
    let words: Vec<&str> = rest.split_whitespace().collect();
    match words.as_slice() {
        [uri, suite, components @ ..] => cross(&[uri], &[suite], components),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEB822: &str = "\
# comment
Types: deb deb-src
# another/20250520T000000Z
URIs: http://mirror.invalid/debian
Suites: bookworm
  bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/x.gpg

Types: deb
URIs: http://mirror.invalid/sec
Suites: bookworm-security
Components: main

Types: deb
Enabled: no
URIs: http://off.invalid/debian
Suites: bookworm
Components: main

types: deb-src
URIs: http://src.invalid/debian
Suites: bookworm
Components: main
";

    const LINES: &str = "\
# deb http://commented.invalid/debian bookworm main
deb-src http://src.invalid/debian bookworm main
deb cdrom:[Debian]/ bookworm main
deb [arch=amd64 signed-by=/x.gpg] https://mirror.invalid/debian bookworm main # why
deb\thttp://mirror.invalid/sec bookworm-security main contrib
deb http://short.invalid
";

    #[test]
    fn both_forms_give_the_mirror() {
        let mirror = choose(&parse_deb822(DEB822), "bookworm").unwrap();
        assert_eq!(mirror.archive, "http://mirror.invalid/debian");
        assert_eq!(
            mirror.security.as_deref(),
            Some("http://mirror.invalid/sec")
        );
        let lines = parse_lines(LINES);
        assert_eq!(lines.len(), 2, "{lines:?}");
        let mirror = choose(&lines, "bookworm").unwrap();
        assert_eq!(mirror.archive, "https://mirror.invalid/debian");
        assert_eq!(
            mirror.security.as_deref(),
            Some("http://mirror.invalid/sec")
        );
    }

    #[test]
    fn other_machines_and_suites_give_none() {
        assert_eq!(choose(&parse_deb822(DEB822), "forky"), None);
        let dir = tempfile::tempdir().unwrap();
        let etc = dir.path().join("etc");
        std::fs::create_dir_all(etc.join("apt/sources.list.d")).unwrap();
        std::fs::write(etc.join("apt/sources.list.d/debian.sources"), DEB822).unwrap();
        let release = |id: &str| {
            std::fs::write(
                etc.join("os-release"),
                format!("NAME=x\nID={id}\nVERSION_CODENAME=\"bookworm\"\n"),
            )
            .unwrap();
        };
        release("ubuntu");
        assert_eq!(mirror(&etc), None);
        release("debian");
        assert!(mirror(&etc).is_some());
        std::fs::rename(
            etc.join("apt/sources.list.d/debian.sources"),
            etc.join("apt/sources.list.d/debian.sources.disabled"),
        )
        .unwrap();
        assert_eq!(mirror(&etc), None);
    }
}
