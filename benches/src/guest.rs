//! A real guest under the real daemon: cold launch against a bare QEMU (`bare.rs`), `exec` against a
//! new ssh, and how fast a killed daemon has its machine again.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use pileus_api::routes;
use pileus_testkit::{Daemon, Need, Options, guest_image, need};
use serde_json::Value;

use crate::bare::{self, CPUS, EXPLAIN, MEMORY, ssh};
use crate::fake::killed;
use crate::measure::{
    Phases, Times, get, inside, pileus, poll, processor_time, ratio, show, timed,
};
use crate::table::{Row, Table};

/// The daemon that the benches with a real guest share, made when it is first needed.
#[derive(Default)]
pub struct Real {
    daemon: Option<Daemon>,
    /// What runs under it.
    instance: Option<String>,
    launched: u32,
}

impl Real {
    fn can() -> bool {
        need(&[Need::Root, Need::Tun, Need::Guest, Need::Program("ssh")])
    }

    fn daemon(&mut self) -> &mut Daemon {
        self.daemon
            .get_or_insert_with(|| Daemon::start(Options::real()))
    }

    /// Launches an instance; returns how long the launch and a first command took.
    fn launch(&mut self) -> Result<(Duration, Duration)> {
        self.launched += 1;
        let name = format!("cold{}", self.launched);
        let storage = self.daemon().storage();
        // Or a third one would find a template that the daemon made by itself.
        let args = [
            "launch", "--cold", "--name", &name, "-c", CPUS, "-m", MEMORY,
        ];
        let (launch, _) = timed(&mut pileus(&storage, &args))?;
        self.instance = Some(name.clone());
        let (command, _) = timed(&mut pileus(&storage, &["exec", &name, "--", "true"]))?;
        Ok((launch, command))
    }

    fn purge(&mut self) -> Result<()> {
        if let Some(name) = self.instance.take() {
            let storage = self.daemon().storage();
            timed(&mut pileus(&storage, &["delete", "--purge", &name]))?;
        }
        Ok(())
    }

    /// The name of an instance that runs.
    fn instance(&mut self) -> Result<String> {
        if self.instance.is_none() {
            self.launch()?;
        }
        self.instance.clone().context("it was just launched")
    }

    fn info(&mut self, name: &str) -> Result<Value> {
        get(
            &self.daemon().socket(),
            &routes::fill(routes::INSTANCE, name),
        )
    }
}

/// `launch` of a cached image to its first command, against the bare QEMU to its first command.
pub fn cold(real: &mut Real, rounds: u32, explain: bool, table: &mut Table) -> Result<()> {
    if !Real::can() {
        return Ok(());
    }
    let image = guest_image();
    let mut ours = Times::default();
    let mut launches = Times::default();
    let mut firsts = Times::default();
    let mut phases = Phases::default();
    let (mut port, mut command, mut cloud_init) =
        (Times::default(), Times::default(), Times::default());
    let (mut our_processor, mut bare_processor) = (Times::default(), Times::default());
    for round in (0..rounds).rev() {
        // Who begins changes, so that what grows slower over time hurts both; the last one of ours
        // stays for the other benches.
        for side in [round % 2 == 0, round % 2 != 0] {
            // Two guests at once would share the processors.
            real.purge()?;
            if side {
                let bare = bare::boot(&image, explain)?;
                eprintln!("bare: {bare:?}");
                port.add(bare.port);
                command.add(bare.command);
                cloud_init.add(bare.cloud_init);
                bare_processor.add(bare.processor);
            } else {
                let (launch, first) = real.launch()?;
                for pid in real.daemon().machines() {
                    our_processor.add(processor_time(pid)?);
                }
                eprintln!("ours: {launch:?} + {first:?}");
                ours.add(launch + first);
                launches.add(launch);
                firsts.add(first);
                let name = real.instance()?;
                phases.add(&real.info(&name)?);
                if explain {
                    let (name, storage) = (real.instance()?, real.daemon().storage());
                    let words = ["exec", &name, "--", "sh", "-c", EXPLAIN];
                    eprintln!("{}", timed(&mut pileus(&storage, &words))?.1);
                }
            }
        }
    }
    let times = ratio(ours.median(), command.median());
    table.add(Row {
        what: "cold `launch` of a cached image to the first command; bare QEMU to the first ssh"
            .into(),
        ours: ours.show(),
        alternative: command.show(),
        ratio: format!("{times:.2}×"),
        bound: "≤ 1.1×".into(),
        met: Some(times <= 1.1),
    });
    let full = ratio(launches.median(), cloud_init.median());
    table.add(Row {
        what: "… to cloud-init being done; bare QEMU to the same".into(),
        ours: launches.show(),
        alternative: cloud_init.show(),
        ratio: format!("{full:.2}×"),
        ..Row::default()
    });
    let times = ratio(our_processor.median(), bare_processor.median());
    table.add(Row {
        what: "… QEMU's processor time until the first command is done".into(),
        ours: our_processor.show(),
        alternative: bare_processor.show(),
        ratio: format!("{times:.2}×"),
        ..Row::default()
    });
    table.note("… sshd takes connections", String::new(), port.show());
    for (phase, times) in phases.all() {
        table.note(format!("… our phase {phase}"), times.show(), String::new());
    }
    table.note("… the first command itself", firsts.show(), String::new());
    Ok(())
}

/// The second and later commands, against a new ssh each.
pub fn exec(real: &mut Real, runs: u32, table: &mut Table) -> Result<()> {
    if !Real::can() {
        return Ok(());
    }
    let name = real.instance()?;
    let storage = real.daemon().storage();
    let info = real.info(&name)?;
    let known = Login::of(real.daemon(), &info)?;
    let pid = real.daemon().pid().context("the daemon runs")?;
    let by_ssh = || inside(pid, || timed(&mut known.ssh("true"))).map(|(time, _)| time);
    let by_exec = || timed(&mut pileus(&storage, &["exec", &name, "--", "true"])).map(|(t, _)| t);
    // Once each, not measured: both ways are open.
    poll("ssh to the guest", Duration::from_secs(60), || {
        by_ssh().ok()
    })?;
    by_exec()?;
    let (mut ours, mut theirs) = (Times::default(), Times::default());
    for run in 0..runs {
        ours.add(by_exec()?);
        if run % 5 == 0 {
            theirs.add(by_ssh()?);
        }
    }
    let times = ratio(theirs.median(), ours.median());
    table.add(Row {
        what: "a command on a running instance: `pileus exec`; a new ssh".into(),
        ours: ours.show(),
        alternative: theirs.show(),
        ratio: format!("{times:.1}× faster"),
        bound: "≥ 10× faster".into(),
        met: Some(times >= 10.0),
    });
    Ok(())
}

/// What ssh needs for an instance of ours.
pub struct Login {
    folder: tempfile::TempDir,
    key: PathBuf,
    address: Ipv4Addr,
}

impl Login {
    pub fn of(daemon: &Daemon, info: &Value) -> Result<Self> {
        let id = info["id"].as_str().context("it has no id")?;
        let own = daemon.storage().join("data/instances").join(id);
        let address = info["ipv4"][0].as_str().context("it has no address")?;
        let address: Ipv4Addr = address.parse()?;
        let folder = tempfile::tempdir()?;
        let (_, host_key) = timed(
            Command::new("ssh-keygen")
                .arg("-y")
                .arg("-f")
                .arg(own.join("host_key")),
        )?;
        fs::write(
            folder.path().join("known_hosts"),
            format!("{address} {host_key}"),
        )?;
        Ok(Self {
            folder,
            key: own.join("client_key"),
            address,
        })
    }

    /// A command by a new connection, from inside the daemon's namespace.
    pub fn ssh(&self, words: &str) -> Command {
        let hosts = self.folder.path().join("known_hosts");
        let mut command = ssh(&self.key, self.address);
        command
            .args(["-o", "StrictHostKeyChecking=yes", "-o"])
            .arg(format!("GlobalKnownHostsFile={}", hosts.display()))
            .arg(words);
        command
    }
}

/// A real machine under a daemon that is killed.
pub fn adopt(real: &mut Real, rounds: u32, table: &mut Table) -> Result<()> {
    if !Real::can() {
        return Ok(());
    }
    let name = real.instance()?;
    let storage = real.daemon().storage();
    let (mut ready, mut adopted, mut used) = (Times::default(), Times::default(), Times::default());
    for _ in 0..rounds {
        let began = Instant::now();
        let (first, last) = killed(real.daemon(), 1)?;
        ready.add(first);
        adopted.add(last);
        timed(&mut pileus(&storage, &["exec", &name, "--", "true"]))?;
        used.add(began.elapsed());
    }
    table.note(
        "killed daemon's new start until a real machine is adopted",
        adopted.show(),
        format!("of this to the first answer {}", show(ready.median())),
    );
    table.note(
        "… until a command in it is done (a new SSH session over its port)",
        used.show(),
        String::new(),
    );
    Ok(())
}
