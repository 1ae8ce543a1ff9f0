//! Operations: long work with a name, a stream of events, an end that can be awaited, and a way to
//! cancel. The record is committed before the work begins and again when it ends (`state/operations.rs`),
//! so that a daemon that was killed knows what it left half-way.
//!
//! States are drawn in `api/src/operations.rs`. The work itself is in `service/`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pileus_api::{
    Event, Operation, OperationEvent, OperationKind, OperationState, PhaseTime, Progress,
};
use pileus_base::{Code, Error, Reporter, Result, Update};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::hub::Hub;
use crate::state::{self, State};

/// Progress within a phase is told at most this often.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);
/// Events that a slow reader may be behind before it misses some.
const BACKLOG: usize = 256;

#[derive(Clone)]
pub struct Operations {
    inner: Arc<Inner>,
}

struct Inner {
    state: State,
    hub: Hub,
    running: Mutex<HashMap<Uuid, Arc<Entry>>>,
}

/// An operation under way.
struct Entry {
    operation: Mutex<Operation>,
    phase_began: Mutex<(Instant, Instant)>,
    events: broadcast::Sender<OperationEvent>,
    over: watch::Sender<bool>,
    cancel: CancellationToken,
}

/// A reader of an operation's events: where it stands now, and what comes.
pub struct Follow {
    pub operation: Operation,
    /// Nothing if the operation was over already.
    pub events: Option<broadcast::Receiver<OperationEvent>>,
}

impl Operations {
    pub fn new(state: State, hub: Hub) -> Self {
        Self {
            inner: Arc::new(Inner {
                state,
                hub,
                running: Mutex::default(),
            }),
        }
    }

    /// Begins an operation; `work` runs on its own and outlives the caller.
    pub async fn begin<F>(
        &self,
        kind: OperationKind,
        target: impl Into<String>,
        work: impl FnOnce(Reporter) -> F,
    ) -> Result<Operation>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let operation = Operation {
            id: Uuid::new_v4(),
            kind,
            target: target.into(),
            state: OperationState::Running,
            phase: None,
            progress: None,
            phases: Vec::new(),
            warnings: Vec::new(),
            result: None,
            error: None,
            created_at: state::now(),
            ended_at: None,
        };
        let mut gone = CallerGone(self.clone(), Some(operation.clone()));
        let recorded = self.record(operation.clone()).await;
        gone.1 = None;
        recorded?;
        let now = Instant::now();
        let entry = Arc::new(Entry {
            operation: Mutex::new(operation.clone()),
            phase_began: Mutex::new((now, now)),
            events: broadcast::channel(BACKLOG).0,
            over: watch::channel(false).0,
            cancel: CancellationToken::new(),
        });
        lock(&self.inner.running).insert(operation.id, entry.clone());
        self.inner.hub.send(Event::Operation {
            operation: Box::new(operation.clone()),
        });
        let reporter = Reporter::new(
            {
                let entry = entry.clone();
                move |update| entry.update(update)
            },
            entry.cancel.clone(),
        );
        let work = work(reporter);
        let this = self.clone();
        tokio::spawn(async move {
            // A panic in the work must end its operation, not hang those who wait for it.
            let done = match tokio::spawn(work).await {
                Ok(done) => done,
                Err(err) => Err(Error::internal(format!("The work broke off: {err}"))),
            };
            this.end(&entry, done).await;
        });
        Ok(operation)
    }

    async fn end(&self, entry: &Entry, done: Result<()>) {
        entry.close_phase();
        let operation = {
            let mut operation = lock(&entry.operation);
            operation.ended_at = Some(state::now());
            operation.progress = None;
            operation.state = match &done {
                Ok(()) => OperationState::Succeeded,
                Err(err) if err.code == Code::Cancelled => OperationState::Cancelled,
                Err(_) => OperationState::Failed,
            };
            if let Err(err) = &done {
                tracing::info!(
                    operation = %operation.id, kind = operation.kind.as_str(), target = operation.target,
                    code = %err.code, %err, "failed"
                );
            }
            operation.error = done.err().map(Into::into);
            operation.clone()
        };
        let kept = self.record(operation.clone()).await;
        let operation = Box::new(operation);
        let _ = entry.events.send(OperationEvent::Done {
            operation: operation.clone(),
        });
        entry.over.send_replace(true);
        match kept {
            Ok(()) => drop(lock(&self.inner.running).remove(&operation.id)),
            // The record says that it runs; so its end is told from memory.
            Err(err) => tracing::error!(%err, "the end of an operation can't be recorded"),
        }
        self.inner.hub.send(Event::Operation { operation });
    }

    async fn record(&self, operation: Operation) -> Result<()> {
        let state = &self.inner.state;
        state
            .run(move |tx| state::operations::put(tx, &operation))
            .await
    }

    fn entry(&self, id: Uuid) -> Option<Arc<Entry>> {
        lock(&self.inner.running).get(&id).cloned()
    }

    async fn ended(&self, id: Uuid) -> Result<Operation> {
        self.inner
            .state
            .run(move |tx| state::operations::get(tx, id))
            .await?
            .ok_or_else(|| {
                Error::new(
                    Code::OperationNotFound,
                    format!("operation \"{id}\" does not exist"),
                )
            })
    }

    pub async fn get(&self, id: Uuid) -> Result<Operation> {
        match self.entry(id) {
            Some(entry) => Ok(lock(&entry.operation).clone()),
            None => self.ended(id).await,
        }
    }

    pub async fn list(&self) -> Result<Vec<Operation>> {
        let mut operations = self
            .inner
            .state
            .run(|tx| state::operations::list(tx, 200))
            .await?;
        for operation in &mut operations {
            if let Some(entry) = self.entry(operation.id) {
                *operation = lock(&entry.operation).clone();
            }
        }
        Ok(operations)
    }

    /// Where the operation stands, and what comes.
    pub async fn follow(&self, id: Uuid) -> Result<Follow> {
        if let Some(entry) = self.entry(id) {
            // Both under the lock: nothing falls between the state and the first event.
            let operation = lock(&entry.operation);
            // One that is just over is told from here: its end may not be in the database yet.
            let events = (!operation.is_over()).then(|| entry.events.subscribe());
            return Ok(Follow {
                operation: operation.clone(),
                events,
            });
        }
        Ok(Follow {
            operation: self.ended(id).await?,
            events: None,
        })
    }

    /// Waits until the operation is over, or as long as said; returns where it stands then.
    pub async fn wait(&self, id: Uuid, at_most: Duration) -> Result<Operation> {
        if let Some(entry) = self.entry(id) {
            let mut over = entry.over.subscribe();
            let _ = tokio::time::timeout(at_most, over.wait_for(|over| *over)).await;
        }
        self.get(id).await
    }

    /// Asks the work to stop. It undoes what it must, so the end may come later.
    pub async fn cancel(&self, id: Uuid) -> Result<Operation> {
        if let Some(entry) = self.entry(id) {
            entry.cancel.cancel();
        }
        self.get(id).await
    }
}

/// If whoever wants an operation goes while its beginning is being recorded, nothing begins, and the record says so.
struct CallerGone(Operations, Option<Operation>);

impl Drop for CallerGone {
    fn drop(&mut self) {
        let Some(mut operation) = self.1.take() else {
            return;
        };
        let err = Error::new(Code::Cancelled, "Who asked for it has gone");
        operation.state = OperationState::Cancelled;
        operation.ended_at = Some(state::now());
        operation.error = Some(err.into());
        let operations = self.0.clone();
        // Comes after the beginning: records are written in order.
        tokio::spawn(async move {
            if let Err(err) = operations.record(operation).await {
                tracing::error!(%err, "an operation that did not begin can't be recorded");
            }
        });
    }
}

impl Entry {
    fn update(&self, update: Update) {
        let mut operation = lock(&self.operation);
        let event = match update {
            Update::Phase(phase) => {
                if operation.phase == Some(phase) {
                    return;
                }
                self.push_phase(&mut operation);
                operation.phase = Some(phase);
                operation.progress = None;
                OperationEvent::Phase { phase }
            }
            Update::Progress { done, total } => {
                let progress = Progress { done, total };
                operation.progress = Some(progress);
                let mut times = lock(&self.phase_began);
                if times.1.elapsed() < PROGRESS_EVERY && total != Some(done) {
                    return;
                }
                times.1 = Instant::now();
                OperationEvent::Progress { progress }
            }
            Update::Took(phase, time) => {
                operation.phases.push(PhaseTime::new(phase, time));
                return;
            }
            Update::Result(name) => {
                operation.result = Some(name);
                return;
            }
            Update::Log(line) => OperationEvent::Log { line },
            Update::Warning(line) => {
                operation.warnings.push(line.clone());
                OperationEvent::Warning { line }
            }
        };
        // Nobody may be listening.
        let _ = self.events.send(event);
    }

    fn close_phase(&self) {
        let mut operation = lock(&self.operation);
        self.push_phase(&mut operation);
    }

    fn push_phase(&self, operation: &mut Operation) {
        let mut times = lock(&self.phase_began);
        if let Some(phase) = operation.phase {
            operation
                .phases
                .push(PhaseTime::new(phase, times.0.elapsed()));
        }
        times.0 = Instant::now();
    }
}

/// A lock whose holder panicked still guards plain values.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pileus_base::Phase;

    fn operations() -> (tempfile::TempDir, Operations) {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&dir.path().join("a.db")).unwrap();
        (dir, Operations::new(state, Hub::new()))
    }

    #[tokio::test]
    async fn events_come_in_order_and_end_with_done() {
        let (_dir, operations) = operations();
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let begun = operations
            .begin(OperationKind::Launch, "foo", |report| async move {
                wait.await.unwrap();
                report.phase(Phase::Starting);
                report.progress(1, Some(2));
                report.phase(Phase::Booting);
                report.warn("hm");
                Err(Error::new(Code::BootTimeout, "no"))
            })
            .await
            .unwrap();
        let follow = operations.follow(begun.id).await.unwrap();
        let mut events = follow.events.unwrap();
        go.send(()).unwrap();
        let mut kinds = Vec::new();
        let done = loop {
            match events.recv().await.unwrap() {
                OperationEvent::Done { operation } => break operation,
                event => kinds.push(event),
            }
        };
        assert_eq!(
            kinds[0],
            OperationEvent::Phase {
                phase: Phase::Starting
            }
        );
        assert_eq!(done.state, OperationState::Failed);
        assert_eq!(done.warnings, ["hm"]);
        assert_eq!(done.phases.len(), 2);
        // It can still be asked for.
        let again = operations.wait(begun.id, Duration::ZERO).await.unwrap();
        assert_eq!(again, *done);
    }

    #[tokio::test]
    async fn one_that_is_over_is_told_as_over_before_its_end_is_recorded() {
        let (_dir, operations) = operations();
        let (go, wait) = tokio::sync::oneshot::channel::<()>();
        let begun = operations
            .begin(OperationKind::Stop, "foo", |_| async move {
                let _ = wait.await;
                Err(Error::new(Code::ShutdownTimeout, "it did not"))
            })
            .await
            .unwrap();
        // The disk is busy: nothing is written until we say so.
        let (free, busy) = std::sync::mpsc::channel::<()>();
        let state = operations.inner.state.clone();
        let hold = tokio::spawn(async move {
            state
                .run(move |_| {
                    let _ = busy.recv();
                    Ok(())
                })
                .await
        });
        tokio::task::yield_now().await;
        go.send(()).unwrap();
        while !operations.get(begun.id).await.unwrap().is_over() {
            tokio::task::yield_now().await;
        }
        let follow = operations.follow(begun.id);
        let follow = tokio::time::timeout(Duration::from_secs(5), follow).await;
        let follow = follow.expect("it does not wait for the disk").unwrap();
        assert!(follow.events.is_none());
        assert_eq!(follow.operation.state, OperationState::Failed);
        assert_eq!(follow.operation.error.unwrap().code, Code::ShutdownTimeout);
        free.send(()).unwrap();
        hold.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn one_whose_caller_goes_before_it_begins_does_not_run_for_ever() {
        let (_dir, operations) = operations();
        {
            let begin = operations.begin(OperationKind::Pull, "x", |_| async { Ok(()) });
            let mut begin = std::pin::pin!(begin);
            assert!(futures_util::poll!(&mut begin).is_pending());
        }
        for _ in 0..500 {
            let all = operations.list().await.unwrap();
            match all.first().map(|operation| operation.state) {
                Some(OperationState::Cancelled) => return,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
        panic!("{:?}", operations.list().await);
    }

    #[tokio::test]
    async fn a_cancelled_operation_and_one_that_panics_both_end() {
        let (_dir, operations) = operations();
        let waits = operations
            .begin(OperationKind::Pull, "x", |report| async move {
                report.cancelled().await;
                report.check()
            })
            .await
            .unwrap();
        operations.cancel(waits.id).await.unwrap();
        let at_most = Duration::from_secs(10);
        let over = operations.wait(waits.id, at_most).await.unwrap();
        assert_eq!(over.state, OperationState::Cancelled);
        let breaks = operations
            .begin(OperationKind::Pull, "x", |_| async move { panic!("boom") })
            .await
            .unwrap();
        let over = operations.wait(breaks.id, at_most).await.unwrap();
        assert_eq!(over.error.unwrap().code, Code::Internal);
        let unknown = operations.get(Uuid::nil()).await.unwrap_err();
        assert_eq!(unknown.code, Code::OperationNotFound);
    }
}
