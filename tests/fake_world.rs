//! What the tests of an instance's life share: a daemon whose machines start at once, its API, and the
//! rules that hold whenever nothing is under way ([`World::check`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pileus_testkit::{Api, Daemon, Refusal, files_below, program};
use serde_json::{Value, json};

pub struct World {
    pub daemon: Daemon,
    pub api: Api,
}

impl Deref for World {
    type Target = Daemon;

    fn deref(&self) -> &Daemon {
        &self.daemon
    }
}

impl DerefMut for World {
    fn deref_mut(&mut self) -> &mut Daemon {
        &mut self.daemon
    }
}

pub fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

/// What the database holds of one instance.
struct Row {
    id: String,
    name: String,
    state: String,
    spec: Value,
    snapshots: Value,
}

impl World {
    /// Nothing takes time there but what a test makes slow.
    pub fn new() -> Self {
        Self::with("fast")
    }

    pub fn with(words: &str) -> Self {
        let daemon = Daemon::fake();
        daemon.fakes_do(words);
        let api = daemon.api();
        Self { daemon, api }
    }

    /// Layers that nobody needs one by one are merged there, as by every daemon that is not told otherwise: at its
    /// start, and then each minute. On a file system in memory: nothing waits for the host's disk.
    pub fn merging(words: &str) -> Self {
        let mut daemon = Daemon::on_small_disk(64 << 30);
        daemon.stop();
        let qemu = program("fake-qemu");
        let qemu = qemu.to_str().unwrap_or_default();
        let mut daemon = daemon.with_args(&["--qemu", qemu, "--accelerator", "tcg"]);
        daemon.start_again();
        // What the guests write has to be in what becomes of their layers.
        daemon.fakes_do(&format!("{words} data"));
        let api = daemon.api();
        Self { daemon, api }
    }

    pub fn try_launch(&self, name: &str) -> Result<Value, Refusal> {
        let image = format!("file://{}", self.fake_image().display());
        let body = json!({"image": image, "name": name, "warm": "never"});
        self.api.run("POST", "/v1/instances", Some(&body))
    }

    #[track_caller]
    pub fn launch(&self, name: &str) {
        self.try_launch(name).unwrap();
    }

    pub fn instance(&self, name: &str) -> Value {
        self.api.instance(name).unwrap_or_default()
    }

    /// `none` if there is no such instance.
    pub fn state(&self, name: &str) -> String {
        match self.api.instance(name) {
            Ok(instance) => text(&instance, "state").to_owned(),
            Err(_) => "none".to_owned(),
        }
    }

    pub fn act(&self, name: &str, what: &str) -> Result<Value, Refusal> {
        let body = match what {
            "suspend" => None,
            _ => Some(json!({})),
        };
        let path = format!("/v1/instances/{name}/{what}");
        self.api.run("POST", &path, body.as_ref())
    }

    #[track_caller]
    pub fn must(&self, name: &str, what: &str) {
        if let Err(err) = self.act(name, what) {
            panic!("{what} {name}: {err:?}");
        }
    }

    pub fn force_stop(&self, name: &str) -> Result<Value, Refusal> {
        self.api.act(name, "stop", &json!({"force": true}))
    }

    pub fn snapshot(&self, name: &str, snapshot: &str, memory: bool) -> Result<Value, Refusal> {
        let body =
            json!({"name": snapshot, "with_memory": memory, "comment": format!("of {snapshot}")});
        self.api.act(name, "snapshots", &body)
    }

    /// Leaves layers that nobody needs one by one: snapshots that are gone again. Each has what the machine, which
    /// has to run, wrote by `before`.
    pub fn pile_up(&self, name: &str, before: impl Fn()) -> Result<(), Refusal> {
        // As many as are worth a merge, and one more (`daemon/src/service/merge.rs`).
        for _ in 0..9 {
            before();
            self.snapshot(name, "pile", false)?;
            self.delete_snapshot(name, "pile")?;
        }
        Ok(())
    }

    /// How many layers the instance stands on.
    pub fn layers(&self, name: &str) -> usize {
        let row = self.rows().into_iter().find(|row| row.name == name);
        row.map_or(0, |row| row.spec["layers"].as_array().map_or(0, Vec::len))
    }

    /// How many merges there were.
    pub fn merges(&self) -> usize {
        self.log().matches("merged into one").count()
    }

    pub fn restore(&self, name: &str, snapshot: &str) -> Result<Value, Refusal> {
        let what = format!("snapshots/{snapshot}/restore");
        self.api.act(name, &what, &json!({}))
    }

    pub fn delete_snapshot(&self, name: &str, snapshot: &str) -> Result<Value, Refusal> {
        let path = format!("/v1/instances/{name}/snapshots/{snapshot}");
        self.api.run("DELETE", &path, None)
    }

    pub fn clone_to(&self, name: &str, new: &str) -> Result<Value, Refusal> {
        self.api.act(name, "clone", &json!({ "name": new }))
    }

    pub fn rename(&self, name: &str, new: &str) -> Result<Value, Refusal> {
        let path = format!("/v1/instances/{name}/rename");
        self.api.call("POST", &path, Some(&json!({ "name": new })))
    }

    pub fn delete(&self, name: &str, purge: bool) -> Result<Value, Refusal> {
        let path = format!("/v1/instances/{name}?purge={purge}");
        self.api.run("DELETE", &path, None)
    }

    pub fn get_setting(&self, key: &str) -> String {
        let setting = self.api.get(&format!("/v1/settings/{key}"));
        setting.map_or_else(|err| err.code, |s| text(&s, "value").to_owned())
    }

    /// What the guest has written on the disk that it stands on.
    #[track_caller]
    pub fn marks(&self, name: &str) -> Vec<String> {
        self.api.told_by(name, "disk").unwrap()
    }

    #[track_caller]
    pub fn told(&self, name: &str, what: &str) -> String {
        let told = self.api.told_by(name, what).unwrap();
        told.first().cloned().unwrap_or_default()
    }

    pub fn machine(&self, name: &str) -> Option<i32> {
        self.machine_of(text(&self.instance(name), "id"))
    }

    #[track_caller]
    pub fn signal(&self, name: &str, signal: Signal) {
        assert!(self.machine(name).is_some(), "{name} has a machine");
        self.try_signal(name, signal).unwrap();
    }

    /// As [`World::signal`]; as an answer of the API.
    pub fn try_signal(&self, name: &str, signal: Signal) -> Result<Value, Refusal> {
        let instance = self.api.instance(name)?;
        if let Some(pid) = self.machine_of(text(&instance, "id")) {
            let _ = kill(Pid::from_raw(pid), signal);
            if signal != Signal::SIGUSR2 {
                wait("it ends", || {
                    self.machine_of(text(&instance, "id")).is_none()
                });
            }
        }
        Ok(instance)
    }

    /// Waits for the end of a reboot that the guest has just been told to make.
    pub fn wait_reboot(&self, name: &str) {
        let until = Instant::now() + Duration::from_millis(300);
        while self.state(name) == "running" && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        wait("the guest reboots", || self.state(name) == "running");
    }

    /// Kills the daemon and does not start it again.
    pub fn kill_only(&self) {
        if let Some(pid) = self.pid() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }

    /// Waits until the instance is in this state.
    #[track_caller]
    pub fn wait_state(&self, name: &str, state: &str) {
        wait(&format!("{name} is {state}"), || self.state(name) == state);
    }

    /// As a power cut of the daemon alone.
    pub fn crash(&mut self) {
        self.kill();
        self.start_again();
        self.taken_up();
        self.settle();
    }

    /// Waits until a daemon that has just started knows how its instances are: before that it tells how they
    /// were.
    pub fn taken_up(&self) {
        for instance in self.api.instances().unwrap_or_default() {
            if text(&instance, "state") != "stopped" {
                // Waits; how it ends does not matter.
                let _ = self.api.told_by(text(&instance, "name"), "hostname");
            }
        }
    }

    /// Waits until nothing is under way.
    pub fn settle(&self) {
        wait("everything comes to rest", || {
            let all = self.api.instances().unwrap_or_default();
            let operations = self.api.get("/v1/operations").unwrap_or_default();
            let over = |o: &Value| o["state"] != "running";
            operations
                .as_array()
                .is_some_and(|all| all.iter().all(over))
                && all.iter().all(|instance| {
                    let state = text(instance, "state");
                    ["stopped", "running", "suspended", "unknown"].contains(&state)
                })
        });
    }

    /// Changes the database of a daemon that is down.
    pub fn sql(&self, statement: &str) {
        let database = self.storage().join("data/pileus.db");
        let database = rusqlite::Connection::open(database).unwrap();
        assert!(database.execute(statement, []).unwrap() > 0, "{statement}");
    }

    fn rows(&self) -> Vec<Row> {
        let database = self.storage().join("data/pileus.db");
        let database = rusqlite::Connection::open(database).unwrap();
        let query = "SELECT id, name, state, spec, snapshots FROM instances ORDER BY name";
        let mut statement = database.prepare(query).unwrap();
        let json = |text: String| serde_json::from_str(&text).unwrap();
        let rows = statement.query_map([], |row| {
            Ok(Row {
                id: row.get(0)?,
                name: row.get(1)?,
                state: row.get(2)?,
                spec: json(row.get(3)?),
                snapshots: json(row.get(4)?),
            })
        });
        rows.unwrap().map(Result::unwrap).collect()
    }

    /// What each instance's QEMU said last on its standard error, by name.
    pub fn qemu_logs(&self) -> Vec<(String, String)> {
        let data = self.storage().join("data/instances");
        let tail = |row: Row| {
            let log = std::fs::read_to_string(data.join(&row.id).join("qemu.log"));
            let log = log.unwrap_or_default();
            let last: Vec<_> = log.lines().rev().take(3).collect();
            (row.name, last.join(" | "))
        };
        self.rows().into_iter().map(tail).collect()
    }

    /// By id, what each instance's guest and each snapshot of it holds: `wrote` and `size`, read from the files;
    /// and whether it waits for an identity.
    pub fn disks(&self) -> BTreeMap<String, Value> {
        loop {
            let rows = self.rows();
            let layers = |rows: &[Row]| {
                let of = |row: &Row| (row.spec["layers"].clone(), row.snapshots.clone());
                rows.iter().map(of).collect::<Vec<_>>()
            };
            let before = layers(&rows);
            let disks = self.disks_of(rows);
            // A merge takes files away that were needed when the rows were read.
            if layers(&self.rows()) == before {
                return disks;
            }
        }
    }

    fn disks_of(&self, rows: Vec<Row>) -> BTreeMap<String, Value> {
        let data = self.storage().join("data");
        let layer = |value: &Value| {
            let id = value.as_str().unwrap_or_default();
            data.join(format!("layers/{id}.qcow2"))
        };
        let layers = |of: &Value| -> Vec<PathBuf> {
            let all = of["layers"].as_array().into_iter().flatten();
            all.map(layer).collect()
        };
        let mut marks = Marks::default();
        let disk_of = |row: Row| {
            let mut files = layers(&row.spec);
            files.push(data.join("instances").join(&row.id).join("disk.qcow2"));
            let mut disk = json!({
                "wrote": written(&files, &mut marks), "size": size(&files),
                "identify": row.spec["identify"],
            });
            for snapshot in row.snapshots.as_array().into_iter().flatten() {
                disk["snapshots"][text(snapshot, "id")] = json!({
                    "wrote": written(&layers(snapshot), &mut marks), "identify": snapshot["identify"],
                });
            }
            (row.id, disk)
        };
        rows.into_iter().map(disk_of).collect()
    }

    /// Everything on the disk and every process belongs to somebody, and nothing that somebody needs is
    /// missing. Only when nothing is under way.
    pub fn check(&self) -> Result<(), String> {
        let rows = self.rows();
        let data = self.storage().join("data");
        let mut layers = BTreeSet::new();
        let mut running = BTreeSet::new();
        let mut folders = BTreeSet::new();
        for row in &rows {
            let name = &row.name;
            folders.insert(row.id.clone());
            let above = row.snapshots.as_array().into_iter().flatten();
            for of in above.clone().chain([&row.spec]) {
                let all = of["layers"].as_array().into_iter().flatten();
                layers.extend(all.filter_map(|l| Some(format!("{}.qcow2", l.as_str()?))));
            }
            if let Some(pid) = self.machine_of(&row.id) {
                running.insert(pid);
            }
            let saved = !row.spec["suspended"].is_null();
            if saved != (row.state == "suspended") {
                return Err(format!("{name} is {} and saved: {saved}", row.state));
            }
            let files = files_below(&data.join("instances").join(&row.id));
            let mut memories: BTreeSet<PathBuf> = above
                .filter(|s| !s["saved"].is_null())
                .map(|s| format!("snapshots/{}.memory", text(s, "id")).into())
                .collect();
            memories.extend(saved.then(|| "suspended.memory".into()));
            let is_memory = |file: &&PathBuf| file.extension().is_some_and(|e| e == "memory");
            let found: BTreeSet<_> = files.iter().filter(is_memory).cloned().collect();
            if found != memories {
                return Err(format!("{name} has {found:?} and needs {memories:?}"));
            }
            let disks: Vec<_> = files
                .iter()
                .filter(|file| file.to_string_lossy().starts_with("disk."))
                .collect();
            if disks != [&PathBuf::from("disk.qcow2")] {
                return Err(format!("{name} has the disks {disks:?}"));
            }
        }
        let names = |folder: &str| -> BTreeSet<String> {
            let entries = std::fs::read_dir(data.join(folder));
            let entries = entries.into_iter().flatten().flatten();
            entries
                .map(|entry| entry.file_name().to_string_lossy().into_owned())
                .collect()
        };
        let found = names("layers");
        if found != layers {
            let (more, less): (Vec<_>, Vec<_>) = (
                found.difference(&layers).collect(),
                layers.difference(&found).collect(),
            );
            return Err(format!(
                "layers that nobody needs: {more:?}; layers that are gone: {less:?}"
            ));
        }
        let found = names("instances");
        if found != folders {
            return Err(format!("folders {found:?}, and instances {folders:?}"));
        }
        let machines: BTreeSet<_> = self.machines().into_iter().collect();
        if machines != running {
            return Err(format!("machines {machines:?}, of instances {running:?}"));
        }
        for instance in self.api.instances().map_err(|err| format!("{err:?}"))? {
            let (id, name, state) = (
                text(&instance, "id"),
                text(&instance, "name"),
                text(&instance, "state"),
            );
            let runs = self.machine_of(id).is_some();
            if runs != matches!(state, "running" | "unknown") {
                return Err(format!("{name} is {state}, and its machine runs: {runs}"));
            }
            let answers = || self.api.told_by(name, "hostname").is_ok();
            if state == "running" && instance["deleted"] == false && !answers() {
                return Err(format!("{name} is running, and its guest does not answer"));
            }
        }
        Ok(())
    }

    #[track_caller]
    pub fn all_is_well(&self) {
        self.try_all_is_well().unwrap();
    }

    pub fn try_all_is_well(&self) -> Result<(), String> {
        self.settle();
        // What ends by itself may need a moment more.
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            let found = self.check();
            if found.is_ok() || Instant::now() > until {
                return found;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// The marks that guests of the stand-in for QEMU left in these layers, the lowest first
/// (`testkit/src/bin/fake-qemu/disk.rs`).
fn written(files: &[PathBuf], known: &mut Marks) -> Vec<String> {
    let missing = files.iter().filter(|file| !file.exists());
    let mut all: Vec<_> = missing
        .map(|f| format!("{} is gone", f.display()))
        .collect();
    let layers: Vec<_> = files.iter().map(|f| known.of(f)).collect();
    for place in 0.. {
        let upper = layers.iter().rev();
        let Some(mark) = upper.map(|layer| &layer.data).find_map(|d| d.get(&place)) else {
            break;
        };
        all.push(mark.clone());
    }
    all.extend(layers.iter().flat_map(|layer| layer.behind.iter().cloned()));
    all
}

/// What each file has by itself, read once.
#[derive(Default)]
struct Marks(BTreeMap<PathBuf, Rc<Own>>);

#[derive(Default)]
struct Own {
    /// By their place.
    data: BTreeMap<u64, String>,
    behind: Vec<String>,
}

impl Marks {
    fn of(&mut self, file: &Path) -> Rc<Own> {
        let read = || Rc::new(Own::read(file).unwrap_or_default());
        self.0.entry(file.to_owned()).or_insert_with(read).clone()
    }
}

impl Own {
    fn read(path: &Path) -> std::io::Result<Self> {
        const FIRST: u64 = 4096;
        const ENTRIES: u64 = 8192;
        const TABLE_AT: u64 = 40;
        const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
        const MARK: usize = 64;
        let file = File::open(path)?;
        let number = |at| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at)?;
            Ok::<_, std::io::Error>(u64::from_be_bytes(bytes) & PLACE)
        };
        let mark = |at| {
            let mut record = [0; MARK];
            file.read_exact_at(&mut record, at).ok()?;
            let text = record.strip_prefix(b"MARK ")?;
            Some(String::from_utf8_lossy(text).trim().to_owned())
        };
        let mut own = Self::default();
        let mut end = file.metadata()?.len();
        while let Some(at) = end.checked_sub(MARK as u64)
            && let Some(text) = mark(at)
        {
            own.behind.insert(0, text);
            end = at;
        }
        let table = number(number(TABLE_AT)?)?;
        // One that only says that something was written has none.
        let mut entries = vec![0; ((ENTRIES - FIRST) * 8) as usize];
        if table == 0 || file.read_exact_at(&mut entries, table + FIRST * 8).is_err() {
            return Ok(own);
        }
        for (n, entry) in (0..).zip(entries.as_chunks::<8>().0) {
            let place = u64::from_be_bytes(*entry) & PLACE;
            if let Some(text) = mark(place).filter(|_| place != 0) {
                own.data.insert(n, text);
            }
        }
        Ok(own)
    }
}

/// The size that a machine finds on the layers: a disk that is smaller than the layer below it is made as large
/// before it is used.
fn size(files: &[PathBuf]) -> Option<u64> {
    let of = |file: &PathBuf| {
        let mut size = [0; 8];
        File::open(file).ok()?.read_exact_at(&mut size, 24).ok()?;
        Some(u64::from_be_bytes(size))
    };
    let (disk, below) = files.split_last()?;
    of(disk).max(below.last().and_then(of))
}

#[track_caller]
pub fn wait(what: &str, so: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(60);
    while !so() {
        assert!(Instant::now() < until, "{what}: did not happen");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Must be refused with this code.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(done: Result<T, Refusal>, code: &str) -> String {
    match done {
        Ok(done) => panic!("{code} was expected: {done:?}"),
        Err(refusal) => {
            assert_eq!(refusal.code, code, "{}", refusal.message);
            refusal.message
        }
    }
}
