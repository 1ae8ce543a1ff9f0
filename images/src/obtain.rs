//! One piece of work an item, however many callers want it: each caller sees its progress, one that
//! leaves harms nobody, the last one that leaves ends it, and a failure is not remembered.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pileus_base::{Code, Error, Phase, Reporter, Result, Update};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::packed::Rule;

type Outcome<T> = Option<Result<T, Arc<Error>>>;

/// The work under way, by key.
#[derive(Debug)]
pub(crate) struct Flights<T> {
    flights: Mutex<HashMap<String, Arc<Flight<T>>>>,
}

#[derive(Debug)]
struct Flight<T> {
    passengers: Mutex<Passengers>,
    cancel: CancellationToken,
    outcome: watch::Sender<Outcome<T>>,
}

/// Who is told of the progress, and what a latecomer has missed.
#[derive(Debug, Default)]
struct Passengers {
    next: u64,
    reporters: HashMap<u64, Reporter>,
    phase: Option<Phase>,
    progress: Option<(u64, Option<u64>)>,
}

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self {
            flights: Mutex::default(),
        }
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// Joins the work on `key`, or begins it with `start`.
    pub async fn join<F>(
        self: &Arc<Self>,
        key: &str,
        report: &Reporter,
        start: impl FnOnce(Reporter) -> F,
    ) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        report.check()?;
        let (ticket, begin) = self.board(key, report);
        if begin {
            self.launch(key.to_owned(), &ticket.flight, start);
        }
        let mut outcome = ticket.flight.outcome.subscribe();
        let ended = async {
            match outcome.wait_for(Option::is_some).await.map(|o| o.clone()) {
                Ok(Some(Ok(value))) => Ok(value),
                Ok(Some(Err(err))) => Err(copy_of(&err)),
                _ => Err(Error::internal("Work on an image ended without a result")),
            }
        };
        tokio::pin!(ended);
        tokio::select! {
            done = &mut ended => done,
            () = report.cancelled() => {
                // The last one waits until everything is cleaned up.
                if ticket.leave() {
                    let _ = ended.await;
                }
                Err(Error::new(Code::Cancelled, "The operation was cancelled"))
            }
        }
    }

    fn board(&self, key: &str, report: &Reporter) -> (Ticket<T>, bool) {
        let mut flights = lock(&self.flights);
        // One that is being cancelled is not for us.
        let open = flights
            .get(key)
            .filter(|flight| !flight.cancel.is_cancelled())
            .cloned();
        let begin = open.is_none();
        let flight = open.unwrap_or_else(|| {
            let flight = Arc::new(Flight {
                passengers: Mutex::default(),
                cancel: CancellationToken::new(),
                outcome: watch::Sender::new(None),
            });
            flights.insert(key.to_owned(), flight.clone());
            flight
        });
        let mut passengers = lock(&flight.passengers);
        let id = passengers.next;
        passengers.next += 1;
        passengers.reporters.insert(id, report.clone());
        if let Some(phase) = passengers.phase {
            report.phase(phase);
        }
        if let Some((done, total)) = passengers.progress {
            report.progress(done, total);
        }
        drop(passengers);
        (Ticket { flight, id }, begin)
    }

    fn launch<F>(
        self: &Arc<Self>,
        key: String,
        flight: &Arc<Flight<T>>,
        start: impl FnOnce(Reporter) -> F,
    ) where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let weak = Arc::downgrade(flight);
        let sink = move |update| {
            if let Some(flight) = weak.upgrade() {
                lock(&flight.passengers).tell(&update);
            }
        };
        let work = tokio::spawn(start(Reporter::new(sink, flight.cancel.clone())));
        let (flights, flight) = (self.clone(), flight.clone());
        tokio::spawn(async move {
            let done = work.await.unwrap_or_else(|err| {
                Err(Error::internal(format!("Work on an image panicked: {err}")))
            });
            let mut map = lock(&flights.flights);
            if map.get(&key).is_some_and(|now| Arc::ptr_eq(now, &flight)) {
                map.remove(&key);
            }
            drop(map);
            flight.outcome.send_replace(Some(done.map_err(Arc::new)));
        });
    }
}

impl Passengers {
    fn tell(&mut self, update: &Update) {
        match update {
            Update::Phase(phase) => {
                self.phase = Some(*phase);
                self.progress = None;
            }
            Update::Progress { done, total } => self.progress = Some((*done, *total)),
            _ => {}
        }
        for reporter in self.reporters.values() {
            match update {
                Update::Phase(phase) => reporter.phase(*phase),
                Update::Progress { done, total } => reporter.progress(*done, *total),
                Update::Took(phase, time) => reporter.took(*phase, *time),
                Update::Result(name) => reporter.result(name),
                Update::Log(line) => reporter.log(line),
                Update::Warning(line) => reporter.warn(line),
            }
        }
    }
}

/// A caller's place. Dropped, also with its future, it is given up.
struct Ticket<T> {
    flight: Arc<Flight<T>>,
    id: u64,
}

impl<T> Ticket<T> {
    /// Gives up the place; true if it was the last one and the work is now cancelled.
    fn leave(&self) -> bool {
        let mut passengers = lock(&self.flight.passengers);
        let was_there = passengers.reporters.remove(&self.id).is_some();
        let last = was_there && passengers.reporters.is_empty();
        if last {
            self.flight.cancel.cancel();
        }
        last
    }
}

impl<T> Drop for Ticket<T> {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The maps are whole between two statements, so a panic elsewhere doesn't spoil them.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The same error for one more caller.
fn copy_of(err: &Arc<Error>) -> Error {
    let mut copy = Error::new(err.code, err.message.clone());
    copy.advice.clone_from(&err.advice);
    copy.details.clone_from(&err.details);
    if let Some(rule) = Rule::of(err) {
        // Those who ask for it look for it by its type.
        copy = copy.with_source(rule);
    } else if err.source.is_some() {
        copy = copy.with_source(SharedCause(err.clone()));
    }
    copy
}

/// The cause of an error that several callers got.
#[derive(Debug)]
struct SharedCause(Arc<Error>);

impl fmt::Display for SharedCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.source {
            Some(source) => source.fmt(f),
            None => Ok(()),
        }
    }
}

impl std::error::Error for SharedCause {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref()?.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    fn flights() -> Arc<Flights<u32>> {
        Arc::default()
    }

    #[tokio::test]
    async fn one_piece_of_work_for_many_and_progress_for_each() {
        let flights = flights();
        let starts = Arc::new(AtomicUsize::new(0));
        let phases = Arc::new(AtomicUsize::new(0));
        let caller = || {
            let phases = phases.clone();
            let report = Reporter::new(
                move |update| {
                    if update == Update::Phase(Phase::BuildingImage) {
                        phases.fetch_add(1, Ordering::SeqCst);
                    }
                },
                CancellationToken::new(),
            );
            let (flights, starts) = (flights.clone(), starts.clone());
            tokio::spawn(async move {
                flights
                    .join("k", &report, |report| {
                        starts.fetch_add(1, Ordering::SeqCst);
                        async move {
                            report.phase(Phase::BuildingImage);
                            tokio::time::sleep(Duration::from_millis(50)).await;
                            Ok(7)
                        }
                    })
                    .await
            })
        };
        let all: Vec<_> = (0..5).map(|_| caller()).collect();
        for one in all {
            assert_eq!(one.await.unwrap().unwrap(), 7);
        }
        assert_eq!(starts.load(Ordering::SeqCst), 1);
        assert_eq!(phases.load(Ordering::SeqCst), 5);
    }

    #[tokio::test]
    async fn one_that_leaves_harms_nobody_and_the_last_ends_it() {
        let flights = flights();
        let (ended, mut is_ended) = watch::channel(false);
        let start = |flights: &Arc<Flights<u32>>, report: Reporter| {
            let (flights, ended) = (flights.clone(), ended.clone());
            tokio::spawn(async move {
                flights
                    .join("k", &report, |report| async move {
                        report.cancelled().await;
                        tokio::time::sleep(Duration::from_millis(30)).await;
                        ended.send_replace(true);
                        Err(Error::new(Code::Cancelled, "cancelled"))
                    })
                    .await
            })
        };
        let (first, second) = (CancellationToken::new(), CancellationToken::new());
        let a = start(&flights, Reporter::new(|_| (), first.clone()));
        let b = start(&flights, Reporter::new(|_| (), second.clone()));
        tokio::time::sleep(Duration::from_millis(20)).await;
        first.cancel();
        assert_eq!(a.await.unwrap().unwrap_err().code, Code::Cancelled);
        assert!(!*is_ended.borrow_and_update());
        second.cancel();
        assert_eq!(b.await.unwrap().unwrap_err().code, Code::Cancelled);
        // The last one came back only when the work had ended.
        assert!(*is_ended.borrow_and_update());
    }

    #[tokio::test]
    async fn a_failure_is_given_to_all_and_not_remembered() {
        let flights = flights();
        let report = Reporter::silent();
        let fail = |_| async {
            Err(Error::new(Code::BadImage, "no").with_source(std::io::Error::other("why")))
        };
        let err = flights.join("k", &report, fail).await.unwrap_err();
        assert_eq!(err.code, Code::BadImage);
        assert_eq!(err.source.unwrap().to_string(), "why");
        let again = flights.join("k", &report, |_| async { Ok(1) }).await;
        assert_eq!(again.unwrap(), 1);
    }

    #[tokio::test]
    async fn every_caller_learns_which_rule_was_broken() {
        let flights = flights();
        let report = Reporter::silent();
        let refuse = |_| async { Err(Rule::Truncated.refuse()) };
        let err = flights.join("k", &report, refuse).await.unwrap_err();
        assert_eq!(Rule::of(&err), Some(Rule::Truncated));
    }

    #[tokio::test]
    async fn a_dropped_future_is_one_that_left() {
        let flights = flights();
        let (begun, mut is_begun) = watch::channel(false);
        let (cancelled, mut is_cancelled) = watch::channel(false);
        let other = flights.clone();
        let task = tokio::spawn(async move {
            let report = Reporter::silent();
            other
                .join("k", &report, |report| async move {
                    begun.send_replace(true);
                    report.cancelled().await;
                    cancelled.send_replace(true);
                    Ok(1)
                })
                .await
        });
        is_begun.wait_for(|begun| *begun).await.unwrap();
        task.abort();
        is_cancelled.wait_for(|done| *done).await.unwrap();
    }
}
