//! Runs the tests and the benchmarks. One build for all of it: the same packages, features and
//! profile each time, so that no second copy of the dependencies is compiled.

use std::fs;
use std::io::{BufRead, BufReader, IsTerminal};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::steps::{cargo, run};
use crate::tools;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Unit tests and the crates' own tests: no real guests.
    Quick,
    All,
}

/// The package whose tests boot real guests.
const SYSTEM_TESTS: &str = "pileus-tests";
/// The package that measures, and its program.
const BENCHES: &str = "pileus-benches";

/// What every build names, so that all share one set of compiled dependencies: cargo compiles a
/// dependency again when the packages or features asked for change what it needs.
pub const EVERYTHING: [&str; 4] = ["--locked", "--workspace", "--features", "xtask/docs"];

/// Builds the programs and the tests.
pub fn build() -> Result<()> {
    build_programs()?;
    run(cargo()
        .args(["test", "--no-run", "--lib", "--bins", "--tests"])
        .args(EVERYTHING))
}

/// The whole-system tests and the documents come from the programs in the target directory.
pub fn build_programs() -> Result<()> {
    run(cargo().args(["build", "--bins"]).args(EVERYTHING))
}

pub fn run_tests(scope: Scope, filters: &[&str]) -> Result<()> {
    if scope == Scope::All {
        build_programs()?;
    }
    let mut command = cargo();
    if has_nextest() {
        command
            .args(["nextest", "run", "--profile", "ci"])
            .args(EVERYTHING);
        if scope == Scope::Quick {
            command.args(["-E", &format!("not package({SYSTEM_TESTS})")]);
        }
        return run_nextest(command.args(filters));
    }
    eprintln!("cargo-nextest is not installed: `cargo test` runs the tests, without time limits.");
    command
        .args(["test", "--no-fail-fast", "--lib", "--bins", "--tests"])
        .args(EVERYTHING);
    if scope == Scope::Quick {
        command.args(["--exclude", SYSTEM_TESTS]);
    }
    // Its own filters take one text, behind the dashes any number.
    run(command.arg("--").args(filters))
}

fn has_nextest() -> bool {
    cargo()
        .args(["nextest", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Runs nextest and tells which tests found that they can't run here (they pass, and print
/// "SKIPPED: reason"; nextest hides what passing tests print). Where nobody watches, nextest's
/// summary is held back until that is told, so that it ends the output.
fn run_nextest(command: &mut Command) -> Result<()> {
    let report = tools::target()?.join("nextest/ci/junit.xml");
    match fs::remove_file(&report) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).context("the last test report can't be removed");
        }
        _ => {}
    }
    let watched = std::io::stderr().is_terminal();
    let mut held = Vec::new();
    if !watched {
        command.stderr(Stdio::piped());
    }
    let mut child = command.spawn().context("cargo nextest can't be started")?;
    if let Some(stderr) = child.stderr.take() {
        for line in BufReader::new(stderr).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            if !held.is_empty() || line.trim_start().starts_with("Summary [") {
                held.push(line);
            } else {
                eprintln!("{line}");
            }
        }
    }
    let status = child.wait()?;
    let skipped = fs::read_to_string(&report).map_or_else(|_| Vec::new(), |xml| skips(&xml));
    for (test, reason) in &skipped {
        eprintln!("   NOT RUN {test}: {reason}");
    }
    for line in held {
        eprintln!("{line}");
    }
    if !status.success() {
        bail!("the tests failed ({status})");
    }
    Ok(())
}

/// Test names and reasons of the lines "SKIPPED: reason" in a JUnit report.
fn skips(xml: &str) -> Vec<(String, String)> {
    let mut test = String::new();
    let mut found = Vec::new();
    for line in xml.lines() {
        if let Some((_, rest)) = line.split_once("<testcase name=\"") {
            test = unescape(rest.split('"').next().unwrap_or_default());
        }
        if let Some((_, reason)) = line.split_once("SKIPPED: ") {
            let reason = reason.split('<').next().unwrap_or_default().trim_end();
            found.push((test.clone(), unescape(reason)));
        }
    }
    found
}

fn unescape(text: &str) -> String {
    text.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&quot;", "\"")
        .replace("&apos;", "'")
        .replace("&amp;", "&")
}

/// The benchmarks compare what users get, so everything is built in release mode.
pub fn bench(arguments: &[&str]) -> Result<()> {
    run(cargo()
        .args(["build", "--release", "--locked"])
        .args(["-p", "pileus", "-p", "pileusd", "-p", "pileus-testkit"])
        .args(["-p", BENCHES]))?;
    run(Command::new(tools::target()?.join("release").join(BENCHES)).args(arguments))
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn skipped_tests_are_found_with_their_reasons() {
        let xml = r#"
<testsuite name="pileus-networks">
  <testcase name="bridge::up" classname="pileus-networks">
    <system-err>SKIPPED: not root, &lt;ip netns&gt; can&apos;t work</system-err>
  </testcase>
  <testcase name="bridge::names" classname="pileus-networks">
    <system-err></system-err>
  </testcase>
  <testcase name="nat" classname="pileus-networks">
    <system-err>first line
SKIPPED: no nft here
last line</system-err>
  </testcase>
</testsuite>"#;
        let expected = [
            ("bridge::up", "not root, <ip netns> can't work"),
            ("nat", "no nft here"),
        ];
        let found = skips(xml);
        let found: Vec<_> = found
            .iter()
            .map(|(t, r)| (t.as_str(), r.as_str()))
            .collect();
        assert_eq!(found, expected);
    }
}
