-- Chapter 7: what may be forgotten.
-- A file that is no longer needed cannot be deleted at once, since a running query may still read it. Such files are
-- listed here with a time of expiry, and the collector deletes them from the object store after it.
--
-- The check holds at the time of writing only, and rows are meant to expire. PostgreSQL does not look at old rows
-- again, but a restore writes them anew: rows expired by then are refused. Restore without this table's rows, or drop
-- the check first and add it back NOT VALID. It stays because a past expiry is a bug that would delete files in use.

CREATE TABLE gc_manifest (
    location_id bigint    NOT NULL,
    file_id     bigint    NOT NULL,
    file_path   text      NOT NULL,
    expiration  timestamp NOT NULL,

    CONSTRAINT gc_manifest_pk                     PRIMARY KEY (file_id),
    CONSTRAINT gc_manifest_file_path_uq           UNIQUE (file_path),
    CONSTRAINT gc_manifest_location_id_file_id_uq UNIQUE (location_id, file_id),
    CONSTRAINT gc_manifest_expiration_ck          CHECK (expiration > (now() AT TIME ZONE 'utc')),
    CONSTRAINT gc_manifest_file_id_fk             FOREIGN KEY (file_id)
        REFERENCES file_metadata (id) ON DELETE CASCADE,
    CONSTRAINT gc_manifest_location_id_fk         FOREIGN KEY (location_id)
        REFERENCES physical_table_revisions (id) ON DELETE CASCADE
);

CREATE INDEX gc_manifest_location_id_expiration_ix
    ON gc_manifest (location_id, expiration) INCLUDE (file_path);

COMMENT ON TABLE  gc_manifest             IS 'Files that may be deleted from the object store after they expire.';
COMMENT ON COLUMN gc_manifest.location_id IS 'The revision that the file belongs to.';
COMMENT ON COLUMN gc_manifest.file_path   IS 'Where the file lies, so that the collector needs no join.';
COMMENT ON COLUMN gc_manifest.expiration  IS 'In UTC; in the future when written.';
