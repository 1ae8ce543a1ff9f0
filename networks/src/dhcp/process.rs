//! The dnsmasq process: adopted when it still runs, started otherwise, started again when it dies.
//! dnsmasq puts itself into the background in its own session, so it outlives the daemon; its first
//! process ends only when the ports are open, and says what went wrong if they can't be.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pileus_base::process::ProcessId;
use pileus_base::{Code, Error, Result, files};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

use super::{Settings, unprivileged};
use crate::tools;

/// Waiting times before dnsmasq is started again, doubled each time it dies early.
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// One that lived this long was fine: the next waiting time is the first one again.
const LIVED: Duration = Duration::from_secs(60);
/// How long a dnsmasq that was told to end may take.
const END_BOUND: Duration = Duration::from_secs(5);

/// Our dnsmasq, supervised. Dropping it ends the supervision, not dnsmasq.
#[derive(Debug)]
pub(crate) struct Server {
    settings: Settings,
    state: Arc<Mutex<State>>,
    supervisor: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    process: Option<ProcessId>,
    /// Why it does not run, while it does not.
    problem: Option<String>,
    restarts: u32,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

impl Server {
    /// Makes sure that a dnsmasq with these settings runs. One that runs is kept unless its
    /// configuration differs or `fresh` says that it can't work any more (new bridge).
    pub(crate) async fn start(settings: Settings, fresh: bool) -> Result<Self> {
        settings.create_folders()?;
        let (user, group) = unprivileged(&settings.dir);
        let conf = settings.conf(&user, &group);
        let running = find(&settings);
        let process = match running {
            Some(process) if !fresh && is_current(&settings, process, &conf) => {
                tracing::info!(pid = process.pid, "dnsmasq still runs and is adopted");
                process
            }
            other => {
                if let Some(process) = other {
                    end(process).await?;
                }
                files::write_atomic(&settings.conf_path(), conf.as_bytes(), 0o644)?;
                launch(&settings).await?
            }
        };
        let state = Arc::new(Mutex::new(State {
            process: Some(process),
            ..State::default()
        }));
        let supervisor = tokio::spawn(supervise(settings.clone(), state.clone(), process));
        Ok(Self {
            settings,
            state,
            supervisor,
        })
    }

    /// Makes dnsmasq read its entries again and drop what it has cached.
    pub(crate) fn reload(&self) {
        let process = lock(&self.state).process;
        if let Some(process) = process
            && let Err(err) = signal(process, Signal::HUP)
        {
            // It has just died: the one that follows it reads the entries anyway.
            tracing::debug!(%err, "dnsmasq was not told to read its entries again");
        }
    }

    /// The running process.
    pub(crate) fn process(&self) -> Option<ProcessId> {
        lock(&self.state)
            .process
            .filter(|process| process.is_alive())
    }

    /// Why there is no DHCP and DNS at the moment, if so.
    pub(crate) fn problem(&self) -> Option<Error> {
        if self.process().is_some() {
            return None;
        }
        let state = lock(&self.state);
        let reason = state.problem.as_deref().unwrap_or("it has just ended");
        Some(
            Error::new(
                Code::NetworkFailed,
                format!("dnsmasq does not run, so guests get no address and no names: {reason}"),
            )
            .advise(format!(
                "It is started again by itself; see {}.",
                self.settings.log_path().display()
            )),
        )
    }

    /// Ends dnsmasq for good.
    pub(crate) async fn stop(&self) -> Result<()> {
        self.supervisor.abort();
        let process = lock(&self.state).process.take();
        for process in process.into_iter().chain(find(&self.settings)) {
            end(process).await?;
        }
        for path in [self.settings.pid_path(), self.settings.conf_path()] {
            files::remove_file(&path)?;
        }
        Ok(())
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    // Nothing panics while it holds this lock, and the state is valid after each assignment.
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits for each end of dnsmasq and starts it again, waiting longer each time.
async fn supervise(settings: Settings, state: Arc<Mutex<State>>, first: ProcessId) {
    let mut process = Some(first);
    let mut wait = FIRST_WAIT;
    loop {
        if let Some(process) = process.take() {
            let since = Instant::now();
            ended(process).await;
            let end = files::tail(&settings.log_path(), 500);
            tracing::warn!(
                pid = process.pid,
                log = end.trim_end(),
                "dnsmasq ended; it is started again"
            );
            if since.elapsed() >= LIVED {
                wait = FIRST_WAIT;
            }
        }
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
        let started = launch(&settings).await;
        let mut state = lock(&state);
        match started {
            Ok(new) => {
                process = Some(new);
                state.process = process;
                state.problem = None;
                state.restarts += 1;
                tracing::info!(
                    pid = new.pid,
                    restarts = state.restarts,
                    "dnsmasq runs again"
                );
            }
            Err(err) => {
                tracing::warn!(%err, details = ?err.details, "dnsmasq could not be started");
                state.problem = Some(err.to_string());
            }
        }
    }
}

/// Starts dnsmasq and returns its background process once its ports are open.
async fn launch(settings: &Settings) -> Result<ProcessId> {
    let program = tools::find("dnsmasq", "dnsmasq-base")?;
    files::remove_file(&settings.pid_path())?;
    // Only the log of this run is of use, and it must not grow for ever.
    files::remove_file(&settings.log_path())?;
    let conf = format!("--conf-file={}", settings.conf_path().display());
    let output = tools::run(&program, &[&conf], "").await?;
    if !output.status.success() {
        return Err(start_error(settings, &output));
    }
    // Its first process ends a moment before the pid file is there.
    let begin = Instant::now();
    loop {
        if let Some(process) = find(settings) {
            return Ok(process);
        }
        if begin.elapsed() > END_BOUND {
            return Err(Error::new(
                Code::NetworkFailed,
                "dnsmasq ended right after it was started",
            )
            .detail(files::tail(&settings.log_path(), 1000)));
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn start_error(settings: &Settings, output: &std::process::Output) -> Error {
    let text = String::from_utf8_lossy(&output.stderr);
    if text.contains("Address already in use") {
        let gateway = settings.subnet.gateway();
        return Error::new(
            Code::PortTaken,
            format!("Another program uses port 53 (DNS) or 67 (DHCP) on {gateway}, the address of the bridge {}", settings.bridge),
        )
        .advise(
            "Another DNS or DHCP server of this host listens on all addresses (`ss -lnup` shows it): \
             bind it to its own interfaces, for dnsmasq with `bind-interfaces`, or end it.",
        )
        .detail(text.trim());
    }
    tools::failure("Starting dnsmasq", output)
}

/// The dnsmasq that the pid file names, if it lives and was started with our configuration file.
pub(crate) fn find(settings: &Settings) -> Option<ProcessId> {
    let text = files::read_bounded(&settings.pid_path(), 32).ok()?;
    let pid: i32 = std::str::from_utf8(&text).ok()?.trim().parse().ok()?;
    let process = ProcessId::of(pid)?;
    let cmdline = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = cmdline.split(|byte| *byte == 0);
    let program = words.next()?;
    let conf = format!("--conf-file={}", settings.conf_path().display());
    let ours = program.ends_with(b"dnsmasq") && words.any(|word| word == conf.as_bytes());
    ours.then_some(process)
}

/// Whether a running dnsmasq works with this configuration, in this network namespace.
fn is_current(settings: &Settings, process: ProcessId, conf: &str) -> bool {
    let same_conf = std::fs::read(settings.conf_path()).is_ok_and(|old| old == conf.as_bytes());
    let theirs = std::fs::read_link(format!("/proc/{}/ns/net", process.pid));
    let own = std::fs::read_link(Path::new("/proc/thread-self/ns/net"));
    let same_network = matches!((theirs, own), (Ok(theirs), Ok(own)) if theirs == own);
    same_conf && same_network
}

/// Ends a process of ours: asks, and kills it if it doesn't go.
async fn end(process: ProcessId) -> Result<()> {
    for how in [Signal::TERM, Signal::KILL] {
        if signal(process, how).is_err() && !process.is_alive() {
            return Ok(());
        }
        if tokio::time::timeout(END_BOUND, ended(process))
            .await
            .is_ok()
        {
            return Ok(());
        }
    }
    Err(Error::new(
        Code::NetworkFailed,
        format!("dnsmasq (process {}) could not be ended", process.pid),
    ))
}

/// Signals that very process, and no other that got its pid.
fn signal(process: ProcessId, signal: Signal) -> std::io::Result<()> {
    let fd = pidfd(process)?;
    pidfd_send_signal(fd, signal)?;
    Ok(())
}

fn pidfd(process: ProcessId) -> std::io::Result<OwnedFd> {
    let gone = || std::io::Error::from_raw_os_error(libc::ESRCH);
    let pid = Pid::from_raw(process.pid).ok_or_else(gone)?;
    let fd = pidfd_open(pid, PidfdFlags::NONBLOCK)?;
    // After the opening, so that the descriptor can't be of a later process.
    if process.is_alive() {
        Ok(fd)
    } else {
        Err(gone())
    }
}

/// Completes when the process is gone; it need not be a child.
async fn ended(process: ProcessId) {
    if let Ok(fd) = pidfd(process) {
        // SAFETY: an OwnedFd stays the same open descriptor until the AsyncFd drops it.
        let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        if let Ok(fd) = fd
            && fd.readable().await.is_ok()
        {
            return;
        }
    }
    while process.is_alive() {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
