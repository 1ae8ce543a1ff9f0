//! Documents that this project's programs write: the OpenAPI document, the command-line reference
//! and the manual pages. They are checked in, proved current, and the OpenAPI document is proved
//! valid by a validator that isn't ours.
//!
//! `generate` makes all of them in a folder below target/ that is laid out as the checkout is; what
//! to do with them is the caller's choice. A new document is a new line there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::steps::{on_ci, output, run};
use crate::{tests, tools};

const OPENAPI: &str = "api/openapi.json";
const CLI_REFERENCE: &str = "docs/cli.md";
/// A folder with nothing but generated files.
const MAN_PAGES: &str = "docs/man";

/// Writes the OpenAPI document anew and validates it.
pub fn openapi() -> Result<()> {
    tests::build_programs()?;
    let made = folder()?;
    generate_openapi(&made)?;
    take_over(&made, OPENAPI)?;
    validate()
}

/// Writes the command-line reference and the manual pages anew.
pub fn docs() -> Result<()> {
    tests::build_programs()?;
    let made = folder()?;
    generate_cli(&made)?;
    let fresh = files_below(&made, MAN_PAGES)?;
    for old in files_below(Path::new("."), MAN_PAGES)?.difference(&fresh) {
        fs::remove_file(old).with_context(|| format!("{} can't be removed", old.display()))?;
    }
    for page in &fresh {
        take_over(&made, &page.to_string_lossy())?;
    }
    take_over(&made, CLI_REFERENCE)
}

/// Fails if a document in the checkout is not what the programs write now.
pub fn check_current() -> Result<()> {
    tests::build_programs()?;
    let made = folder()?;
    generate_openapi(&made)?;
    generate_cli(&made)?;
    let mut stale = Vec::new();
    let mut all = files_below(&made, MAN_PAGES)?;
    all.extend(files_below(Path::new("."), MAN_PAGES)?);
    all.extend([OPENAPI, CLI_REFERENCE].map(PathBuf::from));
    for path in all {
        if fs::read(made.join(&path)).ok() != fs::read(&path).ok() {
            stale.push(path.display().to_string());
        }
    }
    if !stale.is_empty() {
        bail!(
            "not current: {}. Run `cargo xtask openapi` and `cargo xtask docs`, look at the \
             difference and commit it",
            stale.join(", ")
        );
    }
    Ok(())
}

/// Is the OpenAPI document in the checkout valid?
pub fn validate() -> Result<()> {
    if !Path::new(OPENAPI).exists() {
        bail!("there is no {OPENAPI}: write it with `cargo xtask openapi`");
    }
    match tools::openapi_validator()? {
        Some(validator) => run(Command::new(validator).arg(OPENAPI)),
        None if on_ci() => bail!("the OpenAPI validator could not be installed (see above)"),
        None => {
            eprintln!("SKIPPED: {OPENAPI} was NOT validated: the validator could not be installed");
            Ok(())
        }
    }
}

/// An empty folder for what is made.
fn folder() -> Result<PathBuf> {
    let folder = tools::target()?.join("documents");
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    for below in ["api", MAN_PAGES] {
        fs::create_dir_all(folder.join(below))?;
    }
    Ok(folder)
}

fn generate_openapi(into: &Path) -> Result<()> {
    let document = output(Command::new(program("pileusd")?).arg("openapi"))?;
    serde_json::from_str::<serde_json::Value>(&document)
        .context("`pileusd openapi` printed no JSON")?;
    fs::write(into.join(OPENAPI), format!("{}\n", document.trim_end()))?;
    Ok(())
}

/// The command-line documents come from the CLI's own library. Only an xtask that was built with
/// the feature `docs` links it, so that the other chores don't wait for it to compile.
fn generate_cli(into: &Path) -> Result<()> {
    run(Command::new(program("xtask")?)
        .arg("cli-documents")
        .arg(into))
}

/// A program as `tests::build_programs` made it.
fn program(name: &str) -> Result<PathBuf> {
    Ok(tools::target()?.join("debug").join(name))
}

#[cfg(not(feature = "docs"))]
pub fn write_cli_documents(_into: &Path) -> Result<()> {
    bail!("this xtask was built without the feature \"docs\": run `cargo xtask docs`")
}

#[cfg(feature = "docs")]
pub fn write_cli_documents(into: &Path) -> Result<()> {
    fs::write(into.join(CLI_REFERENCE), pileus::docs::markdown())?;
    for (name, page) in pileus::docs::man_pages() {
        fs::write(into.join(MAN_PAGES).join(name), page)?;
    }
    Ok(())
}

fn take_over(made: &Path, path: &str) -> Result<()> {
    if let Some(folder) = Path::new(path).parent() {
        fs::create_dir_all(folder)?;
    }
    fs::copy(made.join(path), path).with_context(|| format!("{path} can't be written"))?;
    eprintln!("    wrote {path}");
    Ok(())
}

/// The files of a flat folder, as paths from `root`.
fn files_below(root: &Path, folder: &str) -> Result<BTreeSet<PathBuf>> {
    let Ok(entries) = fs::read_dir(root.join(folder)) else {
        return Ok(BTreeSet::new());
    };
    entries
        .map(|entry| Ok(Path::new(folder).join(entry?.file_name())))
        .collect()
}
