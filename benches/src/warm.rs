//! Warm launch on a real guest: against a boot, against a script that does the same with plain tools
//! (`bare_warm.rs`), with and without a standby; what a template costs; forks.
//!
//! Next: `crowd.rs` has many of them at once.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pileus_api::routes;
use pileus_testkit::{Daemon, Need, Options, guest_image, need};
use serde_json::Value;

use crate::bare_warm::{Steps, Twin};
use crate::measure::{Phases, Times, get, pileus, poll, ratio, show, timed};
use crate::table::{Row, Table};

/// What all machines of these benches are.
const IMAGE: &str = "build:debian-13";
const CPUS: &str = "1";
const MEMORY: &str = "1G";
const MIB: f64 = (1 << 20) as f64;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Extent {
    /// Of what takes most of a minute.
    pub boots: u32,
    /// Of what takes seconds, as pairs with the alternative.
    pub pairs: u32,
    /// Warm launches for the percentiles, and runs at once.
    pub many: u32,
    /// Idle instances, warm and cold.
    pub idle: u32,
    /// Idle instances, warm only.
    pub idle_warm: u32,
    pub explain: bool,
}

/// The daemon that these benches share, with its template.
pub struct World {
    pub daemon: Daemon,
    launched: u32,
    /// Cold launches to the first command done, for what is compared with them later.
    pub boots: Times,
}

/// A launch that is over.
#[derive(Debug)]
pub struct Launched {
    pub name: String,
    pub launch: Duration,
    pub first: Duration,
}

impl Launched {
    pub fn total(&self) -> Duration {
        self.launch + self.first
    }
}

impl World {
    /// The shared one; made, with its template, when it is first needed. None where that can't be.
    pub fn of<'a>(shared: &'a mut Option<Self>, table: &mut Table) -> Result<Option<&'a mut Self>> {
        let tools = ["ssh", "ssh-keygen", "socat"].map(Need::Program);
        if !need(&[Need::Root, Need::Tun, Need::Guest]) || !need(&tools) {
            return Ok(None);
        }
        if shared.is_none() {
            guest_image();
            let world = Self {
                daemon: Daemon::start(Options::real()),
                launched: 0,
                boots: Times::default(),
            };
            world.run(&["set", "local.warm=manual"])?;
            world.run(&["set", "local.warm-pool=0"])?;
            world.make_template(table)?;
            *shared = Some(world);
        }
        Ok(shared.as_mut())
    }

    pub fn command(&self, args: &[&str]) -> Command {
        pileus(&self.daemon.storage(), args)
    }

    pub fn run(&self, args: &[&str]) -> Result<Duration> {
        timed(&mut self.command(args)).map(|(time, _)| time)
    }

    pub fn run_command() -> Vec<&'static str> {
        let shape = ["run", "--rm", "--warm", "-c", CPUS, "-m", MEMORY];
        [&shape[..], &["--quiet", IMAGE, "--", "true"]].concat()
    }

    fn make_template(&self, table: &mut Table) -> Result<()> {
        let shape = ["template", "create", IMAGE, "-c", CPUS, "-m", MEMORY];
        let took = self.run(&shape)?;
        let all = get(&self.daemon.socket(), routes::TEMPLATES)?;
        let list = all.as_array().or_else(|| all["templates"].as_array());
        let made = list.and_then(|list| list.first());
        let made = made.context("there is no template")?;
        let id = made["id"].as_str().unwrap_or_default();
        let folder = self.daemon.storage().join("data/templates").join(id);
        let state = std::fs::metadata(folder.join("state"))?.len();
        let size = |key: &str| made[key].as_u64().unwrap_or_default() as f64 / MIB;
        table.note(
            "making a template, 1 CPU and 1 GiB",
            show(took),
            String::new(),
        );
        table.note(
            "a template on the disk: memory + what the guest wrote + devices",
            format!(
                "{:.0} MiB + {:.1} MiB + {:.1} MiB",
                size("memory_used"),
                size("disk_used") - state as f64 / MIB,
                state as f64 / MIB
            ),
            "1 GiB for each, copied".into(),
        );
        Ok(())
    }

    pub fn new_name(&mut self) -> String {
        self.launched += 1;
        format!("bench{}", self.launched)
    }

    /// Launches an instance (`how`: `--warm` or `--cold`) and runs a first command.
    pub fn launch(&mut self, how: &str) -> Result<Launched> {
        let name = self.new_name();
        let launch = self.run(&launch_args(&name, how))?;
        let first = self.run(&["exec", &name, "--", "true"])?;
        Ok(Launched {
            name,
            launch,
            first,
        })
    }

    /// Launches so many at once, each with a first command; returns names and the time of all.
    pub fn launch_together(&mut self, how: &str, count: u32) -> Result<(Vec<String>, Duration)> {
        let names: Vec<String> = (0..count).map(|_| self.new_name()).collect();
        let world = &*self;
        let began = Instant::now();
        let each = |name: &String| -> Result<()> {
            world.run(&launch_args(name, how))?;
            world.run(&["exec", name, "--", "true"]).map(drop)
        };
        together(&names, each)?;
        Ok((names, began.elapsed()))
    }

    pub fn purge(&self, names: &[String]) -> Result<()> {
        for name in names {
            self.run(&["delete", "--purge", name])?;
        }
        Ok(())
    }

    pub fn info(&self, name: &str) -> Result<Value> {
        get(&self.daemon.socket(), &routes::fill(routes::INSTANCE, name))
    }

    /// A stopped instance whose place bare clones take.
    pub fn twin(&mut self) -> Result<Twin> {
        let launched = self.launch("--warm")?;
        let twin = Twin::of(&self.daemon, &self.info(&launched.name)?);
        self.run(&["stop", "--force", &launched.name])?;
        twin
    }

    /// What the agents told of their steps of identifying, from the daemon's log, in their order.
    fn steps(&self) -> Phases {
        let mut steps = Phases::default();
        for line in self.daemon.log().lines() {
            let told = line.split_once(" step=\"").and_then(|(_, rest)| {
                let (step, rest) = rest.split_once("\" milliseconds=")?;
                Some((step, rest.trim().parse().ok()?))
            });
            if let Some((step, milliseconds)) = told {
                steps.note(step, Duration::from_millis(milliseconds));
            }
        }
        steps
    }
}

fn launch_args<'a>(name: &'a str, how: &'a str) -> [&'a str; 9] {
    [
        "launch", IMAGE, how, "--name", name, "-c", CPUS, "-m", MEMORY,
    ]
}

/// Does the work for all at the same time.
pub fn together<T: Sync>(all: &[T], work: impl Fn(&T) -> Result<()> + Sync) -> Result<()> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|one| scope.spawn(|| work(one))).collect();
        threads.into_iter().try_for_each(|thread| {
            let joined = thread.join();
            joined.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })
}

/// Warm launches, measured one after the other.
#[derive(Debug, Default)]
struct Warm {
    totals: Times,
    launches: Times,
    firsts: Times,
    phases: Phases,
}

impl Warm {
    /// Measures one more and takes the instance away again.
    fn measure(&mut self, world: &mut World) -> Result<()> {
        let launched = world.launch("--warm")?;
        self.totals.add(launched.total());
        self.launches.add(launched.launch);
        self.firsts.add(launched.first);
        self.phases.add(&world.info(&launched.name)?);
        world.purge(&[launched.name])
    }
}

/// Warm launch to the first command: against a boot, and against the script.
pub fn launch(shared: &mut Option<World>, extent: Extent, table: &mut Table) -> Result<()> {
    let Some(world) = World::of(shared, table)? else {
        return Ok(());
    };
    let twin = world.twin()?;
    // Once each, not measured: the caches of the host are warm for both.
    Warm::default().measure(world)?;
    twin.clone_once().context("the bare clone")?;
    let (mut ours, mut bare) = (Warm::default(), Vec::new());
    for round in 0..extent.pairs {
        // Who begins changes, so that what grows slower over time hurts both.
        for side in [round % 2 == 0, round % 2 != 0] {
            if side {
                bare.push(twin.clone_once()?);
                eprintln!("bare: {:?}", bare.last());
            } else {
                ours.measure(world)?;
            }
        }
    }
    for _ in 0..extent.boots {
        let launched = world.launch("--cold")?;
        eprintln!("cold: {launched:?}");
        world.boots.add(launched.total());
        world.purge(&[launched.name])?;
    }
    tell_launch(&ours, &bare, &world.boots, table);
    if extent.explain {
        for (step, times) in world.steps().all() {
            table.note(
                format!("… of identifying: {step}"),
                times.show(),
                String::new(),
            );
        }
    }
    percentiles(world, extent.many, table)
}

fn tell_launch(ours: &Warm, bare: &[Steps], boots: &Times, table: &mut Table) {
    let times = ratio(boots.median(), ours.totals.median());
    table.add(Row {
        what: "warm launch to the first command; cold launch to the same".into(),
        ours: ours.totals.show(),
        alternative: boots.show(),
        ratio: format!("{times:.1}× faster"),
        bound: "≥ 20× faster".into(),
        met: Some(times >= 20.0),
    });
    let of = |step: fn(&Steps) -> Duration| -> Times {
        let mut times = Times::default();
        bare.iter().for_each(|steps| times.add(step(steps)));
        times
    };
    let script = of(|steps| steps.command);
    let times = ratio(ours.totals.median(), script.median());
    table.add(Row {
        what: "warm launch to the first command; a script with plain tools on the same template"
            .into(),
        ours: ours.totals.show(),
        alternative: script.show(),
        ratio: format!("{times:.2}×"),
        bound: "≤ 1.15×".into(),
        met: Some(times <= 1.15),
    });
    let theirs = [
        ("configuring", of(|steps| steps.prepared)),
        ("restoring", of(|steps| steps.restored - steps.prepared)),
        ("identifying", of(|steps| steps.identified - steps.restored)),
    ];
    for (phase, times) in ours.phases.all() {
        let same = theirs.iter().find(|(name, _)| name == phase);
        let same = same.map_or(String::new(), |(_, times)| times.show());
        table.note(format!("… phase {phase}"), times.show(), same);
    }
    table.note(
        "… `pileus launch` as a whole",
        ours.launches.show(),
        String::new(),
    );
    table.note(
        "… the first command; ssh's first connection with it",
        ours.firsts.show(),
        of(|steps| steps.command - steps.identified).show(),
    );
}

fn percentiles(world: &mut World, many: u32, table: &mut Table) -> Result<()> {
    let mut ours = Warm::default();
    for _ in 0..many {
        ours.measure(world)?;
    }
    let show_both = |times: &Times| {
        let (half, most) = (times.percentile(50), times.percentile(95));
        format!("p50 {}, p95 {}", show(half), show(most))
    };
    table.note(
        format!("{many} warm launches, one after the other: to the first command"),
        show_both(&ours.totals),
        format!("`launch` alone: {}", show_both(&ours.launches)),
    );
    Ok(())
}

/// How long a standby may take to be there, and then to come to rest.
const STANDBY_BOUND: Duration = Duration::from_secs(60);
const REST: Duration = Duration::from_secs(5);

/// What a standby saves.
pub fn pool(shared: &mut Option<World>, extent: Extent, table: &mut Table) -> Result<()> {
    let Some(world) = World::of(shared, table)? else {
        return Ok(());
    };
    let what = "warm launch to the first command with a standby (local.warm-pool=1); without";
    world.run(&["set", "local.warm-pool=1"])?;
    // The daemon learns what is wanted from a launch.
    Warm::default().measure(world)?;
    if standby(world).is_err() {
        world.run(&["set", "local.warm-pool=0"])?;
        table.note(what, "left out: no standby was made".into(), String::new());
        return Ok(());
    }
    let (mut with, mut without) = (Warm::default(), Warm::default());
    for _ in 0..extent.pairs {
        world.run(&["set", "local.warm-pool=1"])?;
        // A first one may be needed so that another is made.
        if standby(world).is_err() {
            Warm::default().measure(world)?;
            standby(world)?;
        }
        with.measure(world)?;
        world.run(&["set", "local.warm-pool=0"])?;
        poll("the standby goes", STANDBY_BOUND, || {
            world.daemon.machines().is_empty().then_some(())
        })?;
        std::thread::sleep(REST);
        without.measure(world)?;
    }
    let times = ratio(without.totals.median(), with.totals.median());
    let saved = without.totals.median().saturating_sub(with.totals.median());
    table.add(Row {
        what: what.into(),
        ours: with.totals.show(),
        alternative: without.totals.show(),
        ratio: format!("{times:.1}× faster, {} saved", show(saved)),
        ..Row::default()
    });
    table.note(
        "… `pileus launch` as a whole",
        with.launches.show(),
        without.launches.show(),
    );
    if world.boots.len() > 0 {
        let times = ratio(world.boots.median(), with.totals.median());
        table.add(Row {
            what: "… with a standby; cold launch to the same".into(),
            ours: with.totals.show(),
            alternative: world.boots.show(),
            ratio: format!("{times:.0}× faster"),
            ..Row::default()
        });
    }
    Ok(())
}

/// Waits for a standby (all instances are gone) and lets it come to rest.
fn standby(world: &World) -> Result<()> {
    poll("there is a standby", STANDBY_BOUND, || {
        (!world.daemon.machines().is_empty()).then_some(())
    })?;
    std::thread::sleep(REST);
    Ok(())
}

/// Forks of a running instance.
pub fn fork(shared: &mut Option<World>, extent: Extent, table: &mut Table) -> Result<()> {
    let Some(world) = World::of(shared, table)? else {
        return Ok(());
    };
    let source = world.launch("--warm")?.name;
    // What nobody waits for after a clone's start is over then.
    std::thread::sleep(Duration::from_secs(25));
    for clones in 1..=3_u64 {
        let (mut whole, mut pauses) = (Times::default(), Times::default());
        let what = format!("fork of a running instance, clones: {clones}");
        for _ in 0..extent.boots {
            let count = clones.to_string();
            let (took, names, pause) = match forked(world, &source, &count) {
                Ok(done) => done,
                Err(err) => {
                    table.failed(&what, &format!("{err:#}"));
                    return world.purge(&[source]);
                }
            };
            whole.add(took);
            pauses.add(pause);
            for name in &names {
                world.run(&["exec", name, "--", "true"])?;
            }
            world.purge(&names)?;
        }
        let each = show(whole.median() / u32::try_from(clones)?);
        table.note(
            what,
            format!("{}, {each} a clone", whole.show()),
            format!("the source stood still for {}", pauses.show()),
        );
    }
    world.purge(&[source])
}

/// How long a fork took, the clones' names, and how long the source stood still.
fn forked(world: &World, source: &str, count: &str) -> Result<(Duration, Vec<String>, Duration)> {
    let mut command = world.command(&["fork", "--verbose", source, "-n", count]);
    let began = Instant::now();
    let output = command.output()?;
    let took = began.elapsed();
    let told = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{told}");
    let pause = told.lines().find_map(|line| {
        let (_, rest) = line.split_once(" stood still for ")?;
        rest.trim_end_matches('s').parse().ok()
    });
    let pause = Duration::from_secs_f64(pause.context("the pause is not told")?);
    let names = String::from_utf8_lossy(&output.stdout);
    let names = names.split_whitespace().map(str::to_owned).collect();
    Ok((took, names, pause))
}
