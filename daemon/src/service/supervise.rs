//! What the daemon does to instances by itself: a shutdown whose time has come, a start after the host's,
//! another try after a crash. Times and wishes are in the rows, so a daemon that starts again goes on.
//!
//! ```text
//!   stop --time N ─▶ row.shutdown_at ─▶ users are told ─▶ stop       (cancel, start and suspend take it back)
//!   host started  ─▶ autostart `always`, or `last` and it ran ─▶ start
//!   host goes down ─▶ what runs is suspended, and starts again as above
//!   VM crashed    ─▶ on-crash `restart`, and not too often     ─▶ start
//! ```

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::SignedDuration;
use pileus_api::{Autostart, Event, InstanceState, OnCrash, StartRequest, StopRequest, Timestamp};
use pileus_base::{Code, Error, Reporter, Result};
use tokio::sync::broadcast::error::RecvError;
use uuid::Uuid;

use super::Service;
use super::registry::Instance;
use crate::state;

/// A shutdown may be this far away.
const MOST_MINUTES: u64 = 60 * 24 * 30;
const TICK: Duration = Duration::from_secs(1);
/// An instance that crashes more often than this stays as it is.
const MOST_RESTARTS: usize = 3;
/// What the service's unit grants (TimeoutStopSec), and something less.
const HOST_END_BOUND: Duration = Duration::from_secs(270);
const RESTARTS_WITHIN: Duration = Duration::from_secs(600);

/// When a stop is to happen, if not now.
pub(super) fn delay(request: &StopRequest) -> Result<Option<SignedDuration>> {
    let minutes = request.delay_minutes.filter(|minutes| *minutes > 0);
    let refuse = |what: &str| Err(Error::new(Code::InvalidArgument, what));
    if request.cancel && minutes.is_some() {
        return refuse("Cannot set 'time' and 'cancel' options at the same time");
    }
    if request.force && (request.cancel || minutes.is_some()) {
        return refuse("Cannot set 'force' along with 'time' or 'cancel' options at the same time");
    }
    match minutes {
        Some(minutes) if minutes > MOST_MINUTES => refuse("A shutdown is 30 days away at most"),
        Some(minutes) => Ok(Some(SignedDuration::from_mins(minutes.cast_signed()))),
        None => Ok(None),
    }
}

/// Whether users are told, with so many minutes to go: every five, and each of the last five.
fn is_told_at(minutes: i64) -> bool {
    minutes > 0 && (minutes <= 5 || minutes % 5 == 0)
}

impl Service {
    /// Sets the time of a shutdown; one that was set before is replaced.
    pub(super) async fn shut_down_later(
        &self,
        instance: &Arc<Instance>,
        delay: SignedDuration,
    ) -> Result<()> {
        let state = instance.machine()?.snapshot().state;
        if matches!(state, InstanceState::Stopped | InstanceState::Suspended) {
            // As a stop of a stopped instance: it is so already.
            return match state {
                InstanceState::Stopped => Ok(()),
                _ => Err(Error::new(
                    Code::WrongState,
                    format!(
                        "Cannot shut down suspended instance {}.",
                        instance.row().name
                    ),
                )),
            };
        }
        let at = (self.parts.clock)() + delay;
        instance.change(|row| row.shutdown_at = Some(at)).await?;
        self.tell_users(instance, delay.as_mins()).await;
        Ok(())
    }

    pub(super) async fn cancel_shutdown(&self, instance: &Arc<Instance>) -> Result<()> {
        if instance.row().shutdown_at.is_none() {
            return Ok(());
        }
        instance.change(|row| row.shutdown_at = None).await?;
        if let Ok(guest) = instance.machine()?.guest() {
            let _ = guest.wall("The system shutdown has been cancelled").await;
        }
        Ok(())
    }

    /// Best effort: nobody may be logged in, or the guest may be busy.
    async fn tell_users(&self, instance: &Arc<Instance>, minutes: i64) {
        let Ok(guest) = instance.machine().and_then(|machine| machine.guest()) else {
            return;
        };
        let plural = if minutes == 1 { "" } else { "s" };
        let text = format!(
            "The system is going down for poweroff in {minutes} minute{plural}, use 'pileus stop --cancel {}' \
             to cancel the shutdown.",
            instance.row().name
        );
        tokio::spawn(async move {
            let _ = guest.wall(&text).await;
        });
    }

    /// Runs as long as the daemon, from the moment that all instances are taken up again.
    pub async fn supervise(&self) {
        let mut events = self.parts.hub.subscribe();
        if let Err(err) = self.after_host_start().await {
            tracing::error!(%err, "instances can't be started after the host's start");
        }
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut told = HashMap::new();
        let mut crashes = Crashes::default();
        self.after_crashes(&mut crashes).await;
        loop {
            tokio::select! {
                _ = tick.tick() => self.shutdowns(&mut told).await,
                event = events.recv() => match event {
                    Ok(Event::Instance { id, state: InstanceState::Stopped, .. }) => {
                        if let Some(instance) = self.parts.registry.by_id(id) {
                            self.after_crash(&instance, &mut crashes).await;
                        }
                    }
                    // Which ones were missed is not known.
                    Err(RecvError::Lagged(_)) => self.after_crashes(&mut crashes).await,
                    Ok(_) => {}
                    Err(RecvError::Closed) => return,
                },
            }
        }
    }

    async fn after_crashes(&self, crashes: &mut Crashes) {
        for instance in self.parts.registry.all() {
            self.after_crash(&instance, crashes).await;
        }
    }

    /// Shuts down what is due; `told` keeps what users were told last.
    async fn shutdowns(&self, told: &mut HashMap<Uuid, i64>) {
        let now = (self.parts.clock)();
        told.retain(|id, _| self.parts.registry.by_id(*id).is_some());
        for instance in self.parts.registry.all() {
            let row = instance.row();
            let Some(at) = row.shutdown_at else {
                told.remove(&row.id);
                continue;
            };
            if at <= now {
                self.shut_down_now(&instance).await;
                continue;
            }
            let minutes = minutes_left(now, at);
            // The first word was said when it was asked for.
            let before = told.insert(row.id, minutes).unwrap_or(minutes);
            if before != minutes && is_told_at(minutes) {
                self.tell_users(&instance, minutes).await;
            }
        }
    }

    async fn shut_down_now(&self, instance: &Arc<Instance>) {
        let name = instance.row().name.to_string();
        tracing::info!(instance = name, "its time has come: it is shut down");
        // Once: if the guest does not listen, the user decides what comes next.
        if let Err(err) = instance.change(|row| row.shutdown_at = None).await {
            tracing::error!(instance = name, %err, "its shutdown can't be noted");
            return;
        }
        if let Err(err) = self.stop(&name, &StopRequest::default()).await {
            tracing::warn!(instance = name, %err, "it can't be shut down");
        }
    }

    /// The host has started since a daemon ran last: what should run is started.
    async fn after_host_start(&self) -> Result<()> {
        let rebooted = self.host_was_restarted().await?;
        for instance in self.parts.registry.all() {
            let row = instance.row();
            let wanted = match row.spec.autostart {
                Autostart::Last => row.history.cut_off,
                Autostart::Always => rebooted || row.history.cut_off,
                Autostart::Never => false,
            };
            if wanted && !row.deleted && row.process.is_none() {
                tracing::info!(instance = %row.name, "is started: the host has started again");
                let name = row.name.to_string();
                if let Err(err) = self.start(&name, &StartRequest::default()).await {
                    tracing::error!(instance = name, %err, "can't be started");
                }
            }
        }
        // Only now: a daemon that ends before this begins again.
        let (key, now) = (state::settings::BOOT_ID, boot_id());
        self.parts
            .state
            .run(move |tx| state::settings::set(tx, key, &now))
            .await
    }

    /// The host goes down: what runs is written to disk, and goes on when the host is back.
    pub async fn suspend_all(&self) {
        let all = self.parts.registry.all().into_iter();
        let running = all.filter(|i| i.row().process.is_some() && i.row().lease.is_none());
        let work = running.map(|instance| async move {
            let name = instance.row().name;
            let silent = Reporter::silent();
            let suspended = async {
                let _turn = instance.turn_by_force(&silent).await?;
                // First, so that one whose suspend breaks off is booted again.
                instance.change(|row| row.history.cut_off = true).await?;
                instance.machine()?.suspend(silent.clone()).await
            };
            match suspended.await {
                Ok(()) => tracing::info!(instance = %name, "is suspended: the host goes down"),
                Err(err) => tracing::error!(instance = %name, %err, "can't be suspended"),
            }
        });
        let done = futures_util::future::join_all(work);
        if tokio::time::timeout(HOST_END_BOUND, done).await.is_err() {
            tracing::error!("not all instances were suspended in time");
        }
    }

    /// Whether the host has started again since a daemon took its instances up.
    pub(crate) async fn host_was_restarted(&self) -> Result<bool> {
        let key = state::settings::BOOT_ID;
        let before = self
            .parts
            .state
            .run(move |tx| state::settings::get(tx, key))
            .await?;
        Ok(before.is_some_and(|before| before != boot_id()))
    }

    async fn after_crash(&self, instance: &Arc<Instance>, crashes: &mut Crashes) {
        let row = instance.row();
        if !row.history.crashed || row.deleted || row.process.is_some() {
            return;
        }
        if row.spec.on_crash != OnCrash::Restart || !crashes.may_restart(row.id, Instant::now()) {
            return;
        }
        tracing::warn!(instance = %row.name, "has crashed and is started again");
        let name = row.name.to_string();
        if let Err(err) = self.start(&name, &StartRequest::default()).await {
            tracing::error!(instance = name, %err, "can't be started again");
        }
    }
}

/// Rounded up: with 61 seconds to go there are two minutes left.
fn minutes_left(now: Timestamp, at: Timestamp) -> i64 {
    let seconds = at.duration_since(now).as_secs();
    seconds.max(0).saturating_add(59) / 60
}

/// When each instance was started again after a crash.
#[derive(Default)]
struct Crashes(HashMap<Uuid, Vec<Instant>>);

impl Crashes {
    fn may_restart(&mut self, id: Uuid, now: Instant) -> bool {
        let times = self.0.entry(id).or_default();
        times.retain(|at| now.duration_since(*at) < RESTARTS_WITHIN);
        if times.len() >= MOST_RESTARTS {
            return false;
        }
        times.push(now);
        true
    }
}

/// Another one after each start of the host.
fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stop_is_now_or_later_or_cancelled() {
        let request = |force, cancel, delay_minutes| StopRequest {
            force,
            cancel,
            delay_minutes,
            timeout: None,
        };
        for (request, expected) in [
            (request(false, false, None), Ok(None)),
            (request(false, false, Some(0)), Ok(None)),
            (request(false, false, Some(2)), Ok(Some(120))),
            (request(false, true, None), Ok(None)),
            (request(true, false, None), Ok(None)),
            (request(true, false, Some(1)), Err("force")),
            (request(true, true, None), Err("force")),
            (request(false, true, Some(1)), Err("time")),
            (request(false, false, Some(u64::MAX)), Err("30 days")),
        ] {
            match (delay(&request), expected) {
                (Ok(delay), Ok(seconds)) => assert_eq!(delay.map(|d| d.as_secs()), seconds),
                (Err(err), Err(word)) => assert!(err.message.contains(word), "{err}"),
                (got, _) => panic!("{request:?}: {got:?}"),
            }
        }
    }

    #[test]
    fn users_are_told_every_five_minutes_and_each_of_the_last() {
        let told: Vec<_> = (0..=16).filter(|m| is_told_at(*m)).collect();
        assert_eq!(told, [1, 2, 3, 4, 5, 10, 15]);
        let now = Timestamp::UNIX_EPOCH;
        let in_seconds = |s| minutes_left(now, now + SignedDuration::from_secs(s));
        assert_eq!([-5, 0, 1, 60, 61, 120].map(in_seconds), [0, 0, 1, 1, 2, 2]);
    }

    #[test]
    fn crashes_are_not_endless() {
        let mut crashes = Crashes::default();
        let (id, now) = (Uuid::nil(), Instant::now());
        let later = |seconds| now + Duration::from_secs(seconds);
        assert!((0..3).all(|n| crashes.may_restart(id, later(n))));
        assert!(!crashes.may_restart(id, later(4)));
        assert!(crashes.may_restart(Uuid::max(), later(4)));
        assert!(crashes.may_restart(id, later(700)));
    }
}
