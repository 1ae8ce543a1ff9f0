//! From a command line to a process that outlives us, and how a process is found, watched and ended.
//!
//! QEMU gets a session of its own (no signal of our terminal reaches it), no standard input, a log
//! as output, exactly the descriptors of its command line, no way to gain privileges, and in root
//! mode a user id that owns nothing. It is never waited for by pid alone: a pidfd names it.
//! It outlives us unless its spec says otherwise ([`MachineSpec::ends_with_daemon`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{OnceLock, mpsc};

use pileus_base::process::ProcessId;
use pileus_base::{Code, Error, Result, ResultExt, files};
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::argv::{self, What};
use super::spec::{MachineSpec, Paths};

/// A user that QEMU becomes before it starts; needs root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confinement {
    /// Needs no entry in /etc/passwd.
    pub uid: u32,
    pub gid: u32,
    /// Further groups, such as the one that may open /dev/kvm.
    pub groups: Vec<u32>,
}

/// How a process ended. Both are unknown for one that we did not start ourselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    pub code: Option<i32>,
    pub signal: Option<i32>,
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code, self.signal) {
            (_, Some(signal)) => write!(f, "was ended by signal {signal}"),
            (Some(code), None) => write!(f, "ended with code {code}"),
            (None, None) => f.write_str("ended"),
        }
    }
}

/// Starts QEMU. Blocking, but short: returns once the program runs (or could not be run).
pub fn spawn(
    program: &Path,
    spec: &MachineSpec,
    taps: Vec<OwnedFd>,
    confinement: Option<&Confinement>,
) -> Result<ProcessId> {
    let paths = &spec.paths;
    super::log::trim(&paths.qemu_log, super::log::QEMU_LIMIT)?;
    let log = append(&paths.qemu_log)?;
    let errors = log
        .try_clone()
        .io(format_args!("Opening {}", paths.qemu_log.display()))?;
    let pid_file = File::create(paths.pid_file())
        .io(format_args!("Creating {}", paths.pid_file().display()))?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    let mut taps = taps.into_iter();
    let args = argv::arguments(spec, &mut |what| {
        let fd = open(what, &mut taps, confinement)?;
        let number = fd.as_raw_fd();
        fds.push(fd);
        Ok(number)
    })?;
    let mut command = Command::new(program);
    command
        .args(&args)
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors);
    let ends_with = spec
        .ends_with_daemon
        .then(|| std::process::id().cast_signed());
    prepare_child(&mut command, confinement.cloned(), pid_file, fds, ends_with);
    if spec.in_background {
        // SAFETY: a system call without pointers, between fork and exec.
        unsafe {
            command.pre_exec(|| check(libc::setpriority(libc::PRIO_PROCESS, 0, BACKGROUND)));
        }
    }
    let spawned = match spec.ends_with_daemon {
        true => on_lasting_thread(move || command.spawn())?,
        false => command.spawn(),
    };
    let child = spawned.map_err(|err| {
        let what = format!("{} could not be started: {err}", program.display());
        let code = match err.kind() {
            io::ErrorKind::NotFound => Code::QemuMissing,
            _ => Code::QemuFailed,
        };
        Error::new(code, what).with_source(err)
    })?;
    // `child` is dropped unwaited on purpose: `wait_exit` reaps it, and until then its pid is not
    // used again.
    let pid = child.id().cast_signed();
    if spec.in_background {
        // It has a session of its own, and a kernel that groups by session weighs the groups.
        let _ = std::fs::write(format!("/proc/{pid}/autogroup"), BACKGROUND.to_string());
    }
    ProcessId::of(pid).ok_or_else(|| {
        // It is a zombie already; take it away.
        let exit = reap_now(pid);
        Error::new(Code::QemuFailed, format!("QEMU {exit} while it started"))
            .detail(files::tail(&paths.qemu_log, 2000))
    })
}

/// Runs work on a thread that lives as long as this process does. A child's parent-death signal
/// comes when the *thread* ends that started it, and those of tokio's pool end when idle.
fn on_lasting_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    type Job = Box<dyn FnOnce() + Send>;
    static THREAD: OnceLock<Option<mpsc::Sender<Job>>> = OnceLock::new();
    let thread = THREAD.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        let work = move || queue.iter().for_each(|job| job());
        let thread = std::thread::Builder::new().name("qemu-parent".into());
        thread.spawn(work).is_ok().then_some(jobs)
    });
    let (done, outcome) = mpsc::channel();
    let job: Job = Box::new(move || drop(done.send(work())));
    thread
        .as_ref()
        .and_then(|jobs| jobs.send(job).ok())
        .and_then(|()| outcome.recv().ok())
        .ok_or_else(|| Error::internal("The thread that starts QEMU is gone"))
}

/// The niceness of a machine that nobody waits for.
const BACKGROUND: libc::c_int = 15;
const CLOEXEC: libc::c_int = libc::CLOSE_RANGE_CLOEXEC.cast_signed();

/// Registers what the child does between fork and exec.
fn prepare_child(
    command: &mut Command,
    confinement: Option<Confinement>,
    pid_file: File,
    fds: Vec<OwnedFd>,
    ends_with: Option<i32>,
) {
    let become_child = move || -> io::Result<()> {
        // SAFETY: plain system calls without pointers.
        unsafe {
            check(libc::setsid())?;
            libc::umask(0o077);
            // Whatever a library forgot to mark is not for QEMU. Marked, not closed: the pipe that
            // reports a failed exec is among them.
            check(libc::close_range(3, libc::c_uint::MAX, CLOEXEC))?;
        }
        // Numbers stay as they are: moving them (dup2) could hit that very pipe.
        for fd in &fds {
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
        }
        let no_core = libc::rlimit {
            rlim_cur: 0,
            rlim_max: 0,
        };
        // SAFETY: the pointer is to a living local.
        check(unsafe { libc::setrlimit(libc::RLIMIT_CORE, &no_core) })?;
        write_pid(&pid_file)?;
        if let Some(who) = &confinement {
            // SAFETY: the pointer and the length belong to one living vector.
            unsafe {
                check(libc::setgroups(who.groups.len(), who.groups.as_ptr()))?;
                check(libc::setresgid(who.gid, who.gid, who.gid))?;
                check(libc::setresuid(who.uid, who.uid, who.uid))?;
            }
        }
        // SAFETY: no pointers; also keeps set-uid programs without effect.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
        // After the change of the user, which clears it.
        if let Some(parent) = ends_with {
            // SAFETY: no pointers.
            check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) })?;
            // SAFETY: as above. The parent may have ended before the line above.
            if unsafe { libc::getppid() } != parent {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
        }
        Ok(())
    };
    // SAFETY: the closure runs after fork in a process with one thread; it makes system calls only,
    // and takes no lock and no memory.
    unsafe { command.pre_exec(become_child) };
}

fn check(result: libc::c_int) -> io::Result<()> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Writes our own pid in decimal, without taking memory (this runs between fork and exec). So the
/// number is on disk before QEMU runs, and a daemon that is killed right here finds it again.
fn write_pid(file: &File) -> io::Result<()> {
    let mut digits = [b'\n'; 12];
    let mut at = digits.len() - 1;
    let mut rest = std::process::id();
    loop {
        at -= 1;
        digits[at] = b'0' + (rest % 10) as u8;
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    rustix::io::write(file, &digits[at..])?;
    Ok(())
}

fn open(
    what: What,
    taps: &mut impl Iterator<Item = OwnedFd>,
    confinement: Option<&Confinement>,
) -> Result<OwnedFd> {
    let file = |path: &Path, options: &OpenOptions| {
        let file = options.open(path);
        file.io(format_args!("Opening {}", path.display()))
    };
    Ok(match what {
        What::Read(path) => file(&path, OpenOptions::new().read(true))?.into(),
        What::ReadWrite(path) => file(&path, OpenOptions::new().read(true).write(true))?.into(),
        What::Append(path) => append(&path)?.into(),
        What::Listen(path) => listen(&path)?.into(),
        What::Tap => taps
            .next()
            .ok_or_else(|| Error::internal("The machine has a NIC but was given no tap"))?,
        What::LooseTap => super::loose_tap::make()?,
        What::Folder(path) => folder(&path, confinement)?.into(),
        What::Memory { path, write } => {
            let mut options = OpenOptions::new();
            options.read(true).write(write);
            file(&path, options.custom_flags(libc::O_NOFOLLOW))?.into()
        }
    })
}

/// An empty folder that only QEMU's user can enter.
fn folder(path: &Path, confinement: Option<&Confinement>) -> Result<File> {
    let what = || format!("Making {}", path.display());
    files::remove_folder(path)?;
    files::create_folder(path, 0o700)?;
    if let Some(who) = confinement {
        std::os::unix::fs::chown(path, Some(who.uid), Some(who.gid)).io(what())?;
    }
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
        .open(path)
        .io(what())
}

/// Write only: QEMU looks for a descriptor of just that kind when it opens a log.
fn append(path: &Path) -> Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .io(format_args!("Opening {}", path.display()))
}

/// Binds a socket in a folder that only we can enter; one left over from before goes.
fn listen(path: &Path) -> Result<UnixListener> {
    files::remove_file(path)?;
    UnixListener::bind(path).io(format_args!("Listening on {}", path.display()))
}

/// Finds the QEMU of a machine again by the pid that it left at its start: the process must live
/// and carry this id on its command line.
pub fn find(paths: &Paths, uuid: uuid::Uuid) -> Option<ProcessId> {
    let text = files::read_bounded(&paths.pid_file(), 64).ok()?;
    let pid: i32 = std::str::from_utf8(&text).ok()?.trim().parse().ok()?;
    let process = ProcessId::of(pid)?;
    let line = files::read_bounded(Path::new(&format!("/proc/{pid}/cmdline")), 1 << 20).ok()?;
    let wanted = uuid.to_string();
    let args: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    args.windows(2)
        .any(|pair| pair[0] == b"-uuid" && pair[1] == wanted.as_bytes())
        .then_some(process)
        .filter(|process| process.is_alive())
}

/// A descriptor that stands for just this process; `None` if it is gone.
fn pidfd(process: ProcessId) -> Result<Option<OwnedFd>> {
    let Some(pid) = Pid::from_raw(process.pid) else {
        return Ok(None);
    };
    let fd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::SRCH) => return Ok(None),
        Err(err) => return Err(err).io(format_args!("Watching process {}", process.pid)),
    };
    // Opened first, looked at second: if the pid had another owner by now, the start time tells.
    // A zombie of ours has no start time either, but is still to be reaped.
    let same = match ProcessId::of(process.pid) {
        Some(now) => now == process,
        None => true,
    };
    Ok(same.then_some(fd))
}

/// Waits until the process has ended, whoever started it; takes its exit status if it is our child.
pub async fn wait_exit(process: ProcessId) -> Result<Exit> {
    let unknown = Exit {
        code: None,
        signal: None,
    };
    let Some(fd) = pidfd(process)? else {
        return Ok(unknown);
    };
    let what = || format!("Watching process {}", process.pid);
    // SAFETY: an owned descriptor stays the same and open as long as the AsyncFd has it.
    let fd = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }
        .map_err(std::io::Error::from)
        .io(what())?;
    let _ready = fd.readable().await.io(what())?;
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    match rustix::process::waitid(WaitId::PidFd(fd.get_ref().as_fd()), options) {
        Ok(Some(status)) => Ok(Exit {
            code: status.exit_status(),
            signal: status.terminating_signal(),
        }),
        // Not our child, or already taken by someone else.
        Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(unknown),
        Err(err) => Err(err).io(what()),
    }
}

/// Sends SIGKILL to just this process; one that is gone is fine.
pub fn kill(process: ProcessId) -> Result<()> {
    let Some(fd) = pidfd(process)? else {
        return Ok(());
    };
    match rustix::process::pidfd_send_signal(&fd, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(err) => Err(err).io(format_args!("Killing process {}", process.pid)),
    }
}

fn reap_now(pid: i32) -> Exit {
    let status = Pid::from_raw(pid)
        .and_then(|pid| rustix::process::waitid(WaitId::Pid(pid), WaitIdOptions::EXITED).ok())
        .flatten();
    Exit {
        code: status.as_ref().and_then(|status| status.exit_status()),
        signal: status
            .as_ref()
            .and_then(|status| status.terminating_signal()),
    }
}
