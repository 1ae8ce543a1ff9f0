//! Saving a machine to a file and loading it again, as QEMU does it: asked for, and then asked about until
//! it is over. What is saved is what the guest knows: which boot this is, its name, what it wrote.

use std::collections::HashSet;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{Machine, locked};

/// What a template's machine is saved as: devices alone, and no instance behind them.
const TEMPLATE: &[u8] = b"what the stand-in for QEMU saved";
const WHOLE: &str = "pileus-fake-memory";

#[derive(Default)]
pub struct Migration {
    /// Empty before the first one.
    status: &'static str,
    why: Option<String>,
    capabilities: HashSet<String>,
    /// Which one this is: a thread that works for an earlier one gives up.
    number: u64,
}

impl Migration {
    pub fn set_capabilities(&mut self, arguments: &Value) {
        for one in arguments["capabilities"].as_array().into_iter().flatten() {
            let name = one["capability"].as_str().unwrap_or_default().to_owned();
            match one["state"] == true {
                true => self.capabilities.insert(name),
                false => self.capabilities.remove(&name),
            };
        }
    }

    /// `query-migrate`.
    pub fn told(&self) -> Value {
        match (self.status, &self.why) {
            ("", _) => json!({}),
            (status, None) => json!({"status": status}),
            (status, Some(why)) => json!({"status": status, "error-desc": why}),
        }
    }

    fn begin(&mut self) -> u64 {
        self.number += 1;
        (self.status, self.why) = ("active", None);
        self.number
    }

    pub fn cancel(&mut self) {
        if matches!(self.status, "active" | "pre-switchover" | "device") {
            self.status = "cancelled";
        }
    }

    /// `migrate-continue`.
    pub fn go_on(&mut self) -> Result<Value, String> {
        if self.status != "pre-switchover" {
            return Err(format!("Migration not in expected state: {}", self.status));
        }
        self.status = "device";
        Ok(json!({}))
    }
}

/// Whether the one with this number is still in this state.
fn is(machine: &Machine, number: u64, status: &str) -> bool {
    let migration = locked(&machine.migration);
    migration.number == number && migration.status == status
}

fn end(machine: &Machine, number: u64, done: Result<(), String>) {
    let mut migration = locked(&machine.migration);
    if migration.number == number && migration.status != "cancelled" {
        (migration.status, migration.why) = match done {
            Ok(()) => ("completed", None),
            Err(why) => ("failed", Some(why)),
        };
    }
}

/// Sleeps, unless it is cancelled meanwhile.
fn pause(machine: &Machine, number: u64, time: Duration) -> bool {
    let until = Instant::now() + time;
    while Instant::now() < until && is(machine, number, "active") {
        std::thread::sleep(Duration::from_millis(1).min(until - Instant::now().min(until)));
    }
    is(machine, number, "active")
}

/// `migrate`: begins to write.
pub fn save(machine: &Arc<Machine>, file: Arc<File>) {
    let (number, template, live) = {
        let mut migration = locked(&machine.migration);
        let number = migration.begin();
        let has = |name: &str| migration.capabilities.contains(name);
        (
            number,
            has("x-ignore-shared"),
            has("pause-before-switchover"),
        )
    };
    let machine = machine.clone();
    std::thread::spawn(move || {
        let done = match template {
            true => save_template(&machine, &file),
            false => save_whole(&machine, &file, number, live),
        };
        end(&machine, number, done);
    });
}

fn save_template(machine: &Machine, mut file: &File) -> Result<(), String> {
    machine.pause_for("save-ms");
    if machine.has("save-fails") {
        return Err("fake: told not to be saved".into());
    }
    file.write_all(TEMPLATE).map_err(|err| err.to_string())
}

fn save_whole(
    machine: &Arc<Machine>,
    mut file: &File,
    number: u64,
    live: bool,
) -> Result<(), String> {
    let half = machine.time_now("suspend-ms") / 2;
    let failed = |err: std::io::Error| err.to_string();
    // What is cut off now is not a whole one.
    file.write_all(format!("{{\"{WHOLE}\": 1").as_bytes())
        .map_err(failed)?;
    let goes_on = pause(machine, number, half);
    if machine.has_now("suspend-fails") {
        return Err("fake: told not to be suspended".into());
    }
    if !goes_on {
        return Ok(());
    }
    machine.halt();
    if live {
        locked(&machine.migration).status = "pre-switchover";
        while is(machine, number, "pre-switchover") {
            std::thread::sleep(Duration::from_millis(1));
        }
        if !is(machine, number, "device") {
            return Ok(());
        }
        std::thread::sleep(half);
    } else if !pause(machine, number, half) {
        return Ok(());
    }
    let rest = machine.memory().to_string();
    file.write_all(format!(",{}", &rest[1..]).as_bytes())
        .map_err(failed)
}

/// `migrate-incoming`: begins to read.
pub fn load(machine: &Arc<Machine>, file: Arc<File>) {
    let number = locked(&machine.migration).begin();
    let machine = machine.clone();
    std::thread::spawn(move || {
        let done = load_now(&machine, &file, number);
        end(&machine, number, done);
    });
}

fn load_now(machine: &Machine, mut file: &File, number: u64) -> Result<(), String> {
    let bad = || "fake: error while loading state".to_owned();
    let mut saved = Vec::new();
    file.read_to_end(&mut saved)
        .map_err(|err| err.to_string())?;
    if saved == TEMPLATE {
        machine.pause_for("restore-ms");
        machine.is_template.store(true, Ordering::SeqCst);
        return match machine.has("restore-fails") {
            true => Err(bad()),
            false => Ok(()),
        };
    }
    let saved: Value = serde_json::from_slice(&saved).map_err(|_| bad())?;
    pause(machine, number, machine.time_now("resume-ms"));
    if saved[WHOLE] != 1 || machine.has_now("resume-fails") {
        return Err(bad());
    }
    machine.remember(&saved).ok_or_else(bad)
}
