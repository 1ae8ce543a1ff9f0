//! Table `operations`: what was begun, and how it ended. The row is written before the work begins,
//! so that a start after a crash knows what was under way.

use pileus_api::{Operation, OperationState};
use pileus_base::{Error, Result};
use rusqlite::{OptionalExtension, Transaction, params};
use uuid::Uuid;

use super::database;

/// Operations that are over are kept so long that a client can still ask, not for ever.
const KEPT: u32 = 500;

pub fn put(tx: &Transaction<'_>, operation: &Operation) -> Result<()> {
    let body = serde_json::to_string(operation)
        .map_err(|err| Error::internal(format!("Writing an operation as JSON: {err}")))?;
    tx.execute(
        "INSERT INTO operations (id, state, created_at, body) VALUES (?1, ?2, ?3, ?4)
         ON CONFLICT (id) DO UPDATE SET state = excluded.state, body = excluded.body",
        params![
            operation.id.to_string(),
            if operation.is_over() {
                "over"
            } else {
                "running"
            },
            operation.created_at.to_string(),
            body
        ],
    )
    .map_err(|err| database("Writing", err))?;
    if operation.is_over() {
        tx.execute(
            "DELETE FROM operations WHERE state = 'over' AND id NOT IN
             (SELECT id FROM operations ORDER BY created_at DESC LIMIT ?1)",
            [KEPT],
        )
        .map_err(|err| database("Writing", err))?;
    }
    Ok(())
}

pub fn get(tx: &Transaction<'_>, id: Uuid) -> Result<Option<Operation>> {
    let body: Option<String> = tx
        .query_row(
            "SELECT body FROM operations WHERE id = ?1",
            [id.to_string()],
            |row| row.get(0),
        )
        .optional()
        .map_err(|err| database("Reading", err))?;
    Ok(body.and_then(|body| serde_json::from_str(&body).ok()))
}

/// The newest operations, newest first.
pub fn list(tx: &Transaction<'_>, limit: u32) -> Result<Vec<Operation>> {
    bodies(
        tx,
        "SELECT body FROM operations ORDER BY created_at DESC LIMIT ?1",
        limit,
    )
}

/// Marks what was under way when the daemon ended as failed; returns those operations.
pub fn interrupt_all(tx: &Transaction<'_>) -> Result<Vec<Operation>> {
    let mut running = bodies(
        tx,
        "SELECT body FROM operations WHERE state = 'running' LIMIT ?1",
        u32::MAX,
    )?;
    for operation in &mut running {
        operation.state = OperationState::Failed;
        operation.ended_at = Some(super::now());
        operation.error = Some(
            Error::new(
                pileus_base::Code::Interrupted,
                "The daemon ended while it worked on this",
            )
            .advise("Look at `pileus list`, then run the command again if it is still wanted.")
            .into(),
        );
        put(tx, operation)?;
    }
    // A body that can't be read any more must not stay "running" for ever.
    tx.execute(
        "UPDATE operations SET state = 'over' WHERE state = 'running'",
        [],
    )
    .map_err(|err| database("Writing", err))?;
    Ok(running)
}

fn bodies(tx: &Transaction<'_>, sql: &str, limit: u32) -> Result<Vec<Operation>> {
    let mut statement = tx
        .prepare_cached(sql)
        .map_err(|err| database("Reading", err))?;
    let rows = statement
        .query_map([limit], |row| row.get::<_, String>(0))
        .map_err(|err| database("Reading", err))?;
    let mut operations = Vec::new();
    for row in rows {
        let body = row.map_err(|err| database("Reading", err))?;
        match serde_json::from_str(&body) {
            Ok(operation) => operations.push(operation),
            Err(err) => tracing::warn!(%err, "an operation's record can't be read"),
        }
    }
    Ok(operations)
}
