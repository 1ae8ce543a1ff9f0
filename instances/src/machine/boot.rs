//! Waiting for a guest, in two phases with a bound each: its first sign of life, and cloud-init's end.
//! Whatever goes wrong is told with the phase and the console's last lines.

use std::time::Duration;

use pileus_api::{CloudInit, CloudInitStatus};
use pileus_base::{Code, Error, Phase, Reporter, Result};
use tokio::time::Instant;

use super::actor::Actor;
use super::driver::{Driver, GuestEvent, TRIM_EVERY, Vm, VmEvent};

impl<D: Driver> Actor<D> {
    /// Waits until the guest is up, cloud-init has ended, and the guest is itself.
    pub(super) async fn finish_boot(&mut self, timeout: Duration, report: &Reporter) -> Result<()> {
        let began = Instant::now();
        report.phase(Phase::Booting);
        // What an earlier boot said doesn't count; an adopted guest tells again.
        self.config.snapshot.cloud_init = None;
        let up = self.wait_for(began + timeout, report, |event, _| match event {
            GuestEvent::Up => Some(()),
            _ => None,
        });
        match up.await {
            Err(Stop::Timeout) if self.config.driver.may_be_silent() => {
                report.warn(format!(
                    "'{}' runs, but gave no sign of life within {} s: commands can't reach it if its \
                     system has no agent of pileus.",
                    self.name(),
                    timeout.as_secs()
                ));
                return Ok(());
            }
            up => up.map_err(|err| self.explain(err, Phase::Booting, timeout))?,
        }
        self.note_phase(Phase::Booting, began);
        self.finish_cloud_init(timeout, report).await?;
        self.identify(report).await
    }

    /// A guest on a copy of another one's disk does not count as running before it is itself.
    pub(super) async fn identify(&mut self, report: &Reporter) -> Result<()> {
        let Some(vm) = &self.vm else { return Ok(()) };
        let driver = self.config.driver.clone();
        report.or_cancelled(driver.identify(vm, report)).await
    }

    /// Waits until cloud-init has ended.
    pub(super) async fn finish_cloud_init(
        &mut self,
        timeout: Duration,
        report: &Reporter,
    ) -> Result<()> {
        let began = Instant::now();
        report.phase(Phase::Initializing);
        let result = self
            .wait_for(began + timeout, report, |_, told| {
                told.filter(|c| c.status != CloudInitStatus::Running)
                    .cloned()
            })
            .await
            .map_err(|err| self.explain(err, Phase::Initializing, timeout))?;
        self.note_phase(Phase::Initializing, began);
        judge(self.name().as_str(), &result, report)
    }

    /// Waits for the event (or the cloud-init status so far) that `wanted` is looking for.
    async fn wait_for<T>(
        &mut self,
        deadline: Instant,
        report: &Reporter,
        wanted: impl Fn(&GuestEvent, Option<&CloudInit>) -> Option<T>,
    ) -> Result<T, Stop> {
        let mut trim = tokio::time::interval(TRIM_EVERY);
        // cloud-init may have ended before its phase began.
        if let Some(found) = wanted(
            &GuestEvent::CloudInit(CloudInit {
                status: CloudInitStatus::Running,
                errors: Vec::new(),
            }),
            self.config.snapshot.cloud_init.as_ref(),
        ) {
            return Ok(found);
        }
        loop {
            let Some(vm) = &mut self.vm else {
                return Err(Stop::Exited(None));
            };
            tokio::select! {
                event = vm.next() => match event {
                    VmEvent::Guest(event) => {
                        self.note_guest(event.clone());
                        if let Some(found) = wanted(&event, self.config.snapshot.cloud_init.as_ref()) {
                            return Ok(found);
                        }
                    }
                    VmEvent::Panicked => return Err(Stop::Panicked),
                    VmEvent::Exited { reason } => return Err(Stop::Exited(reason)),
                    VmEvent::DiskError { no_space, reason } => {
                        self.note_disk_error(no_space, &reason);
                    }
                    // cloud-init's power_state may reboot: the guest comes up again.
                    VmEvent::Shutdown { .. } | VmEvent::Reset => {}
                },
                _ = trim.tick() => {
                    self.config.driver.trim_console();
                    self.try_resume().await;
                }
                () = report.cancelled() => return Err(Stop::Cancelled),
                () = tokio::time::sleep_until(deadline) => return Err(Stop::Timeout),
            }
        }
    }

    fn explain(&self, stop: Stop, phase: Phase, timeout: Duration) -> Error {
        let name = self.name();
        let what = match phase {
            Phase::Booting => "while it booted",
            _ => "while cloud-init ran",
        };
        let error = match stop {
            Stop::Cancelled => {
                return Error::new(Code::Cancelled, "The operation was cancelled");
            }
            Stop::Panicked => Error::new(
                Code::GuestStopped,
                format!("The kernel of '{name}' panicked {what}"),
            ),
            Stop::Exited(None) => Error::new(
                Code::GuestStopped,
                format!("'{name}' shut itself down {what}"),
            ),
            Stop::Exited(Some(reason)) => Error::new(
                Code::GuestStopped,
                format!("The VM of '{name}' ended {what}: {reason}"),
            ),
            Stop::Timeout if phase == Phase::Booting => Error::new(
                Code::BootTimeout,
                format!(
                    "'{name}' gave no sign of life within {} s",
                    timeout.as_secs()
                ),
            ),
            Stop::Timeout => Error::new(
                Code::CloudInitTimeout,
                format!(
                    "cloud-init in '{name}' did not end within {} s",
                    timeout.as_secs()
                ),
            )
            .advise(format!(
                "It goes on in the guest: `pileus exec {name} -- cloud-init status --long` tells. \
                 A longer bound: --timeout."
            )),
        };
        self.with_console(error)
    }
}

enum Stop {
    Cancelled,
    Panicked,
    Exited(Option<String>),
    Timeout,
}

/// Turns what cloud-init said into success, a warning or an error.
fn judge(name: &str, result: &CloudInit, report: &Reporter) -> Result<()> {
    match result.status {
        CloudInitStatus::Running | CloudInitStatus::Done | CloudInitStatus::Absent => Ok(()),
        CloudInitStatus::Degraded => {
            for line in &result.errors {
                report.warn(format!("cloud-init: {line}"));
            }
            Ok(())
        }
        CloudInitStatus::Error => {
            let mut error = Error::new(
                Code::CloudInitFailed,
                format!("cloud-init failed in '{name}', which runs all the same"),
            )
            .advise(format!(
                "`pileus exec {name} -- sudo cat /var/log/cloud-init-output.log` shows more."
            ));
            error.details = result.errors.clone();
            Err(error)
        }
    }
}
