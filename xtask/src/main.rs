//! `cargo xtask`: the one entry for developers and CI. Each chore is a module; `steps.rs` runs
//! programs and keeps the times. It must stay small: it is built before every chore.
//!
//! Next step: `ci.rs` puts the chores in order, `rules/` holds what the tree promises.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

mod ci;
mod documents;
mod fuzz;
mod rules;
mod steps;
mod tests;
mod tools;

const USAGE: &str = "\
Usage: cargo xtask CHORE

  check             formatting, the tree's own rules, clippy, unused and forbidden dependencies
  check --fast      the same without what has to compile or download
  test [FILTER...]  all tests (arguments go to the test runner)
  test --quick      without the whole-system tests on real guests
  ci                check, then test, in the order that fails fastest
  openapi           write api/openapi.json anew, and validate it
  docs              write docs/cli.md and docs/man/ anew
  documents --check are the generated documents current?
  fuzz SECONDS      every fuzz target for so long
  bench [ARGS...]   the benchmarks, on release builds
";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    std::env::set_current_dir(root()?).context("the project's folder can't be entered")?;
    match arguments.as_slice() {
        ["check"] => ci::check(ci::Depth::Full),
        ["check", "--fast"] => ci::check(ci::Depth::Fast),
        ["ci"] => ci::ci(),
        ["test", "--quick", filters @ ..] => tests::run_tests(tests::Scope::Quick, filters),
        ["test", filters @ ..] => tests::run_tests(tests::Scope::All, filters),
        ["openapi"] => documents::openapi(),
        ["docs"] => documents::docs(),
        ["documents", "--check"] => documents::check_current(),
        // For documents.rs itself.
        ["cli-documents", into] => documents::write_cli_documents(Path::new(into)),
        ["fuzz", seconds] => fuzz::run_all(seconds.parse().context("SECONDS is a whole number")?),
        ["bench", rest @ ..] => tests::bench(rest),
        [] | ["help" | "--help" | "-h"] => {
            print!("{USAGE}");
            Ok(())
        }
        other => bail!("there is no chore {:?}\n\n{USAGE}", other.join(" ")),
    }
}

/// The checkout that this program was built from.
fn root() -> Result<PathBuf> {
    let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    Ok(here
        .parent()
        .context("xtask lies in no project")?
        .to_path_buf())
}
