//! The model of `fake_model.rs`: what must hold after each request, in the plainest words. It knows nothing of
//! layers or processes: a disk is the list of what its guest wrote (`testkit/src/bin/fake-qemu/disk.rs`).
//!
//! What a guest will write is not known before: `#boot 7` stands for some boot's mark, and is bound to the
//! real one when it is first seen ([`Model::bind`]).

use std::collections::BTreeMap;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Stopped,
    Running,
    Suspended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pending {
    pub cpus: Option<u64>,
    pub memory: Option<u64>,
}

/// Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub state: State,
    pub deleted: bool,
    pub cpus: u64,
    pub memory: u64,
    pub disk: u64,
    pub pending: Pending,
    pub autostart: String,
    pub snapshots: BTreeMap<String, Snapshot>,
    pub head: Option<String>,
    pub wrote: Vec<String>,
    /// It has another one's identity until its next boot.
    pub identify: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub comment: String,
    pub parent: Option<String>,
    pub with_memory: bool,
    pub cpus: u64,
    pub memory: u64,
    pub disk: u64,
    pub wrote: Vec<String>,
    pub identify: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Launch(String),
    Start(String),
    Stop(String),
    ForceStop(String),
    Restart(String),
    Suspend(String),
    Snapshot {
        of: String,
        name: String,
        memory: bool,
    },
    Restore(String, String),
    DeleteSnapshot(String, String),
    /// Snapshots of a running one, each deleted again: leaves nothing but layers.
    PileUp(String),
    Clone {
        of: String,
        name: String,
        snapshot: Option<String>,
    },
    Rename(String, String),
    RenameSnapshot(String, String, String),
    Comment(String, String, String),
    Cpus(String, u64),
    Memory(String, u64),
    Disk(String, u64),
    Autostart(String, &'static str),
    Delete(String),
    DeleteForGood(String),
    Recover(String),
    Purge,
    /// SIGKILL for its QEMU.
    Crash(String),
    /// The guest itself does it.
    PowerOff(String),
    Reboot(String),
}

pub const GIB: u64 = 1 << 30;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Model {
    pub instances: BTreeMap<String, Instance>,
    /// Numbers the marks that are not known yet.
    next: u64,
}

type Done = Result<(), &'static str>;

const WRONG: Done = Err("wrong-state");

impl Model {
    fn unknown(&mut self, kind: &str) -> String {
        self.next += 1;
        format!("#{kind} {}", self.next)
    }

    fn usable(&mut self, name: &str) -> Result<&mut Instance, &'static str> {
        match self.instances.get_mut(name) {
            None => Err("instance-not-found"),
            Some(instance) if instance.deleted => Err("instance-deleted"),
            Some(instance) => Ok(instance),
        }
    }

    fn boots(&mut self, name: &str) {
        let boot = self.unknown("boot");
        let id = self.unknown("id");
        if let Some(instance) = self.instances.get_mut(name) {
            let first = !instance.wrote.iter().any(|w| is_kind(w, "id"));
            instance.wrote.push(boot);
            if first || instance.identify {
                instance.wrote.push(id);
            }
            instance.identify = false;
            instance.state = State::Running;
        }
    }

    fn goes_on(&mut self, name: &str) {
        let on = self.unknown("on");
        if let Some(instance) = self.instances.get_mut(name) {
            instance.wrote.push(on);
            instance.state = State::Running;
        }
    }

    fn starts(&mut self, name: &str) {
        if let Some(instance) = self.instances.get_mut(name) {
            instance.apply_pending();
        }
        self.boots(name);
    }

    /// What comes of it, and the code if it is refused.
    pub fn apply(&mut self, op: &Op) -> Done {
        match op {
            Op::Launch(name) => self.launch(name),
            Op::Start(name) => {
                match self.usable(name)?.state {
                    State::Stopped => self.starts(name),
                    State::Suspended => self.goes_on(name),
                    State::Running => (),
                }
                Ok(())
            }
            Op::Stop(name) => match self.usable(name)?.state {
                State::Suspended => WRONG,
                _ => self.ends(name),
            },
            Op::ForceStop(name) => {
                self.usable(name)?;
                self.ends(name)
            }
            Op::Restart(name) => {
                let instance = self.usable(name)?;
                if instance.state != State::Running {
                    return WRONG;
                }
                instance.apply_pending();
                self.boots(name);
                Ok(())
            }
            Op::Suspend(name) => {
                let instance = self.usable(name)?;
                if instance.state == State::Running {
                    instance.state = State::Suspended;
                }
                Ok(())
            }
            Op::Snapshot { of, name, memory } => self.snapshot(of, name, *memory),
            Op::Restore(name, snapshot) => self.restore(name, snapshot),
            Op::DeleteSnapshot(name, snapshot) => self.usable(name)?.forget(snapshot),
            Op::PileUp(name) => self.usable(name).map(drop),
            Op::Clone { of, name, snapshot } => self.copy(of, name, snapshot.as_deref()),
            Op::Rename(name, new) => self.rename(name, new),
            Op::RenameSnapshot(name, snapshot, new) => {
                self.usable(name)?.rename_snapshot(snapshot, new)
            }
            Op::Comment(name, snapshot, comment) => {
                let found = self.usable(name)?.snapshots.get_mut(snapshot);
                found
                    .ok_or("snapshot-not-found")?
                    .comment
                    .clone_from(comment);
                Ok(())
            }
            Op::Cpus(..) | Op::Memory(..) | Op::Disk(..) | Op::Autostart(..) => self.set(op),
            Op::Delete(name) => {
                let instance = self.instances.get_mut(name).ok_or("instance-not-found")?;
                if instance.state == State::Running && !instance.deleted {
                    instance.state = State::Stopped;
                }
                instance.deleted = true;
                Ok(())
            }
            Op::DeleteForGood(name) => {
                let gone = self.instances.remove(name);
                gone.map(drop).ok_or("instance-not-found")
            }
            Op::Recover(name) => {
                let instance = self.instances.get_mut(name);
                instance.ok_or("instance-not-found")?.deleted = false;
                Ok(())
            }
            Op::Purge => {
                self.instances.retain(|_, instance| !instance.deleted);
                Ok(())
            }
            Op::Crash(name) | Op::PowerOff(name) => self.ends(name),
            Op::Reboot(name) => {
                self.boots(name);
                Ok(())
            }
        }
    }

    /// A reboot that the guest makes by itself takes no pending settings, and a restart of it is no start.
    fn ends(&mut self, name: &str) -> Done {
        self.usable(name)?.state = State::Stopped;
        Ok(())
    }

    fn launch(&mut self, name: &str) -> Done {
        if self.instances.contains_key(name) {
            return Err("instance-exists");
        }
        let new = Instance {
            state: State::Running,
            deleted: false,
            cpus: 1,
            memory: GIB,
            disk: 5 * GIB,
            pending: Pending::default(),
            autostart: "last".into(),
            snapshots: BTreeMap::new(),
            head: None,
            wrote: Vec::new(),
            identify: false,
        };
        self.instances.insert(name.to_owned(), new);
        self.boots(name);
        Ok(())
    }

    fn snapshot(&mut self, of: &str, name: &str, memory: bool) -> Done {
        let instance = self.usable(of)?;
        if instance.snapshots.contains_key(name) {
            return Err("snapshot-exists");
        }
        if memory && instance.state == State::Stopped {
            return WRONG;
        }
        let taken = Snapshot {
            comment: format!("of {name}"),
            parent: instance.head.clone(),
            with_memory: memory,
            cpus: instance.cpus,
            memory: instance.memory,
            disk: instance.disk,
            wrote: instance.wrote.clone(),
            identify: instance.identify,
        };
        instance.snapshots.insert(name.to_owned(), taken);
        instance.head = Some(name.to_owned());
        Ok(())
    }

    fn restore(&mut self, name: &str, snapshot: &str) -> Done {
        let instance = self.usable(name)?;
        if !instance.snapshots.contains_key(snapshot) {
            return Err("snapshot-not-found");
        }
        let ran = instance.state == State::Running;
        let with_memory = instance.stands_on(snapshot);
        instance.state = State::Stopped;
        if with_memory {
            self.goes_on(name);
        } else if ran {
            self.boots(name);
        }
        Ok(())
    }

    fn copy(&mut self, of: &str, name: &str, snapshot: Option<&str>) -> Done {
        let source = self.usable(of)?;
        let mut new = source.clone();
        if let Some(snapshot) = snapshot {
            let taken = source.snapshots.get(snapshot).ok_or("snapshot-not-found")?;
            new.wrote.clone_from(&taken.wrote);
            (new.cpus, new.memory, new.disk) = (taken.cpus, taken.memory, taken.disk);
        }
        if self.instances.contains_key(name) {
            return Err("instance-exists");
        }
        new.state = State::Stopped;
        new.pending = Pending::default();
        new.snapshots.clear();
        new.head = None;
        new.identify = true;
        self.instances.insert(name.to_owned(), new);
        Ok(())
    }

    fn rename(&mut self, name: &str, new: &str) -> Done {
        if self.usable(name)?.state == State::Suspended {
            return WRONG;
        }
        if self.instances.contains_key(new) && name != new {
            return Err("instance-exists");
        }
        if let Some(instance) = self.instances.remove(name) {
            self.instances.insert(new.to_owned(), instance);
        }
        Ok(())
    }

    fn set(&mut self, op: &Op) -> Done {
        let (Op::Cpus(name, _) | Op::Memory(name, _) | Op::Disk(name, _) | Op::Autostart(name, _)) =
            op
        else {
            return Ok(());
        };
        let instance = self.usable(name)?;
        let stopped = instance.state == State::Stopped;
        if stopped && matches!(op, Op::Cpus(..) | Op::Memory(..)) {
            // At rest nothing waits for a boot, and what is said last holds.
            instance.apply_pending();
        }
        match op {
            Op::Cpus(_, cpus) if stopped => instance.cpus = *cpus,
            Op::Cpus(_, cpus) => {
                instance.pending.cpus = Some(*cpus).filter(|c| *c != instance.cpus);
            }
            Op::Memory(_, memory) if stopped => instance.memory = *memory,
            Op::Memory(_, memory) => {
                instance.pending.memory = Some(*memory).filter(|m| *m != instance.memory);
            }
            Op::Disk(_, disk) if *disk == instance.disk => (),
            Op::Disk(_, disk) if *disk < instance.disk => return Err("invalid-setting"),
            Op::Disk(..) if instance.state == State::Suspended => return WRONG,
            Op::Disk(_, disk) => instance.disk = *disk,
            Op::Autostart(_, wish) => (*wish).clone_into(&mut instance.autostart),
            _ => (),
        }
        Ok(())
    }

    /// All that may be found if the daemon was killed in the middle of it.
    pub fn cut_off(&self, op: &Op) -> Vec<Model> {
        let mut all = vec![self.clone()];
        let mut after = self.clone();
        if after.apply(op).is_err() {
            return all;
        }
        let with = |change: &dyn Fn(&mut Model)| {
            let mut model = self.clone();
            change(&mut model);
            model
        };
        let stopped = |model: &mut Model, name: &str| {
            if let Some(instance) = model.instances.get_mut(name) {
                instance.state = State::Stopped;
            }
        };
        match op {
            // Settings are taken first; a VM that was not taken note of may have begun to boot.
            Op::Start(name) | Op::Restart(name)
                if self.instances[name].state != State::Suspended =>
            {
                all.push(with(&|m| stopped(m, name)));
                all.push(with(&|m| {
                    stopped(m, name);
                    m.instances
                        .get_mut(name)
                        .into_iter()
                        .for_each(Instance::apply_pending);
                }));
                all.push(with(&|m| {
                    m.starts(name);
                    stopped(m, name);
                }));
                all.push(with(&|m| m.boots(name)));
            }
            Op::Restore(name, snapshot) => {
                all.push(with(&|m| stopped(m, name)));
                for state in [State::Stopped, State::Suspended] {
                    all.push(with(&|m| {
                        if let Some(instance) = m.instances.get_mut(name) {
                            let memory = instance.stands_on(snapshot);
                            if memory || state == State::Stopped {
                                instance.state = state;
                            }
                        }
                    }));
                }
            }
            Op::Delete(name) => all.push(with(&|m| stopped(m, name))),
            Op::Purge => {
                let deleted = self.instances.iter().filter(|(_, i)| i.deleted);
                let mut some = self.clone();
                for (name, _) in deleted {
                    some.instances.remove(name);
                    all.push(some.clone());
                }
            }
            _ => (),
        }
        all.push(after);
        all
    }

    /// Whether all is as the model says; what was not known before is bound.
    pub fn bind(&mut self, seen: &Model) -> Result<(), String> {
        let names = |model: &Model| model.instances.keys().cloned().collect::<Vec<_>>();
        if names(self) != names(seen) {
            return Err(format!(
                "{:?} are there, not {:?}",
                names(seen),
                names(self)
            ));
        }
        let mut known = BTreeMap::new();
        let pairs = self.instances.iter().zip(seen.instances.values());
        for ((name, mine), theirs) in pairs {
            learn(&mut known, &mine.wrote, &theirs.wrote)
                .map_err(|why| format!("the disk of {name}: {why}"))?;
            for (of, snapshot) in &mine.snapshots {
                let taken = theirs.snapshots.get(of);
                let taken = taken.ok_or_else(|| format!("{name}.{of} is gone"))?;
                learn(&mut known, &snapshot.wrote, &taken.wrote)
                    .map_err(|why| format!("the disk of {name}.{of}: {why}"))?;
            }
        }
        for instance in self.instances.values_mut() {
            let lists = instance.snapshots.values_mut().map(|s| &mut s.wrote);
            for mark in lists.chain([&mut instance.wrote]).flatten() {
                if let Some(real) = known.get(mark) {
                    mark.clone_from(real);
                }
            }
        }
        for (name, mine) in &self.instances {
            let mut theirs = seen.instances[name].clone();
            for (of, snapshot) in &mut theirs.snapshots {
                // Shows in what is restored from it.
                snapshot.identify = mine.snapshots.get(of).is_some_and(|s| s.identify);
            }
            if *mine != theirs {
                return Err(format!(
                    "{name} is\n  {theirs:?}\nand should be\n  {mine:?}"
                ));
            }
        }
        Ok(())
    }

    /// Two guests that say that they are the same machine.
    pub fn twins(&self) -> Option<String> {
        let mut seen = BTreeMap::new();
        for (name, instance) in &self.instances {
            let id = instance.wrote.iter().rev().find(|w| is_kind(w, "id"));
            if instance.state == State::Running
                && let Some(other) = id.and_then(|id| seen.insert(id.clone(), name))
            {
                return Some(format!("{name} and {other} have one identity"));
            }
        }
        None
    }
}

impl Instance {
    fn apply_pending(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        self.cpus = pending.cpus.unwrap_or(self.cpus);
        self.memory = pending.memory.unwrap_or(self.memory);
    }

    /// Takes the snapshot's place; tells whether it has memory.
    fn stands_on(&mut self, snapshot: &str) -> bool {
        let Some(to) = self.snapshots.get(snapshot).cloned() else {
            return false;
        };
        (self.cpus, self.memory, self.disk) = (to.cpus, to.memory, to.disk);
        self.pending = Pending::default();
        self.head = Some(snapshot.to_owned());
        self.wrote = to.wrote;
        self.identify = to.identify;
        to.with_memory
    }

    fn forget(&mut self, snapshot: &str) -> Done {
        let gone = self
            .snapshots
            .remove(snapshot)
            .ok_or("snapshot-not-found")?;
        for other in self.snapshots.values_mut() {
            if other.parent.as_deref() == Some(snapshot) {
                other.parent.clone_from(&gone.parent);
            }
        }
        if self.head.as_deref() == Some(snapshot) {
            self.head = gone.parent;
        }
        Ok(())
    }

    fn rename_snapshot(&mut self, snapshot: &str, new: &str) -> Done {
        if !self.snapshots.contains_key(snapshot) {
            return Err("snapshot-not-found");
        }
        if snapshot != new && self.snapshots.contains_key(new) {
            return Err("snapshot-exists");
        }
        let Some(found) = self.snapshots.remove(snapshot) else {
            return Ok(());
        };
        self.snapshots.insert(new.to_owned(), found);
        let parents = self.snapshots.values_mut().map(|s| &mut s.parent);
        for name in parents.chain([&mut self.head]) {
            if name.as_deref() == Some(snapshot) {
                *name = Some(new.to_owned());
            }
        }
        Ok(())
    }
}

fn is_kind(mark: &str, kind: &str) -> bool {
    mark.trim_start_matches('#')
        .starts_with(&format!("{kind} "))
}

fn learn(
    known: &mut BTreeMap<String, String>,
    mine: &[String],
    theirs: &[String],
) -> Result<(), String> {
    let differ = || Err(format!("{theirs:?} was written, not {mine:?}"));
    if mine.len() != theirs.len() {
        return differ();
    }
    for (mark, real) in mine.iter().zip(theirs) {
        let kind = real.split(' ').next().unwrap_or_default();
        let fits = match mark.starts_with('#') {
            true => is_kind(mark, kind) && known.get(mark).is_none_or(|before| before == real),
            false => mark == real,
        };
        if !fits {
            return differ();
        }
        if mark.starts_with('#') {
            known.insert(mark.clone(), real.clone());
        }
    }
    Ok(())
}
