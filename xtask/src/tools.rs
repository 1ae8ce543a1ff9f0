//! Programs that the checks use and that no distribution packages: installed once, at pinned
//! versions, below target/tools. Built without optimisation: they run for a second.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::steps::{cargo, run};

const DENY: Tool = Tool {
    name: "cargo-deny",
    version: "0.20.2",
};
const MACHETE: Tool = Tool {
    name: "cargo-machete",
    version: "0.9.2",
};
const FUZZ: Tool = Tool {
    name: "cargo-fuzz",
    version: "0.13.2",
};
const OPENAPI_VALIDATOR: &str = "openapi-spec-validator==0.9.0";

struct Tool {
    name: &'static str,
    version: &'static str,
}

pub fn deny() -> Result<Command> {
    Ok(Command::new(DENY.path()?))
}

pub fn machete() -> Result<Command> {
    Ok(Command::new(MACHETE.path()?))
}

pub fn fuzz() -> Result<Command> {
    let mut command = Command::new(FUZZ.path()?);
    // libFuzzer's flags are for nightly compilers; the stable one takes them when told so.
    command.arg("fuzz").env("RUSTC_BOOTSTRAP", "1");
    Ok(command)
}

impl Tool {
    /// The program, built on first use. Its folder carries the version, so that a new pin is
    /// installed and an old one is left for older checkouts.
    fn path(&self) -> Result<PathBuf> {
        let root = tools()?.join(format!("{}-{}", self.name, self.version));
        let program = root.join("bin").join(self.name);
        if !program.exists() {
            eprintln!(
                "    installing {} {} into {}",
                self.name,
                self.version,
                root.display()
            );
            let build = tools()?.join("build");
            run(cargo()
                .args(["install", "--quiet", "--locked", "--debug", "--root"])
                .arg(&root)
                .arg("--target-dir")
                .arg(build)
                .arg(format!("{}@{}", self.name, self.version))
                .env("CARGO_PROFILE_DEV_DEBUG", "false"))?;
        }
        Ok(program)
    }
}

/// The OpenAPI validator, in a Python environment of its own. `None` when it can't be had.
pub fn openapi_validator() -> Result<Option<PathBuf>> {
    let venv = tools()?.join("openapi");
    let program = venv.join("bin/openapi-spec-validator");
    if !program.exists() {
        eprintln!("    installing {OPENAPI_VALIDATOR} into {}", venv.display());
        let made = run(Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&venv))
        .and_then(|()| {
            run(Command::new(venv.join("bin/pip")).args([
                "install",
                "--quiet",
                "--no-input",
                OPENAPI_VALIDATOR,
            ]))
        });
        if let Err(error) = made {
            eprintln!("    {error:#}");
            return Ok(None);
        }
    }
    Ok(Some(program))
}

/// Where tools are kept: a folder of cargo's target directory, wherever that is.
fn tools() -> Result<PathBuf> {
    Ok(target()?.join("tools"))
}

/// cargo's target directory. This program lies in it, as `target/debug/xtask`.
pub fn target() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    match program.parent().and_then(Path::parent) {
        Some(target) => Ok(target.to_path_buf()),
        None => bail!("{} lies in no target directory", program.display()),
    }
}
