//! `pileusd`: reads the command line, moves into the user's namespace if it must, and runs the daemon
//! (`lib.rs`).

use std::io::IsTerminal;
use std::process::ExitCode;

use pileus_base::{Result, files};
use pileusd::config::{Args, Command};
use pileusd::service::Mode;
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let args = Args::of_process();
    if let Some(Command::Openapi) = args.command {
        print!("{}", pileusd::http::openapi());
        return ExitCode::SUCCESS;
    }
    start_log(&args);
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            tracing::error!(code = %err.code, advice = err.advice, details = ?err.details, "{err}");
            eprintln!("pileusd: {err}");
            for line in err.details.iter().chain(&err.advice) {
                eprintln!("  {line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let uid = rustix::process::geteuid().as_raw();
    let layout = args.layout(uid);
    // Before any thread exists: taken first, so that the loser of two daemons changes nothing.
    let lock = pileusd::lock(&layout)?;
    let mode = if uid == 0 {
        Mode::System
    } else {
        files::create_folder(&layout.run, 0o700)?;
        Mode::User(pileus_networks::user_mode::enter(&layout.network_run())?)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|err| pileus_base::Error::io("Starting the daemon's threads", err))?;
    runtime.block_on(pileusd::run(args, layout, mode, lock))
}

fn start_log(args: &Args) {
    let filter = EnvFilter::try_new(&args.log).unwrap_or_else(|err| {
        eprintln!("pileusd: --log {}: {err}; logging `info`", args.log);
        EnvFilter::new("info")
    });
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    if args.log_json {
        log.json().init();
    } else {
        log.init();
    }
}
