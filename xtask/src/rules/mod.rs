//! What the tree promises and a program can check without compiling it. Each rule returns the
//! sentences that a person should read; none means that it holds.
//!
//! `direction.rs`: who may depend on whom. `sources.rs`: size and opening of source files.
//! `hosts.rs`: no name of this machine's package servers in the tree.

use anyhow::{Result, bail};

use crate::steps::output;

mod direction;
mod hosts;
mod sources;

pub fn check() -> Result<()> {
    let files = tracked_files()?;
    let broken = [
        direction::check()?,
        sources::check(&files)?,
        hosts::check()?,
    ]
    .concat();
    for sentence in &broken {
        eprintln!("    {sentence}");
    }
    if !broken.is_empty() {
        bail!("{} broken (CONTRIBUTING.md has the rules)", broken.len());
    }
    Ok(())
}

/// What git tracks, and what it would track if it were added: paths from the project's folder.
fn tracked_files() -> Result<Vec<String>> {
    let list = output(std::process::Command::new("git").args([
        "ls-files",
        "-z",
        "--cached",
        "--others",
        "--exclude-standard",
    ]))?;
    Ok(list
        .split('\0')
        .filter(|path| !path.is_empty() && std::path::Path::new(path).is_file())
        .map(str::to_string)
        .collect())
}
