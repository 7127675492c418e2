"""A history under a name of its own: several projects in one database, and in one schema."""

from functools import partial

import anyio
import pytest

import ampd
from ampd.config import MetadataDb, Migrations
from ampd.database_url import DatabaseUrl
from tests.scenes import scripts
from tests.servers import Database

pytestmark = pytest.mark.anyio

APPLICATION = scripts("CREATE TABLE users ()", "CREATE TABLE orders ()")
LIBRARY = scripts("CREATE TABLE jobs ()", "-- no-transaction\nCREATE INDEX CONCURRENTLY queued ON jobs ((true))")


@pytest.mark.parametrize("table", ["queue_migrations", 'its "own" 100% Table', "user", "x" * 63])
async def test_two_projects_share_a_schema(database: Database, table: str) -> None:
    """Each sees its own history alone, whatever that is called."""
    await ampd.migrate(database.url, migrations=APPLICATION)
    for _ in range(2):
        await ampd.migrate(database.url, migrations=LIBRARY, table=table)
    assert (await ampd.status(database.url, migrations=LIBRARY, table=table)).up_to_date
    assert (await ampd.status(database.url, migrations=APPLICATION)).up_to_date
    counted = await database.fetch(f"""
        SELECT version, statements_done FROM "{table.replace('"', '""')}" ORDER BY version""")
    assert [tuple(row) for row in counted] == [(1, 1), (2, 1)]


async def test_two_projects_migrate_at_once(database: Database) -> None:
    """Each has a lock of its own, so that nobody waits for the other, and ten runners of both succeed."""
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(partial(ampd.migrate, database.url, migrations=APPLICATION))
            tasks.start_soon(partial(ampd.migrate, database.url, migrations=LIBRARY, table="queue"))
    assert (await ampd.status(database.url, migrations=LIBRARY, table="queue")).up_to_date
    assert (await ampd.status(database.url, migrations=APPLICATION)).up_to_date


async def test_the_configuration_names_it(database: Database) -> None:
    """`metadata_db.migrations.table` holds for `migrate`, `status`, `baseline`, `resolve` and `open_pool`."""
    configured = MetadataDb(url=DatabaseUrl(database.url), migrations=Migrations(table="queue"))
    await ampd.baseline(configured, 1, migrations=LIBRARY)
    await database.execute("CREATE TABLE jobs ()")
    assert [each.version for each in (await ampd.migrate(configured, migrations=LIBRARY)).applied] == [2]
    async with ampd.open_pool(configured, migrations=LIBRARY) as pool:
        assert await pool.fetchval("SELECT count(*) FROM queue") == 2
    with pytest.raises(ampd.ConfigError, match="version 2 is applied, not interrupted"):
        await ampd.resolve(configured, 2, ampd.Resolution.APPLIED, migrations=LIBRARY)
    async with ampd.open_pool(MetadataDb(url=DatabaseUrl(database.url)), migrations=LIBRARY, table="queue") as pool:
        assert await pool.fetchval("SELECT to_regclass('ampd_schema_migrations')") is None


async def test_another_tool_of_the_application_is_a_warning(database: Database) -> None:
    """A library with a history of its own does not mind what the application migrates with."""
    await database.execute("CREATE TABLE alembic_version AS SELECT 'a1'::text AS version_num")
    warned: list[str] = []

    def listen(event: ampd.Event) -> None:
        if isinstance(event, ampd.Warned):
            warned.append(event.message)

    await ampd.migrate(database.url, migrations=LIBRARY, table="queue", on_event=listen)
    assert warned == [
        '"public" seems to be migrated by Alembic: "public"."alembic_version" (owner postgres) has entries; '
        "ampd runs every file all the same"
    ]


@pytest.mark.parametrize(
    ("table", "error", "message"),
    [
        ("", ampd.ConfigError, "the table's name is empty"),
        ("x" * 64, ampd.ConfigError, "the table's name is longer than 63 bytes"),
        ("pg_mine", ampd.ConfigError, "pg_mine"),
        (5, TypeError, "the name of a table is a str, not int"),
    ],
)
async def test_what_no_table_can_be_called_is_refused(table: object, error: type[Exception], message: str) -> None:
    """Before anything connects."""
    with pytest.raises(error, match=message):
        await ampd.migrate("postgresql://nobody@nowhere.invalid/x", table=table)  # type: ignore[arg-type]


async def test_a_migration_that_changes_it_is_named(database: Database) -> None:
    """The history is protected under whichever name."""
    with pytest.raises(ampd.MigrationFailed) as failure:
        await ampd.migrate(database.url, migrations=scripts("SELECT 1;\nDROP TABLE queue;"), table="queue")
    assert failure.value.message == (
        '1_step.sql:2: ampd\'s history table "public"."queue" was dropped, renamed or moved while this migration ran'
    )
