//! The client called by its other name, `multipass`, and what parsers of other projects make of its words.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use pileus_testkit::{Daemon, Need, Output, program};
use serde_json::Value;

/// What a test with it needs.
pub const NEEDS: [Need; 4] = [Need::Root, Need::Tun, Need::Guest, Need::Program("python3")];

/// The client under its other name.
pub struct Multipass<'a> {
    pub daemon: &'a Daemon,
    pub link: PathBuf,
    /// Where it is called.
    pub folder: PathBuf,
}

impl<'a> Multipass<'a> {
    pub fn new(daemon: &'a Daemon) -> Self {
        let folder = daemon.folder().join("work");
        fs::create_dir(&folder).unwrap();
        let link = daemon.folder().join("bin/multipass");
        fs::create_dir(link.parent().unwrap()).unwrap();
        symlink(program("pileus"), &link).unwrap();
        Self {
            daemon,
            link,
            folder,
        }
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.daemon.inside(&self.link);
        command
            .env("MULTIPASS_STORAGE", self.daemon.storage())
            .env("PATH", self.path())
            .current_dir(&self.folder)
            .args(args);
        command
    }

    /// With the link's folder first, as in an installation.
    fn path(&self) -> String {
        format!("{}/bin:/usr/bin:/bin", self.daemon.folder().display())
    }

    pub fn input(&self, args: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(args);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let output = std::thread::scope(|scope| {
            scope.spawn(move || {
                let _ = stdin.write_all(input);
            });
            child.wait_with_output().unwrap()
        });
        Output {
            what: format!("multipass {}", args.join(" ")),
            status: output.status,
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// The words of a line.
    pub fn run(&self, line: &str) -> Output {
        self.input(&line.split_whitespace().collect::<Vec<_>>(), b"")
    }

    /// Works, says nothing on stderr and nothing to a terminal.
    #[track_caller]
    pub fn ok(&self, line: &str) -> String {
        let text = self.run(line).ok();
        assert!(!text.contains('\x1b'), "{line}: {text:?}");
        text
    }

    #[track_caller]
    pub fn fails(&self, code: i32, line: &str, words: &str) {
        let out = self.run(line);
        let said = out.fails_with(code);
        assert!(said.contains(words), "{line}: {said:?} has no {words:?}");
        assert!(!said.contains("error code"), "{line}: {said}");
    }

    #[track_caller]
    pub fn json(&self, line: &str) -> Value {
        let text = self.ok(line);
        serde_json::from_str(&text).unwrap_or_else(|err| panic!("{line}: {err}: {text}"))
    }

    pub fn state(&self, name: &str) -> String {
        let list = self.json("list --format json");
        let all = list["list"].as_array().unwrap();
        let found = all.iter().find(|one| one["name"] == name);
        found.map_or("none".into(), |one| {
            one["state"].as_str().unwrap().to_owned()
        })
    }

    pub fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, bytes).unwrap();
        path
    }
}

/// What a parser of another project makes of it, on the host or (YAML) in the guest.
#[track_caller]
fn parsed(mut python: Command, script: &str, text: &str) -> Value {
    let mut child = python
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    serde_json::from_slice(&output.stdout).unwrap_or_else(|err| panic!("{err}: {text}"))
}

#[track_caller]
pub fn csv(text: &str) -> Value {
    let script = "import csv, json, sys; json.dump(list(csv.DictReader(sys.stdin, strict=True)), sys.stdout)";
    parsed(Command::new("python3"), script, text)
}

#[track_caller]
pub fn yaml(multipass: &Multipass, text: &str) -> Value {
    let script =
        "import yaml, json, sys; json.dump(yaml.safe_load(sys.stdin), sys.stdout, default=str)";
    parsed(
        multipass.command(&["exec", "vm", "--", "python3"]),
        script,
        text,
    )
}

pub fn keys(value: &Value) -> BTreeSet<&str> {
    value
        .as_object()
        .into_iter()
        .flatten()
        .map(|(key, _)| key.as_str())
        .collect()
}
