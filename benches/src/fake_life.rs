//! What the daemon itself costs in the life of an instance: starts, stops, snapshots and clones a second,
//! of machines that are stand-ins, against a plain database that commits to the same disk.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pileus_testkit::{Api, Daemon};
use rusqlite::Connection;
use serde_json::{Value, json};

use crate::fake::{can, launch};
use crate::measure::{Times, operate};
use crate::table::Table;
use crate::warm::together;

/// Instances that are worked on at once.
const AT_ONCE: usize = 4;
const MOST: u32 = 80;

/// One after the other, and of several instances at once.
pub fn operations(runs: u32, table: &mut Table) -> Result<()> {
    if !can() {
        return Ok(());
    }
    // A chain may have 200 layers.
    let runs = runs.min(MOST);
    let daemon = Daemon::fake();
    daemon.fakes_do("fast");
    let names: Vec<String> = (0..AT_ONCE).map(|n| format!("worker{n}")).collect();
    let all: Vec<&str> = names.iter().map(String::as_str).collect();
    launch(&daemon, &all)?;
    let api = daemon.api();
    let commits = commits(&daemon, runs)?;
    let alternative = format!("a commit of SQLite to that disk {}", commits.show());
    let mut tell = |what: [&str; 2], work: Work| -> Result<()> {
        let mut times = [Times::default(), Times::default()];
        let began = Instant::now();
        for number in 0..runs {
            let [first, second] = work(&api, &names[0], number)?;
            times[0].add(first);
            times[1].add(second);
        }
        let one = began.elapsed();
        let began = Instant::now();
        together(&names, |name| {
            (runs..runs * 2).try_for_each(|number| work(&api, name, number).map(drop))
        })?;
        let together = began.elapsed();
        let rate = |count: usize, took: Duration| count as f64 / took.as_secs_f64();
        table.note(
            format!(
                "{} and {} of a stand-in machine, pairs a second; of {AT_ONCE} at once",
                what[0], what[1]
            ),
            format!(
                "{:.1}; {:.1} ({} {}, {} {})",
                rate(times[0].len(), one),
                rate(times[0].len() * AT_ONCE, together),
                what[0],
                times[0].show(),
                what[1],
                times[1].show(),
            ),
            alternative.clone(),
        );
        Ok(())
    };
    tell(["snapshot", "its deletion"], |api, name, number| {
        let snapshot = format!("s{number}");
        let (taken, _) = operate(api, name, "snapshots", &json!({ "name": snapshot }))?;
        let deleted = remove(api, &format!("/v1/instances/{name}/snapshots/{snapshot}"))?;
        Ok([taken, deleted])
    })?;
    tell(["stop", "start"], |api, name, _| {
        let (stopped, _) = operate(api, name, "stop", &json!({}))?;
        let (started, _) = operate(api, name, "start", &json!({}))?;
        Ok([stopped, started])
    })?;
    for name in &names {
        operate(&api, name, "stop", &json!({}))?;
    }
    tell(["clone", "its deletion"], |api, name, number| {
        let clone = format!("{name}-c{number}");
        let (cloned, _) = operate(api, name, "clone", &json!({ "name": clone }))?;
        let deleted = remove(api, &format!("/v1/instances/{clone}?purge=true"))?;
        Ok([cloned, deleted])
    })
}

/// Does something and undoes it.
type Work = fn(&Api, &str, u32) -> Result<[Duration; 2]>;

fn remove(api: &Api, path: &str) -> Result<Duration> {
    let began = Instant::now();
    let done = api.run("DELETE", path, None);
    done.map_err(|refusal| anyhow::anyhow!("DELETE {path}: {}", refusal.message))?;
    Ok(began.elapsed())
}

/// One small row after the other, each on the disk before the next, as the daemon's own database does it.
fn commits(daemon: &Daemon, runs: u32) -> Result<Times> {
    let folder = tempfile::tempdir_in(daemon.folder())?;
    let database = Connection::open(folder.path().join("commits.db"))?;
    let _: Value = database
        .pragma_update_and_check(None, "journal_mode", "wal", |row| {
            Ok(Value::from(row.get::<_, String>(0)?))
        })
        .context("no write-ahead log")?;
    database.pragma_update(None, "synchronous", "full")?;
    database.execute_batch("CREATE TABLE rows (body TEXT NOT NULL) STRICT")?;
    let body = "x".repeat(2000);
    let mut times = Times::default();
    for _ in 0..runs {
        let began = Instant::now();
        database.execute("INSERT INTO rows VALUES (?1)", [&body])?;
        times.add(began.elapsed());
    }
    Ok(times)
}
