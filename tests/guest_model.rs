//! A real guest led at random through all that can happen to one, kills of the daemon and of QEMU included,
//! beside a model of what must be left. What is cut off in the middle may have happened or not: the model
//! keeps all worlds that are possible, and what the guest then tells rules out the others.
//!
//! `PILEUS_GUEST_SEED` and `PILEUS_GUEST_STEPS` choose another way, and how far to go.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use pileus_testkit::{Daemon, Need, Options, need, wait_until};
use serde_json::{Value, json};

use crate::guests::{kill_machine, machine, settles};

const STEPS: u64 = 100;
/// Boots take most of a minute: so many at most.
const BOOTS: u32 = 2;
const SNAPSHOTS: usize = 6;
/// On a machine that is busy with something else fewer steps are as good.
const ENOUGH: Duration = Duration::from_secs(420);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Suspended,
    Stopped,
}

impl State {
    fn of(shown: &str) -> Self {
        match shown {
            "Running" => State::Running,
            "Suspended" => State::Suspended,
            "Stopped" => State::Stopped,
            other => panic!("an unexpected state: {other}"),
        }
    }
}

/// What may be true of the instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct World {
    state: State,
    /// The number that was written to its disk last.
    disk: u64,
    /// The number in its memory; none after a boot.
    memory: Option<u64>,
}

impl World {
    fn at(self, state: State) -> Self {
        Self { state, ..self }
    }

    fn without_power(self) -> Self {
        Self {
            state: State::Stopped,
            memory: None,
            ..self
        }
    }
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Write,
    Suspend,
    Start,
    Stop,
    ForceStop,
    Snapshot {
        memory: bool,
    },
    Restore {
        disk_only: bool,
    },
    DeleteSnapshot,
    Clone,
    Fork,
    Rename,
    KillDaemon,
    KillMachine,
    /// The daemon is killed a moment after it began with this.
    CutSuspend,
    CutStart,
    CutSnapshot,
    CutRestore,
    /// QEMU is killed while it suspends.
    KillSuspend,
}

use Step::{
    Clone as CloneIt, CutRestore, CutSnapshot, CutStart, CutSuspend, DeleteSnapshot, ForceStop,
    Fork, KillDaemon, KillMachine, KillSuspend, Rename, Restore, Snapshot, Start, Stop, Suspend,
    Write,
};

const WHEN_RUNNING: [(u32, Step); 18] = [
    (18, Write),
    (14, Suspend),
    (6, Snapshot { memory: false }),
    (8, Snapshot { memory: true }),
    (8, Restore { disk_only: false }),
    (5, DeleteSnapshot),
    (3, CloneIt),
    // It starts much of the guest anew, and takes as long as ten others.
    (2, Fork),
    (5, Rename),
    (5, KillDaemon),
    (3, KillMachine),
    (3, ForceStop),
    (1, Stop),
    (2, Start),
    (7, CutSuspend),
    (5, CutSnapshot),
    (5, CutRestore),
    (4, KillSuspend),
];
const WHEN_SUSPENDED: [(u32, Step); 11] = [
    (30, Start),
    (4, Snapshot { memory: false }),
    (6, Snapshot { memory: true }),
    (6, Restore { disk_only: false }),
    (2, Restore { disk_only: true }),
    (4, DeleteSnapshot),
    (3, CloneIt),
    (5, KillDaemon),
    (2, ForceStop),
    (10, CutStart),
    (4, CutRestore),
];
const WHEN_STOPPED: [(u32, Step); 9] = [
    (30, Restore { disk_only: false }),
    (5, Restore { disk_only: true }),
    (4, Start),
    (4, Snapshot { memory: false }),
    (3, DeleteSnapshot),
    (3, CloneIt),
    (4, Rename),
    (4, KillDaemon),
    (6, CutRestore),
];

struct Walk {
    daemon: Daemon,
    random: u64,
    name: &'static str,
    /// All that may be; never empty.
    worlds: Vec<World>,
    /// What each snapshot holds: disk, and memory if that was saved.
    snapshots: BTreeMap<String, (u64, Option<u64>)>,
    written: u64,
    taken: u64,
    boots: u32,
    trail: Vec<String>,
}

fn from_environment(name: &str, default: u64) -> u64 {
    let given = std::env::var(name).ok();
    given.and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn guest_model() {
    if !need(&[Need::Root, Need::Tun, Need::Guest]) {
        return;
    }
    let seed = from_environment("PILEUS_GUEST_SEED", 4);
    let steps = from_environment("PILEUS_GUEST_STEPS", STEPS);
    let daemon = Daemon::start(Options::warm());
    daemon
        .run(&["launch", "--warm", "--name", "foo"])
        .ok_with_words();
    let mut walk = Walk {
        daemon,
        random: seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
        name: "foo",
        worlds: vec![World {
            state: State::Running,
            disk: 0,
            memory: None,
        }],
        snapshots: BTreeMap::new(),
        written: 0,
        taken: 0,
        boots: 0,
        trail: Vec::new(),
    };
    walk.step(Write);
    walk.step(Snapshot { memory: true });
    let began = Instant::now();
    let mut done = 2;
    while done < steps && (began.elapsed() < ENOUGH || steps != STEPS) {
        let step = walk.choose();
        walk.step(step);
        done += 1;
    }
    eprintln!("{done} steps from seed {seed} in {:.0?}", began.elapsed());
    walk.end();
}

impl Drop for Walk {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let last = self.trail.len().saturating_sub(25);
            eprintln!("--- the way here:\n{}", self.trail[last..].join("\n"));
        }
    }
}

impl Walk {
    fn number(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) % below
    }

    fn choose(&mut self) -> Step {
        let from: &[(u32, Step)] = match self.state() {
            State::Running => &WHEN_RUNNING,
            State::Suspended => &WHEN_SUSPENDED,
            State::Stopped => &WHEN_STOPPED,
        };
        loop {
            let all: u32 = from.iter().map(|(weight, _)| weight).sum();
            let mut at = u32::try_from(self.number(u64::from(all))).unwrap();
            let chosen = from.iter().find(|(weight, _)| {
                let found = at < *weight;
                at = at.saturating_sub(*weight);
                found
            });
            let step = chosen.unwrap().1;
            if self.makes_sense(step) {
                return step;
            }
        }
    }

    fn makes_sense(&self, step: Step) -> bool {
        let certain = self.worlds.len() == 1;
        match step {
            Snapshot { .. } | CutSnapshot => certain && self.snapshots.len() < SNAPSHOTS,
            Start if self.state() == State::Stopped => self.boots < BOOTS,
            // One with memory always stays: the way back without a boot.
            DeleteSnapshot => self.with_memory() > 1,
            _ => true,
        }
    }

    fn with_memory(&self) -> usize {
        self.snapshots.values().filter(|s| s.1.is_some()).count()
    }

    fn state(&self) -> State {
        self.worlds[0].state
    }

    /// A snapshot by chance; one with memory if that is wanted.
    fn some_snapshot(&mut self, memory: bool) -> (String, (u64, Option<u64>)) {
        let wanted = |s: &&(u64, Option<u64>)| !memory || s.1.is_some();
        let count = self.snapshots.values().filter(wanted).count();
        let at = usize::try_from(self.number(count as u64)).unwrap();
        let found = self.snapshots.iter().filter(|(_, s)| wanted(s)).nth(at);
        let (name, what) = found.unwrap();
        (name.clone(), *what)
    }

    /// Begins a POST. What takes no body gets none: a server that closes on one resets the connection.
    fn begin(&self, what: &str, body: &Value) -> Value {
        let path = format!("/v1/instances/{}/{what}", self.name);
        let body = (what != "suspend").then_some(body);
        let begun = self.daemon.api().begin("POST", &path, body);
        begun.unwrap_or_else(|err| panic!("{what}: {err:?}"))
    }

    fn act(&self, what: &str, body: &Value) {
        let begun = self.begin(what, body);
        if let Err(err) = self.daemon.api().wait(&begun) {
            panic!("{what}: {err:?}");
        }
    }

    fn step(&mut self, step: Step) {
        self.trail.push(format!("    {step:?} …"));
        let began = Instant::now();
        let told = self.perform(step);
        self.look();
        let took = began.elapsed();
        self.trail.pop();
        self.trail.push(format!(
            "{:3} {step:?} {told} {took:.1?} -> {:?}",
            self.trail.len(),
            self.worlds
        ));
    }

    fn perform(&mut self, step: Step) -> String {
        let now = self.worlds.clone();
        match step {
            Write => {
                self.written += 1;
                let value = self.written;
                // As root: what a user keeps there goes when that user's last session ends.
                let script = format!(
                    "echo {value} > /var/tmp/n; echo {value} > /dev/shm/n; sync /var/tmp/n /var/tmp"
                );
                self.daemon.script(self.name, &script);
                self.worlds = vec![World {
                    state: State::Running,
                    disk: value,
                    memory: Some(value),
                }];
                return value.to_string();
            }
            Suspend => {
                self.act("suspend", &json!({}));
                self.all_become(State::Suspended);
            }
            Start => {
                self.boots += u32::from(self.state() == State::Stopped);
                self.act("start", &json!({}));
                self.all_become(State::Running);
            }
            Stop | ForceStop => {
                self.act("stop", &json!({ "force": matches!(step, ForceStop) }));
                self.worlds = now.into_iter().map(World::without_power).collect();
            }
            Snapshot { memory } => return self.snapshot(memory),
            Restore { disk_only } => return self.restore(disk_only),
            DeleteSnapshot => {
                let keep = self.with_memory() == 1;
                let (name, what) = self.some_snapshot(false);
                if keep && what.1.is_some() {
                    return "nothing".into();
                }
                let path = format!("/v1/instances/{}/snapshots/{name}", self.name);
                self.daemon.api().run("DELETE", &path, None).unwrap();
                self.snapshots.remove(&name);
                return name;
            }
            CloneIt => {
                self.act("clone", &json!({ "name": "other" }));
                assert_eq!(self.daemon.state("other"), "Stopped");
                self.daemon.run(&["delete", "--purge", "other"]).ok();
            }
            Fork => self.fork(),
            Rename => {
                let new = if self.name == "foo" { "bar" } else { "foo" };
                let path = format!("/v1/instances/{}/rename", self.name);
                let body = json!({ "name": new });
                self.daemon.api().call("POST", &path, Some(&body)).unwrap();
                self.name = new;
                if self.state() == State::Running {
                    assert_eq!(self.daemon.exec(new, &["hostname"]), format!("{new}\n"));
                }
            }
            KillDaemon => self.another_daemon(),
            KillMachine => {
                kill_machine(machine(&self.daemon, self.name).unwrap());
                settles(&self.daemon, self.name, &["Stopped"], 30);
                self.worlds = now.into_iter().map(World::without_power).collect();
            }
            CutSuspend => {
                let told = self.cut("suspend", &json!({}));
                let done = now.iter().map(|w| w.at(State::Suspended));
                self.worlds = now.iter().copied().chain(done).collect();
                return told;
            }
            CutStart => {
                let told = self.cut("start", &json!({}));
                let done = now.iter().map(|w| w.at(State::Running));
                self.worlds = now.iter().copied().chain(done).collect();
                return told;
            }
            CutSnapshot => return self.cut_snapshot(),
            CutRestore => return self.cut_restore(),
            KillSuspend => {
                let pid = machine(&self.daemon, self.name).unwrap();
                let millis = self.moment();
                let begun = self.begin("suspend", &Value::Null);
                std::thread::sleep(Duration::from_millis(millis));
                kill_machine(pid);
                let ended = self.daemon.api().wait(&begun);
                let saved = now.iter().map(|w| w.at(State::Suspended));
                self.worlds = match ended.is_ok() {
                    true => saved.collect(),
                    false => now.iter().map(|w| w.without_power()).collect(),
                };
                return format!("after {millis} ms");
            }
        }
        String::new()
    }

    fn all_become(&mut self, state: State) {
        for world in &mut self.worlds {
            *world = world.at(state);
        }
    }

    fn snapshot(&mut self, memory: bool) -> String {
        self.taken += 1;
        let name = format!("s{}", self.taken);
        self.act("snapshots", &json!({ "name": name, "with_memory": memory }));
        self.note_snapshot(&name, memory);
        name
    }

    fn note_snapshot(&mut self, name: &str, memory: bool) {
        let world = self.worlds[0];
        // Memory in which nothing was written is a memory all the same: none of it is a number.
        let saved = memory.then(|| world.memory.unwrap_or(0));
        self.snapshots.insert(name.to_owned(), (world.disk, saved));
    }

    fn restored(&self, what: (u64, Option<u64>)) -> World {
        World {
            state: State::Running,
            disk: what.0,
            memory: what.1.filter(|number| *number > 0),
        }
    }

    fn restore(&mut self, disk_only: bool) -> String {
        let (name, what) = self.some_snapshot(!disk_only);
        self.act(
            &format!("snapshots/{name}/restore"),
            &json!({ "disk_only": disk_only }),
        );
        let new = self.restored(what);
        self.worlds = vec![match disk_only {
            true => new.without_power(),
            false => new,
        }];
        name
    }

    /// A fork tells what both of them hold.
    fn fork(&mut self) {
        self.daemon
            .run(&["fork", self.name, "--name", "twin"])
            .ok_with_words();
        let (disk, memory) = self.read("twin");
        let told = format!("the fork has {disk} on disk, {memory:?} in memory");
        self.rule_out(&told, |w| (w.disk, w.memory) == (disk, memory));
        self.daemon.run(&["delete", "--purge", "twin"]).ok();
    }

    fn moment(&mut self) -> u64 {
        let bound = [20, 200, 800, 2000][usize::try_from(self.number(4)).unwrap()];
        self.number(bound)
    }

    fn another_daemon(&mut self) {
        self.daemon.kill();
        self.daemon.start_again();
    }

    /// Begins something, and kills the daemon.
    fn cut(&mut self, what: &str, body: &Value) -> String {
        let millis = self.moment();
        self.begin(what, body);
        std::thread::sleep(Duration::from_millis(millis));
        self.another_daemon();
        format!("after {millis} ms")
    }

    fn cut_snapshot(&mut self) -> String {
        self.taken += 1;
        let name = format!("s{}", self.taken);
        let memory = self.number(2) == 0;
        let told = self.cut("snapshots", &json!({ "name": name, "with_memory": memory }));
        if self.shown_snapshots().contains(&name) {
            self.note_snapshot(&name, memory);
        }
        told
    }

    fn cut_restore(&mut self) -> String {
        let (name, what) = self.some_snapshot(true);
        let told = self.cut(&format!("snapshots/{name}/restore"), &json!({}));
        let new = self.restored(what);
        let now = self.worlds.clone();
        self.worlds.extend(now.iter().map(|w| w.without_power()));
        self.worlds
            .extend([new, new.at(State::Suspended), new.without_power()]);
        format!("{name} {told}")
    }

    fn shown_snapshots(&self) -> Vec<String> {
        let all = self.daemon.api().snapshots(self.name).unwrap();
        let mut names: Vec<String> = all
            .iter()
            .map(|s| s["name"].as_str().unwrap().to_owned())
            .collect();
        names.sort();
        names
    }

    /// The numbers on a guest's disk and in its memory.
    fn read(&self, name: &str) -> (u64, Option<u64>) {
        let script = "cat /var/tmp/n 2> /dev/null || echo 0; cat /dev/shm/n 2> /dev/null || echo -";
        let told = self.daemon.exec(name, &["sh", "-c", script]);
        let mut lines = told.lines();
        let disk = lines.next().and_then(|line| line.parse().ok());
        let memory = lines.next().and_then(|line| line.parse().ok());
        (disk.unwrap_or_else(|| panic!("{told:?}")), memory)
    }

    #[track_caller]
    fn rule_out(&mut self, told: &str, holds: impl Fn(&World) -> bool) {
        let left: Vec<World> = self.worlds.iter().copied().filter(|w| holds(w)).collect();
        assert!(
            !left.is_empty(),
            "{told}, but it should be one of {:?}",
            self.worlds
        );
        self.worlds = left;
        self.worlds.dedup();
    }

    /// Compares what is with what may be.
    fn look(&mut self) {
        // A daemon that has just begun tells what it knew before until it has looked for the machine.
        let shown = wait_until("its state and its machine agree", 60, || {
            let shown = self.daemon.state(self.name);
            let settled = ["Running", "Suspended", "Stopped"].contains(&shown.as_str());
            let machines = usize::from(shown == "Running");
            (settled && self.daemon.machines().len() == machines).then_some(shown)
        });
        let state = State::of(&shown);
        self.rule_out(&shown, |world| world.state == state);
        let names: Vec<&String> = self.snapshots.keys().collect();
        let mut shown = self.shown_snapshots();
        shown.sort();
        assert!(
            shown.iter().eq(names.iter().copied()),
            "{shown:?} {names:?}"
        );
        if state == State::Running {
            let (disk, memory) = self.read(self.name);
            let told = format!("{disk} is on disk, {memory:?} in memory");
            self.rule_out(&told, |w| (w.disk, w.memory) == (disk, memory));
        }
    }

    /// All that was kept is still good; and then nothing is left.
    fn end(mut self) {
        for (name, what) in self.snapshots.clone() {
            if what.1.is_none() {
                continue;
            }
            self.act(&format!("snapshots/{name}/restore"), &json!({}));
            self.worlds = vec![self.restored(what)];
            self.look();
        }
        self.daemon.run(&["delete", "--purge", self.name]).ok();
        let data = self.daemon.storage().join("data");
        let left = pileus_testkit::files_below(&data.join("instances"));
        assert!(left.is_empty(), "{left:?}");
        let layers = pileus_testkit::files_below(&data.join("layers"));
        assert_eq!(
            layers.len(),
            1,
            "only the template's layer stays: {layers:?}"
        );
    }
}
