//! `pileus run`: a machine for one command. Launched, used, deleted; its parts are in `run/`.
//!
//! ```text
//! ports taken ─▶ launch ─▶ copies in ─▶ command ─▶ copies out ─▶ delete (accepted, not awaited)
//!                   └── lease of 30 s, renewed until the end ──┘
//! ```

use std::path::PathBuf;
use std::time::{Duration, Instant};

use pileus_api::{ExecRequest, LaunchRequest};
use pileus_base::Error;

use super::launch;
use crate::complete;
use crate::context::Context;
use crate::error::{CommandError, Kind, Outcome};
use crate::progress::Progress;
use crate::run::copy::{self, CopiedOut, Place};
use crate::run::machine::Machine;
use crate::run::options::{self, Copy, Publish};
use crate::run::publish::Ports;
use crate::session::{self, End, Limits};
use crate::signals::Signals;
use crate::terminal::tell;

/// Exit code of all that is not the command's own.
pub const FAILED: u8 = 125;
const OUT_OF_TIME: u8 = 124;

/// Run a command on an instance of its own, which is deleted at the end
#[derive(Debug, Clone, Default, clap::Args)]
#[command(after_help = "\
The command gets standard input, the terminal and signals as with pileus exec; without a command it
is a login shell. Its exit code is returned (128 and the number of a signal that ended it); 124 if
its --timeout was over, 125 if pileus failed. Standard output is the command's alone.
The instance is deleted whatever happens: also after Ctrl-C, and some 30 s after this program was
killed.

Examples:
  pileus run debian-13 -- uname -a
  pileus run debian-13                                    a shell
  tar c src | pileus run -c 2 debian-13 -- sh -c 'tar x && make -C src test'
  pileus run --copy-in . --copy-out dist debian-13 -- make dist
  pileus run -p 8080:80 --timeout 1h debian-13 -- python3 -m http.server 80")]
pub struct Args {
    /// An image's name (see pileus find), file, address or digest
    #[arg(value_name = "IMAGE", add = complete::images())]
    pub image: String,
    /// The command and its arguments
    #[arg(value_name = "COMMAND", trailing_var_arg = true)]
    pub command: Vec<String>,
    /// Name of the instance; a random one if not given
    #[arg(short, long, value_name = "NAME")]
    pub name: Option<String>,
    /// Number of CPUs [default: 1]
    #[arg(short, long, value_name = "N", allow_hyphen_values = true)]
    pub cpus: Option<String>,
    /// Memory, at least 512M [default: 1G]
    #[arg(
        short,
        long,
        alias = "mem",
        value_name = "SIZE",
        allow_hyphen_values = true
    )]
    pub memory: Option<String>,
    /// Disk, at least 1G and as large as the image [default: 5G]
    #[arg(short, long, value_name = "SIZE", allow_hyphen_values = true)]
    pub disk: Option<String>,
    /// Keep what the guest writes to its disk in this host's memory
    #[arg(long, conflicts_with = "keep")]
    pub tmpfs: bool,
    /// User data for cloud-init: a file, an address, or - for standard input
    #[arg(long, value_name = "FILE|URL|-")]
    pub cloud_init: Option<String>,
    /// Start from a template, or fail if there is none that fits
    #[arg(long, conflicts_with = "cold")]
    pub warm: bool,
    /// Boot, even if there is a template
    #[arg(long)]
    pub cold: bool,
    /// Wait so many seconds at most for the instance
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true)]
    pub launch_timeout: Option<String>,
    /// A variable for the command; a name alone passes this one's value on
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,
    /// Variables from a file, one a line
    #[arg(long, value_name = "FILE")]
    pub env_file: Vec<PathBuf>,
    /// Folder in the guest to run the command in [default: the home]
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// End the command after so long: 90, 90s, 1m30s, 2h
    #[arg(long, value_name = "DURATION", allow_hyphen_values = true)]
    pub timeout: Option<String>,
    /// Kill the command when it says more than this
    #[arg(long, value_name = "SIZE")]
    pub max_output: Option<String>,
    /// Lead a port of this host (127.0.0.1, if no address is given) to one of the guest; 0: any free one
    #[arg(short, long, value_name = "[ADDRESS:]HOSTPORT:GUESTPORT")]
    pub publish: Vec<String>,
    /// Copy a file or folder into the guest first; into the working directory, or as DST
    #[arg(long, value_name = "SRC[:DST]")]
    pub copy_in: Vec<String>,
    /// Copy a file or folder out of the guest at the end; into the current folder, or as DST
    #[arg(long, value_name = "PATH[:DST]")]
    pub copy_out: Vec<String>,
    /// Copy no more than this out of the guest, each time [default: 10G]
    #[arg(long, value_name = "SIZE")]
    pub max_copy: Option<String>,
    /// Share a folder with the guest (not there yet)
    #[arg(long, value_name = "SRC:DST", hide = true)]
    pub mount: Vec<String>,
    /// Give the command a terminal, even if this has none
    #[arg(short, long, conflicts_with = "no_tty")]
    pub tty: bool,
    /// Give the command no terminal
    #[arg(short = 'T', long)]
    pub no_tty: bool,
    /// Pass standard input on (what happens anyway)
    #[arg(short, long, hide = true)]
    pub interactive: bool,
    /// Delete the instance at the end (what happens anyway)
    #[arg(long, conflicts_with = "keep")]
    pub rm: bool,
    /// Keep the instance
    #[arg(long)]
    pub keep: bool,
    /// Show no progress and no warnings
    #[arg(short, long)]
    pub quiet: bool,
}

/// What was asked for, read and checked before anything is begun.
struct Plan {
    launch: LaunchRequest,
    request: ExecRequest,
    limits: Limits,
    publish: Vec<Publish>,
    copy_in: Vec<Copy>,
    copy_out: Vec<Copy>,
    max_copy: u64,
    keep: bool,
    quiet: bool,
}

pub(crate) async fn run(context: &Context, args: Args) -> Outcome {
    let done = async {
        let plan = Plan::read(context, args).await?;
        carry_out(context, plan).await
    };
    done.await.map_err(|err: CommandError| match err.kind {
        Kind::Signal(_) | Kind::ClosedPipe => err,
        _ => err.with_exit_code(FAILED),
    })
}

impl Plan {
    async fn read(context: &Context, args: Args) -> Result<Self, CommandError> {
        if !args.mount.is_empty() {
            return Err(
                CommandError::usage("error: folders can't be shared with a guest yet")
                    .hint("--copy-in copies a folder into the guest, --copy-out out of it."),
            );
        }
        let read = |texts: &[String], folder| -> Result<Vec<Copy>, CommandError> {
            texts
                .iter()
                .map(|text| options::copy(text, folder))
                .collect()
        };
        let folder = context.env.current_folder.as_path();
        let copy_in = read(&args.copy_in, Some(folder))?;
        let copy_out = read(&args.copy_out, None)?;
        copy::check(folder, &copy_in, &copy_out)?;
        let publish = args.publish.iter().map(|text| options::publish(text));
        let publish = publish.collect::<Result<_, _>>()?;
        let terminals = context.env.terminals;
        let tty = args.tty || (!args.no_tty && terminals.stdin && terminals.stdout);
        let limits = Limits {
            time: args.timeout.as_deref().map(options::duration).transpose()?,
            output: args.max_output.as_deref().map(options::size).transpose()?,
        };
        let max_copy = args.max_copy.as_deref().map(options::size).transpose()?;
        let request = ExecRequest {
            env: options::variables(&args.env_file, &args.env, &context.env.variables)?,
            working_directory: args.workdir,
            tty: tty.then(|| session::terminal_of(context)),
            command: args.command,
            ..Default::default()
        };
        // Last, because it may read standard input or an address.
        let machine = launch::Args {
            image: Some(args.image),
            name: args.name,
            cpus: args.cpus,
            memory: args.memory,
            disk: args.disk,
            cloud_init: args.cloud_init,
            timeout: args.launch_timeout,
            warm: args.warm,
            cold: args.cold,
            ..Default::default()
        };
        let mut launch = launch::request(&machine, folder).await?;
        launch.disk_in_memory = args.tmpfs;
        Ok(Self {
            launch,
            request,
            limits,
            publish,
            copy_in,
            copy_out,
            max_copy: max_copy.unwrap_or(10 << 30),
            keep: args.keep,
            quiet: args.quiet,
        })
    }
}

async fn carry_out(context: &Context, plan: Plan) -> Outcome {
    let mut times = Times::start();
    let ports = Ports::take(&plan.publish).await?;
    let client = context.client().await?;
    let mut signals =
        Signals::to_forward().map_err(|err| Error::io("Listening to signals", err))?;
    let shown = context.env.terminals.stderr && !plan.quiet;
    let progress = Progress::new(shown, context.verbose > 0);
    let warned = shown || context.verbose > 0;
    let machine = Machine::launch(&client, plan.launch.clone(), &mut signals, |name| {
        let line = progress.line(name);
        if warned {
            line
        } else {
            line.without_warnings()
        }
    })
    .await?;
    times.phases(&machine);
    let _published = ports.serve(&client, &machine.name, context.verbose > 0);
    let kept = plan.keep.then(|| {
        let (client, name) = (client.clone(), machine.name.clone());
        tokio::spawn(async move { client.lease(&name, 0).await })
    });
    let outcome = inside(
        context,
        &plan,
        &machine,
        &mut signals,
        &progress,
        &mut times,
    )
    .await;
    let name = machine.name.clone();
    let ended = match kept {
        None => {
            let ended = machine.delete().await;
            times.mark("deleting");
            ended.map_err(|err| format!("{name} could not be deleted: {err}"))
        }
        Some(kept) => {
            let kept = kept
                .await
                .unwrap_or_else(|err| Err(Error::internal(err.to_string())));
            machine.leave();
            kept.map_err(|err| format!("{name} is not kept: {err}"))
        }
    };
    match ended {
        Ok(()) if plan.keep => tell(&format!("Kept: {name}")),
        Ok(()) => {}
        Err(text) => context.warn(&text),
    }
    if context.verbose > 0 {
        times.show(&name);
    }
    outcome
}

/// All that is done with the running instance.
async fn inside(
    context: &Context,
    plan: &Plan,
    machine: &Machine,
    signals: &mut Signals,
    progress: &Progress,
    times: &mut Times,
) -> Outcome {
    let place = Place {
        client: &machine.client,
        name: &machine.name,
        working_directory: plan.request.working_directory.as_deref(),
        folder: &context.env.current_folder,
    };
    for copy in &plan.copy_in {
        let line = progress.line(&machine.name);
        line.message(&format!("Copying in {}", copy.from));
        let skipped = or_signal(signals, copy::copy_in(&place, copy)).await?;
        drop(line);
        if !plan.quiet {
            for name in skipped {
                context.warn(&format!(
                    "{name} was not copied: neither file, folder nor link"
                ));
            }
        }
    }
    if !plan.copy_in.is_empty() {
        times.mark("copying-in");
    }
    let client = &machine.client;
    let end = session::attach(client, &machine.name, &plan.request, signals, plan.limits).await?;
    times.mark("command");
    let code = match end {
        End::Exit(code) => code,
        End::OutOfTime => {
            tell("run: the time for the command was over");
            OUT_OF_TIME
        }
        End::TooMuchOutput => {
            tell("run: the command said more than --max-output allows");
            FAILED
        }
    };
    for copy in &plan.copy_out {
        let line = progress.line(&machine.name);
        line.message(&format!("Copying out {}", copy.from));
        let copied = or_signal(signals, copy::copy_out(&place, copy, plan.max_copy)).await;
        drop(line);
        let missing = || {
            let text = format!("{} does not exist in the guest", copy.from);
            CommandError::from(Error::new(pileus_api::Code::InvalidArgument, text))
        };
        match copied {
            Ok(CopiedOut::Done) => {}
            // A command that failed need not have made what it was to make.
            Ok(CopiedOut::Missing) if code != 0 => {
                if !plan.quiet {
                    context.warn(&missing().error.message);
                }
            }
            Ok(CopiedOut::Missing) => return Err(missing()),
            Err(err) => return Err(err),
        }
    }
    if !plan.copy_out.is_empty() {
        times.mark("copying-out");
    }
    Ok(code)
}

/// Does the work, unless a signal comes first.
async fn or_signal<T>(
    signals: &mut Signals,
    work: impl Future<Output = Result<T, CommandError>>,
) -> Result<T, CommandError> {
    tokio::select! {
        done = work => done,
        signal = signals.next() => Err(session::ended_by(signal)),
    }
}

/// How long each phase took, for `-v`.
struct Times {
    begun: Instant,
    last: Instant,
    all: Vec<(&'static str, Duration)>,
}

impl Times {
    fn start() -> Self {
        let begun = Instant::now();
        Self {
            begun,
            last: begun,
            all: Vec::new(),
        }
    }

    /// The phases that the daemon told of; what is left of the time went by around them.
    fn phases(&mut self, machine: &Machine) {
        let mut told = Duration::ZERO;
        for phase in &machine.launch.phases {
            let time = Duration::from_millis(phase.milliseconds);
            self.all.push((phase.phase.as_str(), time));
            told += time;
        }
        let rest = self.last.elapsed().saturating_sub(told);
        self.all.push(("asking", rest));
        self.last = Instant::now();
    }

    fn mark(&mut self, what: &'static str) {
        self.all.push((what, self.last.elapsed()));
        self.last = Instant::now();
    }

    fn show(&self, name: &str) {
        let seconds = |time: Duration| format!("{:>8.3}s", time.as_secs_f64());
        for (what, time) in &self.all {
            tell(&format!("{what:<18}{}", seconds(*time)));
        }
        tell(&format!("{name:<18}{}", seconds(self.begun.elapsed())));
    }
}
