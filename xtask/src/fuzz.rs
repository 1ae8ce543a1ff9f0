//! Runs each fuzz target of `fuzz/` for a bounded time, one after the other.

use std::path::Path;

use anyhow::{Result, bail};

use crate::steps::{output, run};
use crate::tools;

/// `seconds` is the time for each target.
pub fn run_all(seconds: u32) -> Result<()> {
    if !Path::new("fuzz/Cargo.toml").exists() {
        bail!("there is no fuzz/Cargo.toml: this checkout has no fuzz targets");
    }
    let targets = output(tools::fuzz()?.arg("list"))?;
    for target in targets.split_whitespace() {
        eprintln!("==> fuzz target {target}, {seconds} s");
        run(tools::fuzz()?
            .args(["run", target, "--"])
            .arg(format!("-max_total_time={seconds}"))
            // A parser of hostile input gets by with little memory and answers at once.
            .args(["-rss_limit_mb=1024", "-timeout=10"]))?;
    }
    Ok(())
}
