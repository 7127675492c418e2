CREATE TABLE visits (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    worker text NOT NULL,
    at     timestamptz NOT NULL DEFAULT now()
);
