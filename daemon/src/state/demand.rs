//! Table `demand`: how often each image and shape was launched, so that templates are made of what is
//! used, and how the last attempt to make one failed, so that it is not repeated for ever.

use pileus_api::Timestamp;
use pileus_base::{Digest, Result, Size};
use rusqlite::{OptionalExtension, Transaction, params};

use super::database;

/// What a template is made of, as far as a user chooses it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Shape {
    pub image: Digest,
    pub cpus: u32,
    pub memory: Size,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Demand {
    pub launches: u32,
    pub failed_at: Option<Timestamp>,
    pub failure: Option<String>,
}

pub fn get(tx: &Transaction<'_>, shape: &Shape) -> Result<Demand> {
    tx.query_row(
        "SELECT launches, failed_at, failure FROM demand
         WHERE image = ?1 AND cpus = ?2 AND memory = ?3",
        key(shape),
        |row| {
            let failed_at: Option<String> = row.get(1)?;
            Ok(Demand {
                launches: row.get(0)?,
                failed_at: failed_at.and_then(|text| text.parse().ok()),
                failure: row.get(2)?,
            })
        },
    )
    .optional()
    .map(Option::unwrap_or_default)
    .map_err(|err| database("Reading", err))
}

/// Counts a launch; returns how many there were, this one included.
pub fn count(tx: &Transaction<'_>, shape: &Shape, now: Timestamp) -> Result<u32> {
    let (image, cpus, memory) = key(shape);
    tx.query_row(
        "INSERT INTO demand (image, cpus, memory, launches, last_at) VALUES (?1, ?2, ?3, 1, ?4)
         ON CONFLICT (image, cpus, memory)
         DO UPDATE SET launches = launches + 1, last_at = excluded.last_at
         RETURNING launches",
        params![image, cpus, memory, now.to_string()],
        |row| row.get(0),
    )
    .map_err(|err| database("Writing", err))
}

/// Remembers how an attempt to make its template ended.
pub fn record(
    tx: &Transaction<'_>,
    shape: &Shape,
    now: Timestamp,
    failure: Option<&str>,
) -> Result<()> {
    let (image, cpus, memory) = key(shape);
    let at = failure.map(|_| now.to_string());
    tx.execute(
        "INSERT INTO demand (image, cpus, memory, last_at, failed_at, failure)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (image, cpus, memory)
         DO UPDATE SET failed_at = excluded.failed_at, failure = excluded.failure",
        params![image, cpus, memory, now.to_string(), at, failure],
    )
    .map_err(|err| database("Writing", err))?;
    Ok(())
}

/// Forgets a shape: its template was deleted by a person, who does not want it back at once.
pub fn forget(tx: &Transaction<'_>, shape: &Shape) -> Result<()> {
    tx.execute(
        "DELETE FROM demand WHERE image = ?1 AND cpus = ?2 AND memory = ?3",
        key(shape),
    )
    .map_err(|err| database("Writing", err))?;
    Ok(())
}

fn key(shape: &Shape) -> (String, u32, i64) {
    let memory = i64::try_from(shape.memory.bytes()).unwrap_or(i64::MAX);
    (shape.image.to_string(), shape.cpus, memory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::State;

    #[tokio::test]
    async fn launches_and_failures_are_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(&dir.path().join("a.db")).unwrap();
        let shape = Shape {
            image: Digest::from_bytes([7; 32]),
            cpus: 1,
            memory: Size::gib(1),
        };
        let now = Timestamp::UNIX_EPOCH;
        state
            .run(move |tx| {
                assert_eq!(get(tx, &shape)?, Demand::default());
                assert_eq!(count(tx, &shape, now)?, 1);
                assert_eq!(count(tx, &shape, now)?, 2);
                record(tx, &shape, now, Some("no space"))?;
                let demand = get(tx, &shape)?;
                assert_eq!(demand.launches, 2);
                assert_eq!(demand.failed_at, Some(now));
                assert_eq!(demand.failure.as_deref(), Some("no space"));
                record(tx, &shape, now, None)?;
                assert_eq!(get(tx, &shape)?.failed_at, None);
                let other = Shape {
                    cpus: 2,
                    ..shape.clone()
                };
                assert_eq!(get(tx, &other)?, Demand::default());
                forget(tx, &shape)?;
                assert_eq!(get(tx, &shape)?, Demand::default());
                Ok(())
            })
            .await
            .unwrap();
    }
}
