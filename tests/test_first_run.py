"""What stands in the way of a first run: a history that is not seen, another tool's, and tables of an application."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import ampd as library
from ampd.history import first_run
from ampd.history.first_run import TOOLS, FirstRun, Neighbour, Neighbours, tool_of
from tests.folders import write
from tests.scenes import Heard, scripts
from tests.servers import Ampd, Database, Role

pytestmark = pytest.mark.anyio

FILES = scripts("CREATE TABLE t ()")
NO_FOLDER = (
    "no folder was named, so these are the migrations packaged with ampd: give the folder of your project with "
    "--migrations DIR or metadata_db.migrations.dir"
)

BY_WORD = "if these tables are amp's, `ampd baseline VERSION` records its migrations up to VERSION as applied; "


async def histories(database: Database) -> list[str]:
    """Return the schemas that hold a history."""
    rows = await database.fetch(
        "SELECT schemaname FROM pg_tables WHERE tablename = 'ampd_schema_migrations' ORDER BY 1"
    )
    return [row[0] for row in rows]


def configured(url: str, folder: Path | None = None) -> library.MetadataDb:
    """Return the configuration of a database and, where there is one, a folder."""
    return library.MetadataDb(url=library.DatabaseUrl(url), migrations=library.Migrations(dir=folder))


async def refusals(metadata_db: library.MetadataDb) -> set[tuple[type[library.AmpdError], str]]:
    """Return how each call refuses, all of which have to."""

    async def opened(*, auto_migrate: bool) -> None:
        async with library.open_pool(replace(metadata_db, auto_migrate=auto_migrate)):
            pass

    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: library.migrate(metadata_db),
        lambda: library.status(metadata_db),
        lambda: library.resolve(metadata_db, 1, library.Resolution.APPLIED),
        lambda: opened(auto_migrate=False),
        lambda: opened(auto_migrate=True),
    ]
    found = set()
    for call in calls:
        with pytest.raises(library.AmpdError) as error:
            await call()
        found.add((type(error.value), str(error.value)))
    return found


# --- a history of ours in another schema


def unseen(elsewhere: str, here: str) -> str:
    """Return the refusal of a run that would begin a second history."""
    return (
        f'there is no history of migrations in "{here}", but one in "{elsewhere}"."ampd_schema_migrations" '
        "(owner postgres): everything would be applied again, and recorded in a second history\n"
        f'hint: to go on with that history set metadata_db.schema = "{elsewhere}", or let the search path lead there; '
        f'to begin one in "{here}" all the same set metadata_db.schema = "{here}"'
    )


async def test_the_search_path_of_one_url(database: Database, tmp_path: Path) -> None:
    """What one URL's search path has led to is not applied again by a URL without it, whatever the call."""
    folder = write(tmp_path / "m", {"1_step.sql": "CREATE TABLE t ();"})
    await database.execute("CREATE SCHEMA app")
    await library.migrate(f"{database.url}?options=-csearch_path%3Dapp", migrations=FILES)
    assert await refusals(configured(database.url, folder)) == {(library.ConfigError, unseen("app", "public"))}
    assert await histories(database) == ["app"]
    assert not (await library.migrate(database.url, migrations=FILES, schema="app")).applied


@pytest.mark.parametrize("whose", ["DATABASE {database}", "ROLE postgres IN DATABASE {database}"])
async def test_a_migration_that_changes_the_search_path_to_come(database: Database, whose: str) -> None:
    """A first run may move the search path of the next one, which then does not begin anew."""
    statement = f"ALTER {whose.format(database=database.name)} SET search_path = app"
    files = scripts(f"CREATE SCHEMA app; {statement}", "CREATE TABLE t ()")
    await library.migrate(database.url, migrations=files[:1])
    with pytest.raises(library.ConfigError) as error:
        await library.migrate(database.url, migrations=files)
    assert str(error.value) == unseen("public", "app")
    assert await histories(database) == ["public"]


async def test_a_schema_that_is_set_begins_a_history_with_a_warning(database: Database) -> None:
    """Several projects may share a database: with `schema` it is said, once, that there is another history."""
    await library.migrate(database.url, migrations=FILES)
    heard = Heard()
    await library.migrate(database.url, migrations=FILES, schema="app", on_event=heard)
    await library.migrate(database.url, migrations=FILES, schema="app", on_event=heard)
    assert [event.message for event in heard.of(library.Warned)] == [
        'a history is begun in "app", and there is one in "public"."ampd_schema_migrations" (owner postgres) as well, '
        "which is left alone"
    ]
    assert await histories(database) == ["app", "public"]
    await library.migrate(database.url, migrations=FILES, schema="third", on_event=heard)
    assert heard.of(library.Warned)[-1].message == (
        'a history is begun in "third", and there are some in "app"."ampd_schema_migrations" (owner postgres), '
        '"public"."ampd_schema_migrations" (owner postgres) as well, which are left alone'
    )


async def test_a_strangers_history_is_no_reason(database: Database) -> None:
    """A table of that name that a stranger has filled keeps nobody from a first run; neither does one without rows."""
    stranger = await database.role("stranger", f"CREATE ON DATABASE {database.name}")
    async with database.connect(stranger.url) as connection:
        await connection.execute("CREATE SCHEMA trap; CREATE TABLE trap.ampd_schema_migrations AS SELECT 1 AS version;")
    await database.execute("CREATE SCHEMA empty; CREATE TABLE empty.ampd_schema_migrations (version int)")
    heard = Heard()
    await library.migrate(database.url, migrations=FILES, on_event=heard)
    assert [event.message for event in heard.of(library.Warned)] == [
        'a history is begun in "public", and there is one in "trap"."ampd_schema_migrations" '
        f"(owner {stranger.name}) as well, which is left alone"
    ]


async def test_the_history_of_whoever_connects_is_a_reason(database: Database) -> None:
    """A role that is no superuser trusts what is its own."""
    role = await database.role("app", f"CREATE ON DATABASE {database.name}", "ALL ON SCHEMA public")
    await library.migrate(role.url, migrations=FILES, schema="app")
    with pytest.raises(library.ConfigError, match=r'there is no history of migrations in "public", but one in "app"'):
        await library.migrate(role.url, migrations=FILES)


# --- another tool's history

SQLX = "CREATE TABLE _sqlx_migrations (version bigint, description text, success bool, checksum bytea)"


async def test_another_tools_history(database: Database, tmp_path: Path) -> None:
    """Where another tool has migrated the schema nothing is applied; an empty history of it is no history."""
    folder = write(tmp_path / "m", {"1_step.sql": "CREATE TABLE t ();"})
    await database.execute(SQLX)
    assert (await library.status(database.url, migrations=FILES)).plan.pending
    await database.execute("INSERT INTO _sqlx_migrations VALUES (1)")
    message = (
        '"public" is migrated by sqlx: its history "public"."_sqlx_migrations" (owner postgres) has entries, and ampd '
        "has none there\n"
        "hint: ampd would run every file from the beginning: if sqlx has applied them, `ampd baseline --from "
        "sqlx` checks that and records it; if they are others, give them a schema of their own with "
        "metadata_db.schema; if what sqlx has made is gone from here, rename its table"
    )
    assert await refusals(configured(database.url, folder)) == {(library.MigrationConflict, message)}
    assert await histories(database) == []
    assert (await library.migrate(database.url, migrations=FILES, schema="app")).applied


async def test_the_histories_of_several_tools(database: Database) -> None:
    """An older tool's table may have been left behind: all are named, for whoever knows which one is in use."""
    await database.execute("CREATE TABLE alembic_version AS SELECT 'x' AS version_num")
    await database.execute("CREATE TABLE schema_migrations AS SELECT 61 AS version, false AS dirty")
    with pytest.raises(library.MigrationConflict) as error:
        await library.migrate(database.url, migrations=FILES)
    assert str(error.value) == (
        '"public" is migrated by several tools, whose histories have entries, and ampd has none there: Alembic, '
        '"public"."alembic_version" (owner postgres); golang-migrate, "public"."schema_migrations" (owner postgres)\n'
        "hint: ampd would run every file from the beginning: if one of them has applied them, "
        "`ampd baseline --from alembic` or `ampd baseline --from golang-migrate` checks that and records it; if they "
        "are others, give them a schema of their own with metadata_db.schema; if what one of them has made is gone "
        "from here, rename its table"
    )


async def test_tables_of_one_tool(database: Database) -> None:
    """Rails keeps two tables, one of which is called as that of dbmate; it is one tool."""
    await database.execute("CREATE TABLE ar_internal_metadata AS SELECT 'k' AS key, 'v' AS value, now() AS created_at")
    await database.execute("CREATE TABLE schema_migrations AS SELECT '1' AS version")
    with pytest.raises(library.MigrationConflict, match=r'^"public" is migrated by Rails: its history .*"ar_internal'):
        await library.migrate(database.url, migrations=FILES)


async def test_a_table_that_is_only_named_so(database: Database) -> None:
    """An application's own schema_migrations is not another tool's history, nor is one that a stranger has planted."""
    stranger = await database.role("stranger", "ALL ON SCHEMA public")
    await database.execute("CREATE TABLE schema_migrations AS SELECT 1 AS version, 'x' AS note")
    async with database.connect(stranger.url) as connection:
        await connection.execute("CREATE TABLE alembic_version AS SELECT 'x' AS version_num")
    heard = Heard()
    await library.migrate(database.url, migrations=FILES, on_event=heard)
    assert [event.message for event in heard.of(library.Warned)] == [
        f'"public" seems to be migrated by Alembic: "public"."alembic_version" (owner {stranger.name}) has entries; '
        "ampd runs every file all the same"
    ]


async def test_a_tool_with_a_schema_of_its_own(database: Database) -> None:
    """Of a tool that keeps its history elsewhere nobody knows which schema it migrates: that is a warning."""
    await database.execute(
        "CREATE SCHEMA drizzle; CREATE TABLE drizzle.__drizzle_migrations (hash text, created_at int)"
    )
    await database.execute("INSERT INTO drizzle.__drizzle_migrations VALUES ('x')")
    heard = Heard()
    await library.migrate(database.url, migrations=FILES, on_event=heard)
    assert [event.message for event in heard.of(library.Warned)] == [
        "this database is migrated by Drizzle as well, whose history is "
        '"drizzle"."__drizzle_migrations" (owner postgres)'
    ]


def table(name: str, columns: str, *, schema: str = "public", trusted: bool = True) -> Neighbour:
    """Return a table as the catalog shows it."""
    return Neighbour(schema, name, "amp", trusted, frozenset(columns.split()))


@pytest.mark.parametrize(
    ("name", "columns", "expected"),
    [
        ("_sqlx_migrations", "version description installed_on success checksum execution_time", "sqlx"),
        (
            "flyway_schema_history",
            "installed_rank version description type script checksum installed_by installed_on execution_time success",
            "Flyway",
        ),
        ("schema_version", "installed_rank version script success", "Flyway"),
        ("schema_version", "version", "tern"),
        ("schema_version", "version since", None),
        ("alembic_version", "version_num", "Alembic"),
        ("alembic_version", "version_num note", None),
        ("goose_db_version", "id version_id is_applied tstamp", "goose"),
        ("schema_migrations", "version dirty", "golang-migrate"),
        ("schema_migrations", "version", "dbmate or Rails"),
        ("schema_migrations", "version inserted_at", "Ecto"),
        ("schema_migrations", "version applied_by", None),
        ("ar_internal_metadata", "key value created_at updated_at", "Rails"),
        ("pgmigrations", "id name run_on", "node-pg-migrate"),
        ("_yoyo_migration", "migration_hash migration_id applied_at_utc", "yoyo"),
        ("refinery_schema_history", "version name applied_on checksum", "refinery"),
        ("django_migrations", "id app name applied", "Django"),
        ("_prisma_migrations", "id checksum finished_at migration_name logs started_at", "Prisma"),
        ("databasechangelog", "id author filename dateexecuted md5sum", "Liquibase"),
        ("__diesel_schema_migrations", "version run_on", "Diesel"),
        ("knex_migrations", "id name batch migration_time", "Knex"),
        ("migrations", "id timestamp name", "TypeORM"),
        ("migrations", "id migration batch", "Laravel"),
        ("migrations", "id bird season", None),
        ("SequelizeMeta", "name", "Sequelize"),
        ("t", "version", None),
    ],
)
def test_whose_history_a_table_is(name: str, columns: str, expected: str | None) -> None:
    """A tool is known by its table and columns together; an application may name its own tables as it likes."""
    tool = tool_of(table(name, columns))
    assert (tool and tool.name) == expected


def test_every_tool_is_found_in_its_table() -> None:
    """No entry of the list hides another one."""
    for tool in TOOLS:
        assert tool_of(Neighbour(tool.schema or "public", tool.table, "amp", True, tool.columns)) == tool


# --- tables where the packaged migrations would go


async def test_the_packaged_migrations_do_not_go_among_other_tables(database: Database) -> None:
    """Whoever forgets the folder gets none of amp's tables, and is told how to name it."""
    await database.execute("CREATE TABLE customers (); CREATE TABLE orders (); CREATE TABLE a (); CREATE TABLE b ()")
    message = (
        '"public" already contains tables: "public"."a" (owner postgres), "public"."b" (owner postgres), '
        '"public"."customers" (owner postgres) and others; amp\'s own would be created among them\n'
        f"hint: {NO_FOLDER}; {BY_WORD}to have amp's schema in this database as well, set metadata_db.schema to "
        "another one"
    )
    assert await refusals(configured(database.url)) == {(library.ConfigError, message)}
    assert await histories(database) == []
    assert (await library.migrate(database.url, migrations=library.read_migrations())).applied


async def test_a_strangers_tables_and_those_of_extensions_are_no_reason(database: Database) -> None:
    """Nobody can keep amp from its database by planting a table, and what an extension has brought is not counted."""
    stranger = await database.role("stranger", "ALL ON SCHEMA public")
    async with database.connect(stranger.url) as connection:
        await connection.execute('CREATE TABLE "tr\x1bap" ()')
    await database.execute("CREATE TABLE spatial_ref_sys (id int); ALTER EXTENSION plpgsql ADD TABLE spatial_ref_sys")
    heard = Heard()
    assert (await library.migrate(database.url, on_event=heard)).applied
    assert [event.message for event in heard.of(library.Warned)] == [
        f'"public" already contains tables: "public"."tr\\x1bap" (owner {stranger.name}); '
        "amp's own are created among them"
    ]


@pytest.mark.any_server
async def test_the_command_line_says_the_same_whatever_the_command(ampd: Ampd, database: Database) -> None:
    """Neither a status nor a check nor a dry run promises what a run would refuse; nor does `solo`."""
    await database.execute("CREATE TABLE customers ()")
    text = (
        'error: "public" already contains tables: "public"."customers" (owner postgres); amp\'s own would be created '
        f"among them\nhint: {NO_FOLDER}; {BY_WORD}to have amp's schema in this database as well, "
        "set metadata_db.schema to another one\n"
    )
    for command in (["migrate"], ["migrate", "--check"], ["migrate", "--dry-run"], ["status"], ["solo", "--once"]):
        process = ampd(*command, url=database.url)
        assert (process.returncode, process.stdout, process.stderr) == (1, "", text), command
    process = ampd("status", "--json", url=database.url)
    document = json.loads(process.stdout)
    assert (document["result"], document["error"]["code"]) == ("failed", "config")


# --- the judgement


def test_nothing_speaks_against_a_first_run_in_an_empty_database() -> None:
    """No error and no warning."""
    for packaged in (False, True):
        first_run = FirstRun(Neighbours(), "public", configured=False, packaged=packaged)
        assert first_run.error() is None
        assert not list(first_run.warnings())


async def test_a_stranger_who_locks_a_table_of_his_does_not_hinder_a_first_run(
    database: Database, stranger: Role
) -> None:
    """Its size is not asked for, which would wait for him."""
    await database.execute(f"CREATE SCHEMA his AUTHORIZATION {stranger.name}")
    async with database.connect(stranger.url) as holder:
        await holder.execute("CREATE TABLE his.ampd_schema_migrations (x int)")
        await holder.execute("BEGIN; LOCK TABLE his.ampd_schema_migrations")
        assert len((await library.migrate(database.url, migrations=FILES)).applied) == 1


@pytest.mark.parametrize("begun", [False, True])
async def test_a_locked_table_is_named_with_who_has_locked_it(
    database: Database, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The history, or before there is one, another table that would have to be looked at."""
    monkeypatch.setattr("ampd.history.reading.READ_LOCK_SECS", 0.1)
    monkeypatch.setattr("ampd.history.first_run.READ_LOCK_SECS", 0.1)
    if begun:
        await library.migrate(database.url, migrations=FILES)
        table = "public.ampd_schema_migrations"
    else:
        table = "public.flyway_schema_history"
        await database.execute(f"CREATE TABLE {table} (installed_rank int, script text, success boolean)")
    somebody = await database.role("somebody", f"SELECT, UPDATE ON {table}")
    async with database.connect(somebody.url, server_settings={"application_name": "payroll"}) as holder:
        await holder.execute(f"BEGIN; LOCK TABLE {table}")
        with pytest.raises(library.LockTimeout) as refusal:
            await library.migrate(database.url, migrations=FILES)
        pid = holder.get_server_pid()
    what = f"the history table {table}" if begun else table
    assert refusal.value.message.startswith(
        f"another session has locked {what}\n  blocked by pid {pid}: user {somebody.name}, application payroll, "
        "from 127.0.0.1, idle in transaction, since "
    )
    assert refusal.value.hint == f"wait for its transaction, or end it (pg_terminate_backend of {pid}), and run again"


async def test_a_type_in_the_place_of_the_history_is_named_with_its_owner(database: Database, stranger: Role) -> None:
    """No table can have the name of an enum or a domain; who has made it can rename it."""
    async with database.connect(stranger.url) as connection:
        await connection.execute("CREATE TYPE public.ampd_schema_migrations AS ENUM ('x')")
    with pytest.raises(library.PermissionDenied) as refusal:
        await library.migrate(database.url, migrations=FILES)
    assert refusal.value.message == (
        'the history table "public".ampd_schema_migrations cannot be made: a type of that name, which belongs to '
        f"{stranger.name}, is in its place"
    )
    assert refusal.value.hint == (
        'as its owner or a superuser: ALTER TYPE "public".ampd_schema_migrations RENAME TO …; or set '
        "metadata_db.schema to another schema"
    )


@pytest.mark.parametrize("command", ["migrate", "status"])
async def test_what_another_runner_has_made_meanwhile_is_no_reason(
    database: Database, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """A runner whose first read was before another's first migration finds its tables, and then its history as well."""
    await database.execute("CREATE SCHEMA other CREATE TABLE ampd_schema_migrations ()")  # worth a look: it is empty
    ask = first_run.read_neighbours

    async def late(*arguments: Any, **options: Any) -> first_run.Neighbours:
        monkeypatch.setattr(first_run, "read_neighbours", ask)
        await library.migrate(database.url)
        return await ask(*arguments, **options)

    monkeypatch.setattr(first_run, "read_neighbours", late)
    if command == "status":
        assert (await library.status(database.url)).up_to_date
    else:
        report = await library.migrate(database.url)
        assert (report.applied, report.pending, report.result) == ((), (), library.Result.UP_TO_DATE)
