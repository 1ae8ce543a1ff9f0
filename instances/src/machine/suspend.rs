//! To disk and back. At any moment there is a machine or a saved one, never both: the journal learns of
//! what was saved before the VM ends, and forgets it before the processors run again
//! (docs/decisions/0015-life-of-an-instance.md).

use std::time::Duration;

use pileus_api::{ErrorBody, InstanceState};
use pileus_base::{Code, Error, Phase, Reporter, Result};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::actor::{Actor, cut};
use super::driver::{Driver, Saved, Vm};
use super::rules::{Ask, Decision};

impl<D: Driver> Actor<D> {
    /// The state of an instance without a VM.
    pub(super) fn at_rest(&self) -> InstanceState {
        match self.config.snapshot.suspended {
            Some(_) => InstanceState::Suspended,
            None => InstanceState::Stopped,
        }
    }

    pub(super) async fn suspend(
        &mut self,
        report: &Reporter,
        interrupt: &CancellationToken,
    ) -> Result<()> {
        if self.permit(Ask::Suspend)? == Decision::Nothing {
            return Ok(());
        }
        report.phase(Phase::Suspending);
        self.config.snapshot.last_error = None;
        self.set_state(InstanceState::Suspending).await;
        let Err(error) = self.save_machine(report, interrupt).await else {
            self.end_vm().await;
            self.set_state(InstanceState::Suspended).await;
            return Ok(());
        };
        // As if nothing had been; a VM that is gone tells so itself.
        self.config.snapshot.suspended = None;
        let mut after = InstanceState::Running;
        if let Some(vm) = &self.vm
            && let Err(err) = self.config.driver.unsave(vm).await
        {
            tracing::warn!(instance = %self.name(), %err, "it does not go on after a failed suspend");
            after = InstanceState::Unknown;
        }
        if error.code != Code::Cancelled {
            self.config.snapshot.last_error = Some(ErrorBody::from(&error));
        }
        self.set_state(after).await;
        Err(error)
    }

    /// When it returns the machine is saved, and the journal knows.
    async fn save_machine(
        &mut self,
        report: &Reporter,
        interrupt: &CancellationToken,
    ) -> Result<()> {
        let Some(vm) = &self.vm else {
            return Err(self.refusal(Ask::Suspend));
        };
        let saving = report.or_cancelled(self.config.driver.save(vm));
        let saved = match interrupt.run_until_cancelled(saving).await {
            Some(saved) => saved?,
            None => return cut(),
        };
        self.config.snapshot.suspended = Some(saved);
        self.save().await
    }

    pub(super) async fn restored(
        &mut self,
        saved: Option<Saved>,
        firmware_boot: bool,
    ) -> Result<()> {
        let snapshot = &mut self.config.snapshot;
        if snapshot.state != InstanceState::Stopped {
            return Err(Error::internal("A disk was replaced under a machine"));
        }
        snapshot.suspended = saved;
        snapshot.firmware_boot = firmware_boot;
        snapshot.last_error = None;
        self.config.snapshot.state = self.at_rest();
        self.save().await
    }

    /// Goes on where the instance was suspended. Until the journal has forgotten what was saved, whatever
    /// fails leaves a suspended instance.
    pub(super) async fn resume_saved(
        &mut self,
        timeout: Duration,
        report: &Reporter,
    ) -> Result<()> {
        let Some(saved) = self.config.snapshot.suspended.clone() else {
            return Err(Error::internal("A suspended instance has nothing saved"));
        };
        let began = Instant::now();
        report.phase(Phase::Resuming);
        let driver = self.config.driver.clone();
        let vm = report.or_cancelled(driver.start_empty(&saved)).await?;
        self.own(vm);
        let started = began.elapsed();
        if let Some(vm) = &self.vm {
            report.or_cancelled(driver.load(vm, &saved)).await?;
        }
        let loaded = began.elapsed();
        self.config.snapshot.suspended = None;
        if let Err(err) = self.save().await {
            self.config.snapshot.suspended = Some(saved);
            return Err(err);
        }
        driver.forget(&saved);
        let forgotten = began.elapsed();
        self.after_load().await;
        let told = began.elapsed();
        tracing::debug!(
            instance = %self.name(), ?started, ?loaded, ?forgotten, ?told,
            "it goes on where it was saved"
        );
        self.note_phase(Phase::Resuming, began);
        self.finish_boot(timeout, report).await
    }

    /// Lets a loaded machine run, and its guest know. One that runs already is none the worse for it.
    pub(super) async fn after_load(&mut self) {
        let Some(vm) = &self.vm else { return };
        if let Err(err) = vm.resume().await {
            // What follows waits for the guest, and tells that it does not come.
            tracing::warn!(instance = %self.name(), %err, "it does not go on");
        }
        vm.resumed(&self.name()).await;
    }

    /// The memory is given up: what is left is a stopped instance with its disk.
    pub(super) async fn forget_saved(&mut self) {
        let Some(saved) = self.config.snapshot.suspended.take() else {
            return;
        };
        // The row first: a file that it does not name is swept.
        self.save_or_warn().await;
        self.config.driver.forget(&saved);
    }
}
