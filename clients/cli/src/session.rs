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

use std::io::{self, Write};

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
    let tty = (terminals.stdin && terminals.stdout).then(|| {
        let (cols, rows) = terminal::size();
        let term = context.env.term.clone();
        Tty { term, cols, rows }
    });
    let request = ExecRequest {
        command,
        working_directory,
        tty,
        ..Default::default()
    };
    // Before anything runs, so that no signal is lost between start and forwarding.
    let signals = Signals::to_forward().map_err(|err| Error::io("Listening to signals", err))?;
    let (input, output) = match open(&client, name, &request).await {
        Err(err) if err.code == Code::WrongState => {
            start_instance(context, &client, name, &start).await?;
            open(&client, name, &request).await
        }
        result => result,
    }
    .map_err(channel_error)?;
    connect(input, output, signals, request.tty.is_some()).await
}

/// Opens the session and waits until the command has started.
async fn open(
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
    mut signals: Signals,
    tty: bool,
) -> Outcome {
    // Restored when this function is left, by whatever way.
    let _raw = if tty {
        Some(RawMode::enter().map_err(|err| Error::io("Setting up the terminal", err))?)
    } else {
        None
    };
    let (writer, mut written) = Writer::start();
    let (passed_on, received) = mpsc::channel(8);
    let watch = watch_signals(&mut signals, passed_on, tty);
    let feed = feed(input, received, tty);
    let session = async {
        let code = drain(&mut output, &writer).await?;
        // What the command said must be out before this process ends.
        drop(writer);
        match (&mut written).await {
            Ok(Err(err)) => Err(err.into()),
            _ => Ok(code),
        }
    };
    tokio::select! {
        result = session => result,
        signal = watch => Err(CommandError::new(
            Kind::Signal(signal.number),
            Error::new(Code::Cancelled, format!("Ended by SIG{}", signal.name)),
        )),
        err = feed => Err(err),
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

/// Shows what the command says until it ends; returns its exit code.
async fn drain(output: &mut ExecOutput, writer: &Writer) -> Outcome {
    loop {
        let event = match output.next().await.map_err(channel_error)? {
            ExecPart::Stdout(bytes) => {
                writer.write(Stream::Stdout, bytes).await?;
                continue;
            }
            ExecPart::Stderr(bytes) => {
                writer.write(Stream::Stderr, bytes).await?;
                continue;
            }
            ExecPart::Event(event) => event,
        };
        return match event {
            ExecEvent::Started => continue,
            // As the kernel does: the lowest byte.
            ExecEvent::Exit { code } => Ok((code & 0xff) as u8),
            ExecEvent::Signalled { signal } => {
                Ok(128 + signals::number(&signal).unwrap_or_default())
            }
            ExecEvent::Error { error } => Err(CommandError::new(Kind::Channel, error.into())),
        };
    }
}

/// Reads standard input piece by piece in a thread; the channel closes at its end. The thread may
/// outlive the session, waiting for a key; the process's end ends it.
fn read_stdin() -> mpsc::Receiver<Bytes> {
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
