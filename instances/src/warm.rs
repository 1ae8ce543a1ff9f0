//! Templates and clones on the driver's level: boots a machine to its quiet point and saves it
//! ([`make`]), and starts a machine from what was saved ([`restore`]). Which template, when and for
//! whom is the daemon's business (`daemon/src/service/templates/`, `warm.rs`).
//!
//! ```text
//!   make:     start ─▶ guest up ─▶ cloud-init ended ─▶ quiesce ─▶ stop ─▶ devices into a file ─▶ end
//!   restore:  start, paused ─▶ devices from the file ─▶ disk grown ─▶ go ─▶ NIC plugged ┐
//!                                                              identity by the agent ◀───┴─▶ running
//! ```
//!
//! A restored guest is nobody's until `identify` has answered: only then does the caller get it.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use pileus_api::{CloudInitStatus, PhaseTime};
use pileus_base::{Code, Error, Phase, Reporter, Result, ResultExt, Size, files};
use rand::TryRngCore;

use crate::driver::{Host, QemuDriver, RunningVm};
use crate::guest::clone::{CloneMode, IdentitySpec, NameSpec};
use crate::machine::{Driver, GuestEvent, Vm, VmEvent};
use crate::qemu::{Mac, MachineSpec, Memory, Nic};

/// The guest has to come to rest: timers, jobs, caches.
const QUIESCE_BOUND: Duration = Duration::from_secs(180);
/// A clone that does not answer by then is given up, and the launch boots instead.
const IDENTIFY_BOUND: Duration = Duration::from_secs(60);

/// A fork starts much of its system anew. Measured: 8 s with the host's processors to itself, 25 s beside
/// ten others.
const FORK_BOUND: Duration = Duration::from_secs(180);

/// Boots a machine, brings it to its quiet point and saves it: its memory in the file `ram` (made
/// here, sparse), its devices in `state`. The machine is gone afterwards, whatever happens.
/// `in_background`: nobody waits for it.
pub async fn make(
    driver: &QemuDriver,
    ram: &Path,
    state: &Path,
    timeout: Duration,
    in_background: bool,
    report: &Reporter,
) -> Result<()> {
    let host = driver.wiring().host().await?;
    let mut spec = driver.spec(&host, false);
    spec.nic = Nic::None;
    spec.ram = Memory::Shared(ram.to_owned());
    spec.ends_with_daemon = true;
    spec.in_background = in_background;
    make_sparse(ram, spec.ram_bytes())?;
    report.phase(Phase::Starting);
    let mut vm = driver.launch(&host, &spec, Vec::new()).await?;
    let made = report
        .or_cancelled(settle_and_save(&mut vm, state, timeout, report))
        .await;
    let tail = driver.console_tail();
    vm.kill().await;
    driver.release().await;
    made.map_err(|mut err| {
        if err.code.class() == pileus_base::Class::Guest && !tail.is_empty() {
            err = err.detail("The console's last lines:");
            err.details.extend(tail);
        }
        err
    })
}

async fn settle_and_save(
    vm: &mut RunningVm,
    state: &Path,
    timeout: Duration,
    report: &Reporter,
) -> Result<()> {
    wait_for_boot(vm, timeout, report).await?;
    report.phase(Phase::Quieting);
    vm.guest().quiesce(QUIESCE_BOUND).await?;
    report.phase(Phase::Saving);
    let file = File::options()
        .write(true)
        .create_new(true)
        .open(state)
        .io(format_args!("Creating {}", state.display()))?;
    files::set_mode(state, 0o600)?;
    let saved = async {
        vm.qemu().pause().await?;
        vm.qemu().save_devices(file).await
    };
    saved.await
}

/// A template's guest has no instance behind it: a small wait of its own, with the same two phases.
async fn wait_for_boot(vm: &mut RunningVm, timeout: Duration, report: &Reporter) -> Result<()> {
    report.phase(Phase::Booting);
    let mut until = tokio::time::Instant::now() + timeout;
    let mut up = false;
    loop {
        let event = tokio::time::timeout_at(until, vm.next())
            .await
            .map_err(|_| {
                let (code, what) = match up {
                    false => (Code::BootTimeout, "gave no sign of life"),
                    true => (Code::CloudInitTimeout, "did not end its set-up"),
                };
                let what = format!("The template's guest {what} within {} s", timeout.as_secs());
                Error::new(code, what).advise("A longer bound: --timeout.")
            })?;
        match event {
            VmEvent::Guest(GuestEvent::Up) if !up => {
                up = true;
                until = tokio::time::Instant::now() + timeout;
                report.phase(Phase::Initializing);
            }
            VmEvent::Guest(GuestEvent::CloudInit(told)) => match told.status {
                CloudInitStatus::Running => {}
                CloudInitStatus::Done | CloudInitStatus::Degraded | CloudInitStatus::Absent => {
                    return Ok(());
                }
                CloudInitStatus::Error => {
                    let what = "cloud-init failed in the template's guest";
                    let mut error = Error::new(Code::CloudInitFailed, what);
                    error.details = told.errors;
                    return Err(error);
                }
            },
            VmEvent::Panicked => {
                let what = "The kernel of the template's guest panicked";
                return Err(Error::new(Code::GuestStopped, what));
            }
            VmEvent::Exited { reason } => {
                let reason = reason.map_or(String::new(), |reason| format!(": {reason}"));
                let what = format!("The template's machine ended{reason}");
                return Err(Error::new(Code::GuestStopped, what));
            }
            VmEvent::DiskError { reason, no_space } => {
                let code = if no_space { Code::NoSpace } else { Code::Io };
                let what = format!("The template's disk can't be written: {reason}");
                return Err(Error::new(code, what));
            }
            _ => {}
        }
    }
}

fn make_sparse(path: &Path, bytes: u64) -> Result<()> {
    let what = || format!("Creating {}", path.display());
    let file = File::options()
        .write(true)
        .create_new(true)
        .open(path)
        .io(what())?;
    files::set_mode(path, 0o600)?;
    file.set_len(bytes).io(what())
}

/// What a clone starts from.
#[derive(Debug)]
pub struct Saved {
    pub ram: PathBuf,
    /// Opened, and found to be what was written.
    pub state: File,
    /// The guest's disk grows to this size if it is larger than the template's.
    pub grow_to: Option<Size>,
    pub identity: IdentitySpec,
}

/// What a fork starts from.
#[derive(Debug)]
pub struct SavedWhole {
    /// Devices and memory, as `Vm::freeze` wrote them, and of what machine.
    pub memory: File,
    pub saved: crate::machine::Saved,
    /// The NIC that the saved machine has.
    pub nic: Mac,
    pub identity: IdentitySpec,
}

/// Starts a machine from a template. When it returns, the guest has an identity and a network of its
/// own. On error nothing of it is left.
pub async fn restore(
    driver: &QemuDriver,
    saved: Saved,
    report: &Reporter,
) -> Result<(RunningVm, Vec<PhaseTime>)> {
    let host = driver.wiring().host().await?;
    let mut spec = driver.spec(&host, false);
    spec.nic = Nic::None;
    spec.ram = Memory::CopyOnWrite(saved.ram);
    let load = async |vm: &RunningVm| {
        vm.qemu().restore(saved.state).await?;
        match saved.grow_to {
            Some(size) => vm.qemu().resize_disk(size.bytes()).await,
            None => Ok(()),
        }
    };
    bring_up(driver, &host, spec, load, saved.identity, report).await
}

/// Starts a machine from another one's memory. When it returns, the guest has an identity and a network
/// of its own. On error nothing of it is left.
pub async fn restore_whole(
    driver: &QemuDriver,
    saved: SavedWhole,
    report: &Reporter,
) -> Result<(RunningVm, Vec<PhaseTime>)> {
    let host = driver.wiring().host().await?;
    let mut spec = driver.spec(&host, false);
    // The saved machine has a NIC. It comes back on a wire that leads nowhere, and goes at once.
    spec.nic = Nic::Disconnected(saved.nic);
    let (of, stream) = (&saved.saved, saved.saved.stream);
    (spec.cpus, spec.memory, spec.growth) = (of.cpus, of.memory, of.growth);
    let load = async |vm: &RunningVm| vm.qemu().restore_all(saved.memory, stream).await;
    bring_up(driver, &host, spec, load, saved.identity, report).await
}

/// Starts the machine, loads its state, lets it run, plugs its NIC, and has the agent make it itself.
async fn bring_up(
    driver: &QemuDriver,
    host: &Host,
    mut spec: MachineSpec,
    load: impl AsyncFnOnce(&RunningVm) -> Result<()>,
    mut identity: IdentitySpec,
    report: &Reporter,
) -> Result<(RunningVm, Vec<PhaseTime>)> {
    spec.incoming = true;
    // What was saved has none: a launch with further NICs boots.
    spec.extra_nics.clear();
    let had_nic = spec.nic != Nic::None;
    report.phase(Phase::Restoring);
    let began = Instant::now();
    // Both at once: a tap takes a few milliseconds, QEMU some more.
    let (tap, vm) = tokio::join!(
        driver.wiring().plug(),
        driver.launch(host, &spec, Vec::new())
    );
    let (tap, vm) = match (tap, vm) {
        (Ok(tap), Ok(vm)) => (tap, vm),
        (Err(err), Ok(vm)) => {
            vm.kill().await;
            driver.release().await;
            return Err(err);
        }
        (_, Err(err)) => {
            driver.release().await;
            return Err(err);
        }
    };
    let mut phases = Vec::new();
    let up = async {
        load(&vm).await?;
        vm.qemu().resume().await?;
        phases.push(PhaseTime::new(Phase::Restoring, began.elapsed()));
        report.phase(Phase::Identifying);
        let began = Instant::now();
        let plug = async {
            if had_nic {
                vm.qemu().unplug_nic("nic0").await?;
            }
            driver.plug_nic(&vm, tap).await
        };
        let guest = vm.guest();
        let bound = match identity.mode {
            CloneMode::Full => FORK_BOUND,
            _ => IDENTIFY_BOUND,
        };
        // As new as can be.
        freshen(&mut identity)?;
        let (plugged, identified) = tokio::join!(plug, guest.identify(&identity, bound));
        plugged?;
        for (step, milliseconds) in identified? {
            tracing::debug!(instance = %driver.setup().name, step, milliseconds, "identified");
        }
        phases.push(PhaseTime::new(Phase::Identifying, began.elapsed()));
        Ok(())
    };
    if let Err(err) = report.or_cancelled(up).await {
        vm.kill().await;
        driver.release().await;
        return Err(err);
    }
    Ok((vm.watched_from_now(), phases))
}

/// Gives a clone that stood by its final name, and what else its launch asks for.
pub async fn name(vm: &RunningVm, mut spec: NameSpec, grow_to: Option<Size>) -> Result<()> {
    if let Some(size) = grow_to {
        vm.qemu().resize_disk(size.bytes()).await?;
    }
    spec.grow = grow_to.is_some();
    spec.entropy = entropy()?;
    spec.time = now();
    for (step, milliseconds) in vm.guest().name(&spec, IDENTIFY_BOUND).await? {
        tracing::debug!(instance = spec.hostname, step, milliseconds, "named");
    }
    Ok(())
}

/// Fills in what must be as new as can be.
pub(crate) fn freshen(identity: &mut IdentitySpec) -> Result<()> {
    identity.entropy = entropy()?;
    identity.time = now();
    Ok(())
}

pub(crate) fn entropy() -> Result<Vec<u8>> {
    let mut entropy = vec![0; 64];
    rand::rngs::OsRng
        .try_fill_bytes(&mut entropy)
        .map_err(|err| Error::internal(format!("The system gave no random bytes: {err}")))?;
    Ok(entropy)
}

/// The host's clock, seconds since 1970.
pub(crate) fn now() -> f64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0.0, |now| now.as_secs_f64())
}
