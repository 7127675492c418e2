-- Chapter 1: who does the work.
-- Everything amp stores is produced by a worker, so the story begins with a node that registers itself and then
-- keeps saying that it is alive. Later tables name a worker by its node_id, which outlives any one process.

CREATE TABLE workers (
    id            bigint      GENERATED ALWAYS AS IDENTITY,
    node_id       text        NOT NULL,
    heartbeat_at  timestamptz NOT NULL,
    info          jsonb       NOT NULL DEFAULT '{}',
    created_at    timestamptz NOT NULL DEFAULT now(),
    registered_at timestamptz NOT NULL DEFAULT now(),

    CONSTRAINT workers_pk         PRIMARY KEY (id),
    CONSTRAINT workers_node_id_uq UNIQUE (node_id)
);

COMMENT ON TABLE  workers               IS 'The worker nodes that have registered, one row each.';
COMMENT ON COLUMN workers.node_id       IS 'Name the node chose for itself; jobs are assigned to it.';
COMMENT ON COLUMN workers.heartbeat_at  IS 'Last sign of life; a node silent for too long counts as gone.';
COMMENT ON COLUMN workers.info          IS 'What the node says about itself, such as its build.';
COMMENT ON COLUMN workers.created_at    IS 'When the node was first seen.';
COMMENT ON COLUMN workers.registered_at IS 'When the node last registered, which it does at each start.';
