//! A command or shell in a guest: connects the terminal or the pipes of this process with it until
//! it ends, and gives its exit code.
//!
//! ```text
//! stdin  ─ thread ─▶ 4 pieces ─┐                    ┌─▶ 8 pieces ─ thread ─▶ stdout, stderr
//! signals, window size ────────┴─▶ WebSocket ───────┘
//! ```
//!
//! The threads exist because reading and writing these streams may block; the short queues between
//! keep memory bounded whoever is slow.

use std::cell::Cell;
use std::io::{self, Write};
use std::time::Duration;

use bytes::Bytes;
use pileus_api::{Code, ExecEvent, ExecRequest, InstanceState, OperationState, StartRequest, Tty};
use pileus_base::Error;
use pileus_client::{Client, ExecInput, ExecOutput, ExecPart};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::context::Context;
use crate::error::{CommandError, Kind, Outcome};
use crate::signals::{self, Received, Signals};
use crate::terminal::{self, RawMode};

/// So many signals that the command did not heed end this process.
const PATIENCE: u32 = 3;
/// How long a command has after TERM, and after KILL.
const GRACE: Duration = Duration::from_secs(5);

/// Runs a command (an empty one is the login shell) and returns its exit code. An instance that is
/// stopped is started first.
pub(crate) async fn run(
    context: &Context,
    name: &str,
    command: Vec<String>,
    working_directory: Option<String>,
    start: StartRequest,
) -> Outcome {
    let client = context.client().await?;
    let terminals = context.env.terminals;
    let tty = (terminals.stdin && terminals.stdout).then(|| terminal_of(context));
    let request = ExecRequest {
        command,
        working_directory,
        tty,
        ..Default::default()
    };
    // Before anything runs, so that no signal is lost between start and forwarding.
    let mut signals =
        Signals::to_forward().map_err(|err| Error::io("Listening to signals", err))?;
    let (input, output) = match open(&client, name, &request).await {
        Err(err) if err.code == Code::WrongState => {
            start_instance(context, &client, name, &start).await?;
            open(&client, name, &request).await
        }
        result => result,
    }
    .map_err(channel_error)?;
    let limits = Limits::default();
    match connect(input, output, &mut signals, request.tty.is_some(), limits).await? {
        End::Exit(code) => Ok(code),
        // No limits were given.
        End::OutOfTime | End::TooMuchOutput => Err(Error::internal("A limit of none").into()),
    }
}

/// What a command may use.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Limits {
    pub time: Option<Duration>,
    /// Bytes of standard output and error together.
    pub output: Option<u64>,
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Exit(u8),
    OutOfTime,
    TooMuchOutput,
}

/// Runs a command on a running instance, within limits.
pub(crate) async fn attach(
    client: &Client,
    name: &str,
    request: &ExecRequest,
    signals: &mut Signals,
    limits: Limits,
) -> Result<End, CommandError> {
    // Until it runs there is nobody to pass a signal on to.
    let (input, output) = tokio::select! {
        opened = open(client, name, request) => opened.map_err(channel_error)?,
        signal = signals.next() => return Err(ended_by(signal)),
    };
    connect(input, output, signals, request.tty.is_some(), limits).await
}

/// The terminal that the command gets.
pub(crate) fn terminal_of(context: &Context) -> Tty {
    let (cols, rows) = terminal::size();
    let term = context.env.term.clone();
    Tty { term, cols, rows }
}

/// Opens the session and waits until the command has started.
pub(crate) async fn open(
    client: &Client,
    name: &str,
    request: &ExecRequest,
) -> Result<(ExecInput, ExecOutput), Error> {
    let (input, mut output) = client.exec(name, request.clone()).await?;
    match output.next().await? {
        ExecPart::Event(ExecEvent::Started) => Ok((input, output)),
        ExecPart::Event(ExecEvent::Error { error }) => Err(error.into()),
        _ => Err(Error::internal("The daemon began the session out of order")),
    }
}

async fn start_instance(
    context: &Context,
    client: &Client,
    name: &str,
    request: &StartRequest,
) -> Result<(), CommandError> {
    let instance = client.instance(name).await?;
    if instance.deleted {
        let text = format!("instance \"{name}\" is deleted");
        return Err(Error::new(Code::InstanceDeleted, text).into());
    }
    if instance.state == InstanceState::Running {
        // It came up meanwhile.
        return Ok(());
    }
    let mut line = context.progress().line(name);
    let operation = client.start(name, request).await?;
    let operation = client.follow(operation, |event| line.event(event)).await?;
    line.end(&operation);
    if operation.state != OperationState::Succeeded {
        return Err(CommandError::of_operation(operation));
    }
    Ok(())
}

/// Errors of the way into a guest have an exit code that no command has by chance.
fn channel_error(err: Error) -> CommandError {
    let kind = match err.code {
        Code::GuestUnreachable | Code::ExecFailed => Kind::Channel,
        _ => Kind::Failed,
    };
    CommandError::new(kind, err)
}

async fn connect(
    input: ExecInput,
    mut output: ExecOutput,
    signals: &mut Signals,
    tty: bool,
    limits: Limits,
) -> Result<End, CommandError> {
    // Restored when this function is left, by whatever way.
    let _raw = if tty {
        RawMode::enter().map_err(|err| Error::io("Setting up the terminal", err))?
    } else {
        None
    };
    let (writer, mut written) = Writer::start();
    let (passed_on, received) = mpsc::channel(8);
    let out_of_time = Cell::new(false);
    let time_limit = limit_time(limits.time, passed_on.clone(), &out_of_time);
    let kill = passed_on.clone();
    let watch = watch_signals(signals, passed_on, tty);
    let feed = feed(input, received, tty);
    let session = async {
        let end = drain(&mut output, &writer, limits.output, &kill).await?;
        // What the command said must be out before this process ends.
        drop(writer);
        match (&mut written).await {
            Ok(Err(err)) => Err(err.into()),
            _ if out_of_time.get() => Ok(End::OutOfTime),
            _ => Ok(end),
        }
    };
    tokio::select! {
        result = session => result,
        () = time_limit => Ok(End::OutOfTime),
        signal = watch => Err(ended_by(signal)),
        err = feed => Err(err),
    }
}

/// The error of a signal that was meant for this process.
pub(crate) fn ended_by(signal: Received) -> CommandError {
    CommandError::new(
        Kind::Signal(signal.number),
        Error::new(Code::Cancelled, format!("Ended by SIG{}", signal.name)),
    )
}

/// Asks the command to end when its time is over, and then makes it; returns when even that did not
/// help.
async fn limit_time(
    limit: Option<Duration>,
    passed_on: mpsc::Sender<&'static str>,
    over: &Cell<bool>,
) {
    let Some(limit) = limit else {
        return std::future::pending().await;
    };
    tokio::time::sleep(limit).await;
    over.set(true);
    for signal in ["TERM", "KILL"] {
        // A full queue means that the session is stuck; then only waiting is left.
        let _ = passed_on.try_send(signal);
        tokio::time::sleep(GRACE).await;
    }
}

/// Passes signals on; returns the one that ends this process.
async fn watch_signals(
    signals: &mut Signals,
    passed_on: mpsc::Sender<&'static str>,
    tty: bool,
) -> Received {
    let mut count = 0;
    loop {
        let received = signals.next().await;
        // With a terminal the keys reach the guest as bytes, so a signal is meant for this process.
        let ends = tty && matches!(received.name, "TERM" | "HUP");
        count += 1;
        if ends || count > PATIENCE {
            return received;
        }
        // A full queue means that the session is stuck; then only the count matters.
        let _ = passed_on.try_send(received.name);
    }
}

/// Sends standard input, signals and window sizes to the command; never returns unless that fails
/// for a reason that the other direction would not tell.
async fn feed(
    mut input: ExecInput,
    mut signals: mpsc::Receiver<&'static str>,
    tty: bool,
) -> CommandError {
    let mut sizes = match signal(SignalKind::window_change()) {
        Ok(sizes) => sizes,
        Err(err) => return Error::io("Listening to signals", err).into(),
    };
    let mut stdin = read_stdin();
    let mut open = true;
    loop {
        let sent = tokio::select! {
            Some(name) = signals.recv() => input.signal(name).await,
            _ = sizes.recv(), if tty => {
                let (cols, rows) = terminal::size();
                input.resize(cols, rows).await
            }
            piece = stdin.recv(), if open => match piece {
                Some(piece) => input.stdin(piece).await,
                None => {
                    open = false;
                    input.eof().await
                }
            },
        };
        if sent.is_err() {
            // The reading side learns why and ends the session.
            return std::future::pending().await;
        }
    }
}

/// Shows what the command says until it ends. One that says more than it may is killed.
async fn drain(
    output: &mut ExecOutput,
    writer: &Writer,
    limit: Option<u64>,
    kill: &mpsc::Sender<&'static str>,
) -> Result<End, CommandError> {
    let mut left = limit.unwrap_or(u64::MAX);
    loop {
        let (stream, mut bytes) = match output.next().await.map_err(channel_error)? {
            ExecPart::Stdout(bytes) => (Stream::Stdout, bytes),
            ExecPart::Stderr(bytes) => (Stream::Stderr, bytes),
            ExecPart::Event(event) => match ended(event) {
                Some(end) => return end,
                None => continue,
            },
        };
        let len = bytes.len() as u64;
        if len > left {
            bytes.truncate(left as usize);
            writer.write(stream, bytes).await?;
            let _ = kill.try_send("KILL");
            // It is as good as over, however long its end takes.
            let _ = tokio::time::timeout(GRACE, discard(output)).await;
            return Ok(End::TooMuchOutput);
        }
        left -= len;
        writer.write(stream, bytes).await?;
    }
}

/// What an event says of the command's end.
pub(crate) fn ended(event: ExecEvent) -> Option<Result<End, CommandError>> {
    Some(match event {
        ExecEvent::Started => return None,
        // As the kernel does: the lowest byte.
        ExecEvent::Exit { code } => Ok(End::Exit((code & 0xff) as u8)),
        ExecEvent::Signalled { signal } => Ok(End::Exit(
            128 + signals::number(&signal).unwrap_or_default(),
        )),
        ExecEvent::Error { error } => Err(CommandError::new(Kind::Channel, error.into())),
    })
}

/// Waits for a command's end.
async fn discard(output: &mut ExecOutput) {
    while let Ok(part) = output.next().await {
        if matches!(part, ExecPart::Event(event) if event != ExecEvent::Started) {
            return;
        }
    }
}

/// Reads standard input piece by piece in a thread; the channel closes at its end. The thread may
/// outlive the session, waiting for a key; the process's end ends it.
pub(crate) fn read_stdin() -> mpsc::Receiver<Bytes> {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match rustix::io::read(rustix::stdio::stdin(), &mut buffer[..]) {
                Err(rustix::io::Errno::INTR) => {}
                Ok(len) if len > 0 => {
                    let piece = Bytes::copy_from_slice(&buffer[..len]);
                    if sender.blocking_send(piece).is_err() {
                        return;
                    }
                }
                // The end, or a stream that can't be read, which is as good as empty.
                _ => return,
            }
        }
    });
    receiver
}

#[derive(Clone, Copy)]
enum Stream {
    Stdout,
    Stderr,
}

/// Writes to standard output and error in a thread.
struct Writer(mpsc::Sender<(Stream, Bytes)>);

impl Writer {
    /// Also gives what tells when all is written.
    fn start() -> (Self, oneshot::Receiver<io::Result<()>>) {
        let (sender, mut receiver) = mpsc::channel::<(Stream, Bytes)>(8);
        let (done, written) = oneshot::channel();
        std::thread::spawn(move || {
            let mut result = Ok(());
            while let Some((stream, bytes)) = receiver.blocking_recv() {
                result = match stream {
                    Stream::Stdout => write_all(io::stdout().lock(), &bytes),
                    // Without standard error the command can still do its work.
                    Stream::Stderr => write_all(io::stderr().lock(), &bytes).or(Ok(())),
                };
                if result.is_err() {
                    break;
                }
            }
            // Nobody listens any more if the session ended otherwise.
            let _ = done.send(result);
        });
        (Self(sender), written)
    }

    async fn write(&self, stream: Stream, bytes: Bytes) -> Result<(), CommandError> {
        self.0.send((stream, bytes)).await.map_err(|_| {
            // The thread ends early only because the reader of standard output is gone.
            io::Error::from(io::ErrorKind::BrokenPipe).into()
        })
    }
}

fn write_all(mut to: impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(bytes)?;
    to.flush()
}
