//! No file names a server that packages come from: which mirror or registry a machine uses is its
//! owner's choice. The names to look for can't stand here either, so they are read from this
//! machine's own configuration of apt, cargo, pip and npm.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

pub fn check() -> Result<Vec<String>> {
    let names = names(&configuration());
    if names.is_empty() {
        return Ok(Vec::new());
    }
    let mut grep = Command::new("git");
    grep.args(["grep", "--untracked", "-I", "-n", "-i", "-F"]);
    for name in &names {
        grep.args(["-e", name]);
    }
    // Lock files are the package managers' own.
    grep.args(["--", ".", ":!*Cargo.lock", ":!*package-lock.json"]);
    let output = grep.output()?;
    match output.status.code() {
        Some(0) => Ok(String::from_utf8_lossy(&output.stdout)
            .lines()
            .map(|line| {
                // Only the place: the name itself stays out of logs too.
                let place: Vec<&str> = line.splitn(3, ':').take(2).collect();
                format!("{} names a package server of this machine", place.join(":"))
            })
            .collect()),
        Some(1) => Ok(Vec::new()),
        _ => bail!(
            "git grep failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        ),
    }
}

/// The texts that may name servers. What can't be read names none.
fn configuration() -> Vec<String> {
    let mut texts = Vec::new();
    let mut files: Vec<PathBuf> = ["/etc/apt/sources.list", "/etc/pip.conf", "/etc/npmrc"]
        .map(PathBuf::from)
        .to_vec();
    for folder in [
        "/etc/apt/sources.list.d",
        "/etc/apt/apt.conf.d",
        "/etc/apt/mirrors",
    ] {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        files.extend(entries.map(|entry| entry.path()));
    }
    if let Some(home) = std::env::var_os("HOME").map(PathBuf::from) {
        let below = [
            ".cargo/config.toml",
            ".cargo/config",
            ".config/pip/pip.conf",
            ".pip/pip.conf",
            ".npmrc",
        ];
        files.extend(below.map(|path| home.join(path)));
    }
    if let Some(home) = std::env::var_os("CARGO_HOME").map(PathBuf::from) {
        files.push(home.join("config.toml"));
    }
    texts.extend(files.iter().filter_map(|path: &PathBuf| read(path)));
    texts.extend(std::env::vars().filter_map(|(name, value)| {
        let name = name.to_ascii_uppercase();
        ["PIP_", "CARGO_", "NPM_CONFIG_", "RUSTUP_"]
            .iter()
            .any(|prefix| name.starts_with(prefix))
            .then_some(value)
    }));
    texts
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// The host names of all addresses in the texts.
fn names(texts: &[String]) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for text in texts {
        for address in text.split("://").skip(1) {
            let authority = address
                .split(['/', ' ', '"', '\'', '\n', '\t', ']', '?', ';'])
                .next();
            let host = authority
                .unwrap_or_default()
                .rsplit('@')
                .next()
                .unwrap_or_default();
            let host = host
                .split(':')
                .next()
                .unwrap_or_default()
                .to_ascii_lowercase();
            // What is no package server, or names one for every project alike.
            let own = host == "localhost" || host.starts_with("127.") || host == "github.com";
            if host.contains('.') && host.len() > 3 && !own {
                names.insert(host);
            }
        }
    }
    names
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn hosts_are_found_in_every_kind_of_configuration() {
        let texts = [
            "URIs: http://one.example/debian\n# was: https://two.example\n",
            "deb [arch=amd64] mirror+https://user:secret@three.example:8080/debian stable main",
            "index = \"sparse+https://four.example/index/\"\nproxy = \"http://127.0.0.1:3128\"",
            "file:///etc/apt/mirrors/debian.list http://localhost/ https://github.com/x",
        ]
        .map(str::to_string);
        let expected = [
            "four.example",
            "one.example",
            "three.example",
            "two.example",
        ];
        assert_eq!(names(&texts).into_iter().collect::<Vec<_>>(), expected);
    }
}
