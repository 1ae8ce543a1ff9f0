//! The state: one SQLite database that holds the truth about instances and operations.
//!
//! One thread owns the connection; everyone else sends it closures and awaits their results, so that
//! each closure is one transaction and no lock is held across an await. WAL with `synchronous=FULL`:
//! what was committed survives a power cut. One file a table: `instances.rs`, `operations.rs`,
//! `settings.rs`, `demand.rs`; the schema is in `0001.sql` and what follows it.

pub mod demand;
pub mod instances;
pub mod operations;
pub mod settings;

use std::path::Path;
use std::sync::mpsc;

use pileus_base::{Code, Error, Result};
use rusqlite::{Connection, Transaction};
use tokio::sync::oneshot;

const MIGRATIONS: &[&str] = &[
    include_str!("0001.sql"),
    include_str!("0002.sql"),
    include_str!("0003.sql"),
];

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// The handle to the database's thread. Cheap to clone; the thread ends with the last handle.
#[derive(Clone)]
pub struct State {
    jobs: mpsc::Sender<Job>,
}

impl State {
    /// Opens the database, makes it if it is not there, and brings its schema up to date.
    pub fn open(path: &Path) -> Result<Self> {
        let mut connection = Connection::open(path).map_err(|err| database("Opening", err))?;
        prepare(&mut connection)?;
        // Its companions (-wal, -shm) get the same mode from SQLite.
        pileus_base::files::set_mode(path, 0o600)?;
        let (jobs, queue) = mpsc::channel::<Job>();
        std::thread::Builder::new()
            .name("state".into())
            .spawn(move || {
                while let Ok(job) = queue.recv() {
                    job(&mut connection);
                }
            })
            .map_err(|err| Error::io("Starting the database's thread", err))?;
        Ok(Self { jobs })
    }

    /// Runs `work` in one transaction: all of it is kept, or none if it returns an error.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Transaction<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move |connection| {
            // The caller may have gone; the work is done all the same.
            let _ = reply.send(transact(connection, work));
        });
        let gone = || Error::new(Code::Database, "The database's thread has ended");
        self.jobs.send(job).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

fn transact<T>(
    connection: &mut Connection,
    work: impl FnOnce(&Transaction<'_>) -> Result<T>,
) -> Result<T> {
    let transaction = connection
        .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
        .map_err(|err| database("Writing", err))?;
    let done = work(&transaction)?;
    transaction
        .commit()
        .map_err(|err| database("Writing", err))?;
    Ok(done)
}

fn prepare(connection: &mut Connection) -> Result<()> {
    let failed = |err| database("Preparing", err);
    connection
        .pragma_update(None, "journal_mode", "wal")
        .map_err(failed)?;
    connection
        .pragma_update(None, "synchronous", "full")
        .map_err(failed)?;
    connection
        .pragma_update(None, "foreign_keys", true)
        .map_err(failed)?;
    let version: u32 = connection
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .map_err(failed)?;
    if version as usize > MIGRATIONS.len() {
        return Err(Error::new(
            Code::Database,
            format!(
                "The database was written by a newer pileus (schema {version}, this one knows {})",
                MIGRATIONS.len()
            ),
        )
        .advise("Start the newer version again; this one changed nothing."));
    }
    for (number, migration) in (1_u32..).zip(MIGRATIONS).skip(version as usize) {
        let step = connection.transaction().map_err(failed)?;
        step.execute_batch(migration).map_err(failed)?;
        step.pragma_update(None, "user_version", number)
            .map_err(failed)?;
        step.commit().map_err(failed)?;
    }
    Ok(())
}

/// An error of SQLite; a full disk is the host's.
pub(crate) fn database(what: &str, err: rusqlite::Error) -> Error {
    let code = match err.sqlite_error_code() {
        Some(rusqlite::ErrorCode::DiskFull) => Code::NoSpace,
        _ => Code::Database,
    };
    Error::new(code, format!("{what} the state database failed: {err}")).with_source(err)
}

pub(crate) fn now() -> jiff::Timestamp {
    jiff::Timestamp::now()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failed_transaction_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&dir.path().join("a.db")).unwrap();
        let failed: Result<()> = state
            .run(|tx| {
                settings::set(tx, "a", "1")?;
                Err(Error::internal("no"))
            })
            .await;
        assert!(failed.is_err());
        assert_eq!(state.run(|tx| settings::get(tx, "a")).await.unwrap(), None);
    }

    #[tokio::test]
    async fn a_newer_schema_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        drop(State::open(&path).unwrap());
        let connection = Connection::open(&path).unwrap();
        connection.pragma_update(None, "user_version", 999).unwrap();
        drop(connection);
        let err = State::open(&path).err().unwrap();
        assert_eq!(err.code, Code::Database);
        assert!(err.message.contains("newer"), "{err}");
    }

    #[test]
    fn a_file_that_is_no_database_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.db");
        std::fs::write(&path, "hello, I am no database, not at all").unwrap();
        assert_eq!(State::open(&path).err().unwrap().code, Code::Database);
    }
}
