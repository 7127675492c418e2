"""The folder that every subject migrates: ampd's packaged migrations, then a small shop that grows."""

from pathlib import Path

import msgspec

PACKAGED = Path(__file__).parent.parent / "ampd" / "migrations"
FIRST_GENERATED_VERSION = 20270101090000

CHAPTERS = {
    "create_{table}": """\
CREATE TABLE {table} (
    id         bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name       text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);
COMMENT ON TABLE {table} IS 'One row for each of the {table}; never deleted.';
""",
    "describe_{table}": """\
ALTER TABLE {table} ADD COLUMN details jsonb NOT NULL DEFAULT '{{}}';
ALTER TABLE {table} ADD COLUMN amount numeric(12, 2);
ALTER TABLE {table} ADD CONSTRAINT {table}_amount_ck CHECK (amount >= 0);
""",
    "find_{table}": """\
CREATE UNIQUE INDEX {table}_name_uq ON {table} (name);
CREATE INDEX {table}_created_at_ix ON {table} (created_at);
""",
    "review_{table}": """\
CREATE TABLE {table}_reviews (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    about  bigint NOT NULL REFERENCES {table} (id) ON DELETE CASCADE,
    stars  smallint NOT NULL CHECK (stars BETWEEN 1 AND 5)
);
CREATE INDEX {table}_reviews_about_ix ON {table}_reviews (about);
CREATE VIEW {table}_rated AS SELECT about, avg(stars) AS stars FROM {table}_reviews GROUP BY about;
""",
}
TABLES = ("customers", "products", "orders", "invoices", "shipments", "suppliers")
LAST_RELATION = "suppliers_rated"


class PreparedMigration(msgspec.Struct, frozen=True):
    """One migration as plain SQL, before any tool's layout."""

    version: int
    name: str
    sql: str


def workload() -> tuple[PreparedMigration, ...]:
    """The scripts in their order; none needs to leave its transaction."""
    return *packaged(), *generated()


def packaged() -> list[PreparedMigration]:
    scripts = []
    for path in PACKAGED.glob("*.sql"):
        version, _, name = path.stem.partition("_")
        scripts.append(PreparedMigration(int(version), name, path.read_text(encoding="utf-8")))
    return sorted(scripts, key=lambda script: script.version)


def generated() -> list[PreparedMigration]:
    chapters = [(name, sql, table) for table in TABLES for name, sql in CHAPTERS.items()]
    return [
        PreparedMigration(FIRST_GENERATED_VERSION + number, name.format(table=table), sql.format(table=table))
        for number, (name, sql, table) in enumerate(chapters)
    ]
