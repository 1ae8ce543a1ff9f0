//! The daemon alone, with machines that are stand-ins: `list`, memory, what a launch writes, and how
//! fast a daemon is there.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use pileus_api::routes;
use pileus_testkit::{Daemon, Need, Options, need};
use rusqlite::{Connection, params};

use crate::measure::{
    Times, allocated, get, pileus, poll, process_figure, processor_time, show, timed,
};
use crate::table::{Row, Table};

const MANY: u32 = 1000;
/// Of each.
const SNAPSHOTS: u32 = 10;
const MIB: f64 = (1 << 20) as f64;

pub fn can() -> bool {
    need(&[Need::Root, Need::Tun])
}

/// `list`, whole process, from the outside.
pub fn list(runs: u32, table: &mut Table) -> Result<()> {
    if !can() {
        return Ok(());
    }
    let mut daemon = Daemon::fake();
    launch(&daemon, &["a", "b", "c"])?;
    time_list(&daemon, runs, "3 instances", 3, 20, table)?;
    for name in ["a", "b", "c"] {
        timed(&mut pileus(&daemon.storage(), &["stop", name]))?;
    }
    fill(&mut daemon)?;
    let many = MANY as usize;
    time_list(&daemon, runs, "1,000 stopped ones", many, 50, table)?;
    list_with_snapshots(runs, table)
}

/// The same with snapshots, which most readers don't want.
fn list_with_snapshots(runs: u32, table: &mut Table) -> Result<()> {
    let mut daemon = Daemon::fake();
    launch(&daemon, &["a"])?;
    for _ in 0..SNAPSHOTS {
        timed(&mut pileus(&daemon.storage(), &["snapshot", "a"]))?;
    }
    timed(&mut pileus(&daemon.storage(), &["stop", "a"]))?;
    fill(&mut daemon)?;
    let of = "1,000 stopped ones with 10 snapshots each";
    time_list(&daemon, runs, of, MANY as usize, 50, table)?;
    let mut all = Times::default();
    for _ in 0..runs.min(10) {
        let words = ["list", "--snapshots", "--format", "csv"];
        let (took, csv) = timed(&mut pileus(&daemon.storage(), &words))?;
        let shown = csv.lines().count().saturating_sub(1);
        ensure!(
            shown == (MANY * SNAPSHOTS) as usize,
            "{shown} snapshots are listed"
        );
        all.add(took);
    }
    table.note(
        "… `pileus list --snapshots` of all 10,000",
        all.show(),
        String::new(),
    );
    Ok(())
}

pub fn launch(daemon: &Daemon, names: &[&str]) -> Result<()> {
    let image = format!("file://{}", daemon.fake_image().display());
    for name in names {
        timed(&mut pileus(
            &daemon.storage(),
            &["launch", &image, "--name", name],
        ))?;
    }
    Ok(())
}

fn time_list(
    daemon: &Daemon,
    runs: u32,
    of: &str,
    instances: usize,
    bound: u64,
    table: &mut Table,
) -> Result<()> {
    let storage = daemon.storage();
    let (_, csv) = timed(&mut pileus(&storage, &["list", "--format", "csv"]))?;
    let shown = csv.lines().count().saturating_sub(1);
    ensure!(shown == instances, "`list` shows {shown} of {instances}");
    let (mut times, mut nothing, mut answers) =
        (Times::default(), Times::default(), Times::default());
    for _ in 0..runs {
        times.add(timed(&mut pileus(&storage, &["list"]))?.0);
        nothing.add(timed(&mut pileus(&storage, &["help"]))?.0);
        let began = Instant::now();
        get(&daemon.socket(), routes::INSTANCES)?;
        answers.add(began.elapsed());
    }
    let bound = Duration::from_millis(bound);
    table.add(Row {
        what: format!("`pileus list` of {of}, whole process"),
        ours: times.show(),
        alternative: format!(
            "`pileus help` {}; the API alone {}",
            show(nothing.median()),
            show(answers.median())
        ),
        bound: format!("≤ {}", show(bound)),
        met: Some(times.median() <= bound),
        ..Row::default()
    });
    Ok(())
}

/// Makes the stopped instances many, in the daemon's absence: a subnet has no room for so many
/// launches.
fn fill(daemon: &mut Daemon) -> Result<()> {
    daemon.stop();
    let mut database = Connection::open(daemon.storage().join("data/pileus.db"))?;
    let writing = database.transaction()?;
    let there: u32 = writing.query_row("SELECT count(*) FROM instances", [], |row| row.get(0))?;
    for slot in there..MANY {
        let [high, low] = u16::try_from(slot)?.to_be_bytes();
        let copied = writing.execute(
            "INSERT INTO instances (id, name, address, mac, slot, state, deleted, created_at, started_at,
                 spec, process, history, snapshots)
             SELECT ?1, ?2, ?3, ?4, ?5, state, deleted, created_at, started_at,
                 spec, process, history, snapshots FROM instances WHERE name = 'a'",
            params![
                uuid::Uuid::new_v4().to_string(),
                format!("copied-instance-{slot}"),
                format!("10.255.{high}.{low}"),
                format!("52:54:ff:00:{high:02x}:{low:02x}"),
                slot
            ],
        )?;
        ensure!(copied == 1, "there is no row to be copied");
    }
    writing.commit()?;
    drop(database);
    daemon.start_again();
    settled(daemon)
}

/// Waits until the daemon has taken up all its instances: it uses no more processor time.
fn settled(daemon: &Daemon) -> Result<()> {
    let pid = daemon.pid().context("the daemon runs")?;
    let mut before = None;
    poll("the daemon is idle", Duration::from_secs(30), || {
        std::thread::sleep(Duration::from_millis(500));
        let now = processor_time(pid).ok();
        let idle = now.is_some() && now == before;
        before = now;
        idle.then_some(())
    })
}

/// What the idle daemon keeps in memory.
pub fn memory(table: &mut Table) -> Result<()> {
    if !can() {
        return Ok(());
    }
    let mut daemon = Daemon::fake();
    resident(&daemon, "just started", table)?;
    launch(&daemon, &["a", "b", "c"])?;
    resident(&daemon, "3 running instances", table)?;
    for name in ["a", "b", "c"] {
        timed(&mut pileus(&daemon.storage(), &["stop", name]))?;
    }
    fill(&mut daemon)?;
    resident(&daemon, "1,000 stopped instances", table)?;
    for _ in 0..20 {
        timed(&mut pileus(&daemon.storage(), &["list"]))?;
    }
    resident(&daemon, "1,000 stopped instances, listed 20 times", table)
}

fn resident(daemon: &Daemon, when: &str, table: &mut Table) -> Result<()> {
    settled(daemon)?;
    let pid = daemon.pid().context("the daemon runs")?;
    let figure = |key| process_figure(pid, "status", key).map(|kib| kib as f64 / 1024.0);
    let (all, own) = (figure("VmRSS")?, figure("RssAnon")?);
    table.add(Row {
        what: format!("daemon's resident memory, {when}"),
        ours: format!("{all:.1} MB (its own {own:.1}, the rest is the program's file)"),
        bound: "≤ 30 MB".into(),
        met: Some(all <= 30.0),
        ..Row::default()
    });
    Ok(())
}

/// What a launch of a cached image writes before its guest boots.
pub fn bytes(table: &mut Table) -> Result<()> {
    if !can() {
        return Ok(());
    }
    let daemon = Daemon::fake();
    // Brings the image into the store.
    launch(&daemon, &["first"])?;
    daemon.fakes_do("never-boots");
    settled(&daemon)?;
    let pid = daemon.pid().context("the daemon runs")?;
    let written = || process_figure(pid, "io", "write_bytes");
    let (before, written_before) = (allocated(&daemon.storage()), written()?);
    let image = format!("file://{}", daemon.fake_image().display());
    let mut launch = pileus(&daemon.storage(), &["launch", &image, "--name", "second"]);
    let mut launch = launch.spawn()?;
    let started = poll("QEMU runs", Duration::from_secs(20), || {
        (daemon.machines().len() == 2).then_some(())
    });
    // It is in its row as well.
    std::thread::sleep(Duration::from_millis(500));
    let grown = allocated(&daemon.storage()).saturating_sub(before);
    let dirtied = written()?.saturating_sub(written_before);
    launch.kill()?;
    launch.wait()?;
    started?;
    let most = grown.max(dirtied) as f64 / MIB;
    table.add(Row {
        what: "bytes that a launch writes before the guest boots".into(),
        ours: format!(
            "{:.2} MB written by the daemon, {:.2} MB more on the disk",
            dirtied as f64 / MIB,
            grown as f64 / MIB
        ),
        bound: "≤ 2 MB".into(),
        met: Some(most <= 2.0),
        ..Row::default()
    });
    Ok(())
}

/// From the start of the program to its first answer.
pub fn start(runs: u32, table: &mut Table) -> Result<()> {
    if !can() {
        return Ok(());
    }
    let mut daemon = Daemon::fake();
    for network in ["with its network to be made", "with its network there"] {
        let mut times = Times::default();
        for _ in 0..runs.min(10) {
            if network.ends_with("there") {
                daemon.kill();
            } else {
                daemon.stop();
            }
            times.add(ready(&mut daemon)?);
        }
        table.note(
            format!("daemon's start to its first answer, {network}"),
            times.show(),
            String::new(),
        );
    }
    launch(&daemon, &["a"])?;
    timed(&mut pileus(&daemon.storage(), &["stop", "a"]))?;
    fill(&mut daemon)?;
    let mut times = Times::default();
    for _ in 0..runs.min(10) {
        daemon.stop();
        times.add(ready(&mut daemon)?);
    }
    table.note(
        "daemon's start to its first answer, 1,000 stopped instances",
        times.show(),
        String::new(),
    );
    Ok(())
}

/// Starts the daemon and waits for its first answer.
pub fn ready(daemon: &mut Daemon) -> Result<Duration> {
    let began = Instant::now();
    daemon.spawn();
    let socket = daemon.socket();
    poll("the daemon answers", Duration::from_secs(30), || {
        get(&socket, routes::SERVER).ok()
    })?;
    Ok(began.elapsed())
}

/// What the daemon logs when it has a machine again.
const ADOPTED: &str = "its VM was found running";

/// Kills the daemon, starts it, and waits until so many machines are its own again.
pub fn killed(daemon: &mut Daemon, machines: usize) -> Result<(Duration, Duration)> {
    let adoptions = |daemon: &Daemon| daemon.log().matches(ADOPTED).count();
    let before = adoptions(daemon);
    daemon.kill();
    let began = Instant::now();
    let ready = ready(daemon)?;
    poll("the machines are adopted", Duration::from_secs(30), || {
        (adoptions(daemon) == before + machines).then_some(())
    })?;
    Ok((ready, began.elapsed()))
}

/// Three stand-ins under a daemon that is killed.
pub fn adopt(rounds: u32, table: &mut Table) -> Result<()> {
    if !can() {
        return Ok(());
    }
    let mut daemon = Daemon::start(Options::fake());
    daemon.write_fake_image();
    launch(&daemon, &["a", "b", "c"])?;
    let (mut ready, mut adopted) = (Times::default(), Times::default());
    for _ in 0..rounds {
        let (first, last) = killed(&mut daemon, 3)?;
        ready.add(first);
        adopted.add(last);
    }
    table.note(
        "killed daemon's new start until 3 stand-in machines are adopted",
        adopted.show(),
        format!("of this to the first answer {}", show(ready.median())),
    );
    Ok(())
}
