-- The first schema. Times are RFC 3339 text in UTC, sizes are bytes, JSON columns hold what is read
-- and written as a whole. A migration is never changed after a release: add 0002.sql instead.

CREATE TABLE instances (
    id         TEXT PRIMARY KEY,
    name       TEXT NOT NULL UNIQUE,
    -- The instance's own address and QEMU user: unique among all that exist.
    address    TEXT NOT NULL UNIQUE,
    mac        TEXT NOT NULL UNIQUE,
    slot       INTEGER NOT NULL UNIQUE,
    -- creating | stopped | starting | running | restarting | stopping | unknown | purging
    state      TEXT NOT NULL,
    deleted    INTEGER NOT NULL DEFAULT 0,
    created_at TEXT NOT NULL,
    started_at TEXT,
    -- What the machine is made of (daemon/src/state/instances.rs: Spec).
    spec       TEXT NOT NULL,
    -- The hypervisor's process, while there is one.
    process    TEXT,
    -- How the last start went (daemon/src/state/instances.rs: History).
    history    TEXT NOT NULL DEFAULT '{}'
) STRICT;

CREATE TABLE operations (
    id         TEXT PRIMARY KEY,
    state      TEXT NOT NULL,
    created_at TEXT NOT NULL,
    -- The operation as the API shows it.
    body       TEXT NOT NULL
) STRICT;

CREATE INDEX operations_by_state ON operations (state);
CREATE INDEX operations_by_age ON operations (created_at);

CREATE TABLE settings (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT;
