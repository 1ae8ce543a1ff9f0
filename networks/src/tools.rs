//! Running the few programs that the network needs (dnsmasq, nft): found in the system's own folders
//! (an ordinary user's PATH often lacks sbin, and PATH is nothing to trust), bounded in time.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use pileus_base::{Code, Error, Result};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

const FOLDERS: [&str; 6] = [
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
    "/usr/local/sbin",
    "/usr/local/bin",
];

/// No set-up tool needs longer than this, even on a loaded machine.
const BOUND: Duration = Duration::from_secs(30);

/// Finds a program, or says which package brings it.
pub(crate) fn find(program: &str, package: &str) -> Result<PathBuf> {
    find_in(&FOLDERS, program, package)
}

fn find_in(folders: &[&str], program: &str, package: &str) -> Result<PathBuf> {
    folders
        .iter()
        .map(|folder| Path::new(folder).join(program))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Error::new(
                Code::ToolMissing,
                format!("The program {program} is not installed"),
            )
            .advise(format!("Install the package {package}."))
        })
}

/// Runs a program with `input` on its standard input and returns what it printed and how it ended.
pub(crate) async fn run(program: &Path, args: &[&str], input: &str) -> Result<Output> {
    let what = program.display();
    let failed = |err: std::io::Error| {
        Error::new(Code::ToolFailed, format!("{what} could not be run: {err}")).with_source(err)
    };
    let mut child = Command::new(program)
        .args(args)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)?;
    let stdin = child.stdin.take();
    let work = async {
        if let Some(mut stdin) = stdin {
            // A program that ends without reading says why on its standard error.
            let _ = stdin.write_all(input.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    match tokio::time::timeout(BOUND, work).await {
        Ok(output) => output.map_err(failed),
        Err(_) => Err(Error::new(
            Code::ToolFailed,
            format!("{what} did not end within {} seconds", BOUND.as_secs()),
        )),
    }
}

/// The error for a program that ended badly, told by what it wrote.
pub(crate) fn failure(what: &str, output: &Output) -> Error {
    let text = String::from_utf8_lossy(&output.stderr);
    let text = text.trim();
    let denied = [
        "Operation not permitted",
        "Permission denied",
        "must be root",
    ];
    let error = if denied.iter().any(|sign| text.contains(sign)) {
        permission(what)
    } else {
        Error::new(
            Code::NetworkFailed,
            format!("{what} failed ({})", output.status),
        )
    };
    text.lines().take(20).fold(error, Error::detail)
}

/// The error for a step that needs CAP_NET_ADMIN.
pub(crate) fn permission(what: &str) -> Error {
    Error::new(
        Code::PermissionDenied,
        format!("{what} was refused: this process may not change the network"),
    )
    .advise(
        "Run pileusd as root, or as an ordinary user so that it uses its own network namespace.",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_names_its_package() {
        let dir = tempfile::tempdir().unwrap();
        let err = find_in(&[dir.path().to_str().unwrap()], "dnsmasq", "dnsmasq-base").unwrap_err();
        assert_eq!(err.code, Code::ToolMissing);
        assert_eq!(err.advice.unwrap(), "Install the package dnsmasq-base.");
    }

    #[tokio::test]
    async fn a_refusal_is_told_apart_from_a_failure() {
        let sh = find("sh", "dash").unwrap();
        let script = "read line; echo \"$line\" >&2; exit 1";
        let code =
            async |input| failure("x", &run(&sh, &["-c", script], input).await.unwrap()).code;
        assert_eq!(
            code("Operation not permitted\n").await,
            Code::PermissionDenied
        );
        assert_eq!(code("syntax error\n").await, Code::NetworkFailed);
    }
}
