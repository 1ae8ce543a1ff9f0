//! What the VM and its guest tell by themselves, outside of requests: ends, panics, reboots, reports.

use pileus_api::{ErrorBody, InstanceState};
use pileus_base::{Code, Error, Reporter};
use tokio::time::Instant;

use super::BOOT_TIMEOUT;
use super::actor::Actor;
use super::driver::{Driver, GuestEvent, VmEvent};

impl<D: Driver> Actor<D> {
    /// What happens outside of requests.
    pub(super) async fn on_event(&mut self, event: VmEvent) {
        match event {
            VmEvent::Exited { reason } => {
                if let Some(reason) = reason {
                    self.config.snapshot.crashed = true;
                    let error = Error::new(
                        Code::GuestStopped,
                        format!("The VM of '{}' ended unexpectedly: {reason}", self.name()),
                    );
                    self.config.snapshot.last_error = Some(self.with_console(error).into());
                }
                self.end_vm().await;
                self.set_state(self.at_rest()).await;
            }
            VmEvent::Panicked => {
                self.config.snapshot.crashed = true;
                let error = Error::new(
                    Code::GuestStopped,
                    format!("The kernel of '{}' panicked", self.name()),
                );
                self.config.snapshot.last_error = Some(self.with_console(error).into());
                self.set_state(InstanceState::Unknown).await;
            }
            VmEvent::Reset => {
                self.reboot_until = Some(Instant::now() + BOOT_TIMEOUT);
                self.set_state(InstanceState::Restarting).await;
            }
            VmEvent::DiskError { no_space, reason } => {
                self.note_disk_error(no_space, &reason);
                self.save_or_warn().await;
            }
            VmEvent::Shutdown { .. } => {}
            VmEvent::Guest(GuestEvent::Up) => {
                let waiting = matches!(
                    self.config.snapshot.state,
                    InstanceState::Restarting | InstanceState::Unknown
                );
                if waiting {
                    self.reboot_until = None;
                    match self.identify(&Reporter::silent()).await {
                        Ok(()) => self.set_state(InstanceState::Running).await,
                        Err(err) => {
                            self.config.snapshot.last_error = Some(err.into());
                            self.set_state(InstanceState::Unknown).await;
                        }
                    }
                }
            }
            VmEvent::Guest(event) => {
                if self.note_guest(event) {
                    self.save_or_warn().await;
                }
            }
        }
    }

    pub(super) fn note_disk_error(&mut self, no_space: bool, reason: &str) {
        let name = self.name();
        let error = if no_space {
            self.halted = true;
            Error::new(
                Code::NoSpace,
                format!("The host's disk is full: '{name}' is halted until there is space"),
            )
            .advise("Free some space; the instance then goes on by itself.")
        } else {
            Error::new(
                Code::Io,
                format!("The host could not read or write the disk of '{name}': {reason}"),
            )
        };
        self.config.snapshot.last_error = Some(ErrorBody::from(&error));
    }

    /// Takes in what the guest tells; returns whether the journal should know.
    pub(super) fn note_guest(&mut self, event: GuestEvent) -> bool {
        let snapshot = &mut self.config.snapshot;
        let mut keep = false;
        match event {
            GuestEvent::Up => {}
            GuestEvent::CloudInit(cloud_init) => {
                keep = snapshot.cloud_init.as_ref() != Some(&cloud_init);
                snapshot.cloud_init = Some(cloud_init);
            }
            GuestEvent::Report {
                report,
                addresses,
                other_kernel,
            } => {
                if other_kernel && !snapshot.firmware_boot {
                    snapshot.firmware_boot = true;
                    keep = true;
                }
                snapshot.report = Some(report);
                snapshot.addresses = addresses;
                // Our own network's address comes first; a guest may list others before it.
                if let Some(at) = snapshot
                    .addresses
                    .iter()
                    .position(|a| *a == self.config.address)
                {
                    snapshot.addresses.swap(0, at);
                }
            }
        }
        self.publish.send_replace(self.config.snapshot.clone());
        keep
    }

    pub(super) fn with_console(&self, mut error: Error) -> Error {
        let tail = self.config.driver.console_tail();
        if !tail.is_empty() {
            error = error.detail("The console's last lines:");
            error.details.extend(tail);
        }
        error
    }
}
