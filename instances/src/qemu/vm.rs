//! A running machine: its process and its control socket. Started or adopted here, powered, reset,
//! ended, NICs plugged and unplugged; what happens to it comes as [`VmEvent`]s.
//!
//! Dropping a [`Vm`] leaves the machine running and unwatched, as a daemon's end does; it can be
//! adopted again.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pileus_base::process::ProcessId;
use pileus_base::{Code, Error, Mac, Result, files};
use pileus_qmp::commands::{
    CloseFd, Cont, DeviceAdd, DeviceDel, GetFd, NetdevAddTap, NetdevDel, QueryStatus, Quit, Stop,
    SystemPowerdown, SystemReset,
};
use pileus_qmp::{Client, Event, Events, Options, QmpError};
use serde_json::{Value, json};
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;

use super::hardware::{NicModel, Socket};
use super::host::Qemu;
use super::loan::Loan;
use super::process::{self, Confinement, Exit};
use super::spec::{MachineSpec, Paths, Port};

/// Bound on QEMU's first answer; measured 15 to 100 ms, more on a host that swaps.
const START_BOUND: Duration = Duration::from_secs(30);
/// Bound on the guest's consent to give a device back.
const UNPLUG_BOUND: Duration = Duration::from_secs(10);
/// Bound on QEMU's end after it was told to.
const QUIT_BOUND: Duration = Duration::from_secs(5);
/// Bound on its end after it was killed: the kernel gives a large memory back first.
const KILL_BOUND: Duration = Duration::from_secs(60);
/// Bound on what makes QEMU bring all that it holds to the disk, which may be a busy one.
pub(super) const FLUSH_BOUND: Duration = Duration::from_secs(60);

/// What happens to a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmEvent {
    /// The machine goes down; `Exited` follows. `guest`: the guest wanted it.
    Shutdown {
        guest: bool,
        reason: String,
    },
    /// The machine starts anew in the same process.
    Reset {
        guest: bool,
        reason: String,
    },
    /// The processors were halted, or run again.
    Stopped,
    Resumed,
    /// The guest's kernel gave up; `Shutdown` and `Exited` follow.
    Panicked,
    /// The host could not read or write the disk. Without space the machine is halted as well.
    DiskError {
        no_space: bool,
        reason: String,
    },
    /// Somebody in the guest opened or closed one of the virtio-serial ports (`agent`, `ssh`).
    GuestPort {
        port: String,
        open: bool,
    },
    /// The guest let a device go.
    DeviceGone {
        id: String,
    },
    /// The control socket is closed though the process lives; adopt the machine again.
    Disconnected,
    /// The process is gone. Always the last one.
    Exited(Exit),
}

/// What QEMU says when asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PowerState {
    Running,
    /// Halted by us.
    Paused,
    /// Halted by QEMU after a disk error.
    DiskError,
    /// About to end, or the guest panicked.
    Ending,
}

/// A handle on one machine.
#[derive(Debug)]
pub struct Vm {
    process: ProcessId,
    log: PathBuf,
    client: Client,
    events: broadcast::Sender<VmEvent>,
    exit: watch::Receiver<Option<Exit>>,
    watcher: AbortHandle,
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Only one may wait for the process, or the other one misses how it ended.
        self.watcher.abort();
    }
}

/// Kills a process that was started in vain, unless it is kept.
struct Starting {
    process: ProcessId,
    kept: bool,
}

impl Drop for Starting {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Err(err) = process::kill(self.process) {
            tracing::warn!(%err, "a QEMU that was started in vain can't be killed");
        }
        let process = self.process;
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { process::wait_exit(process).await.is_ok() });
        }
    }
}

impl Vm {
    /// Starts a machine; returns when QEMU answers. If it fails, or the caller goes away meanwhile,
    /// no process stays behind. `taps`: one for each NIC of the machine, in their order.
    pub async fn start(
        qemu: &Qemu,
        spec: &MachineSpec,
        taps: Vec<OwnedFd>,
        confinement: Option<Confinement>,
    ) -> Result<(Self, broadcast::Receiver<VmEvent>)> {
        let paths = spec.paths.clone();
        let program = qemu.program.clone();
        let log_before = std::fs::metadata(&paths.qemu_log).map_or(0, |m| m.len());
        // Until QEMU answers: it has opened its memory by then.
        let _loan = match (&confinement, spec.ram.file()) {
            (Some(who), Some(file)) => Some(Loan::take(file, who.uid).await?),
            _ => None,
        };
        let spawned = {
            let spec = spec.clone();
            tokio::task::spawn_blocking(move || {
                files::create_folder(&spec.paths.run, 0o700)?;
                let process = process::spawn(&program, &spec, taps, confinement.as_ref())?;
                Ok::<_, Error>(Starting {
                    process,
                    kept: false,
                })
            })
        };
        let mut starting = spawned
            .await
            .map_err(|err| Error::internal("Starting QEMU failed").with_source(err))??;
        let process = starting.process;
        let failed = |what: String| {
            let error = Error::new(Code::QemuFailed, what);
            said_since(&paths.qemu_log, log_before)
                .into_iter()
                .fold(error, Error::detail)
        };
        let socket = paths.qmp();
        let connected = tokio::select! {
            biased;
            connected = connect(&socket, START_BOUND) => connected,
            exit = process::wait_exit(process) => {
                starting.kept = true;
                return Err(failed(format!("QEMU {} while it started", exit?)));
            }
        };
        let (client, events) = match connected {
            Ok(connected) => connected,
            Err(err) => {
                // The usual cause of a broken connection is that QEMU is gone; then say that.
                let exit =
                    tokio::time::timeout(Duration::from_millis(500), process::wait_exit(process));
                return Err(match exit.await {
                    Ok(Ok(exit)) => {
                        starting.kept = true;
                        failed(format!("QEMU {exit} while it started"))
                    }
                    _ => failed(err.to_string()).with_source(err),
                });
            }
        };
        starting.kept = true;
        Ok(Self::watched(process, &paths, client, events))
    }

    /// Takes over a machine that was started before, by us or by a daemon that is gone.
    pub async fn adopt(
        process: ProcessId,
        paths: &Paths,
    ) -> Result<(Self, broadcast::Receiver<VmEvent>)> {
        if !process.is_alive() {
            let what = format!("The machine's process {} is gone", process.pid);
            return Err(Error::new(Code::GuestStopped, what));
        }
        let (client, events) = connect(&paths.qmp(), START_BOUND).await?;
        Ok(Self::watched(process, paths, client, events))
    }

    fn watched(
        process: ProcessId,
        paths: &Paths,
        client: Client,
        events: Events,
    ) -> (Self, broadcast::Receiver<VmEvent>) {
        let (sender, receiver) = broadcast::channel(256);
        let (exited, exit) = watch::channel(None);
        let watching = watch_over(process, events, sender.clone(), exited);
        let watcher = tokio::spawn(watching).abort_handle();
        let vm = Self {
            process,
            log: paths.qemu_log.clone(),
            client,
            events: sender,
            exit,
            watcher,
        };
        (vm, receiver)
    }

    pub fn process(&self) -> ProcessId {
        self.process
    }

    /// The wire, for what has no method here.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// What QEMU itself writes to.
    pub(super) fn log(&self) -> &Path {
        &self.log
    }

    /// Events from now on.
    pub fn subscribe(&self) -> broadcast::Receiver<VmEvent> {
        self.events.subscribe()
    }

    /// Completes when the process is gone.
    pub async fn wait(&self) -> Exit {
        let unknown = Exit {
            code: None,
            signal: None,
        };
        let mut exit = self.exit.clone();
        exit.wait_for(Option::is_some)
            .await
            .map_or(unknown, |exit| exit.unwrap_or(unknown))
    }

    pub async fn status(&self) -> Result<PowerState> {
        let status = self.client.run(&QueryStatus {}).await?;
        Ok(match status.status.as_str() {
            _ if status.running => PowerState::Running,
            "io-error" => PowerState::DiskError,
            "shutdown" | "guest-panicked" | "internal-error" => PowerState::Ending,
            _ => PowerState::Paused,
        })
    }

    /// Presses the power button. The guest may take its time, or not react at all.
    pub async fn powerdown(&self) -> Result<()> {
        self.client.run(&SystemPowerdown {}).await?;
        Ok(())
    }

    /// Resets the machine as the reset button does.
    pub async fn reset(&self) -> Result<()> {
        self.client.run(&SystemReset {}).await?;
        Ok(())
    }

    pub async fn pause(&self) -> Result<()> {
        self.client.run_within(&Stop {}, FLUSH_BOUND).await?;
        Ok(())
    }

    pub async fn resume(&self) -> Result<()> {
        self.client.run(&Cont {}).await?;
        Ok(())
    }

    /// Pulls the plug: QEMU closes its disks and ends; if it doesn't, it is killed. Returns when the
    /// process is gone.
    pub async fn quit(&self) -> Result<Exit> {
        match self.client.run_within(&Quit {}, QUIT_BOUND).await {
            Ok(_) | Err(QmpError::Closed { .. }) => (),
            Err(err) => tracing::warn!(%err, "QEMU does not quit, it is killed"),
        }
        match tokio::time::timeout(QUIT_BOUND, self.wait()).await {
            Ok(exit) => Ok(exit),
            Err(_) => self.kill().await,
        }
    }

    /// Kills the process at once and waits until it is gone.
    pub async fn kill(&self) -> Result<Exit> {
        process::kill(self.process)?;
        tokio::time::timeout(KILL_BOUND, self.wait())
            .await
            .map_err(|_| {
                let what = format!("Process {} does not end when killed", self.process.pid);
                Error::new(Code::QemuFailed, what)
            })
    }

    /// Plugs a NIC in while the machine runs. `id` is ours to choose; `nic0` for [`Port::Nic`].
    pub async fn plug_nic(&self, id: &str, port: Port, mac: Mac, tap: OwnedFd) -> Result<()> {
        let socket = Socket {
            bus: port.to_string(),
            addr: None,
        };
        self.plug_card(id, NicModel::Virtio, socket, mac, tap).await
    }

    /// The same for any model, and on any chipset.
    pub async fn plug_card(
        &self,
        id: &str,
        model: NicModel,
        socket: Socket,
        mac: Mac,
        tap: OwnedFd,
    ) -> Result<()> {
        let fdname = format!("tap-{id}");
        let name = GetFd {
            fdname: fdname.clone(),
        };
        self.client.run_with_fd(&name, tap).await?;
        let netdev = NetdevAddTap::new(id, &fdname);
        if let Err(err) = self.client.run(&netdev).await {
            // QEMU may have taken the descriptor or not.
            let _ = self.client.run(&CloseFd { fdname }).await;
            return Err(err.into());
        }
        let mut properties = object(json!({
            "netdev": id,
            "mac": mac.to_string(),
            "romfile": "",
        }));
        if let Some(addr) = socket.addr {
            properties.insert("addr".into(), addr.into());
        }
        let device = DeviceAdd {
            driver: model.as_str().into(),
            id: id.into(),
            bus: Some(socket.bus),
            properties,
        };
        if let Err(err) = self.client.run(&device).await {
            let _ = self.client.run(&NetdevDel { id: id.into() }).await;
            return Err(err.into());
        }
        Ok(())
    }

    /// Takes a NIC out. The guest must agree, which it can only do once it runs.
    pub async fn unplug_nic(&self, id: &str) -> Result<()> {
        let mut events = self.subscribe();
        self.client.run(&DeviceDel { id: id.into() }).await?;
        let gone = async {
            loop {
                match events.recv().await {
                    Ok(VmEvent::DeviceGone { id: gone }) if gone == id => return Ok(()),
                    Ok(VmEvent::Exited(_) | VmEvent::Disconnected)
                    | Err(broadcast::error::RecvError::Closed) => {
                        let what = "The machine ended while a NIC was taken out";
                        return Err(Error::new(Code::GuestStopped, what));
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => (),
                }
            }
        };
        tokio::time::timeout(UNPLUG_BOUND, gone)
            .await
            .map_err(|_| {
                let what = format!("The guest did not give back the NIC {id}");
                Error::new(Code::GuestUnreachable, what)
            })??;
        self.client.run(&NetdevDel { id: id.into() }).await?;
        Ok(())
    }
}

async fn connect(socket: &Path, within: Duration) -> Result<(Client, Events), QmpError> {
    let options = Options {
        greeting: within,
        ..Options::default()
    };
    Client::connect(socket, options).await
}

/// Passes events on, and tells when the process is gone.
async fn watch_over(
    process: ProcessId,
    mut events: Events,
    sender: broadcast::Sender<VmEvent>,
    exited: watch::Sender<Option<Exit>>,
) {
    // Nobody may be listening; that is no fault.
    let tell = |event| drop(sender.send(event));
    while let Some(event) = events.recv().await {
        if let Some(event) = translate(&event) {
            tell(event);
        }
    }
    // The socket ends just before the process does.
    let mut ended = std::pin::pin!(process::wait_exit(process));
    let exit = match tokio::time::timeout(Duration::from_secs(2), &mut ended).await {
        Ok(exit) => exit,
        Err(_) => {
            tell(VmEvent::Disconnected);
            ended.await
        }
    };
    let exit = exit.unwrap_or_else(|err| {
        tracing::error!(%err, "a machine's process can't be watched");
        Exit {
            code: None,
            signal: None,
        }
    });
    tell(VmEvent::Exited(exit));
    let _ = exited.send(Some(exit));
}

fn translate(event: &Event) -> Option<VmEvent> {
    let text = |name: &str| {
        let value = event.data.get(name).and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    };
    let flag = |name: &str| event.data.get(name).and_then(Value::as_bool) == Some(true);
    Some(match event.name.as_str() {
        "SHUTDOWN" => VmEvent::Shutdown {
            guest: flag("guest"),
            reason: text("reason"),
        },
        "RESET" => VmEvent::Reset {
            guest: flag("guest"),
            reason: text("reason"),
        },
        "STOP" => VmEvent::Stopped,
        "RESUME" => VmEvent::Resumed,
        "GUEST_PANICKED" | "GUEST_CRASHLOADED" => VmEvent::Panicked,
        "BLOCK_IO_ERROR" => VmEvent::DiskError {
            no_space: flag("nospace"),
            reason: text("reason"),
        },
        "VSERPORT_CHANGE" => VmEvent::GuestPort {
            port: text("id").trim_start_matches("port-").to_owned(),
            open: flag("open"),
        },
        "DEVICE_DELETED" => match text("device") {
            id if id.is_empty() => return None,
            id => VmEvent::DeviceGone { id },
        },
        _ => return None,
    })
}

/// What QEMU wrote since its log had `before` bytes, at most the last 20 lines.
pub(super) fn said_since(log: &Path, before: u64) -> Vec<String> {
    let now = std::fs::metadata(log).map_or(0, |m| m.len());
    // One byte more: `tail` begins after the first end of a line that it sees.
    let new = match now.checked_sub(before) {
        Some(new) if before > 0 => new + 1,
        _ => now,
    };
    let text = files::tail(log, new.min(8192));
    let lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines[lines.len().saturating_sub(20)..].to_vec()
}

pub(super) fn object(value: Value) -> serde_json::Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => serde_json::Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(name: &str, data: Value) -> Option<VmEvent> {
        translate(&Event {
            name: name.into(),
            data,
            micros: 0,
        })
    }

    #[test]
    fn events_as_qemu_sends_them() {
        assert_eq!(
            event("SHUTDOWN", json!({"guest":true,"reason":"guest-shutdown"})),
            Some(VmEvent::Shutdown {
                guest: true,
                reason: "guest-shutdown".into()
            })
        );
        assert_eq!(
            event("VSERPORT_CHANGE", json!({"id":"port-agent","open":true})),
            Some(VmEvent::GuestPort {
                port: "agent".into(),
                open: true
            })
        );
        assert_eq!(
            event(
                "DEVICE_DELETED",
                json!({"path":"/machine/x/virtio-backend"})
            ),
            None
        );
        assert_eq!(event("RTC_CHANGE", json!({"offset":1})), None);
        // Fields of another type than expected do no harm.
        assert_eq!(
            event("RESET", json!({"guest":"yes","reason":7})),
            Some(VmEvent::Reset {
                guest: false,
                reason: String::new()
            })
        );
    }
}
