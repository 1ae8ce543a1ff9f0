//! Suspend and resume of an idle guest: against the disk's own time for as many bytes, and the file's size
//! against the memory that the guest touched. A warm clone first, then a guest that booted itself.
//!
//! Next: `snapshots.rs` has snapshots, restores and clones.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{SeekFrom, seek};
use serde_json::Value;

use crate::measure::{Phases, Times, mib, show, timed};
use crate::table::{Row, Table};
use crate::warm::{Extent, World};

/// What nobody waits for after a start is over then.
const REST: Duration = Duration::from_secs(20);
/// What is allowed on top of the disk's own time.
const MORE: Duration = Duration::from_secs(2);
/// Of the file to what was touched.
const MOST: f64 = 1.1;
const CHUNK: usize = 1 << 20;

/// Both ways, again and again.
#[derive(Default)]
struct Rounds {
    suspend: Times,
    write: Times,
    running: Times,
    first: Times,
    read: Times,
    /// Every time the page cache let the file go before it was read.
    cold: bool,
    phases: Phases,
    touched: Vec<u64>,
    resident: Vec<u64>,
    file: Vec<u64>,
}

/// Suspend and resume.
pub fn suspend(shared: &mut Option<World>, extent: Extent, table: &mut Table) -> Result<()> {
    let Some(world) = World::of(shared, table)? else {
        return Ok(());
    };
    let mut rounds = Rounds::new();
    let mut name = String::new();
    for _ in 0..extent.boots {
        // Each a clone that never was suspended: a resumed one has its memory for itself.
        if !name.is_empty() {
            world.purge(&[name])?;
        }
        name = world.launch("--warm")?.name;
        rounds.measure(world, &name)?;
    }
    rounds.tell("a warm clone", table);
    by_qemu(world, extent.boots, table)?;

    world.run(&["stop", "--force", &name])?;
    let boot = world.run(&["start", &name])?;
    let mut rounds = Rounds::new();
    for _ in 0..extent.boots {
        rounds.measure(world, &name)?;
    }
    rounds.tell("a guest that booted", table);
    table.note(
        "… the alternative to a resume: `pileus start` of a stopped one",
        String::new(),
        show(boot),
    );
    world.purge(&[name])
}

/// The same by QEMU alone, into the instance's disk: how others do it.
fn by_qemu(world: &mut World, times: u32, table: &mut Table) -> Result<()> {
    let twin = world.twin()?;
    let (mut saves, mut sizes) = (Times::default(), Vec::new());
    for _ in 0..times {
        let (took, bytes) = twin.save_once().context("QEMU's own savevm")?;
        saves.add(took);
        sizes.push(mib(bytes));
    }
    table.note(
        "… the alternative to a suspend: QEMU's own `savevm`, and by how much the disk grows",
        String::new(),
        format!("{}; {}", saves.show(), sizes.join(", ")),
    );
    Ok(())
}

impl Rounds {
    fn new() -> Self {
        Self {
            cold: true,
            ..Self::default()
        }
    }

    fn measure(&mut self, world: &World, name: &str) -> Result<()> {
        std::thread::sleep(REST);
        let info = world.info(name)?;
        let id = info["id"].as_str().context("it has no id")?;
        let pid = world.daemon.machine_of(id).context("it has no QEMU")?;
        let memory = Memory::of(pid, &template_memory(world, &info))?;
        let own = world.daemon.storage().join("data/instances").join(id);
        let file = own.join("suspended.memory");

        self.suspend.add(world.run(&["suspend", name])?);
        self.file.push(on_disk(&file)?);
        self.write
            .add(write_as_many(&own.join("as-many"), memory.touched)?);
        self.cold &= forget(&file)?;
        self.read.add(read(&file)?);
        self.cold &= forget(&file)?;
        let running = world.run(&["start", name])?;
        let first = world.run(&["exec", name, "--", "true"])?;
        self.running.add(running);
        self.first.add(running + first);
        self.phases.add(&world.info(name)?);
        self.touched.push(memory.touched);
        self.resident.push(memory.resident);
        eprintln!(
            "{name}: file {}, touched {}, resident {}",
            mib(*self.file.last().unwrap_or(&0)),
            mib(memory.touched),
            mib(memory.resident)
        );
        Ok(())
    }

    fn tell(&self, of: &str, table: &mut Table) {
        let cached = match self.cold {
            true => "not in the page cache",
            false => "PARTLY IN THE PAGE CACHE",
        };
        let against = |what: String, ours: &Times, theirs: &Times| {
            let more = ours.median().as_secs_f64() - theirs.median().as_secs_f64();
            Row {
                what,
                ours: ours.show(),
                alternative: theirs.show(),
                ratio: format!("{more:+.2} s"),
                bound: format!("≤ +{}", show(MORE)),
                met: Some(more <= MORE.as_secs_f64()),
            }
        };
        let what = format!(
            "`pileus suspend` of {of}, 1 GiB, idle; its touched memory written with fsync \
             by a plain program"
        );
        table.add(against(what, &self.suspend, &self.write));
        let what = format!("… resume: `pileus start` to running; its file read, {cached}");
        table.add(against(what, &self.running, &self.read));
        let what = "… resume to the end of the first command; the same".to_owned();
        table.add(against(what, &self.first, &self.read));
        for (phase, times) in self.phases.all() {
            table.note(format!("… phase {phase}"), times.show(), String::new());
        }
        let ratios = self.file.iter().zip(&self.touched);
        let worst = ratios
            .map(|(&file, &touched)| file as f64 / touched.max(1) as f64)
            .fold(0.0, f64::max);
        let list = |all: &[u64]| all.iter().map(|&n| mib(n)).collect::<Vec<_>>().join(", ");
        table.add(Row {
            what: "… the memory's file on the disk; memory that the guest has touched".into(),
            ours: list(&self.file),
            alternative: format!(
                "{} (resident in QEMU {})",
                list(&self.touched),
                list(&self.resident)
            ),
            ratio: format!("{worst:.2}× at most"),
            bound: format!("≤ {MOST}×"),
            met: Some(worst <= MOST),
        });
    }
}

/// Of the guest's memory, in bytes.
struct Memory {
    /// Its own pages, and what its template had touched if it shares that.
    touched: u64,
    /// What of it is mapped into QEMU now.
    resident: u64,
}

impl Memory {
    fn of(pid: i32, template: &Path) -> Result<Self> {
        let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
        let (mut is_ram, mut shared, mut own, mut resident) = (false, false, 0, 0);
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if let Some((from, to)) = first.split_once('-') {
                let at = |text| u64::from_str_radix(text, 16);
                if let (Ok(from), Ok(to)) = (at(from), at(to)) {
                    // Nothing else is as large as the guest's memory.
                    is_ram = to - from >= 1 << 30;
                    shared |= is_ram && line.ends_with("/ram");
                    continue;
                }
            }
            let kib: u64 = words.next().and_then(|n| n.parse().ok()).unwrap_or(0);
            match first {
                "Anonymous:" if is_ram => own += kib << 10,
                "Rss:" if is_ram => resident += kib << 10,
                _ => {}
            }
        }
        let below = if shared { on_disk(template)? } else { 0 };
        Ok(Self {
            touched: own + below,
            resident,
        })
    }
}

fn template_memory(world: &World, info: &Value) -> PathBuf {
    let template = info["origin"]["template"].as_str().unwrap_or("none");
    let templates = world.daemon.storage().join("data/templates");
    templates.join(template).join("ram")
}

fn on_disk(file: &Path) -> Result<u64> {
    let found = fs::metadata(file).with_context(|| file.display().to_string())?;
    Ok(found.blocks() * 512)
}

/// Writes so many bytes that no disk can make fewer, down to the disk.
fn write_as_many(path: &Path, bytes: u64) -> Result<Duration> {
    let mut chunk = vec![0; CHUNK];
    File::open("/dev/urandom")?.read_exact(&mut chunk)?;
    let began = Instant::now();
    let mut file = File::create(path)?;
    let mut left = usize::try_from(bytes)?;
    while left > 0 {
        let now = left.min(CHUNK);
        file.write_all(&chunk[..now])?;
        left -= now;
    }
    file.sync_all()?;
    let took = began.elapsed();
    drop(file);
    fs::remove_file(path)?;
    Ok(took)
}

/// Reads what a file has on the disk, from end to end.
fn read(path: &Path) -> Result<Duration> {
    let mut chunk = vec![0; CHUNK];
    let began = Instant::now();
    let file = File::open(path)?;
    let mut at = 0;
    // Beyond the last data there is nothing to be found.
    while let Ok(data) = seek(&file, SeekFrom::Data(at)) {
        at = data;
        let hole = seek(&file, SeekFrom::Hole(data))?;
        while at < hole {
            let most = usize::try_from(hole - at)?.min(CHUNK);
            let got = file.read_at(&mut chunk[..most], at)?;
            ensure!(got > 0, "{} got shorter", path.display());
            at += got as u64;
        }
    }
    Ok(began.elapsed())
}

/// Asks the kernel to drop what it has cached of one file (not of the whole machine: others work on it);
/// tells whether it did.
fn forget(path: &Path) -> Result<bool> {
    let mut input = std::ffi::OsString::from("if=");
    input.push(path);
    timed(
        Command::new("dd")
            .arg(input)
            .args(["iflag=nocache", "count=0", "status=none"]),
    )?;
    let (_, left) = timed(
        Command::new("fincore")
            .args(["--bytes", "--noheadings", "--output", "RES"])
            .arg(path),
    )?;
    let left: u64 = left.trim().parse().unwrap_or(u64::MAX);
    // A page here and there may be in use.
    Ok(left <= 1 << 20)
}
