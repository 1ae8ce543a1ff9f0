//! Commands in the guest of a throw-away machine, as root: a recipe's steps, and the clean-up. What they say are
//! log lines of the operation.

use std::time::Duration;

use bytes::Bytes;
use pileus_base::{Code, Error, Phase, Reporter, Result};
use pileus_instances::guest::CLEAN_UP;
use pileus_instances::guest::exec::{Control, ExecSession, ExecSpec, Output};
use pileus_instances::guest::wire::clean;
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::mpsc;

use super::recipe::{What, Work};
use super::throwaway::Throwaway;
use super::upload::Copies;

/// Stopping services and trimming a large disk may take a while in an emulated machine.
const CLEAN_BOUND: Duration = Duration::from_secs(900);
const OFF_BOUND: Duration = Duration::from_secs(120);
/// Lines that an error shows.
const TAIL: usize = 40;
/// Bytes of a line, and of a piece of a file.
const LINE: usize = 2048;
const PIECE: usize = 128 << 10;

/// Reads a script from its input into a file that only root may read, and becomes what runs it.
const RUN: &str = "umask 077; mkdir -p /run/pileus && cat >/run/pileus/step && exec \"$@\" /run/pileus/step </dev/null";
/// A tar's one member, which is called `it`, becomes the path $1, or gets into the folder under its own name.
const COPY: &str = "set -eu; umask 022; to=$1; name=$2; case $to in */) to=$to$name;; esac; \
    mkdir -p \"$(dirname \"$to\")\"; place=$(mktemp -d \"$(dirname \"$to\")/.pileus-copy-XXXXXX\"); \
    trap 'rm -rf \"$place\"' EXIT; tar -x -p --no-same-owner -f - -C \"$place\"; \
    if [ -d \"$place/it\" ] && [ -d \"$to\" ]; then cp -a \"$place/it/.\" \"$to/\"; \
    else rm -rf \"$to\"; mv \"$place/it\" \"$to\"; fi";

impl Throwaway {
    /// Carries one step out.
    pub(super) async fn carry_out(
        &self,
        work: &Work,
        copies: &mut Copies,
        report: &Reporter,
    ) -> Result<()> {
        report.log(format!("{}:", work.name));
        let (command, input): (Vec<String>, Box<dyn AsyncRead + Send + Unpin>) = match &work.what {
            What::Run { shell, env, script } => {
                let mut words = root(RUN);
                words.push("env".to_owned());
                words.extend(env.iter().map(|(key, value)| format!("{key}={value}")));
                words.extend(shell.iter().cloned());
                (words, Box::new(std::io::Cursor::new(script.clone())))
            }
            What::Copy { bytes, name, to } => {
                let mut words = root(COPY);
                words.extend([to.clone(), name.clone()]);
                (words, Box::new(copies.next(*bytes)?))
            }
        };
        let ended = self.run(command, input, work.timeout, report).await;
        let ended = ended.map_err(|err| match err.code {
            Code::TimedOut => {
                let what = format!(
                    "{} did not end within {} s",
                    work.name,
                    work.timeout.as_secs()
                );
                let mut slow = Error::new(Code::StepFailed, what);
                slow.details = err.details;
                slow.advise("Give it a larger `timeout`.")
            }
            _ => err,
        })?;
        match ended.code {
            Some(0) => Ok(()),
            _ => {
                let how = ended.how();
                let mut err = Error::new(Code::StepFailed, format!("{} failed: {how}", work.name));
                err.details = ended.tail;
                Err(err)
            }
        }
    }

    /// Makes the guest forget who it is, and waits until it is off.
    pub(super) async fn clean_up(&self, report: &Reporter) -> Result<()> {
        report.phase(Phase::Cleaning);
        let script = Box::new(std::io::Cursor::new(CLEAN_UP));
        let command = ["sudo", "-n", "sh", "-s"].map(str::to_owned).into();
        let ended = self.run(command, script, CLEAN_BOUND, report).await?;
        if ended.code != Some(0) {
            let how = ended.how();
            let what = format!("The guest could not be made to forget who it is: {how}");
            let mut err = Error::new(Code::CleanUpFailed, what).advise(
                "--keep-identity packs an instance as it is; a recipe with `clean: false` leaves its result so.",
            );
            err.details = ended.tail;
            return Err(err);
        }
        self.is_off(OFF_BOUND, report).await
    }

    /// Gives back what the guest doesn't use; one that can't is left alone.
    pub(super) async fn trim(&self, report: &Reporter) -> Result<()> {
        let words = ["sudo", "-n", "sh", "-c", "sync; fstrim -av; sync"];
        let command = words.map(str::to_owned).into();
        let input = Box::new(tokio::io::empty());
        self.run(command, input, CLEAN_BOUND, report)
            .await
            .map(drop)
    }

    /// Runs a command; each line that it says is logged.
    async fn run(
        &self,
        command: Vec<String>,
        input: Box<dyn AsyncRead + Send + Unpin>,
        bound: Duration,
        report: &Reporter,
    ) -> Result<Ended> {
        let guest = self.instance()?.machine()?.guest()?;
        let spec = ExecSpec {
            command,
            ..ExecSpec::default()
        };
        let session = report.or_cancelled(guest.exec(&spec)).await?;
        let mut lines = Lines::new(report);
        let followed = follow(session, input, &mut lines);
        match tokio::time::timeout(bound, report.or_cancelled(followed)).await {
            Ok(ended) => {
                let (code, signal) = ended?;
                lines.end();
                Ok(Ended {
                    code,
                    signal,
                    tail: lines.tail.into(),
                })
            }
            Err(_) => {
                lines.end();
                let mut err = Error::new(Code::TimedOut, "The command did not end in time");
                err.details = lines.tail.into();
                Err(err)
            }
        }
    }
}

/// A script with arguments, as root.
fn root(script: &str) -> Vec<String> {
    ["sudo", "-n", "sh", "-c", script, "pileus"]
        .map(str::to_owned)
        .into()
}

struct Ended {
    code: Option<u32>,
    signal: Option<String>,
    tail: Vec<String>,
}

impl Ended {
    fn how(&self) -> String {
        match (self.code, &self.signal) {
            (Some(code), _) => format!("it ended with exit code {code}"),
            (None, Some(signal)) => format!("it was ended by the signal {signal}"),
            (None, None) => "it ended".to_owned(),
        }
    }
}

/// Feeds a session and takes what it says until it ends.
async fn follow(
    session: ExecSession,
    input: Box<dyn AsyncRead + Send + Unpin>,
    lines: &mut Lines<'_>,
) -> Result<(Option<u32>, Option<String>)> {
    let ExecSession {
        stdin,
        mut output,
        control,
    } = session;
    let feeding = Aborted(tokio::spawn(feed(input, stdin, control)));
    let ended = loop {
        match output.recv().await {
            Some(Output::Stdout(bytes) | Output::Stderr(bytes)) => lines.add(&bytes),
            Some(Output::Exit(code)) => break Ok((Some(code), None)),
            Some(Output::Signal(signal)) => break Ok((None, Some(signal))),
            Some(Output::Failed(err)) => break Err(err),
            None => break Err(Error::internal("A command in the guest has no end")),
        }
    };
    drop(feeding);
    ended
}

/// Its control channel is held until then: its end would say nothing more than the input's.
async fn feed(
    mut input: Box<dyn AsyncRead + Send + Unpin>,
    stdin: mpsc::Sender<Bytes>,
    control: mpsc::Sender<Control>,
) {
    let mut buffer = vec![0; PIECE];
    loop {
        match input.read(&mut buffer).await {
            Ok(0) => break,
            Ok(n) => {
                if stdin
                    .send(Bytes::copy_from_slice(&buffer[..n]))
                    .await
                    .is_err()
                {
                    return;
                }
            }
            Err(err) => {
                // The tar is cut, which the guest sees.
                tracing::warn!(%err, "what is sent to a guest can't be read");
                break;
            }
        }
    }
    drop(stdin);
    let _ = control.send(Control::Eof).await;
    std::future::pending::<()>().await;
}

/// A task that ends with this value.
struct Aborted(tokio::task::JoinHandle<()>);

impl Drop for Aborted {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Lines out of pieces of text, bounded and harmless for a terminal.
struct Lines<'a> {
    report: &'a Reporter,
    open: Vec<u8>,
    tail: std::collections::VecDeque<String>,
}

impl<'a> Lines<'a> {
    fn new(report: &'a Reporter) -> Self {
        Self {
            report,
            open: Vec::new(),
            tail: std::collections::VecDeque::new(),
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            match byte {
                b'\n' => self.end(),
                // A progress bar: what it says last counts.
                b'\r' => self.open.clear(),
                _ if self.open.len() < LINE => self.open.push(*byte),
                _ => {}
            }
        }
    }

    fn end(&mut self) {
        let line = clean(&String::from_utf8_lossy(&self.open));
        self.open.clear();
        if line.trim().is_empty() {
            return;
        }
        self.report.log(line.clone());
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use pileus_base::Update;
    use tokio_util::sync::CancellationToken;

    use super::*;

    #[test]
    fn lines_are_bounded_and_harmless() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let sink = told.clone();
        let report = Reporter::new(
            move |update| {
                if let Update::Log(line) = update {
                    sink.lock().unwrap().push(line);
                }
            },
            CancellationToken::new(),
        );
        let mut lines = Lines::new(&report);
        lines.add(b"one\ntw");
        lines.add(b"o\n\n10%\r20%\rdone\n\x1b[2Jred\xff\n");
        lines.add(&[b'x'; 9000]);
        lines.add(b"\nlast");
        lines.end();
        let told = told.lock().unwrap();
        assert_eq!(told[..3], ["one", "two", "done"]);
        assert_eq!(told[3], "red\u{fffd}");
        assert!(told[4].len() <= LINE);
        assert_eq!(told[5], "last");
    }

    fn copies(to: &str, name: &str, make: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().display();
        let prepare = format!("cd {place}; mkdir in out; cd in; {make}; tar -cf ../t it");
        let done = std::process::Command::new("sh")
            .args(["-euc", &prepare])
            .status();
        assert!(done.unwrap().success());
        let tar = std::fs::File::open(dir.path().join("t")).unwrap();
        let to = format!("{place}/out/{to}");
        let done = std::process::Command::new("sh")
            .args(["-c", COPY, "pileus", &to, name])
            .stdin(tar)
            .status();
        assert!(done.unwrap().success(), "{to}");
        let list = std::process::Command::new("sh")
            .args(["-c", &format!("cd {place}/out; find . -type f | sort")])
            .output();
        String::from_utf8(list.unwrap().stdout).unwrap()
    }

    #[test]
    fn a_copy_becomes_what_it_is_to_be() {
        assert_eq!(copies("a/b", "x", "echo 1 > it"), "./a/b\n");
        assert_eq!(copies("a/", "x", "echo 1 > it"), "./a/x\n");
        assert_eq!(copies("a", "x", "mkdir it; echo 1 > it/f"), "./a/f\n");
        assert_eq!(copies("a/", "x", "mkdir it; echo 1 > it/f"), "./a/x/f\n");
        // Into a folder that is there.
        assert_eq!(copies("", "x", "mkdir it; echo 1 > it/f"), "./x/f\n");
    }
}
