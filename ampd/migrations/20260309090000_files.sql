-- Chapter 6: the files of a revision.
-- A query plans from here without listing the object store: which Parquet files there are, how large, in which state.
-- Footers are big and seldom all needed, so they stand beside the files rather than in their rows.

CREATE TABLE file_metadata (
    id             bigint GENERATED ALWAYS AS IDENTITY,
    location_id    bigint NOT NULL,
    file_name      text   NOT NULL,
    metadata       jsonb  NOT NULL,
    object_size    bigint,
    object_e_tag   text,
    object_version text,
    url            text   NOT NULL,

    CONSTRAINT file_metadata_pk             PRIMARY KEY (id),
    CONSTRAINT file_metadata_location_id_fk FOREIGN KEY (location_id)
        REFERENCES physical_table_revisions (id) ON DELETE CASCADE
);

CREATE UNIQUE INDEX file_metadata_location_id_file_name_ux ON file_metadata (location_id, file_name);

COMMENT ON TABLE  file_metadata                IS 'The Parquet files of each revision.';
COMMENT ON COLUMN file_metadata.location_id    IS 'The revision that the file belongs to.';
COMMENT ON COLUMN file_metadata.metadata       IS 'What the programs know of the content.';
COMMENT ON COLUMN file_metadata.object_size    IS 'In bytes; null, like the two below, when the store did not say.';
COMMENT ON COLUMN file_metadata.object_e_tag   IS 'Entity tag from the store; changes when the object is replaced.';
COMMENT ON COLUMN file_metadata.object_version IS 'Version given by the store, where it keeps versions.';
COMMENT ON COLUMN file_metadata.url            IS 'The whole address of the file.';

CREATE TABLE footer_cache (
    file_id bigint NOT NULL,
    footer  bytea  NOT NULL,

    CONSTRAINT footer_cache_pk         PRIMARY KEY (file_id),
    CONSTRAINT footer_cache_file_id_fk FOREIGN KEY (file_id) REFERENCES file_metadata (id) ON DELETE CASCADE
);

COMMENT ON TABLE  footer_cache        IS 'Parquet footers, kept to spare a read of the object store.';
COMMENT ON COLUMN footer_cache.footer IS 'The footer as it stands in the file, byte for byte.';
