//! Times and what is made of them; commands as users run them; the daemon's API in a few lines.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use pileus_testkit::Api;
use serde_json::Value;

/// What was measured again and again.
#[derive(Debug, Clone, Default)]
pub struct Times(Vec<Duration>);

impl Times {
    pub fn add(&mut self, time: Duration) {
        self.0.push(time);
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The time that `percent` of all lie at or below.
    pub fn percentile(&self, percent: usize) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        let index = (sorted.len() * percent).div_ceil(100).saturating_sub(1);
        sorted.get(index).copied().unwrap_or_default()
    }

    /// Of an even number the mean of the two in the middle.
    pub fn median(&self) -> Duration {
        let mut sorted = self.0.clone();
        sorted.sort();
        match sorted.len() {
            0 => Duration::ZERO,
            n if n % 2 == 1 => sorted[n / 2],
            n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2,
        }
    }

    /// `12.3 ms (p95 15.0 ms)`, and all of them if they are few.
    pub fn show(&self) -> String {
        let median = show(self.median());
        if self.len() > 8 {
            return format!("{median} (p95 {})", show(self.percentile(95)));
        }
        let all: Vec<String> = self.0.iter().map(|&time| show(time)).collect();
        match all.len() {
            0 | 1 => median,
            _ => format!("{median} (of {})", all.join(", ")),
        }
    }
}

pub fn show(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if seconds >= 1.0 {
        format!("{seconds:.1} s")
    } else {
        format!("{:.1} ms", seconds * 1000.0)
    }
}

/// How many times `a` is in `b`.
pub fn ratio(a: Duration, b: Duration) -> f64 {
    a.as_secs_f64() / b.as_secs_f64().max(1e-9)
}

/// The phases of launches, as the daemon tells them.
#[derive(Debug, Default)]
pub struct Phases(Vec<(String, Times)>);

impl Phases {
    /// Takes those of one instance.
    pub fn add(&mut self, info: &Value) {
        for entry in info["phases"].as_array().into_iter().flatten() {
            let phase = entry["phase"].as_str().unwrap_or_default();
            let milliseconds = entry["milliseconds"].as_u64().unwrap_or_default();
            self.note(phase, Duration::from_millis(milliseconds));
        }
    }

    pub fn note(&mut self, phase: &str, time: Duration) {
        let index = self.0.iter().position(|(known, _)| known == phase);
        let index = index.unwrap_or_else(|| {
            self.0.push((phase.to_owned(), Times::default()));
            self.0.len() - 1
        });
        self.0[index].1.add(time);
    }

    /// In the order in which they came.
    pub fn all(&self) -> &[(String, Times)] {
        &self.0
    }
}

/// Does something with an instance by the API, as `POST /v1/instances/NAME/WHAT`, to its end.
pub fn operate(api: &Api, name: &str, what: &str, body: &Value) -> Result<(Duration, Value)> {
    let began = Instant::now();
    let done = api.act(name, what, body);
    let took = began.elapsed();
    match done {
        Ok(operation) => Ok((took, operation)),
        Err(refusal) => bail!("{what} of {name}: {}: {}", refusal.code, refusal.message),
    }
}

/// How long a phase of an operation took.
pub fn phase(operation: &Value, wanted: &str) -> Option<Duration> {
    let phases = operation["phases"].as_array()?;
    let found = phases.iter().find(|phase| phase["phase"] == wanted)?;
    Some(Duration::from_millis(found["milliseconds"].as_u64()?))
}

pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// The three averages of the machine's load.
pub fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let words: Vec<&str> = text.split(' ').take(3).collect();
    words.join(" ")
}

/// `pileus` for a daemon's storage, as a user calls it: it talks to a socket, so it needs no
/// namespace, and nothing but the process itself is timed.
pub fn pileus(storage: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(pileus_testkit::program("pileus"));
    command
        .args(args)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")
        .env("HOME", "/nonexistent")
        .env("LANG", "C.UTF-8")
        .env("PILEUS_STORAGE", storage);
    command
}

/// Runs a command that must succeed; returns how long it took, and what it printed.
pub fn timed(command: &mut Command) -> Result<(Duration, String)> {
    command.stdin(Stdio::null());
    let began = Instant::now();
    let output = command.output().context("a command can't be started")?;
    let took = began.elapsed();
    ensure!(
        output.status.success(),
        "{command:?} ended with {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    Ok((took, String::from_utf8_lossy(&output.stdout).into_owned()))
}

/// Calls `work` in the network namespace of a process, in a thread of its own: no `ip netns exec` is
/// timed with it.
pub fn inside<T: Send>(pid: i32, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = fs::File::open(format!("/proc/{pid}/ns/net"))
        .with_context(|| format!("process {pid} has no network namespace"))?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            setns(namespace, CloneFlags::CLONE_NEWNET).context("the namespace can't be entered")?;
            work()
        });
        match thread.join() {
            Ok(done) => done,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// The answer of the daemon to a GET.
pub fn get(socket: &Path, path: &str) -> Result<Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    // By HTTP/1.0 the answer ends with the connection.
    write!(stream, "GET {path} HTTP/1.0\r\nHost: pileus\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("{path} was not answered"))?;
    ensure!(head.contains(" 200 "), "{path} was answered with {head}");
    Ok(serde_json::from_str(body)?)
}

/// Tries every millisecond until `check` gives something; no panic as in the test kit's, and finer.
pub fn poll<T>(what: &str, bound: Duration, mut check: impl FnMut() -> Option<T>) -> Result<T> {
    let until = Instant::now() + bound;
    loop {
        if let Some(found) = check() {
            return Ok(found);
        }
        ensure!(Instant::now() < until, "{what}: not within {}", show(bound));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One of a process's figures in /proc/PID/FILE (`VmRSS: 123 kB`), as its number.
pub fn process_figure(pid: i32, file: &str, key: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .with_context(|| format!("{file} has no {key}"))
}

/// Processor time that a process and its threads have used.
pub fn processor_time(pid: i32) -> Result<Duration> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
    let fields: Vec<&str> = fields.split(' ').collect();
    let ticks = |index: usize| {
        fields
            .get(index)
            .and_then(|field| field.parse::<u64>().ok())
    };
    let (user, system) = ticks(11)
        .zip(ticks(12))
        .with_context(|| format!("process {pid} tells no times"))?;
    // Linux shows hundredths of a second on every machine that we know.
    Ok(Duration::from_millis((user + system) * 10))
}

/// Bytes that a folder's files take on the disk.
pub fn allocated(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    pileus_testkit::files_below(folder)
        .into_iter()
        .map(|file: PathBuf| {
            // A file may go while we look.
            fs::symlink_metadata(folder.join(file)).map_or(0, |meta| meta.blocks() * 512)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(milliseconds: &[u64]) -> Times {
        Times(
            milliseconds
                .iter()
                .map(|&n| Duration::from_millis(n))
                .collect(),
        )
    }

    #[test]
    fn medians_and_percentiles() {
        assert_eq!(times(&[]).median(), Duration::ZERO);
        assert_eq!(times(&[3, 1, 2]).median(), Duration::from_millis(2));
        assert_eq!(times(&[4, 1, 2, 3]).median(), Duration::from_micros(2500));
        let hundred: Vec<u64> = (1..=100).collect();
        assert_eq!(times(&hundred).percentile(95), Duration::from_millis(95));
        assert_eq!(times(&[7]).percentile(95), Duration::from_millis(7));
        assert_eq!(times(&[1, 2]).show(), "1.5 ms (of 1.0 ms, 2.0 ms)");
    }
}
