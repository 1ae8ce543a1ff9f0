//! Thousands of random requests, crashes and kills against a model of what must hold (`fake_model_rules.rs`).
//! After each step all that the API tells, and what lies in the files, must be as the model says. Some steps
//! are two requests at once: then one of the two orders must explain what came of it; in some the daemon is
//! killed in the middle: then all is as before, or as after, or as one of the few states between.
//!
//! Several worlds run side by side, each of its own seed and always of the same: one that fails does so because of
//! what was changed. `PILEUS_MODEL_SEED=N PILEUS_MODEL_STEPS=N` runs one of them, or another; with
//! `PILEUS_MODEL_SEED=random` as many run that nobody has seen before. What is asked for at a step follows from the
//! seed, the step and the model alone. What comes of two requests at once, or of a kill, is up to the moment, so two
//! runs of a seed may part there: what one found may take another some tries.
//!
//! Deleted snapshots leave layers behind, which are merged while all this goes on.

use std::collections::VecDeque;
use std::fmt::Write;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pileus_testkit::{Need, Refusal, need};
use serde_json::{Value, json};

use crate::fake_model_rules::{GIB, Instance, Model, Op, Pending, Snapshot, State};
use crate::fake_world::{World, text};

/// One daemon for each, side by side, if nobody says otherwise.
const SEEDS: [u64; 4] = [1, 2, 3, 4];
/// Steps of each.
const STEPS: u64 = 2600;
/// With so many layers an instance needs no more of them.
const MANY_LAYERS: usize = 60;
const MOST_INSTANCES: usize = 4;
const MOST_SNAPSHOTS: usize = 6;

#[test]
fn fake_model_of_an_instances_life() {
    if !need(&[Need::Root, Need::Tun]) {
        return;
    }
    let steps = told("PILEUS_MODEL_STEPS").map_or(STEPS, |steps| number(&steps));
    let seeds = match told("PILEUS_MODEL_SEED").as_deref() {
        None => SEEDS.to_vec(),
        Some("random") => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            let mut random = Random::of(now.map_or(1, |now| now.as_nanos() as u64), 0);
            SEEDS.map(|_| random.below(1 << 32)).to_vec()
        }
        Some(seed) => vec![number(seed)],
    };
    let began = Instant::now();
    let failed: Vec<String> = std::thread::scope(|scope| {
        let runs: Vec<_> = seeds
            .iter()
            .map(|seed| scope.spawn(move || Run::new(*seed).all(steps).err()))
            .collect();
        let done = runs.into_iter().zip(&seeds).map(|(run, seed)| {
            let broken = Some(format!("seed {seed}: the test itself broke off"));
            run.join().unwrap_or(broken)
        });
        done.flatten().collect()
    });
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
    let (count, took) = (steps * seeds.len() as u64, began.elapsed());
    eprintln!("{count} steps in {took:.1?}, seeds {seeds:?}");
}

fn told(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[track_caller]
fn number(value: &str) -> u64 {
    let number = value.parse();
    number.unwrap_or_else(|_| panic!("{value} is no number"))
}

/// One daemon, one model.
struct Run {
    seed: u64,
    random: Random,
    world: World,
    model: Model,
    last: VecDeque<String>,
}

impl Run {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            random: Random::of(seed, 0),
            world: World::merging("fast"),
            model: Model::default(),
            last: VecDeque::new(),
        }
    }

    fn all(mut self, steps: u64) -> Result<(), String> {
        for step in 1..=steps {
            let done = self.step(step);
            if let Err(why) = done {
                let mut story = format!("seed {} failed at step {step}: {why}", self.seed);
                let _ = write!(story, "\nthe last steps:");
                for line in &self.last {
                    let _ = write!(story, "\n  {line}");
                }
                let _ = write!(
                    story,
                    "\nrepeat: PILEUS_MODEL_SEED={} PILEUS_MODEL_STEPS={step} \
                     cargo test -p pileus-tests fake_model",
                    self.seed
                );
                for (name, log) in self.world.qemu_logs() {
                    let _ = write!(story, "\n  QEMU of {name} says: {log}");
                }
                let log = self.world.log();
                let tail: Vec<_> = log.lines().rev().take(40).collect();
                for line in tail.iter().rev() {
                    let _ = write!(story, "\n    {line}");
                }
                return Err(story);
            }
        }
        eprintln!("seed {}: {} merges", self.seed, self.world.merges());
        Ok(())
    }

    fn note(&mut self, line: String) {
        if self.last.len() == 50 {
            self.last.pop_front();
        }
        self.last.push_back(line);
    }

    fn step(&mut self, step: u64) -> Result<(), String> {
        self.random = Random::of(self.seed, step);
        let op = self.choose();
        match self.random.below(100) {
            0..4 if !matches!(op, Op::PileUp(_)) => self.cut_off(step, &op)?,
            4..16 => {
                let other = self.choose();
                match is_alone(&op) || is_alone(&other) {
                    true => self.alone(step, &op)?,
                    false => self.at_once(step, &op, &other)?,
                }
            }
            16 => {
                self.note(format!("{step}: the daemon is killed"));
                self.world.crash();
            }
            _ => self.alone(step, &op)?,
        }
        let seen = self.seen()?;
        self.model.bind(&seen)?;
        if let Some(twins) = self.model.twins() {
            return Err(twins);
        }
        if step.is_multiple_of(20) {
            self.world.try_all_is_well()?;
        }
        Ok(())
    }

    fn alone(&mut self, step: u64, op: &Op) -> Result<(), String> {
        let done = perform(&self.world, op);
        self.note(format!("{step}: {op:?} {}", outcome(&done)));
        let expected = self.model.apply(op).map_err(str::to_owned);
        let got = done.map_err(|refusal| refusal.code);
        match got == expected {
            true => Ok(()),
            false => Err(format!("{op:?} gave {got:?}, not {expected:?}")),
        }
    }

    fn at_once(&mut self, step: u64, first: &Op, second: &Op) -> Result<(), String> {
        let world = &self.world;
        let (one, two) = std::thread::scope(|scope| {
            let other = scope.spawn(|| perform(world, second));
            (perform(world, first), other.join())
        });
        let two = two.map_err(|_| "a request panicked".to_owned())?;
        self.note(format!(
            "{step}: at once {first:?} {} and {second:?} {}",
            outcome(&one),
            outcome(&two)
        ));
        self.world.settle();
        let seen = self.seen()?;
        let code = |done: Result<(), Refusal>| done.map_err(|refusal| refusal.code);
        let (one, two) = (code(one), code(two));
        let mut why = String::new();
        for swapped in [false, true] {
            let mut model = self.model.clone();
            let mut apply = |op| model.apply(op).map_err(str::to_owned);
            let (a, b) = match swapped {
                false => (apply(first), apply(second)),
                true => {
                    let b = apply(second);
                    (apply(first), b)
                }
            };
            if (&a, &b) != (&one, &two) {
                let _ = write!(why, "\n swapped {swapped}: {a:?} and {b:?} were due");
                continue;
            }
            match model.bind(&seen) {
                Ok(()) => {
                    self.model = model;
                    return Ok(());
                }
                Err(different) => {
                    let _ = write!(why, "\n swapped {swapped}: {different}");
                }
            }
        }
        Err(format!("no order of the two explains it:{why}"))
    }

    /// The daemon is killed while it works on this.
    fn cut_off(&mut self, step: u64, op: &Op) -> Result<(), String> {
        let wait = Duration::from_micros(self.random.below(30_000));
        let begun = std::thread::scope(|scope| {
            let world = &self.world;
            let request = scope.spawn(|| perform_once(world, op));
            std::thread::sleep(wait);
            world.kill_only();
            request.join()
        });
        let begun = begun.map_err(|_| "a request panicked".to_owned())?;
        self.note(format!(
            "{step}: killed after {wait:?} in {op:?} {}",
            outcome(&begun)
        ));
        self.world.crash();
        let seen = self.seen()?;
        // What was answered holds.
        let mut candidates = match begun {
            Ok(()) => {
                let mut after = self.model.clone();
                after
                    .apply(op)
                    .map_err(|why| format!("{op:?} worked, not {why}"))?;
                vec![after]
            }
            Err(refusal) if refusal.is_broken_off() => self.model.cut_off(op),
            Err(_) => vec![self.model.clone()],
        };
        let mut why = String::new();
        for model in &mut candidates {
            match model.bind(&seen) {
                Ok(()) => {
                    self.model = model.clone();
                    return Ok(());
                }
                Err(different) => {
                    let _ = write!(why, "\n {different}");
                }
            }
        }
        Err(format!("nothing explains what is left:{why}"))
    }

    /// What the API and the files tell.
    fn seen(&self) -> Result<Model, String> {
        let failed = |refusal: Refusal| format!("{refusal:?}");
        let mut model = Model::default();
        let all = self.world.api.get("/v1/snapshots").map_err(failed)?;
        let rows = self.world.disks();
        for told in self.world.api.instances().map_err(failed)? {
            let (name, id) = (text(&told, "name"), text(&told, "id"));
            let disks = rows.get(id).ok_or_else(|| format!("{name} has no row"))?;
            let all = all.as_array().into_iter().flatten();
            let of: Vec<_> = all.filter(|s| text(s, "instance") == name).collect();
            let instance = instance(&told, &of, disks)?;
            model.instances.insert(name.to_owned(), instance);
        }
        Ok(model)
    }

    fn choose(&mut self) -> Op {
        let names: Vec<String> = self.model.instances.keys().cloned().collect();
        let random = &mut self.random;
        let any = format!("m{}", random.below(6));
        let name = match random.below(20) {
            0 => any.clone(),
            _ => random.one_of(&names).unwrap_or_else(|| any.clone()),
        };
        let Some(instance) = self.model.instances.get(&name) else {
            return Op::Launch(name);
        };
        let full = names.len() >= MOST_INSTANCES;
        let runs = instance.state == State::Running && !instance.deleted;
        let known: Vec<String> = instance.snapshots.keys().cloned().collect();
        let new = format!("s{}", random.below(10));
        let snapshot = match random.below(12) {
            0 => new.clone(),
            _ => random.one_of(&known).unwrap_or_else(|| new.clone()),
        };
        match random.below(100) {
            0..4 if !full => Op::Launch(any),
            0..6 => Op::DeleteForGood(name),
            6..20 => Op::Start(name),
            20..24 => Op::Stop(name),
            24..27 => Op::ForceStop(name),
            27..31 => Op::Restart(name),
            31..38 => Op::Suspend(name),
            38..50 if known.len() < MOST_SNAPSHOTS => Op::Snapshot {
                of: name,
                name: new,
                memory: random.below(2) == 0,
            },
            38..58 => Op::Restore(name, snapshot),
            58..64 => Op::DeleteSnapshot(name, snapshot),
            64..69 if !full => Op::Clone {
                of: name,
                name: any,
                snapshot: (random.below(2) == 0).then_some(snapshot),
            },
            64..72 => Op::Rename(name, any),
            72..74 => Op::RenameSnapshot(name, snapshot, new),
            74..76 => Op::Comment(name, snapshot, format!("words {}", random.below(100))),
            76..79 => Op::Cpus(name, 1 + random.below(4)),
            79..82 => Op::Memory(name, GIB + (random.below(4) << 29)),
            82..86 => {
                let more = random.below(3) << 30;
                Op::Disk(name, instance.disk + more - (random.below(5) / 4) * GIB)
            }
            86..88 => {
                let wish = ["last", "always", "never"][random.below(3) as usize];
                Op::Autostart(name, wish)
            }
            88..91 => Op::Delete(name),
            91..94 => Op::Recover(name),
            94 => Op::Purge,
            95 if runs => Op::PileUp(name),
            96 if runs => Op::Crash(name),
            97 if runs => Op::PowerOff(name),
            98..100 if runs => Op::Reboot(name),
            _ => Op::Start(name),
        }
    }
}

/// Not to be mixed with another request: it breaks others off, or it changes what they are called by.
fn is_alone(op: &Op) -> bool {
    matches!(
        op,
        Op::ForceStop(_)
            | Op::DeleteForGood(_)
            | Op::Purge
            | Op::PileUp(_)
            | Op::Rename(..)
            | Op::Crash(_)
            | Op::PowerOff(_)
            | Op::Reboot(_)
    )
}

fn outcome(done: &Result<(), Refusal>) -> String {
    match done {
        Ok(()) => "ok".to_owned(),
        Err(refusal) => format!("{}: {} {}", refusal.code, refusal.message, refusal.details),
    }
}

fn instance(told: &Value, snapshots: &[&Value], disks: &Value) -> Result<Instance, String> {
    let name = text(told, "name");
    let number = |value: &Value, key: &str| value[key].as_u64().unwrap_or_default();
    let wrote = |disk: &Value| -> Vec<String> {
        let all = disk["wrote"].as_array().into_iter().flatten();
        all.filter_map(|w| w.as_str().map(str::to_owned)).collect()
    };
    let state = match text(told, "state") {
        "stopped" => State::Stopped,
        "running" => State::Running,
        "suspended" => State::Suspended,
        other => return Err(format!("{name} is {other}: {}", told["last_error"])),
    };
    if number(told, "disk") != number(disks, "size") {
        let (told, has) = (number(told, "disk"), number(disks, "size"));
        return Err(format!(
            "{name}'s disk is said to have {told} bytes and has {has}"
        ));
    }
    let mut instance = Instance {
        state,
        deleted: told["deleted"] == true,
        cpus: number(told, "cpus"),
        memory: number(told, "memory"),
        disk: number(told, "disk"),
        pending: Pending {
            cpus: told["pending"]["cpus"].as_u64(),
            memory: told["pending"]["memory"].as_u64(),
        },
        autostart: text(told, "autostart").to_owned(),
        snapshots: std::collections::BTreeMap::new(),
        head: None,
        wrote: wrote(disks),
        identify: disks["identify"] == true,
    };
    if number(told, "snapshots") != snapshots.len() as u64 {
        return Err(format!(
            "{name} has {} snapshots, not {}",
            snapshots.len(),
            told["snapshots"]
        ));
    }
    for told in snapshots {
        let disk = &disks["snapshots"][text(told, "id")];
        let snapshot = Snapshot {
            comment: text(told, "comment").to_owned(),
            parent: told["parent"].as_str().map(str::to_owned),
            with_memory: told["with_memory"] == true,
            cpus: number(told, "cpus"),
            memory: number(told, "memory"),
            disk: number(told, "disk"),
            wrote: wrote(disk),
            identify: disk["identify"] == true,
        };
        if told["head"] == true {
            instance.head = Some(text(told, "name").to_owned());
        }
        instance
            .snapshots
            .insert(text(told, "name").to_owned(), snapshot);
    }
    Ok(instance)
}

fn perform(world: &World, op: &Op) -> Result<(), Refusal> {
    let done = perform_once(world, op);
    if done.is_ok() {
        match op {
            Op::Crash(name) | Op::PowerOff(name) => {
                crate::fake_world::wait("its end is noticed", || world.state(name) == "stopped");
            }
            Op::Reboot(name) => world.wait_reboot(name),
            _ => (),
        }
    }
    done
}

/// One request, up to its end; of what happens in the guest only the beginning.
fn perform_once(world: &World, op: &Op) -> Result<(), Refusal> {
    let setting = |name: &str, what: &str, value: String| {
        world.api.set(&format!("local.{name}.{what}"), &value)
    };
    let done = match op {
        Op::Launch(name) => world.try_launch(name),
        Op::Start(name) => world.act(name, "start"),
        Op::Stop(name) => world.act(name, "stop"),
        Op::ForceStop(name) => world.force_stop(name),
        Op::Restart(name) => world.act(name, "restart"),
        Op::Suspend(name) => world.act(name, "suspend"),
        Op::Snapshot { of, name, memory } => world.snapshot(of, name, *memory),
        Op::Restore(name, snapshot) => world.restore(name, snapshot),
        Op::DeleteSnapshot(name, snapshot) => world.delete_snapshot(name, snapshot),
        Op::PileUp(name) if world.layers(name) > MANY_LAYERS => return Ok(()),
        Op::PileUp(name) => return world.pile_up(name, || ()),
        Op::Clone { of, name, snapshot } => {
            let body = json!({"name": name, "snapshot": snapshot});
            world.api.act(of, "clone", &body)
        }
        Op::Rename(name, new) => world.rename(name, new),
        Op::RenameSnapshot(name, snapshot, new) => {
            setting(name, &format!("{snapshot}.name"), new.clone())
        }
        Op::Comment(name, snapshot, comment) => {
            setting(name, &format!("{snapshot}.comment"), comment.clone())
        }
        Op::Cpus(name, cpus) => setting(name, "cpus", cpus.to_string()),
        Op::Memory(name, memory) => setting(name, "memory", memory.to_string()),
        Op::Disk(name, disk) => setting(name, "disk", disk.to_string()),
        Op::Autostart(name, wish) => setting(name, "autostart", (*wish).to_owned()),
        Op::Delete(name) => world.delete(name, false),
        Op::DeleteForGood(name) => world.delete(name, true),
        Op::Recover(name) => {
            let path = format!("/v1/instances/{name}/recover");
            world.api.call("POST", &path, None)
        }
        Op::Purge => world.api.call("POST", "/v1/purge", None),
        Op::Crash(name) => world.try_signal(name, Signal::SIGKILL),
        Op::PowerOff(name) => world.try_signal(name, Signal::SIGUSR1),
        Op::Reboot(name) => world.try_signal(name, Signal::SIGUSR2),
    };
    done.map(drop)
}

/// SplitMix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    /// What is drawn at a step has nothing to do with what was drawn before.
    fn of(seed: u64, step: u64) -> Self {
        Self(Self(seed).next().wrapping_add(step))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_of<T: Clone>(&mut self, all: &[T]) -> Option<T> {
        match all.len() as u64 {
            0 => None,
            count => all.get(self.below(count) as usize).cloned(),
        }
    }
}
