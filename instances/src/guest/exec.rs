//! Commands and shells in a guest. A session is three queues, so that whoever drives it (a WebSocket of
//! the daemon, a test) needs to know nothing of SSH:
//!
//! ```text
//!   stdin   ─▸ bytes ─▸ (waits for the guest's window)      end: drop the sender, or Control::Eof
//!   control ─▸ Resize, Signal, Eof
//!   output  ◂─ Stdout, Stderr, … and last Exit, Signal or Failed
//! ```
//!
//! Everything is bounded: a guest that does not read stops `stdin`, a reader that does not take
//! `output` stops the guest. Dropping `output` hangs the command up.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pileus_base::{Code, Error, Result};
use russh::client::Msg;
use russh::{ChannelMsg, ChannelReadHalf, ChannelWriteHalf, Pty, Sig};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};

use super::quote;
use super::ssh::{Connection, SshPool, Stall};

/// Bytes of output kept for a reader before the guest has to wait.
const MAX_QUEUE: usize = 4 << 20;
/// A reader that takes nothing for this long holds up the others: they go another way.
const STALL_AFTER: Duration = Duration::from_millis(250);
const START_BOUND: Duration = Duration::from_secs(60);
/// From SIGHUP to the end of the pipes.
const HANG_UP_GRACE: Duration = Duration::from_secs(2);
const MAX_ENV: usize = 256;

/// The terminal of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tty {
    /// The value of TERM.
    pub term: String,
    pub cols: u32,
    pub rows: u32,
    /// Terminal modes by their number in RFC 4254, section 8; unknown ones are left out.
    pub modes: Vec<(u8, u32)>,
}

/// What to run.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecSpec {
    /// Words of the command, each quoted for the login shell that runs it; none: the login shell itself.
    pub command: Vec<String>,
    pub cwd: Option<String>,
    pub env: Vec<(String, String)>,
    pub tty: Option<Tty>,
    /// The guest's SFTP server instead of a command: it speaks version 3 on standard input and output.
    pub sftp: bool,
}

/// Where distributions keep the SFTP server, for an SSH server that does not know the subsystem.
const SFTP_SERVERS: [&str; 4] = [
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
    "/usr/libexec/sftp-server",
    "/usr/lib/ssh/sftp-server",
];

/// Runs the first of them that is there.
pub(super) fn sftp_line() -> String {
    let programs = SFTP_SERVERS.join(" ");
    format!("for p in {programs}; do [ -x $p ] && exec $p; done; exit 127")
}

/// What comes from the command. The last one is `Exit`, `Signal` or `Failed`.
#[derive(Debug)]
pub enum Output {
    Stdout(Bytes),
    Stderr(Bytes),
    /// The exit code.
    Exit(u32),
    /// The command was ended by this signal (`KILL`, without `SIG`).
    Signal(String),
    /// The connection broke before the command ended.
    Failed(Error),
}

/// What goes to the command beside its input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    Resize {
        cols: u32,
        rows: u32,
    },
    /// A signal's name without `SIG`: HUP, INT, TERM, KILL, USR1, …
    Signal(String),
    /// No more input after what was sent so far.
    Eof,
}

/// A running command.
#[derive(Debug)]
pub struct ExecSession {
    pub stdin: mpsc::Sender<Bytes>,
    pub output: mpsc::Receiver<Output>,
    pub control: mpsc::Sender<Control>,
}

impl SshPool {
    /// Starts a command or a shell.
    pub async fn exec(&self, spec: &ExecSpec) -> Result<ExecSession> {
        spec.checked_env()?;
        if spec.sftp {
            let begun = self.begin(spec, Program::Subsystem("sftp")).await;
            match begun {
                Err(err) if err.code == Code::ExecFailed => {
                    tracing::debug!(%err, "no subsystem sftp, its program is tried");
                }
                begun => return begun,
            }
        }
        let line = spec.line(self.user())?;
        self.begin(spec, line.map_or(Program::Shell, Program::Line))
            .await
    }

    #[cfg(test)]
    pub(super) async fn subsystem(&self, name: &'static str) -> Result<ExecSession> {
        self.begin(&ExecSpec::default(), Program::Subsystem(name))
            .await
    }

    async fn begin(&self, spec: &ExecSpec, program: Program) -> Result<ExecSession> {
        let (channel, connection) = self.channel().await?;
        let (mut read, write) = channel.split();
        let early = timeout(START_BOUND, start(&mut read, &write, spec, program))
            .await
            .map_err(|_| failed("it did not start within its bound"))??;
        let (stdin, stdin_in) = mpsc::channel(8);
        let (control, control_in) = mpsc::channel(16);
        let (output_out, output) = mpsc::channel(8);
        let pump = Pump {
            read,
            write: Arc::new(write),
            connection,
            output: output_out,
            queue: early,
            has_tty: spec.tty.is_some(),
        };
        tokio::spawn(pump.run(stdin_in, control_in));
        Ok(ExecSession {
            stdin,
            output,
            control,
        })
    }
}

/// What a channel is asked for.
enum Program {
    Shell,
    /// For the login shell.
    Line(String),
    Subsystem(&'static str),
}

impl ExecSpec {
    /// The line for the login shell; `None` is the login shell itself.
    fn line(&self, user: &str) -> Result<Option<String>> {
        if self.sftp {
            let look = sftp_line();
            return quote::command_line(&["sh".into(), "-c".into(), look], None, user).map(Some);
        }
        match (self.command.is_empty(), &self.cwd) {
            (true, None) => Ok(None),
            (true, Some(_)) => {
                let enter = quote::command_line(&[":".into()], self.cwd.as_deref(), user)?;
                Ok(Some(format!("{enter} && exec \"$SHELL\" -l")))
            }
            (false, cwd) => quote::command_line(&self.command, cwd.as_deref(), user).map(Some),
        }
    }

    fn checked_env(&self) -> Result<()> {
        let bad = |what: String| Err(Error::new(Code::InvalidArgument, what));
        if self.env.len() > MAX_ENV {
            return bad(format!(
                "More than {MAX_ENV} environment variables were given"
            ));
        }
        for (name, value) in &self.env {
            let letters = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            let ok = !name.is_empty()
                && name.bytes().all(letters)
                && !name.as_bytes()[0].is_ascii_digit();
            if !ok {
                return bad(format!(
                    "{name:?} is not the name of an environment variable"
                ));
            }
            if value.contains('\0') || value.len() > 64 * 1024 {
                return bad(format!(
                    "The value of {name} is too long or holds a NUL byte"
                ));
            }
        }
        Ok(())
    }
}

fn failed(why: impl std::fmt::Display) -> Error {
    Error::new(
        Code::ExecFailed,
        format!("The command could not be run: {why}"),
    )
}

fn lost(err: russh::Error) -> Error {
    Error::new(
        Code::GuestUnreachable,
        format!("The connection to the guest broke: {err}"),
    )
    .with_source(err)
}

/// Asks for all that the command needs and waits for the answer to the last request. Returns output
/// that came before it.
async fn start(
    read: &mut ChannelReadHalf,
    write: &ChannelWriteHalf<Msg>,
    spec: &ExecSpec,
    program: Program,
) -> Result<VecDeque<Output>> {
    for (name, value) in &spec.env {
        // An sshd that takes no variables only ignores them.
        write.set_env(false, name, value).await.map_err(lost)?;
    }
    if let Some(tty) = &spec.tty {
        let modes: Vec<(Pty, u32)> = tty
            .modes
            .iter()
            .filter_map(|(code, value)| Some((Pty::from_u8(*code)?, *value)))
            .collect();
        let size = (tty.cols.min(10_000), tty.rows.min(10_000));
        write
            .request_pty(false, &tty.term, size.0, size.1, 0, 0, &modes)
            .await
            .map_err(lost)?;
    }
    let asked = match program {
        Program::Line(line) => write.exec(true, line).await,
        Program::Shell => write.request_shell(true).await,
        Program::Subsystem(name) => write.request_subsystem(true, name).await,
    };
    asked.map_err(lost)?;
    let mut early = VecDeque::new();
    loop {
        match read.wait().await {
            Some(ChannelMsg::Success) => return Ok(early),
            Some(ChannelMsg::Failure) => return Err(failed("the guest's SSH server refused it")),
            Some(ChannelMsg::Data { data }) => early.push_back(Output::Stdout(data)),
            Some(ChannelMsg::ExtendedData { data, ext: 1 }) => {
                early.push_back(Output::Stderr(data));
            }
            Some(ChannelMsg::Close) | None => {
                return Err(Error::new(
                    Code::GuestUnreachable,
                    "The guest closed the session before the command ran",
                ));
            }
            Some(_) => {}
        }
    }
}

/// Carries the bytes of one session.
struct Pump {
    read: ChannelReadHalf,
    write: Arc<ChannelWriteHalf<Msg>>,
    connection: Arc<Connection>,
    output: mpsc::Sender<Output>,
    queue: VecDeque<Output>,
    has_tty: bool,
}

impl Pump {
    async fn run(mut self, stdin: mpsc::Receiver<Bytes>, mut control: mpsc::Receiver<Control>) {
        let (eof, eof_in) = tokio::sync::watch::channel(false);
        let input = tokio::spawn(feed(Arc::clone(&self.write), stdin, eof_in));
        let output = self.output.clone();
        let mut end = None;
        let mut queued: usize = self.queue.iter().map(weight).sum();
        let mut more = true;
        let mut controlled = true;
        let mut stall: Option<Stall> = None;
        while more || !self.queue.is_empty() {
            let full = queued >= MAX_QUEUE;
            if !full {
                stall = None;
            }
            tokio::select! {
                biased;
                () = output.closed() => {
                    input.abort();
                    self.hang_up().await;
                    return;
                }
                Some(wish) = control.recv(), if controlled && more => {
                    if self.obey(wish, &eof).await.is_err() {
                        controlled = false;
                    }
                }
                place = output.reserve(), if !self.queue.is_empty() => {
                    if let (Ok(place), Some(piece)) = (place, self.queue.pop_front()) {
                        queued -= weight(&piece);
                        place.send(piece);
                    }
                }
                message = self.read.wait(), if more && !full => match message {
                    Some(ChannelMsg::Data { data }) => {
                        let piece = Output::Stdout(data);
                        queued += weight(&piece);
                        self.queue.push_back(piece);
                    }
                    Some(ChannelMsg::ExtendedData { data, ext: 1 }) => {
                        let piece = Output::Stderr(data);
                        queued += weight(&piece);
                        self.queue.push_back(piece);
                    }
                    // The status may come before the last bytes.
                    Some(ChannelMsg::ExitStatus { exit_status }) => end = Some(Output::Exit(exit_status)),
                    Some(ChannelMsg::ExitSignal { signal_name, .. }) => {
                        end = Some(Output::Signal(signal_text(&signal_name)));
                    }
                    Some(ChannelMsg::Close) | None => more = false,
                    Some(_) => {}
                },
                () = self.connection.gone(), if more => more = false,
                () = sleep(STALL_AFTER), if full && stall.is_none() => {
                    stall = Some(Stall::new(&self.connection));
                }
            }
        }
        input.abort();
        drop(stall);
        let _ = timeout(START_BOUND, self.write.close()).await;
        let end = end.unwrap_or_else(|| {
            Output::Failed(Error::new(
                Code::GuestUnreachable,
                "The connection to the guest ended before the command did",
            ))
        });
        let _ = self.output.send(end).await;
    }

    async fn obey(
        &self,
        wish: Control,
        eof: &tokio::sync::watch::Sender<bool>,
    ) -> std::result::Result<(), russh::Error> {
        match wish {
            Control::Resize { cols, rows } => {
                let (cols, rows) = (cols.min(10_000), rows.min(10_000));
                self.write.window_change(cols, rows, 0, 0).await
            }
            Control::Signal(name) => match signal(&name) {
                Some(signal) => self.write.signal(signal).await,
                None => Ok(()),
            },
            Control::Eof => {
                eof.send_replace(true);
                Ok(())
            }
        }
    }

    /// Nobody listens any more: the command gets SIGHUP and a moment to tidy up while its output is
    /// thrown away; with a terminal, the terminal's end does that.
    async fn hang_up(&mut self) {
        let Self { read, write, .. } = self;
        if !self.has_tty {
            let tidy = async {
                if write.signal(Sig::HUP).await.is_ok() {
                    while !matches!(read.wait().await, None | Some(ChannelMsg::Close)) {}
                }
            };
            let _ = timeout(HANG_UP_GRACE, tidy).await;
        }
        let _ = timeout(START_BOUND, self.write.close()).await;
    }
}

/// Bytes that a piece holds in memory, about.
fn weight(piece: &Output) -> usize {
    match piece {
        Output::Stdout(bytes) | Output::Stderr(bytes) => bytes.len() + 128,
        _ => 128,
    }
}

/// Input, as fast as the guest takes it; at its end EOF.
async fn feed(
    write: Arc<ChannelWriteHalf<Msg>>,
    mut stdin: mpsc::Receiver<Bytes>,
    mut eof: tokio::sync::watch::Receiver<bool>,
) {
    let mut told = false;
    loop {
        let piece = tokio::select! {
            biased;
            piece = stdin.recv() => piece,
            changed = eof.changed(), if !told => {
                told = true;
                if changed.is_ok() {
                    // What is queued still goes.
                    stdin.close();
                }
                continue;
            }
        };
        match piece {
            Some(bytes) => {
                if write.data_bytes(bytes).await.is_err() {
                    return;
                }
            }
            None => {
                let _ = write.eof().await;
                return;
            }
        }
    }
}

fn signal(name: &str) -> Option<Sig> {
    Some(match name.strip_prefix("SIG").unwrap_or(name) {
        "ABRT" => Sig::ABRT,
        "ALRM" => Sig::ALRM,
        "HUP" => Sig::HUP,
        "INT" => Sig::INT,
        "KILL" => Sig::KILL,
        "PIPE" => Sig::PIPE,
        "QUIT" => Sig::QUIT,
        "TERM" => Sig::TERM,
        "USR1" => Sig::USR1,
        "USR2" => Sig::Custom("USR2".into()),
        _ => return None,
    })
}

fn signal_text(signal: &Sig) -> String {
    match signal {
        Sig::Custom(name) => super::wire::clean(name).chars().take(20).collect(),
        known => format!("{known:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(command: &[&str], cwd: Option<&str>) -> ExecSpec {
        ExecSpec {
            command: command.iter().map(|c| (*c).to_owned()).collect(),
            cwd: cwd.map(str::to_owned),
            ..ExecSpec::default()
        }
    }

    #[test]
    fn lines() {
        let line = |c: &[&str], d| spec(c, d).line("ubuntu").unwrap();
        assert_eq!(line(&[], None), None);
        assert_eq!(
            line(&[], Some("/a b")).unwrap(),
            "cd '/a b' && : && exec \"$SHELL\" -l"
        );
        assert_eq!(line(&["a", "b c"], Some("/d")).unwrap(), "cd /d && a 'b c'");
    }

    #[test]
    fn variables_are_checked() {
        let with = |name: &str, value: &str| {
            ExecSpec {
                env: vec![(name.into(), value.into())],
                ..ExecSpec::default()
            }
            .checked_env()
        };
        assert!(with("LC_ALL", "C").is_ok());
        for (name, value) in [
            ("", "x"),
            ("A=B", "x"),
            ("1A", "x"),
            ("A", "x\0"),
            ("A B", ""),
        ] {
            assert_eq!(
                with(name, value).unwrap_err().code,
                Code::InvalidArgument,
                "{name:?}"
            );
        }
    }

    #[test]
    fn signals_by_name() {
        assert!(matches!(signal("SIGINT"), Some(Sig::INT)));
        assert!(signal("NONE").is_none());
        assert_eq!(signal_text(&Sig::TERM), "TERM");
        assert_eq!(signal_text(&Sig::Custom("X\u{1b}[1m".into())), "X");
    }
}
