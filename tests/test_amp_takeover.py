"""Taking over amp's own database, which its Rust ampd has migrated with sqlx."""

import pytest

import ampd as library
from ampd.adoption.amp import NEWEST, amp_history
from ampd.history.table import TABLE
from tests.cli_output import seen
from tests.servers import Ampd, Database

pytestmark = pytest.mark.anyio

FILES = tuple(file for file in library.read_migrations() if file.version <= NEWEST)
VERSIONS = [file.version for file in FILES]

SQLX = """
    CREATE TABLE _sqlx_migrations (version bigint PRIMARY KEY, description text NOT NULL,
        installed_on timestamptz NOT NULL DEFAULT now(), success boolean NOT NULL, checksum bytea NOT NULL,
        execution_time bigint NOT NULL);
"""

# As amp's files have it: other names everywhere, and the current time in other spellings.
AMPS_OWN_WAY = f"""
    DROP TABLE {TABLE};
    ALTER TABLE gc_manifest DROP CONSTRAINT gc_manifest_expiration_ck, ADD CHECK (expiration > now());
    DO $$
    DECLARE
      one record;
    BEGIN
      FOR one IN SELECT conrelid::regclass AS home, conname, row_number() OVER () AS number FROM pg_constraint
        WHERE connamespace = 'public'::regnamespace AND contype <> 'n'
      LOOP
        EXECUTE format('ALTER TABLE %s RENAME CONSTRAINT %I TO amp_constraint_%s', one.home, one.conname, one.number);
      END LOOP;
      FOR one IN SELECT indexrelid::regclass AS home, row_number() OVER () AS number FROM pg_index
        WHERE indrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)
          AND indexrelid NOT IN (SELECT conindid FROM pg_constraint)
      LOOP
        EXECUTE format('ALTER INDEX %s RENAME TO amp_index_%s', one.home, one.number);
      END LOOP;
    END $$;
    ALTER TABLE workers ALTER created_at SET DEFAULT timezone('UTC', now());
    ALTER TABLE jobs ALTER created_at SET DEFAULT CURRENT_TIMESTAMP;
    ALTER TABLE tags ALTER created_at SET DEFAULT (now() AT TIME ZONE 'utc');
    CREATE TABLE settings (name text);
"""


@pytest.fixture
async def amps(database: Database) -> Database:
    """A database whose tables and sqlx history are amp's of 2026-03."""
    await library.migrate(database.url, migrations=FILES)
    await database.execute(AMPS_OWN_WAY)
    rows = ", ".join(
        f"({version}, '{name}', '2026-03-12 10:00:00+00', true, decode('{checksum}', 'hex'), 1)"
        for version, (name, checksum) in amp_history().items()
    )
    await database.execute(f"{SQLX}; INSERT INTO _sqlx_migrations VALUES {rows}")
    return database


@pytest.mark.parametrize("source", ["sqlx", "auto"])
async def test_the_packaged_migrations_are_recorded(amps: Database, source: str) -> None:
    """Whatever constraints and indexes are called; nothing is run, and later migrations are applied on top."""
    before = await amps.fetch("SELECT oid, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace")
    status = await library.baseline(amps.url, source=source)
    assert [info.version for info in status.plan.migrations if info.state == "applied"] == VERSIONS
    rows = await amps.fetch(f"SELECT * FROM {TABLE} ORDER BY version")
    assert [row["version"] for row in rows] == VERSIONS
    assert {(row["ampd_version"], str(row["finished_at"])) for row in rows} == {
        (f"{library.__version__} baseline from sqlx", "2026-03-12 10:00:00+00:00")
    }
    after = await amps.fetch(
        f"SELECT oid, relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relname !~ '^{TABLE}'"
    )
    assert after == before
    assert await library.baseline(amps.url, source=source) == status
    await library.migrate(amps.url)
    assert (await library.status(amps.url)).up_to_date


NOT_AMPS = (
    "if a newer amp has migrated this database, let a release of ampd that knows it take it over; if somebody has "
    "changed it by hand, find out whether that can be undone; "
    f"`ampd baseline {NEWEST}` records the packaged migrations on your word, once you have looked at the database"
)
AMP_FIRST = "let amp of 2026-03 migrate first, then run `ampd baseline --from sqlx` again"


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        ("ALTER TABLE tags ADD note text", ["+ tags: note text"]),
        ("ALTER TABLE footer_cache DROP footer", ["- footer_cache: footer bytea not null"]),
        (
            "ALTER TABLE file_metadata ALTER object_size TYPE int",
            ["- file_metadata: object_size bigint", "+ file_metadata: object_size integer"],
        ),
        (
            "ALTER TABLE jobs ALTER status DROP NOT NULL",
            ["- jobs: status text not null default 'SCHEDULED'::text", "+ jobs: status text default 'SCHEDULED'::text"],
        ),
        (
            "ALTER TABLE manifest_files ALTER kind SET DEFAULT 'x'",
            [
                "- manifest_files: kind text not null default 'unknown'::text",
                "+ manifest_files: kind text not null default 'x'::text",
            ],
        ),
        (
            "ALTER TABLE jobs ALTER id SET GENERATED BY DEFAULT",
            ["- jobs: id bigint not null identity always", "+ jobs: id bigint not null identity by default"],
        ),
        ("CREATE INDEX ON jobs_status (status)", ["+ jobs_status: index btree (status)"]),
        (
            "CREATE UNIQUE INDEX ON workers (heartbeat_at) WHERE id > 1",
            ["+ workers: UNIQUE index btree (heartbeat_at) WHERE (id > 1)"],
        ),
        ("ALTER TABLE workers ADD UNIQUE (info)", ["+ workers: UNIQUE (info)"]),
        ("ALTER TABLE workers ADD CHECK (id > 0) NOT VALID", ["+ workers: CHECK ((id > 0)) NOT VALID"]),
        ("DROP TABLE footer_cache", ["- footer_cache: the table"]),
        ("CREATE RULE r AS ON DELETE TO tags DO INSTEAD NOTHING", ["+ tags: rule r"]),
        (
            "CREATE TRIGGER t BEFORE UPDATE ON tags EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            ["+ tags: trigger t"],
        ),
        (
            r"UPDATE _sqlx_migrations SET checksum = '\x00' WHERE version = 20241021142330",
            ["20241021142330 initial has another SHA-384 than amp's"],
        ),
        (
            "UPDATE _sqlx_migrations SET success = false WHERE version = 20241021142330",
            ["20241021142330 initial is recorded as failed, or as not finished"],
        ),
        (
            "UPDATE _sqlx_migrations SET description = 'other' WHERE version = 20241021142330",
            ["20241021142330 other is called initial by amp"],
        ),
        (
            "INSERT INTO _sqlx_migrations SELECT 20260401000000, 'to come', now(), true, '', 1",
            ["20260401000000 to come is none of amp's migrations of 2026-03"],
        ),
    ],
)
async def test_what_is_different_is_named(amps: Database, change: str, problems: list[str]) -> None:
    """A column, type, default, key, index, check, trigger or row more, less or other: nothing is written."""
    await amps.execute(change)
    with pytest.raises(library.MigrationConflict) as error:
        await library.baseline(amps.url, source="sqlx")
    assert str(error.value).splitlines() == [
        "this is not the database of amp of 2026-03; nothing was recorded (-: only there, +: only here):",
        *(f"  {problem}" for problem in problems),
        f"hint: {NOT_AMPS}",
    ]
    assert await amps.fetchval(f"SELECT to_regclass('{TABLE}') IS NULL")


async def test_a_delete_rule_is_a_fact(amps: Database) -> None:
    """A foreign key that does something else when what it refers to is deleted is named."""
    name = await amps.fetchval(
        "SELECT conname FROM pg_constraint WHERE conrelid = 'footer_cache'::regclass AND contype = 'f'"
    )
    await amps.execute(
        f"ALTER TABLE footer_cache DROP CONSTRAINT {name}, ADD FOREIGN KEY (file_id) REFERENCES file_metadata"
    )
    with pytest.raises(library.MigrationConflict) as error:
        await library.baseline(amps.url, source="sqlx")
    assert error.value.message.splitlines()[1:] == [
        "  - footer_cache: FOREIGN KEY (file_id) REFERENCES file_metadata(id) ON DELETE CASCADE",
        "  + footer_cache: FOREIGN KEY (file_id) REFERENCES file_metadata(id)",
    ]


async def test_an_amp_that_is_behind_migrates_first(amps: Database) -> None:
    """What is not applied is named, and the catalog, which cannot be right, is left out."""
    await amps.execute(
        "DELETE FROM _sqlx_migrations WHERE version = 20260312000000; ALTER TABLE manifest_files DROP kind"
    )
    with pytest.raises(library.MigrationConflict) as error:
        await library.baseline(amps.url, source="auto")
    assert str(error.value) == (
        "this is not the database of amp of 2026-03; nothing was recorded (-: only there, +: only here):\n"
        f"  20260312000000 add kind to manifest files is not applied\nhint: {AMP_FIRST}"
    )


async def test_another_project_of_sqlx(database: Database) -> None:
    """Whoever forgets the folder is told so."""
    await database.execute(f"{SQLX}; INSERT INTO _sqlx_migrations SELECT 1, 'mine', now(), true, '', 1")
    with pytest.raises(
        library.MigrationConflict, match="none of the migrations in the history of sqlx is amp's"
    ) as error:
        await library.baseline(database.url, source="sqlx")
    assert error.value.hint is not None
    assert error.value.hint.startswith("no folder was named")


async def test_a_word_that_is_another_one(amps: Database) -> None:
    """A version beside --from has to be the one that amp's migrations come to."""
    first = library.read_migrations()[0].version
    with pytest.raises(library.MigrationConflict, match=f"comes to is {NEWEST}, not {first}"):
        await library.baseline(amps.url, first, source="sqlx")


async def test_every_command_names_the_way_out(ampd: Ampd, amps: Database) -> None:
    """Before anything is written, `migrate`, `status` and `--check` name the command, which then does it."""
    refusal = (
        'error: "public" is migrated by sqlx: its history "public"."_sqlx_migrations" (owner postgres) has entries, '
        "and ampd has none there\n"
        "hint: if this is amp's own database, `ampd baseline --from sqlx` proves that and records the packaged "
        "migrations as applied; else no folder was named, so these are the migrations packaged with ampd: give the "
        "folder of your project with --migrations DIR or metadata_db.migrations.dir\n"
    )
    for command in (["migrate"], ["status"], ["migrate", "--check"], ["migrate", "--dry-run"]):
        assert seen(ampd(*command, url=amps.url)) == (1, "", refusal), command
    assert await amps.fetchval(f"SELECT to_regclass('{TABLE}') IS NULL")
    process = ampd("baseline", "--from", "sqlx", "--yes", url=amps.url)
    done = f"DATABASE: recorded 7 migrations as applied; up to date, at version {NEWEST}\n"
    assert seen(process)[:2] == (0, done)
    assert seen(ampd("migrate", "--check", url=amps.url))[0] == 0
