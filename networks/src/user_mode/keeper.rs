//! The processes behind the user's namespace. The *holder* makes it and then sleeps. The *keeper*
//! stays outside, in a session of its own, runs pasta and starts it again when it ends; it goes when
//! the holder goes. Both are plain forks of the daemon from before it had threads: nothing has to be
//! found or started by name, and the binary may be replaced meanwhile.
//!
//! The keeper's side runs after fork in a process without threads, so ordinary code is fine there.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork, setsid};
use pileus_base::process::ProcessId;
use pileus_base::{Code, Error, Result, ResultExt, files};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};

use super::{Record, end, uids};

/// Waiting times before pasta is started again, doubled each time it ends early.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);
/// A pasta that lived this long was fine.
const LIVED: Duration = Duration::from_secs(60);
/// How long pasta may take until the namespace has its route. Later it still may come.
const READY: Duration = Duration::from_secs(5);

/// Where the keeper and pasta write what went wrong.
pub(super) fn log_path(dir: &Path) -> PathBuf {
    dir.join("user-mode.log")
}

/// What the keeper tells the daemon that started it, as one JSON document.
#[derive(Serialize, Deserialize)]
struct Report {
    /// `None`: the namespace is there.
    failure: Option<(Code, String, Option<String>)>,
}

/// What the keeper needs for its work.
struct Plan<'a> {
    dir: &'a Path,
    pasta: &'a Path,
    dns_forward: Option<Ipv4Addr>,
}

/// Starts a keeper, with a new holder unless `old` has one that lives. Returns when the namespace is
/// there and, if that is possible at all, connected. The caller must have no threads.
pub(super) fn start(
    dir: &Path,
    pasta: &Path,
    dns_forward: Option<Ipv4Addr>,
    old: Option<Record>,
    bound: Duration,
) -> Result<()> {
    if let Some(orphan) = old.as_ref().and_then(|record| record.pasta) {
        end(orphan);
    }
    let (read, write) =
        nix::unistd::pipe().map_err(|err| Error::io("Making a pipe", err.into()))?;
    let forked = |err: nix::Error| Error::io("Starting a process", err.into());
    // SAFETY: `enter` has checked that this process has no other threads, so the child may go on as
    // an ordinary process.
    match unsafe { fork() }.map_err(forked)? {
        ForkResult::Child => {
            drop(read);
            let plan = Plan {
                dir,
                pasta,
                dns_forward,
            };
            // A second fork, so that the keeper is init's child and no zombie of the daemon's.
            // SAFETY: as above.
            match unsafe { fork() } {
                Ok(ForkResult::Child) => exit(keep(&plan, old, write)),
                Ok(ForkResult::Parent { .. }) => exit(0),
                Err(_) => exit(1),
            }
        }
        ForkResult::Parent { child } => {
            drop(write);
            let _ = waitpid(child, None);
            receive(read, bound)
        }
    }
}

/// Ends a forked process without running the daemon's exit handlers.
fn exit(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

fn receive(read: OwnedFd, bound: Duration) -> Result<()> {
    let silent = || {
        Error::new(
            Code::NetworkFailed,
            "The user's namespace was not set up in time",
        )
    };
    let mut text = Vec::new();
    let begin = Instant::now();
    let mut file = File::from(read);
    loop {
        let left = bound.checked_sub(begin.elapsed()).ok_or_else(silent)?;
        if !wait_readable(&[file.as_fd()], left) {
            return Err(silent());
        }
        let mut buffer = [0; 4096];
        match file
            .read(&mut buffer)
            .io("Reading what the keeper reports")?
        {
            0 => break,
            count => text.extend_from_slice(&buffer[..count]),
        }
    }
    let report: Report = serde_json::from_slice(&text).map_err(|err| silent().with_source(err))?;
    match report.failure {
        None => Ok(()),
        Some((code, message, advice)) => Err(Error {
            advice,
            ..Error::new(code, message)
        }),
    }
}

/// The keeper's whole life. Returns its exit code.
fn keep(plan: &Plan<'_>, old: Option<Record>, report: OwnedFd) -> i32 {
    let mut report = File::from(detach(report, &log_path(plan.dir)));
    set_name(c"pileus-keeper");
    let record = match old {
        Some(record) => own_id().map(|keeper| Record {
            keeper,
            pasta: None,
            ..record
        }),
        None => new_holder(),
    };
    let set_up = record.and_then(|record| record.write(plan.dir).map(|()| record));
    let mut record = match set_up {
        Ok(record) => record,
        Err(err) => {
            tell(&mut report, Some(&err));
            return 1;
        }
    };
    let Some(holder) = pidfd(record.holder) else {
        let gone = Error::new(
            Code::NetworkFailed,
            "The holder of the user's namespace ended at once",
        );
        tell(&mut report, Some(&gone));
        return 1;
    };
    let mut report = Some(report);
    let mut wait = FIRST_WAIT;
    while record.holder.is_alive() {
        let begin = Instant::now();
        let ended = serve(plan, &mut record, &holder, &mut report);
        // Whatever happened, the daemon has been told by now that it can go on.
        if let Some(mut report) = report.take() {
            tell(&mut report, None);
        }
        record.pasta = None;
        record.problem = Some(ended);
        let _ = record.write(plan.dir);
        if begin.elapsed() >= LIVED {
            wait = FIRST_WAIT;
        }
        wait_readable(&[holder.as_fd()], wait);
        wait = (wait * 2).min(LONGEST_WAIT);
    }
    let _ = files::remove_file(&Record::path(plan.dir));
    0
}

/// Runs one pasta until it or the holder ends, and returns why there is no pasta any more.
fn serve(
    plan: &Plan<'_>,
    record: &mut Record,
    holder: &OwnedFd,
    report: &mut Option<File>,
) -> String {
    let mut child = match spawn_pasta(plan, record.holder) {
        Ok(child) => child,
        Err(err) => return format!("pasta could not be started: {err}"),
    };
    let process = ProcessId::of(child.id().cast_signed());
    let (Some(process), Some(pasta)) = (process, process.and_then(pidfd)) else {
        return why_ended(plan, &mut child);
    };
    record.pasta = Some(process);
    record.problem = Some("pasta is being started".into());
    let _ = record.write(plan.dir);
    let begin = Instant::now();
    let mut ready = false;
    while !ready && begin.elapsed() < READY {
        if wait_readable(&[pasta.as_fd(), holder.as_fd()], Duration::from_millis(10)) {
            break;
        }
        ready = has_default_route(record.holder);
    }
    if ready {
        record.problem = None;
        let _ = record.write(plan.dir);
    }
    if let Some(mut report) = report.take() {
        tell(&mut report, None);
    }
    while !wait_readable(&[pasta.as_fd(), holder.as_fd()], Duration::from_secs(3600)) {}
    if !record.holder.is_alive() {
        let _ = child.kill();
    }
    why_ended(plan, &mut child)
}

fn why_ended(plan: &Plan<'_>, child: &mut Child) -> String {
    let status = child
        .wait()
        .map_or_else(|err| err.to_string(), |status| status.to_string());
    let log = files::tail(&log_path(plan.dir), 400);
    // It can't reach syslog when it says that, which is of no interest.
    let last = log
        .lines()
        .rfind(|line| !line.contains("syslog"))
        .unwrap_or_default();
    format!("pasta ended ({status}): {last}")
}

fn spawn_pasta(plan: &Plan<'_>, holder: ProcessId) -> std::io::Result<Child> {
    let log = OpenOptions::new()
        .create(true)
        .write(true)
        .truncate(true)
        .open(log_path(plan.dir))?;
    let mut command = Command::new(plan.pasta);
    // No port is carried in either direction, and the gateway's address is not the host's loopback:
    // guests must not reach what listens on the host for the user alone.
    command.args([
        "--foreground",
        "--config-net",
        "--no-map-gw",
        "--ns-ifname",
        super::UPLINK,
        "-t",
        "none",
        "-u",
        "none",
        "-T",
        "none",
        "-U",
        "none",
    ]);
    if let Some(address) = plan.dns_forward {
        command.arg("--dns-forward").arg(address.to_string());
    }
    command
        .arg(holder.pid.to_string())
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
}

/// Whether the holder's network has a default route, which pasta sets last.
fn has_default_route(holder: ProcessId) -> bool {
    let table = std::fs::read_to_string(format!("/proc/{}/net/route", holder.pid));
    table.is_ok_and(|table| {
        table
            .lines()
            .any(|line| line.split_ascii_whitespace().nth(1) == Some("00000000"))
    })
}

/// Makes the namespace and the process that holds it.
fn new_holder() -> Result<Record> {
    let pipe = || nix::unistd::pipe().map_err(|err| Error::io("Making a pipe", err.into()));
    let (from_holder, to_keeper) = pipe()?;
    let (from_keeper, to_holder) = pipe()?;
    // SAFETY: the keeper has no threads.
    match unsafe { fork() }.map_err(|err| Error::io("Starting a process", err.into()))? {
        ForkResult::Child => {
            drop((from_holder, to_holder));
            hold(to_keeper, from_keeper)
        }
        ForkResult::Parent { child } => {
            drop((to_keeper, from_keeper));
            let made = finish_holder(child, from_holder, to_holder);
            if made.is_err() {
                // The holder goes by itself when its pipe closes.
                let _ = waitpid(child, None);
            }
            made
        }
    }
}

fn finish_holder(child: Pid, from_holder: OwnedFd, to_holder: OwnedFd) -> Result<Record> {
    let mut errno = Vec::new();
    let read = File::from(from_holder).take(4).read_to_end(&mut errno);
    read.io("Waiting for the user's namespace")?;
    let errno = errno
        .try_into()
        .map(i32::from_ne_bytes)
        .unwrap_or(libc::EIO);
    if errno != 0 {
        return Err(refused(std::io::Error::from_raw_os_error(errno)));
    }
    let full_uid_map = uids::map(child.as_raw())?;
    File::from(to_holder)
        .write_all(&[1])
        .io("Letting the holder go on")?;
    let holder = ProcessId::of(child.as_raw()).ok_or_else(|| {
        Error::new(
            Code::NetworkFailed,
            "The holder of the user's namespace ended at once",
        )
    })?;
    Ok(Record {
        holder,
        keeper: own_id()?,
        pasta: None,
        full_uid_map,
        problem: None,
    })
}

fn refused(err: std::io::Error) -> Error {
    let restricted =
        std::fs::read_to_string("/proc/sys/kernel/apparmor_restrict_unprivileged_userns")
            .is_ok_and(|text| text.trim() == "1");
    let advice = if restricted {
        "AppArmor keeps ordinary users from it on this host: give pileusd an AppArmor profile with \
         `userns,`, or allow it for all with `sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0`."
    } else {
        "Allow user namespaces on this host (sysctl user.max_user_namespaces, \
         kernel.unprivileged_userns_clone), or run pileusd as root."
    };
    Error::new(
        Code::PermissionDenied,
        format!("A user namespace can't be made: {err}"),
    )
    .advise(advice)
    .with_source(err)
}

/// The holder's whole life: makes the namespaces, waits for its id map, and sleeps.
fn hold(to_keeper: OwnedFd, from_keeper: OwnedFd) -> ! {
    set_name(c"pileus-holder");
    let result = unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET);
    let errno = result.map_or_else(|err| err as i32, |()| 0);
    let told = File::from(to_keeper).write_all(&errno.to_ne_bytes());
    let mut go = [0];
    let go_on = File::from(from_keeper).read_exact(&mut go);
    if errno != 0 || told.is_err() || go_on.is_err() {
        exit(1);
    }
    close_from(3);
    loop {
        nix::unistd::pause();
    }
}

/// Leaves the daemon's session, folder and descriptors behind; only `keep` stays open, as number 3.
fn detach(keep: OwnedFd, log: &Path) -> OwnedFd {
    let _ = setsid();
    let _ = std::env::set_current_dir("/");
    let null = OpenOptions::new().read(true).write(true).open("/dev/null");
    let log = OpenOptions::new().create(true).append(true).open(log);
    for (target, file) in [(0, &null), (1, &null), (2, &log)] {
        if let Ok(file) = file {
            // SAFETY: both are valid descriptors; the target is a standard one that stays open.
            unsafe { libc::dup2(file.as_raw_fd(), target) };
        }
    }
    // SAFETY: dup2 onto 3 closes whatever the daemon had there, which this process never uses.
    unsafe { libc::dup2(keep.as_raw_fd(), 3) };
    // Closed below by number, so nobody may close it a second time.
    std::mem::forget((keep, null, log));
    close_from(4);
    // SAFETY: 3 is open and owned by nobody else.
    let kept = unsafe { OwnedFd::from_raw_fd(3) };
    // Not for pasta and the id mappers, which would keep the daemon waiting for the pipe's end.
    let _ = rustix::io::fcntl_setfd(&kept, rustix::io::FdFlags::CLOEXEC);
    kept
}

fn close_from(first: RawFd) {
    // SAFETY: this forked process uses no descriptor at or above `first` any more.
    unsafe { libc::close_range(first.cast_unsigned(), libc::c_uint::MAX, 0) };
}

fn set_name(name: &CStr) {
    let _ = rustix::thread::set_name(name);
}

fn own_id() -> Result<ProcessId> {
    ProcessId::of(std::process::id().cast_signed())
        .ok_or_else(|| Error::internal("/proc does not show this process"))
}

fn pidfd(process: ProcessId) -> Option<OwnedFd> {
    let fd = pidfd_open(
        rustix::process::Pid::from_raw(process.pid)?,
        PidfdFlags::empty(),
    )
    .ok()?;
    process.is_alive().then_some(fd)
}

fn tell(report: &mut File, failure: Option<&Error>) {
    let failure = failure.map(|err| (err.code, err.message.clone(), err.advice.clone()));
    if let Ok(text) = serde_json::to_vec(&Report { failure }) {
        let _ = report.write_all(&text);
    }
}

/// Waits until one of the descriptors is readable (a pidfd is when its process ended), or a time.
fn wait_readable(fds: &[std::os::fd::BorrowedFd<'_>], bound: Duration) -> bool {
    let mut polled: Vec<_> = fds
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
        .collect();
    let bound = Timespec {
        tv_sec: i64::try_from(bound.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: bound.subsec_nanos().into(),
    };
    poll(&mut polled, Some(&bound)).is_ok_and(|count| count > 0)
}
