//! `pileus top`: what the running instances use of the host, now.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use pileus_api::InstanceUsage;
use pileus_base::{Error, ResultExt};
use pileus_client::Client;

use crate::context::Context;
use crate::error::{CommandError, Outcome};
use crate::render::top::{Row, rows};
use crate::render::{self, Format, FormatOption};
use crate::session;
use crate::signals::Signals;
use crate::terminal::{self, RawMode};

const PAUSE: Duration = Duration::from_secs(1);

/// Show what running instances use: processor, memory, disk, network
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "\
On a terminal the table is renewed each second, the busiest instance first; q or Ctrl-C ends it. Otherwise
it is shown once, from two samples one second apart. 100 % is one processor of the host.

Examples:
  pileus top
  pileus top --once --format json")]
pub struct Args {
    /// Show it once and end
    #[arg(long)]
    pub once: bool,
    /// Show it so many times and end
    #[arg(short = 'n', long, value_name = "COUNT", conflicts_with = "once")]
    #[arg(value_parser = clap::value_parser!(u32).range(1..))]
    pub count: Option<u32>,
    #[command(flatten)]
    pub format: FormatOption,
}

pub(crate) async fn run(context: &Context, args: &Args) -> Outcome {
    let client = context.client().await?;
    let format = args.format.format;
    let terminals = context.env.terminals;
    let live = terminals.stdout && !args.once && format == Format::Table;
    let mut samples = Samples::begin(client).await?;
    if !live {
        for _ in 0..args.count.unwrap_or(1) {
            let rows = samples.next().await?;
            context.print(&render::top::render(&rows, format))?;
        }
        return Ok(0);
    }
    let mut signals = Signals::to_forward().io("Listening to signals")?;
    let raw = RawMode::enter().map_err(|err| Error::io("Setting up the terminal", err))?;
    let screen = Screen::enter()?;
    let result = tokio::select! {
        result = show(&mut samples, &screen, args.count) => result.map(|()| 0),
        () = quit(raw.is_some()) => Ok(0),
        signal = signals.next() => Err(session::ended_by(signal)),
    };
    drop(screen);
    drop(raw);
    result
}

async fn show(
    samples: &mut Samples,
    screen: &Screen,
    count: Option<u32>,
) -> Result<(), CommandError> {
    let mut left = count;
    screen.draw("Looking …\n")?;
    loop {
        let rows = samples.next().await?;
        screen.draw(&render::top::render(&rows, Format::Table))?;
        if let Some(left) = &mut left {
            *left -= 1;
            if *left == 0 {
                return Ok(());
            }
        }
    }
}

/// Returns when the user has had enough. In raw mode Ctrl-C is a byte.
async fn quit(keys: bool) {
    if !keys {
        return std::future::pending().await;
    }
    let mut stdin = session::read_stdin();
    while let Some(piece) = stdin.recv().await {
        if piece.iter().any(|key| matches!(key, b'q' | b'Q' | 3 | 4)) {
            return;
        }
    }
    std::future::pending().await
}

/// The last sample and when it was taken.
struct Samples {
    client: Client,
    last: Vec<InstanceUsage>,
    at: Instant,
}

impl Samples {
    async fn begin(client: Client) -> Result<Self, Error> {
        let at = Instant::now();
        let last = client.usage().await?;
        Ok(Self { client, last, at })
    }

    /// What was used in the second after the last sample.
    async fn next(&mut self) -> Result<Vec<Row>, Error> {
        tokio::time::sleep(PAUSE.saturating_sub(self.at.elapsed())).await;
        let at = Instant::now();
        let now = self.client.usage().await?;
        let rows = rows(&self.last, &now, at - self.at);
        (self.last, self.at) = (now, at);
        Ok(rows)
    }
}

/// The terminal's other screen, until it is dropped.
struct Screen;

impl Screen {
    fn enter() -> io::Result<Self> {
        write_out("\x1b[?1049h\x1b[?25l")?;
        Ok(Self)
    }

    fn draw(&self, text: &str) -> io::Result<()> {
        let (cols, lines) = terminal::size();
        let mut out = String::from("\x1b[H");
        for line in text.lines().take(usize::from(lines).saturating_sub(1)) {
            out.extend(line.chars().take(usize::from(cols)));
            // What was there before is erased to the end of the line.
            out.push_str("\x1b[K\r\n");
        }
        out.push_str("\x1b[J");
        write_out(&out)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = write_out("\x1b[?25h\x1b[?1049l");
    }
}

fn write_out(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}
