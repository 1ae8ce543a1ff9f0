//! Table `settings`: a key and its value, for what the daemon must remember as a whole.

use pileus_base::Result;
use rusqlite::{OptionalExtension, Transaction};

use super::database;

/// The warning about the accelerator that was shown last.
pub const ACCELERATOR_WARNING: &str = "accelerator.warning";
/// The subnet of the private network, chosen once: instances keep their addresses.
pub const SUBNET: &str = "network.subnet";

/// The host's boot in which a daemon ran last.
pub const BOOT_ID: &str = "host.boot-id";

pub fn get(tx: &Transaction<'_>, key: &str) -> Result<Option<String>> {
    tx.query_row("SELECT value FROM settings WHERE key = ?1", [key], |row| {
        row.get(0)
    })
    .optional()
    .map_err(|err| database("Reading", err))
}

pub fn set(tx: &Transaction<'_>, key: &str, value: &str) -> Result<()> {
    tx.execute(
        "INSERT INTO settings (key, value) VALUES (?1, ?2)
         ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        [key, value],
    )
    .map_err(|err| database("Writing", err))?;
    Ok(())
}
