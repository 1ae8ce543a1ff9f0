//! Many instances at once: `run` (alone, and many together) against warm and cold launches, and the
//! memory of idle instances, warm against cold.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::measure::{Times, process_figure, ratio, show};
use crate::table::{Row, Table};
use crate::warm::{Extent, World, together};

/// What `run` may take on top of a warm launch and a command.
const RUN_BOUND: Duration = Duration::from_millis(300);
/// The processors' worth of boots: more at once only share them.
const BOOTS_AT_ONCE: u32 = 2;
/// After this a clone has done what nobody waits for (`agent/identify.py`), and a booted guest its
/// timers of the first half minute.
const IDLE_AFTER: Duration = Duration::from_secs(40);

/// `run --rm IMAGE -- true`.
pub fn run(shared: &mut Option<World>, extent: Extent, table: &mut Table) -> Result<()> {
    let Some(world) = World::of(shared, table)? else {
        return Ok(());
    };
    let command = World::run_command();
    world.run(&command)?;
    let (mut runs, mut launches) = (Times::default(), Times::default());
    for round in 0..extent.pairs {
        for side in [round % 2 == 0, round % 2 != 0] {
            if side {
                runs.add(world.run(&command)?);
            } else {
                let launched = world.launch("--warm")?;
                launches.add(launched.total());
                world.purge(&[launched.name])?;
            }
        }
    }
    let more = runs.median().as_secs_f64() - launches.median().as_secs_f64();
    table.add(Row {
        what: "`pileus run --rm IMAGE -- true`, whole process; warm launch + first command".into(),
        ours: runs.show(),
        alternative: launches.show(),
        ratio: format!("{more:+.2} s"),
        bound: format!("≤ +{}", show(RUN_BOUND)),
        met: Some(more <= RUN_BOUND.as_secs_f64()),
    });
    if world.boots.len() > 0 {
        let times = ratio(world.boots.median(), runs.median());
        table.add(Row {
            what: "… ; cold launch to the first command".into(),
            ours: runs.show(),
            alternative: world.boots.show(),
            ratio: format!("{times:.1}× faster"),
            ..Row::default()
        });
    }
    throughput(world, extent, &command, table)
}

fn throughput(
    world: &mut World,
    extent: Extent,
    command: &[&str],
    table: &mut Table,
) -> Result<()> {
    let all: Vec<u32> = (0..extent.many.min(20)).collect();
    let began = Instant::now();
    together(&all, |_| world.run(command).map(drop))?;
    let warm = began.elapsed();
    let mut boots = Times::default();
    for _ in 0..extent.boots.min(2) {
        let (names, took) = world.launch_together("--cold", BOOTS_AT_ONCE)?;
        boots.add(took);
        world.purge(&names)?;
    }
    let a_minute = |count: usize, time: Duration| count as f64 * 60.0 / time.as_secs_f64();
    let cold = a_minute(BOOTS_AT_ONCE as usize, boots.median());
    let ours = a_minute(all.len(), warm);
    table.add(Row {
        what: format!(
            "`pileus run` a minute, {} at once; cold launches",
            all.len()
        ),
        ours: format!("{ours:.1} ({} in {})", all.len(), show(warm)),
        alternative: format!(
            "{cold:.1} (extrapolated from {BOOTS_AT_ONCE} at a time in {})",
            boots.show()
        ),
        ratio: format!("{:.1}× more", ours / cold),
        ..Row::default()
    });
    Ok(())
}

/// What idle instances take of the host's memory.
pub fn memory(shared: &mut Option<World>, extent: Extent, table: &mut Table) -> Result<()> {
    let Some(world) = World::of(shared, table)? else {
        return Ok(());
    };
    let mut names = Vec::new();
    let mut compared = 0;
    let steps = [1, 2, 5, 10, 20, 30, extent.idle, extent.idle_warm];
    let mut steps: Vec<u32> = steps
        .into_iter()
        .filter(|n| *n <= extent.idle_warm)
        .collect();
    steps.sort_unstable();
    steps.dedup();
    let mut grown = Vec::new();
    for count in steps {
        while names.len() < count as usize {
            names.push(world.launch("--warm")?.name);
        }
        std::thread::sleep(IDLE_AFTER);
        let all = proportional(world)?;
        if count == extent.idle {
            compared = all;
        }
        eprintln!("{count} warm: {all} KiB");
        grown.push(format!("{count}: {}", mib(all)));
    }
    world.purge(&names)?;
    names.clear();
    while names.len() < extent.idle as usize {
        let left = extent.idle - u32::try_from(names.len())?;
        let (more, _) = world.launch_together("--cold", left.min(BOOTS_AT_ONCE))?;
        names.extend(more);
    }
    std::thread::sleep(IDLE_AFTER);
    let cold = proportional(world)?;
    world.purge(&names)?;
    let times = cold as f64 / compared.max(1) as f64;
    table.add(Row {
        what: format!("memory (PSS) of {} idle instances, warm; cold", extent.idle),
        ours: mib(compared),
        alternative: mib(cold),
        ratio: format!("{times:.1}× less"),
        bound: "≥ 2.5× less".into(),
        met: Some(times >= 2.5),
    });
    table.note(
        "… of so many warm ones",
        grown.join("; "),
        format!("a cold one: {}", mib(cold / u64::from(extent.idle))),
    );
    Ok(())
}

/// KiB of all machines: pages that several have count once.
fn proportional(world: &World) -> Result<u64> {
    let machines = world.daemon.machines();
    machines
        .into_iter()
        .map(|pid| process_figure(pid, "smaps_rollup", "Pss"))
        .sum()
}

fn mib(kib: u64) -> String {
    format!("{:.0} MiB", kib as f64 / 1024.0)
}
