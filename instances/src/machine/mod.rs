//! One task owns an instance: it alone starts, stops and watches its VM; everyone else sends it
//! requests through [`Machine`] and reads its [`Snapshot`].
//!
//! ```text
//!                        start                    guest up, cloud-init ended
//!   creating ─▶ stopped ──────▶ starting ───────────────────────────▶ running ◀──────────┐
//!                ▲  ▲ ▲            │ │ ▲                               │ │ │ │           │
//!                │  │ │ VM ends,   │ │ │ start     suspend             │ │ │ │ restart,  │ guest up
//!                │  │ └─ cancelled ┘ │ └─ suspended ◀─ suspending ◀────┘ │ │ │ guest     │
//!                │  │                │       │ ▲          │  failed or   │ │ │ reboots   │
//!                │  └─ stop --force ─┼───────┘ └ snapshot └─ cancelled ─▶│ │ ▼           │
//!                │                   │           restored with memory    │ │ restarting ─┘
//!                │                   │ not up within the bound           │ │  │
//!                │                   └──────────▶ unknown ◀──────────────┼─┘  │
//!                │                                 │ │    not up again   │    │
//!                │ VM ends                         │ └── guest up ──────▶│    │
//!                ├──────────────── stopping ◀──────┴── stop ─────────────┘    │
//!                └────────────────────────────────────────────────────────────┘ VM ends
//! ```
//!
//! `creating` and `purging` belong to the daemon's launch and delete services: there is no task yet,
//! or no longer. A shutdown with a delay is a time that the daemon keeps; the instance is `running`.
//! What may be asked for in which state is a pure function with a table test (`rules.rs`). Requests are
//! taken one after the other; `stop --force` and `delete --purge` interrupt what is under way.
//!
//! Files: `actor.rs` the task; `boot.rs` waiting for a guest; `suspend.rs` to disk and back; `events.rs`
//! what comes by itself; `rules.rs` what is allowed; `driver.rs` what a hypervisor must do. The next step
//! down is `instances/src/qemu/`.

mod actor;
mod boot;
mod driver;
mod events;
mod rules;
mod suspend;

pub use driver::{
    Driver, Freeze, Frozen, GuestEvent, Journal, Saved, SavedFile, Shape, Vm, VmEvent,
};
pub use rules::{Ask, Decision, decide};

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pileus_api::{CloudInit, ErrorBody, GuestReport, InstanceState, PhaseTime, Timestamp};
use pileus_base::process::ProcessId;
use pileus_base::{Code, Error, Reporter, Result, Size};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

/// How long a guest has to show signs of life, and again to end cloud-init, if nobody says otherwise.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a guest has to shut down.
pub const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(300);

/// What is known of an instance now, and what the journal keeps of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    pub state: InstanceState,
    pub process: Option<ProcessId>,
    pub started_at: Option<Timestamp>,
    /// All addresses that the guest tells, its own on our network first.
    pub addresses: Vec<Ipv4Addr>,
    pub report: Option<GuestReport>,
    pub cloud_init: Option<CloudInit>,
    /// Phases of the last launch or start.
    pub phases: Vec<PhaseTime>,
    pub last_error: Option<ErrorBody>,
    /// The guest has a kernel of its own choice: boot by firmware from now on.
    pub firmware_boot: bool,
    /// The last VM ended although nobody wanted it to.
    pub crashed: bool,
    /// The machine as it was when it was suspended.
    pub suspended: Option<Saved>,
}

impl Snapshot {
    pub fn stopped() -> Self {
        Self {
            state: InstanceState::Stopped,
            process: None,
            started_at: None,
            addresses: Vec::new(),
            report: None,
            cloud_init: None,
            phases: Vec::new(),
            last_error: None,
            firmware_boot: false,
            crashed: false,
            suspended: None,
        }
    }
}

/// What the task needs to begin.
pub struct Config<D: Driver> {
    pub driver: Arc<D>,
    pub journal: Arc<dyn Journal>,
    /// What the journal kept.
    pub snapshot: Snapshot,
    /// Address on our own network, known before the guest tells.
    pub address: Ipv4Addr,
    pub clock: fn() -> Timestamp,
}

pub(crate) enum Request<D: Driver> {
    Start {
        /// A VM that runs already, with a guest that is up: one that was restored.
        vm: Option<D::Vm>,
        timeout: Duration,
        /// Phases that passed before (of a launch), so that all stand in one list.
        before: Vec<PhaseTime>,
        report: Reporter,
        reply: oneshot::Sender<Result<()>>,
    },
    Stop {
        force: bool,
        timeout: Duration,
        report: Reporter,
        reply: oneshot::Sender<Result<()>>,
    },
    Restart {
        timeout: Duration,
        report: Reporter,
        reply: oneshot::Sender<Result<()>>,
    },
    Suspend {
        report: Reporter,
        reply: oneshot::Sender<Result<()>>,
    },
    /// A stopped instance's disk was brought back to an earlier moment, perhaps with this memory.
    Restored {
        saved: Option<Box<Saved>>,
        firmware_boot: bool,
        reply: oneshot::Sender<Result<()>>,
    },
    Freeze {
        freeze: Freeze,
        reply: oneshot::Sender<Result<Frozen>>,
    },
    GrowDisk {
        size: Size,
        reply: oneshot::Sender<Result<()>>,
    },
    Grow {
        want: Shape,
        reply: oneshot::Sender<Result<Shape>>,
    },
}

/// The handle to an instance's task. When the last one is dropped the task ends; the VM does not.
pub struct Machine<D: Driver> {
    driver: Arc<D>,
    requests: mpsc::Sender<Request<D>>,
    snapshot: watch::Receiver<Snapshot>,
    interrupt: Arc<Mutex<CancellationToken>>,
    guest: GuestSlot<D>,
}

/// Where the task puts the handle on the guest while there is one. Commands take it from here and
/// don't queue: a guest can be looked at while it boots or shuts down.
pub(crate) type GuestSlot<D> = Arc<Mutex<Option<<<D as Driver>::Vm as Vm>::Guest>>>;

impl<D: Driver> Clone for Machine<D> {
    fn clone(&self) -> Self {
        Self {
            driver: self.driver.clone(),
            requests: self.requests.clone(),
            snapshot: self.snapshot.clone(),
            interrupt: self.interrupt.clone(),
            guest: self.guest.clone(),
        }
    }
}

impl<D: Driver> Machine<D> {
    /// Starts the task of an instance whose VM does not run.
    pub fn spawn(config: Config<D>) -> Self {
        Self::spawn_task(config, None)
    }

    /// Starts the task of an instance whose VM was found running. If the guest was still booting, the
    /// wait for it goes on.
    pub fn adopt(config: Config<D>, vm: D::Vm) -> Self {
        Self::spawn_task(config, Some(vm))
    }

    fn spawn_task(config: Config<D>, vm: Option<D::Vm>) -> Self {
        let (requests, queue) = mpsc::channel(8);
        let (publish, snapshot) = watch::channel(config.snapshot.clone());
        let interrupt = Arc::new(Mutex::new(CancellationToken::new()));
        let guest = Arc::new(Mutex::new(vm.as_ref().map(Vm::guest)));
        let driver = config.driver.clone();
        let shared = (interrupt.clone(), guest.clone());
        let actor = actor::Actor::new(config, vm, queue, publish, shared);
        tokio::spawn(actor.run());
        Self {
            driver,
            requests,
            snapshot,
            interrupt,
            guest,
        }
    }

    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.borrow().clone()
    }

    /// Tells of every change.
    pub fn watch(&self) -> watch::Receiver<Snapshot> {
        self.snapshot.clone()
    }

    /// Boots the instance and waits until its guest is up and cloud-init has ended.
    pub async fn start(
        &self,
        timeout: Duration,
        before: Vec<PhaseTime>,
        report: Reporter,
    ) -> Result<()> {
        self.ask(|reply| Request::Start {
            vm: None,
            timeout,
            before,
            report,
            reply,
        })
        .await
    }

    /// Takes a VM that was restored for this instance, and waits until cloud-init has ended in it.
    pub async fn start_with(
        &self,
        vm: D::Vm,
        timeout: Duration,
        before: Vec<PhaseTime>,
        report: Reporter,
    ) -> Result<()> {
        self.ask(|reply| Request::Start {
            vm: Some(vm),
            timeout,
            before,
            report,
            reply,
        })
        .await
    }

    /// Shuts the guest down, or cuts its power. The latter interrupts what is under way.
    pub async fn stop(&self, force: bool, timeout: Duration, report: Reporter) -> Result<()> {
        if force {
            self.interrupt();
        }
        self.ask(|reply| Request::Stop {
            force,
            timeout,
            report,
            reply,
        })
        .await
    }

    pub async fn restart(&self, timeout: Duration, report: Reporter) -> Result<()> {
        self.ask(|reply| Request::Restart {
            timeout,
            report,
            reply,
        })
        .await
    }

    /// Breaks off what is under way, as far as that can be broken off.
    pub fn interrupt(&self) {
        lock(&self.interrupt).cancel();
    }

    /// Writes the instance's memory to disk and ends its VM. Nothing to do for one without a VM.
    pub async fn suspend(&self, report: Reporter) -> Result<()> {
        self.ask(|reply| Request::Suspend { report, reply }).await
    }

    /// A stopped instance's disk is another one's now, or an earlier one: how that boots, and the memory that
    /// goes with it. With memory the instance is suspended.
    pub async fn restored(&self, saved: Option<Saved>, firmware_boot: bool) -> Result<()> {
        let saved = saved.map(Box::new);
        self.ask(|reply| Request::Restored {
            saved,
            firmware_boot,
            reply,
        })
        .await
    }

    /// Grows the disk of a running instance; it never shrinks.
    pub async fn grow_disk(&self, size: Size) -> Result<()> {
        self.ask(|reply| Request::GrowDisk { size, reply }).await
    }

    /// Gives a running instance processors and memory, or takes memory back, as far as the guest can. What it
    /// has afterwards.
    pub async fn grow(&self, want: Shape) -> Result<Shape> {
        self.ask(|reply| Request::Grow { want, reply }).await
    }

    /// Freezes the disk of a running instance, and its memory if that is wanted.
    pub async fn freeze(&self, freeze: Freeze) -> Result<Frozen> {
        self.ask(|reply| Request::Freeze { freeze, reply }).await
    }

    /// What reaches the guest, if there is a VM.
    pub fn guest(&self) -> Result<<D::Vm as Vm>::Guest> {
        let state = self.snapshot.borrow().state;
        let guest = lock(&self.guest).clone();
        match guest {
            Some(guest) if decide(state, Ask::Guest) == Decision::Do => Ok(guest),
            // Between two states there may be no VM although there will be one.
            _ => Err(rules::refusal(&self.driver.name(), state, Ask::Guest)),
        }
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T>>) -> Request<D>,
    ) -> Result<T> {
        let gone = || Error::new(Code::Internal, "The instance's task has ended");
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(request(reply))
            .await
            .map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// Plain values: as good as ever after a panic elsewhere.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
