//! A running guest that is looked at fifty times a second: what that costs a program in it, how often its
//! agent is asked, and how long an answer takes. The alternative is one ssh for each look.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pileus_api::routes;

use crate::guest::Login;
use crate::measure::{Times, get, inside, poll, processor_time, show, timed};
use crate::table::{Row, Table};
use crate::warm::{Extent, World};

/// One look in so long.
const EVERY: Duration = Duration::from_millis(20);
/// Seconds of each turn; the ways change turns, so that what else the machine does hurts all.
const TURN: u32 = 5;
/// Looks that each need a new report.
const ALONE: u32 = 6;
/// Of the guest's speed without looks.
const LEAST: f64 = 0.95;
/// Counts for so many seconds, and tells how far it got.
const LOOP: &str = "import sys, time
end, n, x = time.monotonic() + float(sys.argv[1]), 0, 1
while time.monotonic() < end:
    for _ in range(1000):
        x = x * 1103515245 + 12345 & 0xffffffff
    n += 1
print(n)";
/// How often the agent has written anything so far: some times for each report.
const WRITES: &str = "pid=$(systemctl show --property MainPID --value pileus-agent.service)
sudo -n grep syscw: /proc/$pid/io | cut -d' ' -f2";
/// What a report says, by hand.
const LOOK: &str =
    "cat /proc/loadavg /etc/os-release; nproc; free -b; df -B1 /; hostname -I; uname -r";

#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Not,
    Api,
    Ssh,
}

/// What one way came to, in all its turns.
#[derive(Default)]
struct Way {
    /// Steps of the guest's loop.
    steps: f64,
    /// Processor seconds of QEMU.
    machine: f64,
    /// Processor seconds of the daemon.
    daemon: f64,
    /// That the guest's loop ran, by its own clock.
    looped: f64,
    /// That it was looked at.
    seconds: f64,
    answers: Times,
    /// What the agent wrote, in reports.
    reports: f64,
}

impl Way {
    fn speed(&self) -> f64 {
        self.steps / self.looped.max(1e-9)
    }

    fn rate(&self) -> f64 {
        self.answers.len() as f64 / self.seconds.max(1e-9)
    }
}

/// Fifty looks a second.
pub fn info(shared: &mut Option<World>, extent: Extent, table: &mut Table) -> Result<()> {
    let Some(world) = World::of(shared, table)? else {
        return Ok(());
    };
    let name = world.launch("--warm")?.name;
    // What nobody waits for after a clone's start is over then.
    std::thread::sleep(Duration::from_secs(20));
    let look = Look::of(world, &name)?;
    let (mut not, mut api, mut ssh) = (Way::default(), Way::default(), Way::default());
    for _ in 0..extent.boots.max(2) * 2 {
        look.turn(How::Not, &mut not)?;
        look.turn(How::Api, &mut api)?;
        look.turn(How::Ssh, &mut ssh)?;
    }
    tell(&not, &api, &ssh, table);
    world.purge(&[name])
}

struct Look<'a> {
    world: &'a World,
    name: &'a str,
    login: Login,
    machine: i32,
    daemon: i32,
    /// How often the agent writes for one report.
    writes: f64,
}

impl<'a> Look<'a> {
    fn of(world: &'a World, name: &'a str) -> Result<Self> {
        let info = world.info(name)?;
        let id = info["id"].as_str().context("it has no id")?;
        let mut look = Self {
            world,
            name,
            login: Login::of(&world.daemon, &info)?,
            machine: world.daemon.machine_of(id).context("it has no QEMU")?,
            daemon: world.daemon.pid().context("the daemon runs")?,
            writes: 1.0,
        };
        poll("ssh to the guest", Duration::from_secs(60), || {
            look.once(How::Ssh).ok()
        })?;
        let before = look.in_guest(&["sh", "-c", WRITES])?;
        for _ in 0..ALONE {
            // The last report is too old by then.
            std::thread::sleep(Duration::from_millis(1500));
            look.once(How::Api)?;
        }
        let writes = look.in_guest(&["sh", "-c", WRITES])? - before;
        look.writes = (writes / f64::from(ALONE)).max(1.0);
        eprintln!("the agent writes {} times for a report", look.writes);
        Ok(look)
    }

    fn once(&self, how: How) -> Result<()> {
        match how {
            How::Not => std::thread::sleep(EVERY),
            How::Api => {
                let path = routes::fill(routes::INSTANCE, self.name);
                let info = get(&self.world.daemon.socket(), &path)?;
                info["report"]["load"].as_array().context("no report")?;
            }
            How::Ssh => {
                inside(self.daemon, || timed(&mut self.login.ssh(LOOK)))?;
            }
        }
        Ok(())
    }

    fn in_guest(&self, words: &[&str]) -> Result<f64> {
        let args = [&["exec", self.name, "--"], words].concat();
        let (_, text) = timed(&mut self.world.command(&args))?;
        text.trim()
            .parse()
            .with_context(|| format!("{words:?}: {text}"))
    }

    fn turn(&self, how: How, way: &mut Way) -> Result<()> {
        let used = |pid| processor_time(pid).map(|time| time.as_secs_f64());
        let (machine, daemon) = (used(self.machine)?, used(self.daemon)?);
        let writes = self.in_guest(&["sh", "-c", WRITES])?;
        let seconds = TURN.to_string();
        let steps = std::thread::scope(|scope| -> Result<f64> {
            let at_work = scope.spawn(|| self.in_guest(&["python3", "-c", LOOP, &seconds]));
            let began = Instant::now();
            let mut looks = 0;
            while !at_work.is_finished() {
                let asked = Instant::now();
                self.once(how)?;
                way.answers.add(asked.elapsed());
                looks += 1;
                if how == How::Api {
                    // By the clock: one that was slow is made up for.
                    std::thread::sleep((EVERY * looks).saturating_sub(began.elapsed()));
                }
            }
            way.seconds += began.elapsed().as_secs_f64();
            at_work
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })?;
        way.steps += steps;
        way.looped += f64::from(TURN);
        let writes = self.in_guest(&["sh", "-c", WRITES])? - writes;
        way.reports += writes / self.writes;
        way.machine += used(self.machine)? - machine;
        way.daemon += used(self.daemon)? - daemon;
        Ok(())
    }
}

fn tell(not: &Way, api: &Way, ssh: &Way, table: &mut Table) {
    let kept = |way: &Way| way.speed() / not.speed().max(1e-9);
    // What the guest got done for what its QEMU used: other programs of the host don't matter to it.
    let per = |way: &Way| (way.steps / way.machine.max(1e-9)) / (not.steps / not.machine.max(1e-9));
    let shown = |way: &Way| {
        format!(
            "{:.0} % ({:.0} % by QEMU's processor time) at {:.1} a second",
            kept(way) * 100.0,
            per(way) * 100.0,
            way.rate()
        )
    };
    table.add(Row {
        what: "speed of a busy loop in a guest that is looked at, of that without; looks by ssh"
            .into(),
        ours: shown(api),
        alternative: shown(ssh),
        bound: format!("≥ {:.0} %", LEAST * 100.0),
        met: Some(kept(api) >= LEAST),
        ..Row::default()
    });
    let answers = |way: &Way| {
        let of = |percent| show(way.answers.percentile(percent));
        format!("p50 {}, p95 {}, longest {}", of(50), of(95), of(100))
    };
    table.note("… how long a look takes", answers(api), answers(ssh));
    let most = api.seconds * 1.3 + 2.0;
    table.add(Row {
        what: format!("… reports of the agent meanwhile, in {:.0} s", api.seconds),
        ours: format!("{:.0} for {} looks", api.reports, api.answers.len()),
        alternative: format!("{:.0} without looks", not.reports),
        bound: "one a second".into(),
        met: Some(api.reports <= most),
        ..Row::default()
    });
    table.note(
        "… the daemon's processor time",
        format!("{:.1} %", api.daemon / api.seconds * 100.0),
        format!("{:.1} % without looks", not.daemon / not.seconds * 100.0),
    );
}
