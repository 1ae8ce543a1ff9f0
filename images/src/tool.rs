//! Running a program that does one piece of work (qemu-img, mmdebstrap): in a process group of its
//! own, with bounds on time, memory and file size, its lines passed on, and ended as a whole.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use pileus_base::{Code, Error, Reporter, Result, ResultExt};
use rustix::process::{Pid, Resource, Rlimit, Signal};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::Command;
use tokio::sync::mpsc;

/// Each program carries its stage's name, so that a sweep finds it after the daemon was killed.
const MARK: &str = "PILEUS_STAGE";
const TAIL_LINES: usize = 30;
const MAX_LINE: usize = 4096;
/// Sbin too: an ordinary user's PATH has no mke2fs.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Bounds {
    pub time: Duration,
    /// From the polite signal to the other one.
    pub grace: Duration,
    /// Bytes of address space.
    pub memory: Option<u64>,
    /// Bytes of the largest file it may write.
    pub file: Option<u64>,
}

/// Gets each line of either output.
pub(crate) type OnLine<'a> = &'a mut (dyn FnMut(&str) + Send);
/// Asked about twice a second; an error ends the program.
pub(crate) type Watch<'a> = &'a (dyn Fn() -> Result<()> + Send + Sync);

#[derive(Debug)]
pub(crate) struct Done {
    pub status: ExitStatus,
    /// The last lines, for error details.
    pub tail: Vec<String>,
}

/// Runs `command` to its end. It is an error if it can't be started, is cancelled, or takes too long;
/// its exit status is for the caller to judge.
pub(crate) async fn run(
    mut command: Command,
    stage: &str,
    bounds: Bounds,
    report: &Reporter,
    on_line: OnLine<'_>,
    watch: Watch<'_>,
) -> Result<Done> {
    let name = command
        .as_std()
        .get_program()
        .to_string_lossy()
        .into_owned();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .env("PATH", PATH)
        .env("LC_ALL", "C.UTF-8")
        .env(MARK, stage);
    limit(&mut command, bounds);
    let mut child = command.spawn().map_err(|err| start_error(&name, err))?;
    let group = Group(child.id().and_then(|id| Pid::from_raw(id.cast_signed())));
    let (sender, mut lines) = mpsc::channel(64);
    if let Some(stdout) = child.stdout.take() {
        tokio::spawn(read_lines(stdout, sender.clone()));
    }
    if let Some(stderr) = child.stderr.take() {
        tokio::spawn(read_lines(stderr, sender.clone()));
    }
    drop(sender);
    let mut seen = Seen::default();
    let mut tick = tokio::time::interval(Duration::from_millis(500));
    let deadline = tokio::time::sleep(bounds.time);
    tokio::pin!(deadline);
    let ended: Result<ExitStatus> = loop {
        tokio::select! {
            Some(line) = lines.recv() => {
                seen.add(&line);
                on_line(&line);
            }
            status = child.wait() => break status.io(format_args!("Waiting for {name}")),
            () = report.cancelled() => {
                break Err(Error::new(Code::Cancelled, "The operation was cancelled"));
            }
            () = &mut deadline => {
                break Err(Error::new(
                    Code::ToolFailed,
                    format!("{name} did not end within {} seconds", bounds.time.as_secs()),
                ));
            }
            _ = tick.tick() => if let Err(err) = watch() {
                break Err(err);
            },
        }
    };
    let status = match ended {
        Ok(status) => status,
        Err(mut err) => {
            group.signal(Signal::TERM);
            let _ = tokio::time::timeout(bounds.grace, child.wait()).await;
            drop(group);
            let _ = child.wait().await;
            err.details = seen.tail.into();
            return Err(err);
        }
    };
    // What is still in the pipes; a left-behind grandchild must not keep us waiting.
    let rest = async {
        while let Some(line) = lines.recv().await {
            seen.add(&line);
            on_line(&line);
        }
    };
    let _ = tokio::time::timeout(Duration::from_secs(1), rest).await;
    drop(group);
    Ok(Done {
        status,
        tail: seen.tail.into(),
    })
}

impl Done {
    /// The error of a program that failed.
    pub fn failed(self, what: &str) -> Error {
        let full = self.tail.iter().any(|line| {
            line.contains("No space left on device") || line.contains("File too large")
        });
        let (code, why) = if full {
            (Code::NoSpace, "the disk is full".to_owned())
        } else {
            (Code::ToolFailed, self.status.to_string())
        };
        let mut err = Error::new(code, format!("{what} failed: {why}"));
        err.details = self.tail;
        err
    }
}

fn start_error(name: &str, err: std::io::Error) -> Error {
    if err.kind() == std::io::ErrorKind::NotFound {
        let package = match name.rsplit('/').next() {
            Some("qemu-img") => "qemu-utils",
            _ => name,
        };
        return Error::new(
            Code::ToolMissing,
            format!("The program {name} is not installed"),
        )
        .advise(format!(
            "Install it, on Debian and Ubuntu: sudo apt install {package}"
        ))
        .with_source(err);
    }
    Error::new(Code::ToolFailed, format!("{name} can't be started: {err}")).with_source(err)
}

fn limit(command: &mut Command, bounds: Bounds) {
    let set = move || {
        let limits = [
            (Resource::As, bounds.memory),
            (Resource::Fsize, bounds.file),
            (Resource::Core, Some(0)),
        ];
        for (resource, value) in limits {
            if value.is_some() {
                let limit = Rlimit {
                    current: value,
                    maximum: value,
                };
                rustix::process::setrlimit(resource, limit)?;
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs between fork and exec; it makes only setrlimit system calls on values
    // that it owns, allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(set);
    }
}

#[derive(Default)]
struct Seen {
    tail: VecDeque<String>,
}

impl Seen {
    fn add(&mut self, line: &str) {
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(line.to_owned());
    }
}

/// Sends lines that end in a newline or, as progress does, in a carriage return.
async fn read_lines(mut stream: impl AsyncRead + Unpin, sender: mpsc::Sender<String>) {
    let mut buffer = vec![0; 16 << 10];
    let mut line = Vec::new();
    while let Ok(n @ 1..) = stream.read(&mut buffer).await {
        for byte in &buffer[..n] {
            if matches!(byte, b'\n' | b'\r') {
                let text = String::from_utf8_lossy(&line).trim_end().to_owned();
                line.clear();
                if !text.is_empty() && sender.send(text).await.is_err() {
                    return;
                }
            } else if line.len() < MAX_LINE {
                line.push(*byte);
            }
        }
    }
    if !line.is_empty() {
        let text = String::from_utf8_lossy(&line).into_owned();
        let _ = sender.send(text).await;
    }
}

/// A process group that ends with this value, also when the waiting future is dropped.
struct Group(Option<Pid>);

impl Group {
    fn signal(&self, signal: Signal) {
        if let Some(group) = self.0 {
            let _ = rustix::process::kill_process_group(group, signal);
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
    }
}

/// Ends the programs that a killed daemon left at work in a stage.
pub(crate) fn end_leftovers(stage: &str) {
    let mark = format!("{MARK}={stage}");
    for _ in 0..100 {
        let left = marked(mark.as_bytes());
        if left.is_empty() {
            return;
        }
        for pid in left {
            tracing::info!(
                pid = pid.as_raw_nonzero().get(),
                stage,
                "ending a leftover program"
            );
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// The processes that have this entry in their environment, other than this one.
fn marked(mark: &[u8]) -> Vec<Pid> {
    let own = std::process::id().cast_signed();
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            std::fs::read(format!("/proc/{pid}/environ"))
                .is_ok_and(|environ| environ.split(|byte| *byte == 0).any(|entry| entry == mark))
        })
        .filter_map(Pid::from_raw)
        .collect()
}

/// Removes files that belong to the user's subordinate ids, left by an unprivileged build.
pub(crate) fn remove_as_subordinate(folder: &Path) -> Result<()> {
    let status = std::process::Command::new("mmdebstrap")
        .args(["--unshare-helper", "rm", "-rf", "--one-file-system", "--"])
        .arg(folder)
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .io("Starting mmdebstrap")?;
    if status.success() || !folder.exists() {
        return Ok(());
    }
    Err(Error::new(
        Code::ToolFailed,
        format!("{} can't be removed", folder.display()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;
    use tokio_util::sync::CancellationToken;

    fn shell(text: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        command
    }

    const BOUNDS: Bounds = Bounds {
        time: Duration::from_secs(20),
        grace: Duration::from_millis(100),
        memory: None,
        file: None,
    };

    #[tokio::test]
    async fn lines_status_and_output() {
        let mut got = Vec::new();
        let done = run(
            shell("printf 'a\\rb\\n'; printf 'c' >&2; exit 3"),
            "t",
            BOUNDS,
            &Reporter::silent(),
            &mut |line| got.push(line.to_owned()),
            &|| Ok(()),
        )
        .await
        .unwrap();
        assert_eq!(done.status.code(), Some(3));
        got.sort();
        assert_eq!(got, ["a", "b", "c"]);
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let err = run(
            Command::new("pileus-no-such-program"),
            "t",
            BOUNDS,
            &Reporter::silent(),
            &mut |_| (),
            &|| Ok(()),
        )
        .await
        .unwrap_err();
        assert_eq!(err.code, Code::ToolMissing);
    }

    #[tokio::test]
    async fn cancelling_ends_the_whole_group() {
        let cancel = CancellationToken::new();
        let report = Reporter::new(|_| (), cancel.clone());
        let id = uuid::Uuid::new_v4().to_string();
        let begin = Instant::now();
        let stopper = async {
            while marked(format!("{MARK}={id}").as_bytes()).len() < 2 {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            cancel.cancel();
        };
        // A child that ignores the polite signal, and a grandchild.
        let mut on_line = |_: &str| ();
        let work = run(
            shell("trap '' TERM; sh -c 'trap \"\" TERM; sleep 60; true'; true"),
            &id,
            BOUNDS,
            &report,
            &mut on_line,
            &|| Ok(()),
        );
        let (done, ()) = tokio::join!(work, stopper);
        assert_eq!(done.unwrap_err().code, Code::Cancelled);
        assert!(begin.elapsed() < Duration::from_secs(10));
        while !marked(format!("{MARK}={id}").as_bytes()).is_empty() {
            assert!(begin.elapsed() < Duration::from_secs(10), "still there");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn file_size_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let bounds = Bounds {
            file: Some(1 << 20),
            ..BOUNDS
        };
        let done = run(
            shell(&format!("head -c 9000000 /dev/zero > {}", path.display())),
            "t",
            bounds,
            &Reporter::silent(),
            &mut |_| (),
            &|| Ok(()),
        )
        .await
        .unwrap();
        assert!(!done.status.success());
        assert!(std::fs::metadata(&path).unwrap().len() <= 1 << 20);
    }
}
