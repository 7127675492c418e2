-- Chapter 2: the work itself.
-- A job is assigned to one worker when it is scheduled. The caller supplies the idempotency key, so asking twice for
-- the same work, after a timeout for instance, cannot schedule it twice.

CREATE TABLE jobs (
    id              bigint      GENERATED ALWAYS AS IDENTITY,
    node_id         text        NOT NULL,
    descriptor      jsonb,
    status          text        NOT NULL DEFAULT 'SCHEDULED',
    created_at      timestamptz NOT NULL DEFAULT now(),
    updated_at      timestamptz NOT NULL DEFAULT now(),
    idempotency_key text        NOT NULL,

    CONSTRAINT jobs_pk                 PRIMARY KEY (id),
    CONSTRAINT jobs_idempotency_key_uq UNIQUE (idempotency_key),
    CONSTRAINT jobs_node_id_fk         FOREIGN KEY (node_id) REFERENCES workers (node_id)
);

COMMENT ON TABLE  jobs                 IS 'Units of work, each assigned to one worker.';
COMMENT ON COLUMN jobs.node_id         IS 'The worker that is to run the job.';
COMMENT ON COLUMN jobs.descriptor      IS 'What to do, in the form the worker understands.';
COMMENT ON COLUMN jobs.status          IS 'SCHEDULED, RUNNING, COMPLETED and so on: text, the programs own the list.';
COMMENT ON COLUMN jobs.idempotency_key IS 'Chosen by the caller: a second request with the same key is the same job.';
