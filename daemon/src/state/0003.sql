-- The whole life of an instance.

-- When it is shut down, if that was asked for with a delay.
ALTER TABLE instances ADD COLUMN shutdown_at TEXT;
-- Its snapshots (daemon/src/state/instances.rs: SnapshotRow), written together with what it stands on.
ALTER TABLE instances ADD COLUMN snapshots TEXT NOT NULL DEFAULT '[]';
