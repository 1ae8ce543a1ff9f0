//! The task of an instance: takes requests one after the other and reacts to what the VM does.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use pileus_api::{ErrorBody, InstanceState};
use pileus_base::{Code, Error, InstanceName, Phase, Reporter, Result, Size};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::driver::{Driver, Freeze, Frozen, Shape, TRIM_EVERY, Vm, VmEvent};
use super::rules::{Ask, Decision, decide, refusal};
use super::{BOOT_TIMEOUT, Config, GuestSlot, Request, Snapshot, lock};

/// How long a guest has to end its services before it is reset.
const REBOOT_BOUND: Duration = Duration::from_secs(90);
/// A reset needs no guest.
const RESET_BOUND: Duration = Duration::from_secs(10);

pub(super) struct Actor<D: Driver> {
    pub(super) config: Config<D>,
    pub(super) vm: Option<D::Vm>,
    queue: mpsc::Receiver<Request<D>>,
    pub(super) publish: watch::Sender<Snapshot>,
    interrupt: Arc<Mutex<CancellationToken>>,
    guest: GuestSlot<D>,
    /// When a guest that reboots must be up again.
    pub(super) reboot_until: Option<Instant>,
    /// QEMU halted the machine because the host's disk was full.
    pub(super) halted: bool,
    /// This VM was started by firmware: a reset boots what the guest has chosen.
    by_firmware: bool,
}

impl<D: Driver> Actor<D> {
    pub(super) fn new(
        config: Config<D>,
        vm: Option<D::Vm>,
        queue: mpsc::Receiver<Request<D>>,
        publish: watch::Sender<Snapshot>,
        (interrupt, guest): (Arc<Mutex<CancellationToken>>, GuestSlot<D>),
    ) -> Self {
        Self {
            config,
            vm,
            queue,
            publish,
            interrupt,
            guest,
            reboot_until: None,
            halted: false,
            by_firmware: false,
        }
    }

    pub(super) async fn run(mut self) {
        // Boxed: a task that only waits, as most do, then keeps no room for all that it could do.
        if self.vm.is_some() {
            Box::pin(self.after_adoption()).await;
        }
        let mut trim = tokio::time::interval(TRIM_EVERY);
        trim.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let Some(vm) = &mut self.vm else {
                match self.queue.recv().await {
                    Some(request) => Box::pin(self.handle(request)).await,
                    None => return,
                }
                continue;
            };
            let deadline = self.reboot_until;
            tokio::select! {
                biased;
                event = vm.next() => Box::pin(self.on_event(event)).await,
                request = self.queue.recv() => match request {
                    Some(request) => Box::pin(self.handle(request)).await,
                    None => return,
                },
                () = sleep_until(deadline) => {
                    self.reboot_until = None;
                    self.set_state(InstanceState::Unknown).await;
                }
                _ = trim.tick() => {
                    self.config.driver.trim_console();
                    self.try_resume().await;
                }
            }
        }
    }

    /// A machine that was halted because the host's disk was full goes on when there is space again.
    pub(super) async fn try_resume(&mut self) {
        if let Some(vm) = self.vm.as_ref().filter(|_| self.halted)
            && vm.resume().await.is_ok()
        {
            self.halted = false;
        }
    }

    /// The daemon has started again and found the VM: go on where it was left.
    async fn after_adoption(&mut self) {
        // The daemon before may have ended before it noted what it had started.
        let clock = self.config.clock;
        let snapshot = &mut self.config.snapshot;
        snapshot.process = self.vm.as_ref().map(Vm::process);
        snapshot.started_at.get_or_insert_with(clock);
        self.save_or_warn().await;
        match self.config.snapshot.state {
            InstanceState::Suspending => {
                if let Some(vm) = &self.vm
                    && let Err(err) = self.config.driver.unsave(vm).await
                {
                    tracing::error!(instance = %self.name(), %err, "its suspend can't be undone");
                }
                self.set_state(InstanceState::Running).await;
            }
            InstanceState::Starting => {
                self.after_load().await;
                let report = Reporter::silent();
                // Nobody else's: the first request comes after this.
                let interrupt = lock(&self.interrupt).clone();
                let boot = self.finish_boot(BOOT_TIMEOUT, &report);
                let done = interrupt.run_until_cancelled(boot).await;
                let _ = self.conclude_start(done.unwrap_or_else(cut)).await;
            }
            InstanceState::Restarting => {
                self.reboot_until = Some(Instant::now() + BOOT_TIMEOUT);
            }
            // A shutdown that was asked for goes on in the guest, or is asked for again.
            _ => self.set_state(InstanceState::Running).await,
        }
    }

    async fn handle(&mut self, request: Request<D>) {
        let token = CancellationToken::new();
        *lock(&self.interrupt) = token.clone();
        match request {
            Request::Start {
                vm,
                timeout,
                before,
                report,
                reply,
            } => {
                let done = self.start(vm, timeout, before, &report, &token).await;
                let _ = reply.send(done);
            }
            Request::Stop {
                force,
                timeout,
                report,
                reply,
            } => {
                let done = self.stop(force, timeout, &report, &token).await;
                let _ = reply.send(done);
            }
            Request::Restart {
                timeout,
                report,
                reply,
            } => {
                let done = self.restart(timeout, &report, &token).await;
                let _ = reply.send(done);
            }
            Request::Suspend { report, reply } => {
                let done = self.suspend(&report, &token).await;
                let _ = reply.send(done);
            }
            Request::Restored {
                saved,
                firmware_boot,
                reply,
            } => {
                let done = self.restored(saved.map(|s| *s), firmware_boot).await;
                let _ = reply.send(done);
            }
            Request::GrowDisk { size, reply } => {
                let done = self.grow_disk(size).await;
                let _ = reply.send(done);
            }
            Request::Grow { want, reply } => {
                let done = self.grow(want).await;
                let _ = reply.send(done);
            }
            Request::Freeze { freeze, reply } => {
                let done = self.freeze(freeze).await;
                let _ = reply.send(done);
            }
        }
    }

    async fn freeze(&mut self, freeze: Freeze) -> Result<Frozen> {
        self.permit(Ask::Freeze)?;
        match &self.vm {
            Some(vm) => self.config.driver.freeze(vm, freeze).await,
            None => Err(self.refusal(Ask::Freeze)),
        }
    }

    async fn grow_disk(&mut self, size: Size) -> Result<()> {
        self.permit(Ask::Freeze)?;
        match &self.vm {
            Some(vm) => vm.grow_disk(size).await,
            None => Err(self.refusal(Ask::Freeze)),
        }
    }

    async fn grow(&mut self, want: Shape) -> Result<Shape> {
        self.permit(Ask::Freeze)?;
        match &self.vm {
            Some(vm) => vm.grow(want).await,
            None => Err(self.refusal(Ask::Freeze)),
        }
    }

    pub(super) fn name(&self) -> InstanceName {
        self.config.driver.name()
    }

    pub(super) fn refusal(&self, ask: Ask) -> Error {
        refusal(&self.name(), self.config.snapshot.state, ask)
    }

    pub(super) fn permit(&self, ask: Ask) -> Result<Decision> {
        let state = self.config.snapshot.state;
        match decide(state, ask) {
            Decision::Refuse => Err(self.refusal(ask)),
            decision => Ok(decision),
        }
    }

    async fn start(
        &mut self,
        vm: Option<D::Vm>,
        timeout: Duration,
        before: Vec<pileus_api::PhaseTime>,
        report: &Reporter,
        interrupt: &CancellationToken,
    ) -> Result<()> {
        match self.permit(Ask::Start) {
            Ok(Decision::Do) => {}
            decided => {
                // Whoever brings a VM gives it away.
                if let Some(vm) = vm {
                    vm.kill().await;
                }
                return decided.map(drop);
            }
        }
        let restored = vm.is_some();
        let suspended = self.config.snapshot.state == InstanceState::Suspended;
        if let Some(vm) = vm {
            self.own(vm);
        }
        self.config.snapshot.phases = before;
        self.config.snapshot.last_error = None;
        self.config.snapshot.crashed = false;
        self.set_state(InstanceState::Starting).await;
        let report = report.clone();
        let done = match interrupt
            .run_until_cancelled(async {
                if restored {
                    self.save().await?;
                    return self.finish_cloud_init(timeout, &report).await;
                }
                if suspended {
                    return self.resume_saved(timeout, &report).await;
                }
                self.boot(timeout, &report).await
            })
            .await
        {
            Some(done) => done,
            None => Err(Error::new(
                Code::Cancelled,
                format!("'{}' was stopped while it started", self.name()),
            )),
        };
        self.conclude_start(done).await
    }

    async fn boot(&mut self, timeout: Duration, report: &Reporter) -> Result<()> {
        let began = Instant::now();
        report.phase(Phase::Starting);
        let firmware = self.config.snapshot.firmware_boot;
        let vm = report
            .or_cancelled(self.config.driver.start(firmware, report))
            .await?;
        self.by_firmware = firmware;
        self.own(vm);
        self.note_phase(Phase::Starting, began);
        self.save().await?;
        self.finish_boot(timeout, report).await
    }

    pub(super) fn own(&mut self, vm: D::Vm) {
        self.config.snapshot.process = Some(vm.process());
        self.config.snapshot.started_at = Some((self.config.clock)());
        *lock(&self.guest) = Some(vm.guest());
        self.vm = Some(vm);
    }

    /// Brings the instance into the state that the outcome of a start calls for.
    async fn conclude_start(&mut self, done: Result<()>) -> Result<()> {
        let Err(error) = done else {
            self.set_state(InstanceState::Running).await;
            return Ok(());
        };
        match error.code {
            // The guest is there, only its set-up failed or takes longer.
            Code::CloudInitFailed | Code::CloudInitTimeout => {
                self.config.snapshot.last_error = Some(ErrorBody::from(&error));
                self.set_state(InstanceState::Running).await;
            }
            Code::BootTimeout if self.vm.is_some() => {
                self.config.snapshot.last_error = Some(ErrorBody::from(&error));
                self.set_state(InstanceState::Unknown).await;
            }
            _ => {
                self.end_vm().await;
                if error.code != Code::Cancelled {
                    self.config.snapshot.last_error = Some(ErrorBody::from(&error));
                }
                self.set_state(self.at_rest()).await;
            }
        }
        Err(error)
    }

    async fn stop(
        &mut self,
        force: bool,
        timeout: Duration,
        report: &Reporter,
        interrupt: &CancellationToken,
    ) -> Result<()> {
        let ask = if force { Ask::ForceStop } else { Ask::Stop };
        if self.permit(ask)? == Decision::Nothing {
            return Ok(());
        }
        report.phase(Phase::Stopping);
        if force {
            self.end_vm().await;
            self.forget_saved().await;
            self.set_state(InstanceState::Stopped).await;
            return Ok(());
        }
        let before = self.config.snapshot.state;
        self.set_state(InstanceState::Stopping).await;
        let waited = {
            let wait = self.shut_down(timeout);
            tokio::select! {
                done = wait => done,
                () = interrupt.cancelled() => cut(),
                () = report.cancelled() => Err(Error::new(
                    Code::Cancelled,
                    "The wait for the shutdown was cancelled; the guest may still shut down",
                )),
            }
        };
        match waited {
            Ok(()) => {
                self.end_vm().await;
                self.set_state(InstanceState::Stopped).await;
                Ok(())
            }
            Err(error) => {
                self.set_state(before).await;
                Err(error)
            }
        }
    }

    /// Asks the guest to shut down and waits until the VM is gone.
    async fn shut_down(&mut self, timeout: Duration) -> Result<()> {
        let name = self.name();
        let deadline = Instant::now() + timeout;
        let Some(vm) = &mut self.vm else {
            return Ok(());
        };
        vm.power_down().await?;
        // A guest that is still booting misses the button: press it again from time to time.
        let mut again = tokio::time::interval_at(
            Instant::now() + Duration::from_secs(15),
            Duration::from_secs(15),
        );
        loop {
            tokio::select! {
                event = vm.next() => if let VmEvent::Exited { .. } = event {
                    return Ok(());
                },
                _ = again.tick() => { let _ = vm.power_down().await; }
                () = tokio::time::sleep_until(deadline) => {
                    return Err(Error::new(
                        Code::ShutdownTimeout,
                        format!("'{name}' did not shut down within {} s", timeout.as_secs()),
                    )
                    .advise(format!("Use `pileus stop --force {name}` to cut its power.")));
                }
            }
        }
    }

    async fn restart(
        &mut self,
        timeout: Duration,
        report: &Reporter,
        interrupt: &CancellationToken,
    ) -> Result<()> {
        self.permit(Ask::Restart)?;
        self.config.snapshot.phases.clear();
        self.config.snapshot.last_error = None;
        self.set_state(InstanceState::Restarting).await;
        let report = report.clone();
        let reboot = async {
            report.phase(Phase::Stopping);
            if self.config.snapshot.firmware_boot && !self.by_firmware {
                // A reset would boot the old kernel again, which this VM was given at its start.
                self.shut_down(timeout).await?;
                self.end_vm().await;
                return self.boot(timeout, &report).await;
            }
            self.reboot_guest(timeout).await?;
            self.finish_boot(timeout, &report).await
        };
        let done = match interrupt.run_until_cancelled(reboot).await {
            Some(done) => done,
            None => cut(),
        };
        match done {
            // Nobody wants to wait, but a reboot is no reason to cut the power.
            Err(error) if error.code == Code::Cancelled && self.vm.is_some() => {
                self.reboot_until = Some(Instant::now() + BOOT_TIMEOUT);
                Err(error)
            }
            done => self.conclude_start(done).await,
        }
    }

    /// Asks for a reboot and waits for the reset; a guest that doesn't listen is reset by force.
    async fn reboot_guest(&mut self, timeout: Duration) -> Result<()> {
        let began = Instant::now();
        let mut deadline = began + timeout.min(REBOOT_BOUND);
        let mut forced = false;
        let name = self.name();
        let gone = || {
            Error::new(
                Code::GuestStopped,
                format!("'{name}' ended while it restarted"),
            )
        };
        let Some(vm) = &mut self.vm else {
            return Err(gone());
        };
        vm.reboot().await?;
        loop {
            tokio::select! {
                event = vm.next() => match event {
                    VmEvent::Reset => break,
                    VmEvent::Exited { .. } => return Err(gone()),
                    _ => {}
                },
                // It hangs: then it is not asked any more.
                () = tokio::time::sleep_until(deadline) => {
                    if forced {
                        return Err(Error::new(Code::ShutdownTimeout, format!("'{name}' did not reboot")));
                    }
                    forced = true;
                    deadline = Instant::now() + RESET_BOUND;
                    vm.reset().await?;
                }
            }
        }
        self.note_phase(Phase::Stopping, began);
        Ok(())
    }

    /// Ends the VM if there is one and gives back what it used.
    pub(super) async fn end_vm(&mut self) {
        *lock(&self.guest) = None;
        if let Some(vm) = self.vm.take() {
            vm.kill().await;
        }
        self.config.driver.release().await;
        self.reboot_until = None;
        self.halted = false;
        let snapshot = &mut self.config.snapshot;
        snapshot.process = None;
        snapshot.started_at = None;
        snapshot.report = None;
        snapshot.addresses.clear();
    }

    pub(super) fn note_phase(&mut self, phase: Phase, began: Instant) {
        self.config
            .snapshot
            .phases
            .push(pileus_api::PhaseTime::new(phase, began.elapsed()));
    }

    pub(super) async fn set_state(&mut self, state: InstanceState) {
        self.config.snapshot.state = state;
        let snapshot = &mut self.config.snapshot;
        // A guest that reports tells its addresses itself; for one without an agent we know one.
        if state == InstanceState::Running && snapshot.report.is_none() {
            snapshot.addresses = vec![self.config.address];
        }
        self.save_or_warn().await;
    }

    pub(super) async fn save_or_warn(&mut self) {
        if let Err(err) = self.save().await {
            tracing::error!(instance = %self.name(), %err, "the state can't be saved");
        }
    }

    pub(super) async fn save(&mut self) -> Result<()> {
        let saved = self.config.journal.save(&self.config.snapshot).await;
        self.publish.send_replace(self.config.snapshot.clone());
        saved
    }
}

/// What was under way ends, because somebody could not wait.
pub(super) fn cut<T>() -> Result<T> {
    Err(Error::new(Code::Cancelled, "The power was cut"))
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
