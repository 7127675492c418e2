"""Which table is the history, and what is refused in its place."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest

import ampd
from ampd.events import Event, Planned
from ampd.migration import Migration, checksum
from ampd.version import VERSION
from tests.folders import write
from tests.scenes import GENEROUS, history, meanwhile, scripts
from tests.servers import Database
from tests.strangers import TABLE

pytestmark = pytest.mark.anyio


async def test_the_history_table_is_as_the_contract_has_it(database: Database) -> None:
    """Columns, types and constraints of the table, and what a row says, are those that others rely on."""
    text = "SELECT 1;\nSELECT 2;\n"
    await ampd.migrate(database.url, migrations=(Migration(7, "a_b", "7_a_b.sql", text, checksum(text.encode())),))
    columns = await database.fetch(
        "SELECT attname, format_type(atttypid, atttypmod), attnotnull FROM pg_attribute "
        "WHERE attrelid = 'ampd_schema_migrations'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum"
    )
    assert [tuple(column) for column in columns] == [
        ("version", "bigint", True),
        ("name", "text", True),
        ("checksum", "bytea", True),
        ("started_at", "timestamp with time zone", True),
        ("finished_at", "timestamp with time zone", False),
        ("statements_done", "integer", True),
        ("applied_by", "text", True),
        ("ampd_version", "text", True),
        ("done_checksum", "bytea", False),
    ]
    key = "SELECT pg_get_constraintdef(oid) FROM pg_constraint WHERE conrelid = 'ampd_schema_migrations'::regclass"
    assert [row[0] for row in await database.fetch(f"{key} AND contype = 'p'")] == ["PRIMARY KEY (version)"]
    (row,) = await database.fetch("SELECT *, finished_at >= started_at AS in_order FROM ampd_schema_migrations")
    assert row["version"] == 7
    assert row["name"] == "a_b"
    assert row["checksum"] == sha256(text.encode()).digest()
    assert row["statements_done"] == 2
    assert row["done_checksum"] is None
    assert row["applied_by"] == "postgres"
    assert row["ampd_version"] == VERSION
    assert row["in_order"]


async def test_a_history_made_without_the_last_column_gets_it_when_it_is_needed(database: Database) -> None:
    """Earlier builds made the table without `done_checksum`, which a no-transaction migration needs."""
    await database.execute(TABLE)
    files = scripts("SELECT 1;", "-- no-transaction\nSELECT 2;")
    await ampd.migrate(database.url, migrations=files[:1])
    missing = "SELECT count(*) FROM ampd_schema_migrations h WHERE NOT to_jsonb(h) ? 'done_checksum'"
    assert await database.fetchval(missing) == 1
    await ampd.migrate(database.url, migrations=files)
    assert await database.fetchval(missing) == 0


@pytest.mark.parametrize(
    ("harm", "options"),
    [
        ("DROP TABLE ampd_schema_migrations;", {}),
        ("DELETE FROM ampd_schema_migrations;", {}),
        ("ALTER TABLE ampd_schema_migrations RENAME TO gone;", {}),
        ("DROP SCHEMA home CASCADE;", {"schema": "home"}),
        ("DROP TABLE IF EXISTS ampd_schema_migrations; CREATE TABLE ampd_schema_migrations (version bigint);", {}),
    ],
)
@pytest.mark.parametrize("before", [0, 1])
async def test_a_file_that_takes_its_own_history_away(
    database: Database, harm: str, options: dict[str, Any], before: int
) -> None:
    """Such a file fails as a whole, in its first run and later, and the history is as it was."""
    files = scripts(*["SELECT 1"] * before, f"CREATE TABLE public.kept ();\n{harm}")
    with pytest.raises(ampd.MigrationFailed) as caught, anyio.fail_after(GENEROUS):
        await ampd.migrate(database.url, migrations=files, **options)
    assert caught.value.version == before + 1
    assert await database.fetchval("SELECT to_regclass('kept')") is None
    status = await ampd.status(database.url, migrations=files, **options)
    assert status.current_version == (before or None)
    assert not status.plan.conflicts


@pytest.mark.parametrize(
    ("before", "sqlstate", "message"),
    [
        (
            "CREATE FUNCTION f() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN PERFORM 1 FROM nothing; END';"
            "CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION f()",
            "42P01",
            'relation "nothing" does not exist',
        ),
    ],
    ids=["event trigger"],
)
@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
async def test_what_is_in_the_way_of_the_history_is_no_other_runner(
    database: Database, directive: str, before: str, sqlstate: str, message: str
) -> None:
    """An error that a race of two runners could cause is told as it is when there is no other one."""
    await database.execute(before)
    with anyio.fail_after(GENEROUS), pytest.raises(ampd.MigrationFailed) as raised:
        await ampd.migrate(database.url, migrations=scripts(f"{directive}CREATE TABLE a ()"))
    assert raised.value.message == (
        f'the history table "public".ampd_schema_migrations could not be written: {message} (SQLSTATE {sqlstate})'
    )
    assert raised.value.hint == (
        "look for an event trigger, a trigger or a type that is in its way, and run again; nothing was kept"
    )


async def test_two_schemas_of_one_database_are_independent(database: Database) -> None:
    """Each schema has its own history, and the same files may be applied to each."""
    files = scripts("CREATE TABLE a ();")
    for schema in ("one", "two", "public"):
        report = await ampd.migrate(database.url, migrations=files, schema=schema)
        assert [done.version for done in report.applied] == [1], schema
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'ampd_schema_migrations'") == 3


async def test_the_history_is_found_along_the_search_path(database: Database) -> None:
    """Without a schema configured the history is where the search path finds it, else in the current schema."""
    files = scripts("CREATE TABLE a ();")
    await ampd.migrate(database.url, migrations=files)
    await database.execute("CREATE SCHEMA mine")
    role = await database.role("late", "SELECT ON ampd_schema_migrations", "USAGE, CREATE ON SCHEMA mine")
    await database.execute(f"ALTER ROLE {role.name} SET search_path = mine, public")
    assert (await ampd.status(role.url, migrations=files)).schema == "public"
    assert (await ampd.migrate(role.url, migrations=files)).applied == ()
    await database.execute("DROP TABLE ampd_schema_migrations, a")
    report = await ampd.migrate(role.url, migrations=files)
    assert (report.schema, [done.version for done in report.applied]) == ("mine", [1])
    assert await database.fetchval("SELECT to_regclass('mine.ampd_schema_migrations') IS NOT NULL")


async def test_the_history_is_not_kept_in_a_temporary_schema(database: Database) -> None:
    """A search path that begins with pg_temp leaves the history in the first schema that lasts."""
    await database.execute(f"ALTER DATABASE {database.name} SET search_path = pg_temp, public")
    files = scripts("CREATE TEMP TABLE passing ();", "CREATE TABLE public.lasting ();")
    report = await ampd.migrate(database.url, migrations=files)
    assert (report.schema, report.current_version) == ("public", 2)


async def test_a_temporary_table_of_the_same_name_is_not_the_history(database: Database) -> None:
    """A pool's connection with a temporary table named like the history is not taken in by it."""
    files = scripts("CREATE TABLE a ();")

    async def disguise(connection: asyncpg.Connection) -> None:
        await connection.execute("CREATE TEMP TABLE IF NOT EXISTS ampd_schema_migrations (version bigint)")
        await connection.execute("SET search_path = public, pg_temp")

    async with asyncpg.create_pool(database.url, min_size=1, max_size=1, setup=disguise) as pool:
        report = await ampd.migrate(pool, migrations=files)
        assert [done.version for done in report.applied] == [1]
        assert (await ampd.status(pool, migrations=files)).up_to_date
    assert await history(database) == [(1, True, 1)]


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (
            "(id integer)",
            "it has no column version, name, checksum, started_at, finished_at, statements_done, applied_by, ",
        ),
        ("AS SELECT 1::bigint AS version", "it has no column name, checksum, "),
        (
            "AS SELECT 1 AS version, 'a'::name AS name, '\\x'::bytea AS checksum, now() AS started_at, "
            "now() AS finished_at, 1 AS statements_done, 'a' AS applied_by, 'a' AS ampd_version",
            "it has a column version of type integer, and has a column name of type name",
        ),
    ],
)
async def test_a_table_that_is_no_history(database: Database, table: str, problem: str) -> None:
    """A table of that name and another shape is told, whoever comes to read or to write."""
    await database.execute(f"CREATE TABLE ampd_schema_migrations {table}")
    for run in (ampd.status, ampd.migrate):
        with pytest.raises(ampd.ConfigError) as raised:
            await run(database.url, migrations=scripts("SELECT 1"))
        assert "is not ampd's history table, or was changed by hand: " + problem in raised.value.message
        assert raised.value.hint == (
            "undo the change; or if another program has made the table, keep the history under another name with "
            "metadata_db.migrations.table, or in a schema of its own with metadata_db.schema"
        )


async def test_a_history_that_moves_between_plan_and_turn(database: Database) -> None:
    """What another runner has applied since the plan was made is seen under the lock, and judged anew."""
    files = scripts("CREATE TABLE t ()")

    def another_is_faster(event: Event) -> None:
        if isinstance(event, Planned):
            later = msgspec.structs.replace(files[0], version=2, sql="CREATE TABLE u ()")
            meanwhile(lambda: ampd.migrate(database.url, migrations=[later]))

    with pytest.raises(ampd.MigrationConflict, match="1 step is not applied and 2 already is"):
        await ampd.migrate(database.url, migrations=files, on_event=another_is_faster)
    assert await database.fetchval("SELECT to_regclass('t')") is None


# --- another project's history


@pytest.mark.any_server
@pytest.mark.parametrize("out_of_order", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [(1, 2024), (2024, 1)], ids=["theirs above", "theirs below"])
async def test_another_projects_history_is_refused_by_every_call(
    database: Database, tmp_path: Path, ours: int, theirs: int, out_of_order: bool
) -> None:
    """Whichever way round the versions lie, nothing is applied, resolved, shown as ahead or opened."""
    folders = [write(tmp_path / str(version), {f"{version}_a{version}.sql": "SELECT 1;"}) for version in (ours, theirs)]
    write(folders[0], {f"{ours}_a{ours}.sql": "CREATE TABLE t ();"})
    await ampd.migrate(database.url, migrations=ampd.read_migrations(folders[1]))
    policy = ampd.Migrations(dir=folders[0], allow_out_of_order=out_of_order)
    configured, heard = ampd.MetadataDb(url=ampd.DatabaseUrl(database.url), migrations=policy), list[ampd.Event]()

    async def opened(*, auto_migrate: bool) -> None:
        async with ampd.open_pool(msgspec.structs.replace(configured, auto_migrate=auto_migrate)):
            pytest.fail("a service has started on another project's history")

    for call in (
        lambda: ampd.migrate(configured, on_event=heard.append),
        lambda: ampd.status(configured),
        lambda: ampd.resolve(configured, theirs, ampd.Resolution.APPLIED),
        lambda: ampd.resolve(configured, theirs, ampd.Resolution.ROLLED_BACK),
        lambda: opened(auto_migrate=False),
        lambda: opened(auto_migrate=True),
    ):
        with pytest.raises(ampd.MigrationConflict, match=r"is the history of another project: none of") as error:
            await call()
        assert f"history: {theirs} a{theirs}, last at" in error.value.message
        assert "allow_out_of_order" not in str(error.value)
    assert [type(event) for event in heard] == [ampd.Finished]  # and no plan, which would be of ahead or pending
    assert await history(database) == [(theirs, True, 1)]


async def test_an_unfinished_row_is_never_taken_for_a_file(database: Database) -> None:
    """Not even for one whose name says what the history says of that row."""
    text = "-- no-transaction\nSELECT 1;\nSELECT 1/0;\n"
    with pytest.raises(ampd.MigrationFailed):
        await ampd.migrate(database.url, migrations=(Migration(1, "x", "1_x.sql", text, checksum(text.encode())),))
    for name in ("x", "x unfinished", "x\n"):
        renamed = Migration(1, name, f"1_{name}.sql", text, checksum(text.encode()))
        with pytest.raises(ampd.MigrationFailed, match="division by zero"):
            await ampd.migrate(database.url, migrations=(renamed,))


async def test_a_row_too_large_is_refused_although_the_files_agree(database: Database) -> None:
    """A row that ampd cannot have written is not passed over when the history is compared with the files."""
    files = scripts("SELECT 1")
    await ampd.migrate(database.url, migrations=files)
    await database.execute(
        "ALTER TABLE ampd_schema_migrations ALTER applied_by SET STORAGE EXTERNAL; "
        f"UPDATE ampd_schema_migrations SET applied_by = repeat('x', {10**5})"
    )
    with pytest.raises(ampd.ConfigError, match="rows of a size"):
        await ampd.migrate(database.url, migrations=files)
