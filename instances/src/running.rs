//! A QEMU that runs, and its guest, as what `machine/` owns: it asks both for what happens to the machine, and
//! hears from both what did.
//!
//! Next step: `qemu/vm.rs` (the machine), `guest/handle.rs` (the guest).

use std::time::Duration;

use pileus_base::process::ProcessId;
use pileus_base::{InstanceName, Result, Size};
use tokio::sync::{broadcast, mpsc};

use crate::guest::handle::Guest;
use crate::guest::watch;
use crate::machine::{GuestEvent, Shape, Vm, VmEvent};
use crate::qemu::{self, Growth};

const RESUMED_BOUND: Duration = Duration::from_secs(15);
/// A guest that does not answer grows when it boots.
const CAN_GROW_BOUND: Duration = Duration::from_secs(10);
const GROW_BOUND: Duration = Duration::from_secs(60);

/// A QEMU that runs, and its guest.
pub struct RunningVm {
    pub(crate) vm: qemu::Vm,
    pub(crate) events: broadcast::Receiver<qemu::VmEvent>,
    pub(crate) guest: Guest,
    pub(crate) guest_events: mpsc::Receiver<GuestEvent>,
    /// The end that comes is one that was asked for.
    pub(crate) orderly: bool,
}

impl Vm for RunningVm {
    type Guest = Guest;

    fn process(&self) -> ProcessId {
        self.vm.process()
    }

    fn guest(&self) -> Guest {
        self.guest.clone()
    }

    async fn power_down(&self) -> Result<()> {
        self.vm.powerdown().await
    }

    async fn reboot(&self) -> Result<()> {
        // The agent lets the guest shut its services down; a guest without one is reset.
        if self.guest.reboot().await.is_ok() {
            return Ok(());
        }
        self.vm.reset().await
    }

    async fn resume(&self) -> Result<()> {
        self.vm.resume().await
    }

    async fn reset(&self) -> Result<()> {
        self.vm.reset().await
    }

    async fn resumed(&self, name: &InstanceName) {
        if let Err(err) = self.guest.resumed(RESUMED_BOUND).await {
            tracing::warn!(instance = %name, %err, "the guest was not told that time has passed");
            return;
        }
        let hello = self.guest.agent().hello();
        let other = hello
            .borrow()
            .as_ref()
            .is_some_and(|hello| hello.hostname != name.as_str());
        if other && let Err(err) = self.guest.rename(name, RESUMED_BOUND).await {
            tracing::warn!(instance = %name, %err, "the guest was not told its name");
        }
    }

    async fn grow_disk(&self, size: Size) -> Result<()> {
        self.vm.resize_disk(size.bytes()).await?;
        // Best effort: a file system that does not grow now grows at the next boot.
        if let Err(err) = self.guest.grow(GROW_BOUND).await {
            tracing::info!(%err, "the guest did not grow its file system");
        }
        Ok(())
    }

    async fn grow(&self, want: Shape) -> Result<Shape> {
        let able = self.guest.can_grow(CAN_GROW_BOUND).await?;
        let has = self.vm.grown().await?;
        let mut cpus = has.cpus + has.growth.cpus;
        let most = has.growth.most_cpus.min(able.cpus);
        if cpus < want.cpus.min(most) {
            while cpus < want.cpus.min(most) {
                self.vm.plug_cpu().await?;
                cpus += 1;
            }
            // They are there, whether the guest makes use of them or not.
            if let Err(err) = self.guest.take_cpus(cpus, GROW_BOUND).await {
                tracing::warn!(%err, "the guest did not take its new processors");
            }
        }
        let mut memory = Size(has.memory.bytes() + has.growth.memory.bytes());
        if able.memory && has.growth.room.bytes() > 0 && memory != want.memory {
            let wanted = want.memory.bytes().saturating_sub(has.memory.bytes());
            let more = Size(wanted.min(has.growth.room.bytes())).round_up(Growth::STEP);
            let got = self.vm.set_more_memory(more).await?;
            if got != more {
                // Not later, when nobody expects it any more.
                self.vm.set_more_memory(got).await?;
            }
            memory = Size(has.memory.bytes() + got.bytes());
        }
        // In whole steps it may have a little more than was asked for.
        if memory.round_up(Growth::STEP) == want.memory.round_up(Growth::STEP) {
            memory = want.memory;
        }
        Ok(Shape { cpus, memory })
    }

    async fn kill(&self) {
        if let Err(err) = self.vm.quit().await {
            tracing::error!(%err, "QEMU can't be ended");
        }
    }

    async fn next(&mut self) -> VmEvent {
        loop {
            tokio::select! {
                biased;
                event = self.events.recv() => match event {
                    Ok(event) => if let Some(event) = self.translate(event) {
                        return event;
                    },
                    Err(broadcast::error::RecvError::Lagged(missed)) => {
                        tracing::warn!(missed, "events of QEMU were missed");
                    }
                    Err(broadcast::error::RecvError::Closed) => {
                        let exit = self.vm.wait().await;
                        return VmEvent::Exited { reason: self.reason(exit) };
                    }
                },
                Some(event) = self.guest_events.recv() => {
                    if event == GuestEvent::Up {
                        let guest = self.guest.clone();
                        tokio::spawn(async move { guest.warm_up().await });
                    }
                    return VmEvent::Guest(event);
                }
            }
        }
    }
}

impl RunningVm {
    pub(crate) fn qemu(&self) -> &qemu::Vm {
        &self.vm
    }

    /// What the guest finds.
    pub async fn disk_size(&self) -> Result<Size> {
        self.vm.disk_size().await
    }

    /// Forgets what the guest told so far: a restored one told of the machine that was saved.
    pub fn watched_from_now(mut self) -> Self {
        self.guest_events = watch::watch(self.guest.clone());
        self
    }

    fn translate(&mut self, event: qemu::VmEvent) -> Option<VmEvent> {
        match event {
            qemu::VmEvent::Shutdown { guest, .. } => {
                self.orderly = true;
                Some(VmEvent::Shutdown { by_guest: guest })
            }
            qemu::VmEvent::Reset { .. } => {
                self.guest.was_reset();
                Some(VmEvent::Reset)
            }
            qemu::VmEvent::Panicked => Some(VmEvent::Panicked),
            qemu::VmEvent::DiskError { no_space, reason } => {
                Some(VmEvent::DiskError { no_space, reason })
            }
            qemu::VmEvent::Exited(exit) => Some(VmEvent::Exited {
                reason: self.reason(exit),
            }),
            qemu::VmEvent::Disconnected => {
                tracing::warn!(
                    pid = self.vm.process().pid,
                    "QEMU closed its control socket"
                );
                None
            }
            qemu::VmEvent::Stopped => {
                tracing::debug!("QEMU halted it");
                None
            }
            qemu::VmEvent::Resumed
            | qemu::VmEvent::GuestPort { .. }
            | qemu::VmEvent::DeviceGone { .. } => None,
        }
    }

    /// Why the process ended, unless that was asked for.
    fn reason(&self, exit: qemu::Exit) -> Option<String> {
        if self.orderly || exit.code == Some(0) {
            return None;
        }
        Some(format!("QEMU {exit}"))
    }
}
