//! The instances in memory: each with its row as it stands in the database and its task. The database
//! is the truth; a change is committed there first and shown here after.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use pileus_api::{ErrorBody, Event, InstanceState};
use pileus_base::{Code, Error, InstanceName, Phase, Reporter, Result};
use pileus_instances::driver::QemuDriver;
use pileus_instances::machine::{Journal, Machine, Snapshot};
use tokio::sync::Notify;
use uuid::Uuid;

use crate::hub::Hub;
use crate::state::instances::{InstanceRow, Stage};
use crate::state::{self, State};

/// How long a request waits for a recovery that is under way.
const TAKE_UP_BOUND: Duration = Duration::from_secs(20);
/// How often somebody who can't wait interrupts what is under way.
const INTERRUPT_EVERY: Duration = Duration::from_millis(100);

/// One instance.
pub struct Instance {
    pub id: Uuid,
    row: Arc<RwLock<InstanceRow>>,
    /// Held while a change travels to the database, so that changes don't overtake each other.
    writing: Arc<tokio::sync::Mutex<()>>,
    machine: OnceLock<Result<Machine<QemuDriver>, ErrorBody>>,
    /// Told when the machine is there.
    settled: Notify,
    /// Held by whoever changes the instance: one after the other, in the order in which they came.
    turn: Arc<tokio::sync::Mutex<()>>,
    state: State,
    hub: Hub,
}

impl Instance {
    pub fn new(row: InstanceRow, state: State, hub: Hub) -> Arc<Self> {
        Arc::new(Self {
            id: row.id,
            row: Arc::new(RwLock::new(row)),
            writing: Arc::default(),
            machine: OnceLock::new(),
            settled: Notify::new(),
            turn: Arc::default(),
            state,
            hub,
        })
    }

    pub fn row(&self) -> InstanceRow {
        self.row
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// The instance's task; there is none while its disk is being made.
    pub fn machine(&self) -> Result<&Machine<QemuDriver>> {
        match self.machine.get() {
            Some(Ok(machine)) => Ok(machine),
            Some(Err(trouble)) => Err(trouble.clone().into()),
            None => Err(Error::new(
                Code::WrongState,
                format!("instance \"{}\" is being prepared", self.row().name),
            )
            .advise("Wait until its launch has ended, or cancel the launch (Ctrl-C).")),
        }
    }

    /// As [`Instance::machine`]; right after the daemon's start it waits until the instance was taken up
    /// again.
    pub async fn machine_soon(&self) -> Result<&Machine<QemuDriver>> {
        let settled = self.settled.notified();
        let prepared = self.row().stage == Stage::Is(InstanceState::Creating);
        if self.machine.get().is_none() && !prepared {
            let _ = tokio::time::timeout(TAKE_UP_BOUND, settled).await;
        }
        self.machine()
    }

    /// Waits for its turn to change the instance. What is asked for is decided after that.
    pub async fn turn(&self, report: &Reporter) -> Result<Turn> {
        if let Ok(turn) = self.turn.clone().try_lock_owned() {
            return Ok(Turn(turn));
        }
        report.phase(Phase::Queued);
        let turn = async { Ok(self.turn.clone().lock_owned().await) };
        Ok(Turn(report.or_cancelled(turn).await?))
    }

    /// As [`Instance::turn`], for what can't be done in the trash.
    pub async fn usable_turn(&self, report: &Reporter) -> Result<Turn> {
        let turn = self.turn(report).await?;
        let row = self.row();
        match (row.stage, row.deleted) {
            (Stage::Purging, _) => Err(not_found(row.name.as_str())),
            (_, true) => Err(deleted(row.name.as_str())),
            _ => Ok(turn),
        }
    }

    /// As [`Instance::turn`], and breaks off whatever is before it.
    pub async fn turn_by_force(&self, report: &Reporter) -> Result<Turn> {
        let turn = async {
            let mut lock = std::pin::pin!(self.turn.clone().lock_owned());
            loop {
                match tokio::time::timeout(INTERRUPT_EVERY, &mut lock).await {
                    Ok(turn) => return Ok(turn),
                    Err(_) => {
                        if let Ok(machine) = self.machine() {
                            machine.interrupt();
                        }
                    }
                }
            }
        };
        Ok(Turn(report.or_cancelled(turn).await?))
    }

    pub fn set_machine(&self, machine: Machine<QemuDriver>) {
        // There is one launch and one recovery; a second task would be a second owner.
        if self.machine.set(Ok(machine)).is_err() {
            tracing::error!(instance = %self.id, "has a task already");
        }
        self.settled.notify_waiters();
    }

    /// Says why the instance can't have a task: nothing but deleting it is possible.
    pub fn set_trouble(&self, trouble: ErrorBody) {
        if self.machine.set(Err(trouble)).is_err() {
            tracing::error!(instance = %self.id, "has a task already");
        }
        self.settled.notify_waiters();
    }

    /// What its task knows, if there is one.
    pub fn snapshot(&self) -> Option<Snapshot> {
        self.machine.get()?.as_ref().ok().map(Machine::snapshot)
    }

    /// Changes the row, in the database and then here: both, or neither, though whoever asks for it goes
    /// meanwhile.
    pub async fn change(&self, change: impl FnOnce(&mut InstanceRow)) -> Result<InstanceRow> {
        let writing = self.writing.clone().lock_owned().await;
        let before = self.row();
        let mut row = before.clone();
        change(&mut row);
        if row == before {
            return Ok(row);
        }
        let (state, hub, kept) = (self.state.clone(), self.hub.clone(), self.row.clone());
        let commit = async move {
            let _writing = writing;
            let (record, renamed) = (row.clone(), row.name != before.name);
            state
                .run(move |tx| {
                    if renamed {
                        state::instances::name_is_free(tx, record.id, &record.name)?;
                    }
                    state::instances::update(tx, &record)
                })
                .await?;
            *kept.write().unwrap_or_else(PoisonError::into_inner) = row.clone();
            let shown =
                |row: &InstanceRow| (row.stage, row.deleted, row.name.clone(), row.shutdown_at);
            if shown(&row) != shown(&before) {
                tell(&hub, &row);
            }
            Ok(row)
        };
        tokio::spawn(commit)
            .await
            .map_err(|err| Error::internal("A change broke off").with_source(err))?
    }
}

fn tell(hub: &Hub, row: &InstanceRow) {
    if let Stage::Is(state) = row.stage {
        hub.send(Event::Instance {
            id: row.id,
            name: row.name.clone(),
            state,
            deleted: row.deleted,
        });
    }
}

/// The right to change an instance; given back when it is dropped.
pub struct Turn(#[allow(dead_code)] tokio::sync::OwnedMutexGuard<()>);

/// The journal of an instance's task: the row. Holds the instance weakly, because the instance holds
/// the task.
pub struct RowJournal(pub std::sync::Weak<Instance>);

impl Journal for RowJournal {
    fn save<'a>(
        &'a self,
        snapshot: &'a Snapshot,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<()>> + Send + 'a>> {
        Box::pin(async move {
            let Some(instance) = self.0.upgrade() else {
                return Ok(());
            };
            instance
                .change(|row| {
                    if row.stage != Stage::Purging {
                        row.stage = Stage::Is(snapshot.state);
                    }
                    row.process = snapshot.process;
                    row.started_at = snapshot.started_at;
                    row.spec.firmware_boot = snapshot.firmware_boot;
                    row.spec.suspended.clone_from(&snapshot.suspended);
                    row.spec.booted |= snapshot.process.is_some();
                    row.history.crashed = snapshot.crashed;
                    row.history.phases.clone_from(&snapshot.phases);
                    row.history.last_error.clone_from(&snapshot.last_error);
                    // What cloud-init said is kept beyond the run that it said it in.
                    if snapshot.cloud_init.is_some() {
                        row.history.cloud_init.clone_from(&snapshot.cloud_init);
                    }
                })
                .await
                .map(drop)
        })
    }
}

/// All instances, by name in lower case: names that differ in case only would be one DNS name.
#[derive(Default)]
pub struct Registry {
    instances: Mutex<BTreeMap<String, Arc<Instance>>>,
}

impl Registry {
    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Arc<Instance>>> {
        self.instances
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add(&self, instance: Arc<Instance>) {
        let name = instance.row().name.as_str().to_ascii_lowercase();
        self.lock().insert(name, instance);
    }

    /// Lets the instance be found by another name. The row has it already.
    pub fn renamed(&self, id: Uuid, name: &InstanceName) {
        let mut instances = self.lock();
        let Some(before) = instances
            .iter()
            .find_map(|(name, instance)| (instance.id == id).then(|| name.clone()))
        else {
            return;
        };
        if let Some(instance) = instances.remove(&before) {
            instances.insert(name.as_str().to_ascii_lowercase(), instance);
        }
    }

    pub fn remove(&self, id: Uuid) {
        self.lock().retain(|_, instance| instance.id != id);
    }

    pub fn all(&self) -> Vec<Arc<Instance>> {
        self.lock().values().cloned().collect()
    }

    pub fn by_id(&self, id: Uuid) -> Option<Arc<Instance>> {
        self.lock().values().find(|i| i.id == id).cloned()
    }

    pub fn get(&self, name: &str) -> Result<Arc<Instance>> {
        let found = self.lock().get(&name.to_ascii_lowercase()).cloned();
        found
            .filter(|instance| instance.row().stage != Stage::Purging)
            .ok_or_else(|| not_found(name))
    }

    /// The instance, unless it is in the trash.
    pub fn get_usable(&self, name: &str) -> Result<Arc<Instance>> {
        let instance = self.get(name)?;
        if instance.row().deleted {
            return Err(deleted(name));
        }
        Ok(instance)
    }

    /// Whether any VM runs.
    pub fn any_running(&self) -> bool {
        self.all()
            .iter()
            .any(|instance| instance.row().process.is_some())
    }
}

fn not_found(name: &str) -> Error {
    Error::new(
        Code::InstanceNotFound,
        format!("instance \"{name}\" does not exist"),
    )
}

fn deleted(name: &str) -> Error {
    Error::new(
        Code::InstanceDeleted,
        format!("instance \"{name}\" is deleted"),
    )
    .advise(format!(
        "`pileus recover {name}` brings it back, `pileus purge` ends it."
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::instances::tests::row;

    #[tokio::test]
    async fn a_change_is_in_both_places_though_whoever_asked_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&dir.path().join("a.db")).unwrap();
        let record = row("foo", 1);
        let inserted = record.clone();
        let insert = state.run(move |tx| state::instances::insert(tx, &inserted));
        insert.await.unwrap();
        let instance = Instance::new(record, state.clone(), Hub::new());
        // The disk is busy: nothing is written until we say so.
        let (free, busy) = std::sync::mpsc::channel::<()>();
        let (begun, begins) = tokio::sync::oneshot::channel();
        let held = state.clone();
        let hold = tokio::spawn(async move {
            let hold = held.run(move |_| {
                let _ = begun.send(());
                let _ = busy.recv();
                Ok(())
            });
            hold.await
        });
        begins.await.unwrap();
        {
            let change = instance.change(|row| row.spec.cpus = 7);
            let mut change = std::pin::pin!(change);
            assert!(futures_util::poll!(&mut change).is_pending());
            // On its way to the database.
            tokio::task::yield_now().await;
        }
        free.send(()).unwrap();
        hold.await.unwrap().unwrap();
        // Waits for the one before.
        let row = instance.change(|row| row.spec.memory.0 += 1).await.unwrap();
        assert_eq!(row.spec.cpus, 7);
        assert_eq!(instance.row(), row);
        let (kept, _) = state.run(state::instances::all).await.unwrap();
        assert_eq!(kept, [row]);
    }
}
