//! The benchmarks: what pileus promises (or is compared with) as figures, each measured beside its
//! alternative in one run, printed as one table at the end. `cargo xtask bench [ARGS]` builds all in
//! release mode and runs this. Needs root: every daemon runs in a network namespace of its own.
//!
//! ```text
//! guest.rs      a real guest: cold launch against a bare QEMU, exec against ssh, adoption
//! bare.rs       that bare QEMU
//! fake.rs       the daemon alone, with stand-in machines: list, memory, bytes written, start
//! measure.rs    times and their medians; processes; the API in ten lines
//! table.rs      the table
//! ```

mod bare;
mod fake;
mod guest;
mod measure;
mod table;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

use table::Table;

/// Measures what pileus promises and prints one table.
#[derive(Debug, Parser)]
#[command(name = "pileus-benches")]
struct Args {
    /// Only this one; may be given several times
    #[arg(long, value_enum)]
    only: Vec<Bench>,
    /// How often each side of the cold launch is measured (both take most of a minute)
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How often each short command is run
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Ask both guests of the cold launch what took their time
    #[arg(long)]
    explain: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Bench {
    /// `launch` to the first command, against a bare QEMU
    Cold,
    /// `exec` on a running instance, against ssh
    Exec,
    /// `list`, with few and with many instances
    List,
    /// The idle daemon's resident memory
    Memory,
    /// What a launch writes before the guest boots
    Bytes,
    /// From the daemon's start to its first answer
    Start,
    /// From a killed daemon's new start to its machines being its own again
    Adopt,
}

impl Bench {
    /// Quick ones first: a mistake shows early.
    const ALL: [Bench; 7] = [
        Bench::Start,
        Bench::Bytes,
        Bench::List,
        Bench::Memory,
        Bench::Cold,
        Bench::Exec,
        Bench::Adopt,
    ];
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut table = Table::default();
    let mut real = guest::Real::default();
    let load = measure::load();
    for bench in Bench::ALL {
        if !args.only.is_empty() && !args.only.contains(&bench) {
            continue;
        }
        eprintln!("--- {bench:?}");
        // The test kit panics where a test would fail; the other benches go on.
        let done = catch_unwind(AssertUnwindSafe(|| {
            run(bench, &args, &mut real, &mut table)
        }));
        match done {
            Ok(Ok(())) => {}
            Ok(Err(err)) => table.failed(&format!("{bench:?}"), &format!("{err:#}")),
            Err(_) => table.failed(&format!("{bench:?}"), "panicked, see above"),
        }
    }
    drop(real);
    println!("{table}");
    println!("Load average {load} before, {} after.", measure::load());
    if table.all_met() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(bench: Bench, args: &Args, real: &mut guest::Real, table: &mut Table) -> Result<()> {
    match bench {
        Bench::Cold => guest::cold(real, args.rounds, args.explain, table),
        Bench::Exec => guest::exec(real, args.runs, table),
        Bench::List => fake::list(args.runs, table),
        Bench::Memory => fake::memory(table),
        Bench::Bytes => fake::bytes(table),
        Bench::Start => fake::start(args.runs, table),
        Bench::Adopt => {
            fake::adopt(args.rounds, table)?;
            guest::adopt(real, args.rounds, table)
        }
    }
}
