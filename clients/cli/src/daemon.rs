//! The way to a daemon that answers; a user's own daemon is started if none does.
//!
//! Two clients may do that at once: both start one, the storage's lock lets one of them live, and
//! both clients wait for the socket.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pileus_base::{Code, Error, ResultExt, files};
use pileus_client::Client;

use crate::environment::Environment;
use crate::error::CommandError;
use crate::place::{Place, Start};
use crate::progress::Progress;

/// Bound on a daemon's start, until it answers.
const START: Duration = Duration::from_secs(15);
/// How long another client's daemon may still take after our own has given way to it.
const OTHER: Duration = Duration::from_secs(3);

pub(crate) async fn connect(place: &Place, env: &Environment) -> Result<Client, CommandError> {
    let client = Client::new(&place.socket)?;
    let Some(start) = &place.start else {
        return Ok(client);
    };
    if UnixStream::connect(&place.socket).is_ok() {
        return Ok(client);
    }
    let progress = Progress::new(env.terminals.stderr, false);
    let line = progress.line("pileusd");
    line.message("Starting the daemon");
    let child = spawn(start, env)?;
    wait(&client, child, start).await?;
    Ok(client)
}

/// Whether a daemon answers there now; starts none.
pub(crate) fn answers(place: &Place) -> bool {
    UnixStream::connect(&place.socket).is_ok()
}

fn spawn(start: &Start, env: &Environment) -> Result<Child, Error> {
    let program = find_program(env).ok_or_else(|| {
        Error::new(
            Code::DaemonUnreachable,
            "No daemon is running, and the program pileusd was not found to start one",
        )
        .advise("Install pileusd beside pileus, or start the system's daemon.")
    })?;
    if let Some(folder) = start.log.parent() {
        files::create_folder(folder, 0o700)?;
    }
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(&start.log)
        .io(format_args!("Opening {}", start.log.display()))?;
    let errors = log.try_clone().io("Opening the daemon's log")?;
    let mut command = Command::new(&program);
    if let Some(storage) = &start.storage {
        command.arg("--storage").arg(storage);
    }
    command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(errors);
    detach(&mut command);
    command
        .spawn()
        .io(format_args!("Starting {}", program.display()))
}

/// Gives the program a session of its own, so that a closed terminal does not end it.
#[allow(unsafe_code)]
fn detach(command: &mut Command) {
    // SAFETY: between fork and exec only setsid is called, which is async-signal-safe and touches
    // no memory of the parent.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
}

/// The daemon's program: beside this one, else in PATH.
pub(crate) fn find_program(env: &Environment) -> Option<PathBuf> {
    let path = std::env::split_paths(&env.search_path);
    let mut folders = env.own_folder.clone().into_iter().chain(path);
    folders.find_map(|folder| {
        let program = folder.join("pileusd");
        let usable = rustix::fs::access(&program, rustix::fs::Access::EXEC_OK).is_ok();
        (usable && program.is_file()).then_some(program)
    })
}

async fn wait(client: &Client, mut child: Child, start: &Start) -> Result<(), CommandError> {
    let mut deadline = Instant::now() + START;
    let mut ended = None;
    let mut pause = Duration::from_millis(5);
    loop {
        if UnixStream::connect(client.socket()).is_ok() && client.server().await.is_ok() {
            return Ok(());
        }
        if ended.is_none() {
            ended = child.try_wait().unwrap_or(None);
            if ended.is_some() {
                deadline = deadline.min(Instant::now() + OTHER);
            }
        }
        if Instant::now() > deadline {
            break;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(100));
    }
    let what = match ended {
        Some(status) => format!("The daemon ended at once ({status})"),
        None => format!("The daemon did not answer within {} s", START.as_secs()),
    };
    let mut err = Error::new(Code::DaemonUnreachable, what)
        .advise(format!("Its log is {}.", start.log.display()));
    let log = files::tail(&start.log, 4096);
    let from = log.lines().count().saturating_sub(10);
    err.details = log.lines().skip(from).map(str::to_owned).collect();
    Err(err.into())
}
