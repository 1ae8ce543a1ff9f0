-- Throw-away instances, and which shapes are launched often enough to be worth a template.

-- When the instance is deleted unless its lease is renewed; null for one that stays.
ALTER TABLE instances ADD COLUMN lease TEXT;

CREATE TABLE demand (
    image     TEXT NOT NULL,
    cpus      INTEGER NOT NULL,
    memory    INTEGER NOT NULL,
    -- Launches that a template could have served.
    launches  INTEGER NOT NULL DEFAULT 0,
    last_at   TEXT NOT NULL,
    -- The last attempt to make a template in the background that failed.
    failed_at TEXT,
    failure   TEXT,
    PRIMARY KEY (image, cpus, memory)
) STRICT;
