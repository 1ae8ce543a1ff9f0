//! Snapshots of a guest that runs and writes, restores, and clones: against a copy of the whole disk, as a
//! full clone makes it, and against a boot.
//!
//! Next: `info.rs` asks a running guest fifty times a second how it does.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pileus_testkit::Api;
use serde_json::{Value, json};

use crate::measure::{Times, mib, operate, phase, ratio, show, timed};
use crate::table::{Row, Table};
use crate::warm::{Extent, World};

/// A snapshot's pause, and a clone as a whole.
const BOUND: Duration = Duration::from_millis(100);
/// Snapshots of the source of clones.
const MANY: usize = 100;
/// Writes without end, through to the disk.
const WRITER: &str = "setsid -f sh -c 'while :; do dd if=/dev/urandom of=/var/tmp/written bs=64k \
                      count=64 conv=notrunc,fdatasync; done' > /dev/null 2>&1 < /dev/null";

/// Snapshots of a running guest with and without memory, and back to one.
pub fn take(shared: &mut Option<World>, extent: Extent, table: &mut Table) -> Result<()> {
    let Some(world) = World::of(shared, table)? else {
        return Ok(());
    };
    let api = world.daemon.api();
    let name = world.launch("--warm")?.name;
    world.run(&["exec", &name, "--", "sh", "-c", WRITER])?;
    // It is at work then.
    std::thread::sleep(Duration::from_secs(5));
    let disk = Taken::measure(&api, &name, extent.pairs, false)?;
    let memory = Taken::measure(&api, &name, extent.boots, true)?;
    let restored = restore(world, &api, &name, extent.boots)?;
    world.run(&["stop", "--force", &name])?;
    let copy = copy(world, &name)?;
    disk.tell("without memory", Some(BOUND), &copy, table);
    memory.tell("with memory", None, &copy, table);
    restored.tell(table);
    world.purge(&[name])
}

#[derive(Default)]
struct Taken {
    halted: Times,
    whole: Times,
    /// Bytes on the disk: what was written since the one before, and the memory.
    size: u64,
}

impl Taken {
    fn measure(api: &Api, name: &str, times: u32, memory: bool) -> Result<Self> {
        let mut taken = Self::default();
        for _ in 0..times {
            std::thread::sleep(Duration::from_secs(1));
            let body = json!({ "with_memory": memory });
            let (took, operation) = operate(api, name, "snapshots", &body)?;
            let halted = phase(&operation, "halted").context("it does not tell its pause")?;
            taken.whole.add(took);
            taken.halted.add(halted);
        }
        let all = api.snapshots(name);
        let all = all.map_err(|err| anyhow::anyhow!("{err:?}"))?;
        let last = all.last().context("it has no snapshot")?;
        taken.size = last["size"].as_u64().unwrap_or_default();
        ensure!(taken.size > 0, "the guest has not written");
        Ok(taken)
    }

    fn tell(&self, how: &str, bound: Option<Duration>, copy: &Copy, table: &mut Table) {
        let worst = self.halted.percentile(95);
        table.add(Row {
            what: format!(
                "snapshot {how} of a guest that runs and writes: its pause; a stopped copy"
            ),
            ours: format!(
                "{} (longest {})",
                self.halted.show(),
                show(self.halted.percentile(100))
            ),
            alternative: copy.show(),
            ratio: format!("{:.0}× shorter", ratio(copy.took, self.halted.median())),
            bound: bound.map_or(String::new(), |bound| format!("≤ {}, 95 %", show(bound))),
            met: bound.map(|bound| worst <= bound),
        });
        table.note(
            "… the whole operation, and what the last one has on the disk",
            format!("{}, {}", self.whole.show(), mib(self.size)),
            copy.show(),
        );
    }
}

/// Back to the last snapshot, which has memory: it goes on there. The alternative only has the disk.
struct Restored {
    running: Times,
    first: Times,
    boot: Times,
}

fn restore(world: &World, api: &Api, name: &str, times: u32) -> Result<Restored> {
    let mut restored = Restored {
        running: Times::default(),
        first: Times::default(),
        boot: Times::default(),
    };
    let all = api.snapshots(name);
    let all = all.map_err(|err| anyhow::anyhow!("{err:?}"))?;
    let with_memory = all
        .iter()
        .rev()
        .find(|snapshot| snapshot["with_memory"] == true);
    let snapshot = with_memory.and_then(|snapshot| snapshot["name"].as_str());
    let target = format!("{name}.{}", snapshot.context("none has memory")?);
    for _ in 0..times {
        let running = world.run(&["restore", "--destructive", &target])?;
        let first = world.run(&["exec", name, "--", "true"])?;
        restored.running.add(running);
        restored.first.add(running + first);
    }
    world.run(&["stop", "--force", name])?;
    for _ in 0..times.min(2) {
        let began = Instant::now();
        world.run(&["restore", "--destructive", "--disk-only", &target])?;
        world.run(&["start", name])?;
        restored.boot.add(began.elapsed());
        world.run(&["stop", "--force", name])?;
    }
    // For whoever comes next it runs.
    world.run(&["restore", "--destructive", &target])?;
    Ok(restored)
}

impl Restored {
    fn tell(&self, table: &mut Table) {
        let times = ratio(self.boot.median(), self.running.median());
        table.add(Row {
            what: "restore with memory to running; restore of the disk, and a boot".into(),
            ours: self.running.show(),
            alternative: self.boot.show(),
            ratio: format!("{times:.1}× faster"),
            ..Row::default()
        });
        table.note(
            "… to the end of the first command",
            self.first.show(),
            String::new(),
        );
    }
}

/// A stopped instance's disk copied as a whole, down to the disk.
struct Copy {
    took: Duration,
    bytes: u64,
}

impl Copy {
    fn show(&self) -> String {
        format!("{} for {}", show(self.took), mib(self.bytes))
    }
}

fn copy(world: &World, name: &str) -> Result<Copy> {
    let info = world.info(name)?;
    let chain = chain(world, &info)?;
    let folder = tempfile::tempdir_in(world.daemon.storage().join("data"))?;
    let began = Instant::now();
    timed(
        Command::new("cp")
            .arg("--sparse=always")
            .args(&chain)
            .arg(folder.path()),
    )?;
    timed(Command::new("sync").arg("--file-system").arg(folder.path()))?;
    Ok(Copy {
        took: began.elapsed(),
        bytes: crate::measure::allocated(folder.path()),
    })
}

/// The image, the layers (no other instance is there, so all belong to it or to its template), its disk.
fn chain(world: &World, info: &Value) -> Result<Vec<PathBuf>> {
    let data = world.daemon.storage().join("data");
    let digest = info["image"]["digest"]
        .as_str()
        .context("it has no image")?;
    let id = info["id"].as_str().context("it has no id")?;
    let image = data
        .join("images")
        .join(digest.trim_start_matches("sha256:"));
    let mut chain = vec![image.join("disk.raw")];
    let layers = data.join("layers");
    let files = pileus_testkit::files_below(&layers);
    chain.extend(files.into_iter().map(|file| layers.join(file)));
    chain.push(data.join("instances").join(id).join("disk.qcow2"));
    Ok(chain)
}

/// Clones of a running and of a stopped instance, without and with many snapshots on it.
pub fn clone(shared: &mut Option<World>, extent: Extent, table: &mut Table) -> Result<()> {
    let Some(world) = World::of(shared, table)? else {
        return Ok(());
    };
    let api = world.daemon.api();
    let (running, stopped) = (world.launch("--warm")?.name, world.launch("--warm")?.name);
    world.run(&["stop", "--force", &stopped])?;
    let copy = copy(world, &stopped)?;
    let count = extent.pairs;
    Cloned::measure(world, &stopped, count)?.tell("a stopped instance", &copy, table);
    Cloned::measure(world, &running, count)?.tell("a running instance", &copy, table);
    let (mut wholes, mut pauses) = (Times::default(), Times::default());
    let mut last = Duration::ZERO;
    for _ in 0..MANY {
        let (took, operation) = operate(&api, &running, "snapshots", &json!({}))?;
        last = phase(&operation, "halted").context("it does not tell its pause")?;
        wholes.add(took);
        pauses.add(last);
    }
    table.add(Row {
        what: format!("… {MANY} snapshots of an idle running instance: the pause of the last one"),
        ours: show(last),
        alternative: format!("of all {}", pauses.show()),
        ratio: format!("the operations {}", wholes.show()),
        bound: format!("≤ {}", show(BOUND)),
        met: Some(last <= BOUND),
    });
    let of = format!("a running instance with {MANY} snapshots");
    Cloned::measure(world, &running, count)?.tell(&of, &copy, table);
    world.run(&["stop", "--force", &running])?;
    let of = format!("a stopped instance with {MANY} snapshots");
    Cloned::measure(world, &running, count)?.tell(&of, &copy, table);
    world.purge(&[running, stopped])
}

#[derive(Default)]
struct Cloned {
    process: Times,
    operation: Times,
    halted: Times,
}

impl Cloned {
    /// One after the other: by the command and by the API.
    fn measure(world: &mut World, source: &str, count: u32) -> Result<Self> {
        let api = world.daemon.api();
        let mut cloned = Self::default();
        for _ in 0..count {
            let names = [world.new_name(), world.new_name()];
            let command = ["clone", source, "--name", &names[0]];
            cloned.process.add(world.run(&command)?);
            let body = json!({ "name": names[1] });
            let (took, operation) = operate(&api, source, "clone", &body)?;
            cloned.operation.add(took);
            if let Some(halted) = phase(&operation, "halted") {
                cloned.halted.add(halted);
            }
            for name in &names {
                ensure!(
                    world.info(name)?["state"] == "stopped",
                    "{name} is not there"
                );
            }
            world.purge(&names)?;
        }
        Ok(cloned)
    }

    fn tell(&self, of: &str, copy: &Copy, table: &mut Table) {
        let pause = match self.halted.len() {
            0 => String::new(),
            _ => format!(", pause {}", show(self.halted.median())),
        };
        let median = self.process.median();
        table.add(Row {
            what: format!("`pileus clone` of {of}, whole process; a stopped copy"),
            ours: format!(
                "{} (the operation {}{pause})",
                self.process.show(),
                show(self.operation.median())
            ),
            alternative: copy.show(),
            ratio: format!("{:.0}× faster", ratio(copy.took, median)),
            bound: format!("≤ {}", show(BOUND)),
            met: Some(median <= BOUND),
        });
    }
}
