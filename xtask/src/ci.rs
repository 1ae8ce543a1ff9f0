//! What is checked, in which order: the cheapest first, so that a mistake shows soon.
//!
//! Next step: `tests.rs`.

use std::process::Command;

use anyhow::Result;

use crate::steps::{Steps, cargo, run};
use crate::{documents, rules, tests, tools};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Seconds: nothing is compiled or downloaded.
    Fast,
    Full,
}

pub fn check(depth: Depth) -> Result<()> {
    let mut steps = Steps::default();
    let result = checks(&mut steps, depth);
    steps.print_times();
    result
}

/// Everything. The test runner comes last and nothing is printed after it: its closing lines say
/// what was tested.
pub fn ci() -> Result<()> {
    let mut steps = Steps::default();
    let mut result = checks(&mut steps, Depth::Full);
    if result.is_ok() {
        result = steps.step("build", tests::build);
    }
    if result.is_ok() {
        result = steps.step("generated documents are current", documents::check_current);
    }
    steps.print_times();
    result?;
    eprintln!("==> tests");
    tests::run_tests(tests::Scope::All, &[])
}

fn checks(steps: &mut Steps, depth: Depth) -> Result<()> {
    steps.step("formatting", || {
        run(cargo().args(["fmt", "--all", "--check"]))
    })?;
    steps.step("rules of the tree", rules::check)?;
    steps.step("scripts", scripts)?;
    if depth == Depth::Fast {
        return Ok(());
    }
    steps.step("clippy", || {
        run(cargo()
            .args(["clippy", "--all-targets"])
            .args(tests::EVERYTHING)
            .args(["--", "-D", "warnings"]))
    })?;
    steps.step("unused dependencies", || run(&mut tools::machete()?))?;
    steps.step("licences, sources, bans", || {
        run(tools::deny()?.args(["check", "bans", "licenses", "sources"]))
    })?;
    steps.step("OpenAPI document is valid", documents::validate)
}

/// The shell scripts' own tests.
fn scripts() -> Result<()> {
    for test in ["backports", "scripts", "quickstart"] {
        run(&mut Command::new(format!("packaging/tests/{test}")))?;
    }
    Ok(())
}
