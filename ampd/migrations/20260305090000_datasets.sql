-- Chapter 4: what is to be computed.
-- A dataset is defined by a manifest. Manifests are stored once, under the hash of their content; the registry then
-- links a hash to the names it is known by, and tags give such a link a version. Each step leans on the one before
-- it, so removing a manifest removes its links and their tags.

CREATE TABLE manifest_files (
    hash       text        NOT NULL,
    path       text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    kind       text        NOT NULL DEFAULT 'unknown',

    CONSTRAINT manifest_files_pk PRIMARY KEY (hash)
);

COMMENT ON TABLE  manifest_files      IS 'Dataset definitions, addressed by their content.';
COMMENT ON COLUMN manifest_files.hash IS 'Hash of the content: the identity of the definition.';
COMMENT ON COLUMN manifest_files.path IS 'Where the content lies in the object store.';
COMMENT ON COLUMN manifest_files.kind IS 'The kind of dataset the manifest defines; ''unknown'' when not recorded.';

CREATE TABLE dataset_manifests (
    namespace  text        NOT NULL,
    name       text        NOT NULL,
    hash       text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT dataset_manifests_pk      PRIMARY KEY (namespace, name, hash),
    CONSTRAINT dataset_manifests_hash_fk FOREIGN KEY (hash) REFERENCES manifest_files (hash) ON DELETE CASCADE
);

CREATE INDEX dataset_manifests_hash_ix           ON dataset_manifests (hash);
CREATE INDEX dataset_manifests_namespace_name_ix ON dataset_manifests (namespace, name);

COMMENT ON TABLE  dataset_manifests           IS 'The definitions of each dataset; one manifest may serve many names.';
COMMENT ON COLUMN dataset_manifests.namespace IS 'Owner of the name, so that two teams can use the same one.';
COMMENT ON COLUMN dataset_manifests.name      IS 'Name of the dataset within its namespace.';

CREATE TABLE tags (
    namespace  text        NOT NULL,
    name       text        NOT NULL,
    version    text        NOT NULL,
    hash       text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT tags_pk          PRIMARY KEY (namespace, name, version),
    CONSTRAINT tags_manifest_fk FOREIGN KEY (namespace, name, hash)
        REFERENCES dataset_manifests (namespace, name, hash) ON DELETE CASCADE
);

CREATE INDEX tags_namespace_name_ix ON tags (namespace, name);

COMMENT ON TABLE  tags         IS 'Versions of a dataset, each pointing at one of its manifests.';
COMMENT ON COLUMN tags.version IS 'A released version or a moving label.';
COMMENT ON COLUMN tags.hash    IS 'The manifest meant by this version, always one already linked to the dataset.';
