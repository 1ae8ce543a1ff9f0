//! The benchmarks: what pileus promises (or is compared with) as figures, each measured beside its
//! alternative in one run, printed as one table at the end. `cargo xtask bench [ARGS]` builds all in
//! release mode and runs this. Needs root: every daemon runs in a network namespace of its own.
//!
//! ```text
//! guest.rs      a real guest: cold launch against a bare QEMU, exec against ssh, adoption
//! bare.rs       that bare QEMU
//! warm.rs       a warm launch: against a boot, against a script; a standby; forks
//! bare_warm.rs  that script
//! life.rs       suspend and resume
//! snapshots.rs  snapshots, restores, clones
//! info.rs       a guest that is looked at fifty times a second
//! image_instances.rs  instances of a cached image
//! crowd.rs      many of them: `run` at once, the memory of idle ones
//! fake.rs       the daemon alone, with stand-in machines: list, memory, bytes written, start
//! fake_life.rs  the same: starts, snapshots and clones a second
//! pack.rs       a disk packed into an image, against tar and zstd
//! import.rs     an archive taken in by the store, against the same
//! measure.rs    times and their medians; processes; the API in ten lines
//! table.rs      the table
//! ```

mod bare;
mod bare_warm;
mod crowd;
mod fake;
mod fake_life;
mod guest;
mod image_instances;
mod import;
mod info;
mod life;
mod measure;
mod pack;
mod snapshots;
mod table;
mod warm;

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
    /// How often each side of a warm launch is measured
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// How many warm launches give the percentiles
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    many: u32,
    /// How many idle instances' memory is compared, warm and cold
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    idle: u32,
    /// How many idle warm instances there are at most
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    idle_warm: u32,
    /// Much less of all that takes long: for a first look
    #[arg(long)]
    quick: bool,
    /// Ask the guests what took their time
    #[arg(long)]
    explain: bool,
}

impl Args {
    fn extent(&self) -> warm::Extent {
        let most = |wanted: u32, quick: u32| {
            if self.quick {
                wanted.min(quick)
            } else {
                wanted
            }
        };
        let idle = most(self.idle, 2);
        warm::Extent {
            boots: most(self.rounds, 1),
            pairs: most(self.pairs, 3),
            many: most(self.many, 5),
            idle,
            idle_warm: most(self.idle_warm, 5).max(idle),
            explain: self.explain,
        }
    }
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
    /// Warm `launch` to the first command, against a boot and against a script
    Warm,
    /// What a standby saves
    Pool,
    /// `run`, alone and many at once
    Run,
    /// Clones of a running instance
    Fork,
    /// Suspend and resume, against the disk's own time
    Life,
    /// Snapshots of a running instance and restores, against a stopped copy
    Snapshot,
    /// Clones, against a stopped copy
    Clone,
    /// Fifty `info` a second, against as many ssh as can be
    Info,
    /// Starts, stops, snapshots and clones a second of machines that are stand-ins
    Operations,
    /// Memory of idle instances, warm and cold
    Idle,
    /// Packing a disk, against tar and zstd
    Pack,
    /// Taking in a packed image, against zstd, tar and sha256sum
    Import,
    /// Instances of a cached image, by the store alone
    Instance,
}

impl Bench {
    /// Quick ones first: a mistake shows early.
    const ALL: [Bench; 20] = [
        Bench::Start,
        Bench::Bytes,
        Bench::List,
        Bench::Memory,
        Bench::Operations,
        Bench::Pack,
        Bench::Import,
        Bench::Instance,
        Bench::Cold,
        Bench::Exec,
        Bench::Adopt,
        Bench::Warm,
        Bench::Pool,
        Bench::Run,
        Bench::Fork,
        Bench::Clone,
        Bench::Snapshot,
        Bench::Info,
        Bench::Life,
        Bench::Idle,
    ];
}

fn main() -> ExitCode {
    let args = Args::parse();
    let mut table = Table::default();
    let mut worlds = Worlds::default();
    let load = measure::load();
    for bench in Bench::ALL {
        if !args.only.is_empty() && !args.only.contains(&bench) {
            continue;
        }
        eprintln!("--- {bench:?}");
        // The test kit panics where a test would fail; the other benches go on.
        let done = catch_unwind(AssertUnwindSafe(|| {
            run(bench, &args, &mut worlds, &mut table)
        }));
        match done {
            Ok(Ok(())) => {}
            Ok(Err(err)) => table.failed(&format!("{bench:?}"), &format!("{err:#}")),
            Err(_) => table.failed(&format!("{bench:?}"), "panicked, see above"),
        }
    }
    drop(worlds);
    println!("{table}");
    println!("Load average {load} before, {} after.", measure::load());
    if table.all_met() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The daemons that several benches share. One at a time: idle guests of the other would be measured
/// with it.
#[derive(Default)]
struct Worlds {
    real: guest::Real,
    warm: Option<warm::World>,
}

fn run(bench: Bench, args: &Args, worlds: &mut Worlds, table: &mut Table) -> Result<()> {
    let extent = args.extent();
    let Worlds { real, warm } = worlds;
    let is_warm = matches!(
        bench,
        Bench::Warm
            | Bench::Pool
            | Bench::Run
            | Bench::Fork
            | Bench::Clone
            | Bench::Snapshot
            | Bench::Info
            | Bench::Life
            | Bench::Idle
    );
    if is_warm {
        *real = guest::Real::default();
    }
    match bench {
        Bench::Cold => guest::cold(real, args.rounds, args.explain, table),
        Bench::Exec => guest::exec(real, args.runs, table),
        Bench::List => fake::list(args.runs, table),
        Bench::Memory => fake::memory(table),
        Bench::Bytes => fake::bytes(table),
        Bench::Operations => fake_life::operations(args.runs, table),
        Bench::Start => fake::start(args.runs, table),
        Bench::Adopt => {
            fake::adopt(args.rounds, table)?;
            guest::adopt(real, args.rounds, table)
        }
        Bench::Warm => warm::launch(warm, extent, table),
        Bench::Pool => warm::pool(warm, extent, table),
        Bench::Run => crowd::run(warm, extent, table),
        Bench::Fork => warm::fork(warm, extent, table),
        Bench::Clone => snapshots::clone(warm, extent, table),
        Bench::Snapshot => snapshots::take(warm, extent, table),
        Bench::Info => info::info(warm, extent, table),
        Bench::Life => life::suspend(warm, extent, table),
        Bench::Pack => pack::pack(args.rounds, args.quick, table),
        Bench::Import => import::import(args.rounds, args.quick, table),
        Bench::Instance => image_instances::instances(args.runs, args.quick, table),
        Bench::Idle => crowd::memory(warm, extent, table),
    }
}
