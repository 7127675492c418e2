"""What a no-transaction migration may conclude from the state it finds, and what it must leave alone."""

import shutil
import tempfile
from pathlib import Path

import anyio
import asyncpg
import pytest

import ampd as library
from ampd import LockRetry, LockTimeout, MigrationFailed, MigrationInterrupted, Warned
from ampd.config import Limits
from ampd.local_server.server import local_server
from tests.folders import memory
from tests.scenes import (
    GENEROUS,
    Heard,
    ampds,
    assert_no_trace,
    building,
    history,
    indexes,
    scripts,
    transaction,
    until,
    waiting_for_a_lock,
)
from tests.servers import Database, Role, Server, copy_cluster, server_of

pytestmark = pytest.mark.anyio

NT = "-- no-transaction\n"


@pytest.fixture
async def table(database: Database) -> Database:
    """A database with a table `t` of a few rows."""
    await database.execute("CREATE TABLE t (id integer, more integer); INSERT INTO t VALUES (1, 1), (2, 1), (3, 1)")
    return database


async def definitions(database: Database) -> list[str]:
    """Return the definitions of the indexes of `t`."""
    rows = await database.fetch("SELECT indexdef FROM pg_indexes WHERE tablename = 't' ORDER BY 1")
    return [row["indexdef"] for row in rows]


@pytest.mark.parametrize(
    ("before", "statement", "sqlstate", "mended"),
    [
        ("CREATE INDEX i ON t (id)", "CREATE INDEX CONCURRENTLY i ON t (more)", "42P07", "SELECT 1"),
        ("CREATE INDEX i ON t (id)", "DROP INDEX CONCURRENTLY ii", "42704", "DROP INDEX CONCURRENTLY i"),
        ("SELECT 1", "CREATE INDEX CONCURRENTLY i ON t (idd)", "42703", "CREATE INDEX CONCURRENTLY i ON t (id)"),
        ("SELECT 1", "REINDEX TABLE CONCURRENTLY tt", "42P01", "REINDEX TABLE CONCURRENTLY t"),
        ("SELECT 1", "VACUUM tt", "42P01", "VACUUM t"),
        ("SELECT 1", "BEGIN; CREATE TABLE u (); INSERT INTO t SELECT 1/0; ROLLBACK", "22012", "SELECT 1"),
    ],
    ids=["name taken", "no such index", "no such column", "reindex", "vacuum", "rolled back"],
)  # fmt: skip
async def test_what_was_refused_is_refused_again_until_it_is_mended(
    table: Database, before: str, statement: str, sqlstate: str, mended: str
) -> None:
    """A second run does not take what it finds for the work of the first, and a mended file is simply resumed."""
    await table.execute(before)
    found = await definitions(table)
    for _ in range(2):
        heard = Heard()
        with pytest.raises(MigrationFailed) as raised:
            await library.migrate(table.url, migrations=scripts(f"{NT}SELECT 1; {statement}"), on_event=heard)
        assert raised.value.sqlstate == sqlstate
        assert await history(table) == [(1, False, 1)]
        assert await definitions(table) == found
        assert not heard.of(Warned)
    report = await library.migrate(table.url, migrations=scripts(f"{NT}SELECT 1; {mended}"))
    assert [each.version for each in report.applied] == [1]
    await assert_no_trace(table)
    heard.assert_adds_up()


@pytest.mark.parametrize("guard", ["", "IF NOT EXISTS "])
async def test_an_invalid_index_of_somebody_else_is_left_alone(table: Database, guard: str) -> None:
    """What stood there before the statement was begun is not its leftover, and is neither dropped nor believed in."""
    async with table.connect() as connection:
        with pytest.raises(Exception, match="could not create unique index"):
            await connection.execute("CREATE UNIQUE INDEX CONCURRENTLY i ON t (more)")
    files = scripts(f"{NT}CREATE INDEX CONCURRENTLY {guard}i ON t (id)")
    for _ in range(2):
        with pytest.raises(MigrationFailed):
            await library.migrate(table.url, migrations=files)
        assert await indexes(table) == [("i", False)]


async def test_a_build_that_fails_is_cleared_away_and_built_again(table: Database) -> None:
    """The INVALID index that a failed build has left is its own: gone, once its cause is gone as well."""
    files = scripts(f"{NT}CREATE UNIQUE INDEX CONCURRENTLY i ON t (more)")
    with pytest.raises(MigrationFailed):
        await library.migrate(table.url, migrations=files)
    assert await indexes(table) == [("i", False)]
    await table.execute("DELETE FROM t WHERE id > 1")
    heard = Heard()
    await library.migrate(table.url, migrations=files, on_event=heard)
    (warned,) = heard.of(Warned)
    assert warned.message == "dropping the INVALID index public.i that an interrupted run left"
    assert await indexes(table) == [("i", True)]
    heard.assert_adds_up()


async def test_a_nameless_build_that_fails_is_cleared_away_and_built_again(table: Database) -> None:
    """Without a name its leftover is known by its age: what is older stays."""
    await table.execute("CREATE INDEX older ON t (id)")
    files = scripts(f"{NT}CREATE UNIQUE INDEX CONCURRENTLY ON t (more)")
    for _ in range(2):
        with pytest.raises(MigrationFailed):
            await library.migrate(table.url, migrations=files)
    await table.execute("DELETE FROM t WHERE id > 1")
    await library.migrate(table.url, migrations=files)
    assert await indexes(table) == [("older", True), ("t_more_idx", True)]


async def test_a_build_of_somebody_else_is_not_disturbed(table: Database) -> None:
    """While another session builds the very index, ampd gives up without harm to that; nor does it the second time."""
    limits, files = Limits(lock_retry_secs=0.5), scripts(f"{NT}CREATE INDEX CONCURRENTLY i ON t (id)")
    async with (
        table.connect() as builder,
        anyio.create_task_group() as tasks,
        transaction(table, "INSERT INTO t VALUES (4, 1)"),
    ):
        tasks.start_soon(builder.execute, "CREATE INDEX CONCURRENTLY i ON t (id)")
        await building(table)
        for _ in range(2):
            with pytest.raises(LockTimeout):
                await library.migrate(table.url, migrations=files, limits=limits)
    assert await indexes(table) == [("i", True)]
    with pytest.raises(MigrationFailed, match='relation "i" already exists'):
        await library.migrate(table.url, migrations=files, limits=limits)


async def test_an_index_of_that_name_on_another_table(table: Database) -> None:
    """With IF NOT EXISTS the server is content with it; the migration is not."""
    await table.execute("CREATE TABLE other (id integer); CREATE INDEX i ON other (id)")
    files = scripts(f"{NT}CREATE INDEX CONCURRENTLY IF NOT EXISTS i ON t (id)")
    with pytest.raises(MigrationFailed) as raised:
        await library.migrate(table.url, migrations=files)
    assert raised.value.message == "1_step.sql:2: there is no index i on t: something else has that name"


@pytest.mark.parametrize(
    "gone_on",
    [
        "UPDATE ampd_schema_migrations SET finished_at = now(), statements_done = 3, done_checksum = NULL",
        "UPDATE ampd_schema_migrations SET finished_at = now(), statements_done = 9",
    ],
    ids=["finished", "elsewhere"],
)
async def test_a_runner_that_comes_too_late_changes_nothing(table: Database, gone_on: str) -> None:
    """Where another runner has gone on in the meantime, what a stalled one still sends is rolled back."""
    gate = "SELECT pg_advisory_xact_lock(1)"
    files = scripts(f"{NT}INSERT INTO t VALUES (4); BEGIN; INSERT INTO t VALUES (5); {gate}; COMMIT")
    reports = list[library.Report]()

    async def run() -> None:
        reports.append(await library.migrate(table.url, migrations=files))

    async with transaction(table, gate) as stalled, anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await waiting_for_a_lock(table)
        await table.execute(gone_on)
        await stalled.execute("COMMIT")
    assert [report.applied for report in reports] == [()]
    assert await table.fetchval("SELECT array_agg(id ORDER BY id) FROM t") == [1, 2, 3, 4]
    await assert_no_trace(table)


async def test_a_query_that_merely_looks_like_a_setting_runs_once(table: Database) -> None:
    """Only what sets something is set again where it is needed; a function's name is no reason to call it again."""
    body = (
        "CREATE FUNCTION fill_asset_config() RETURNS void BEGIN ATOMIC INSERT INTO t VALUES (9); END;"
        if table.server.major >= 14
        else "CREATE FUNCTION fill_asset_config() RETURNS void LANGUAGE sql AS 'INSERT INTO t VALUES (9)';"
    )
    files = scripts(
        f"{NT}{body} SELECT fill_asset_config(); CREATE SEQUENCE s;"
        "SELECT set_config('a.b', nextval('s')::text, false); CREATE INDEX CONCURRENTLY i ON t (id);"
        "CREATE TABLE u (); CREATE TABLE v ()"
    )
    await library.migrate(table.url, migrations=files)
    assert await table.fetchval("SELECT count(*) FROM t WHERE id = 9") == 1
    assert await table.fetchval("SELECT last_value FROM s") == 1


async def test_settings_hold_as_in_one_session(table: Database) -> None:
    """What a file sets holds until it is set otherwise, rolled back or reset, whatever has become of it by then."""
    role = f"{table.name}_temporary"
    files = scripts(
        f"{NT}CREATE ROLE {role}; GRANT ALL ON SCHEMA public TO {role}; SET ROLE {role}; CREATE TABLE mine ();"
        "RESET ROLE; CREATE SCHEMA app; SET search_path = app; CREATE TABLE a (); VACUUM; CREATE TABLE b ();"
        "BEGIN; SET search_path = nowhere; ROLLBACK; CREATE TABLE c (); BEGIN; SET search_path = public; COMMIT;"
        f"CREATE TABLE d (); DROP OWNED BY {role}; DROP ROLE {role}; CREATE TABLE e (); CREATE TEMPORARY TABLE f ();"
        "CREATE INDEX CONCURRENTLY i ON t (id); INSERT INTO f DEFAULT VALUES; SELECT current_setting('search_path')"
    )
    await library.migrate(table.url, migrations=files)
    rows = await table.fetch(
        "SELECT schemaname || '.' || tablename AS name FROM pg_tables WHERE schemaname !~ '^pg_|^inf'"
    )
    names = {row["name"] for row in rows}
    assert names == {"app.a", "app.b", "app.c", "public.d", "public.e", "public.t", "public.ampd_schema_migrations"}
    await assert_no_trace(table)


async def test_settings_hold_after_an_interruption(table: Database) -> None:
    """A run that resumes has the settings that the one before had at this place, and no others."""
    await table.execute("CREATE SCHEMA app")
    text = f"{NT}SET work_mem = '99kB'; SET search_path = app; CREATE TABLE a (); RESET work_mem; SELECT 1/{{}}; {{}}"
    late = "CREATE TABLE b AS SELECT current_setting('work_mem') AS memory"
    with pytest.raises(MigrationFailed):
        await library.migrate(table.url, migrations=scripts(text.format(0, late)))
    await library.migrate(table.url, migrations=scripts(text.format(1, late)))
    assert await table.fetchval("SELECT memory FROM app.b") == "4MB"


@pytest.mark.parametrize(
    "unit",
    [
        "BEGIN; SET TRANSACTION ISOLATION LEVEL SERIALIZABLE; CREATE TABLE u AS {level}; COMMIT",
        "BEGIN ISOLATION LEVEL SERIALIZABLE; CREATE TABLE u AS {level}; COMMIT",
        "START TRANSACTION ISOLATION LEVEL SERIALIZABLE; SET TRANSACTION READ WRITE; CREATE TABLE u AS {level}; END",
    ],
)
async def test_a_transaction_of_the_file_has_the_isolation_it_asks_for(table: Database, unit: str) -> None:
    """Nothing of ours stands between its BEGIN and what has to be first in it."""
    level = "SELECT current_setting('transaction_isolation') AS level"
    await library.migrate(table.url, migrations=scripts(f"{NT}{unit.format(level=level)}"))
    assert await table.fetchval("SELECT level FROM u") == "serializable"


async def test_a_place_in_a_transaction_that_is_rolled_back(table: Database) -> None:
    """In a unit that ends in ROLLBACK too the failing statement is told by its line."""
    text = f"{NT}BEGIN;\nINSERT INTO t VALUES (1);\nALTER TABLE t ADD UNIQUE (id);\nROLLBACK;"
    await table.execute("INSERT INTO t VALUES (1)")
    with pytest.raises(MigrationFailed) as raised:
        await library.migrate(table.url, migrations=scripts(text))
    assert raised.value.line == 4


async def test_a_prepared_transaction_is_a_unit_of_its_own(table: Database) -> None:
    """PREPARE TRANSACTION ends the transaction that BEGIN has begun."""
    files = scripts(
        f"{NT}BEGIN; INSERT INTO t VALUES (4); PREPARE TRANSACTION 'p'; COMMIT PREPARED 'p'; CREATE TABLE u ()"
    )
    await library.migrate(table.url, migrations=files)
    assert await table.fetchval("SELECT count(*) FROM t WHERE id = 4") == 1


async def test_a_build_whose_end_nobody_saw_is_not_guessed_at(table: Database) -> None:
    """A nameless build that is neither there for certain nor half there waits for a person."""
    files = scripts(f"{NT}CREATE INDEX CONCURRENTLY ON t (id)")
    with pytest.raises(MigrationFailed):
        await library.migrate(table.url, migrations=scripts(f"{NT}CREATE INDEX CONCURRENTLY ON t (nowhere)"))
    await table.execute(
        f"UPDATE ampd_schema_migrations SET checksum = '\\x{files[0].checksum.hex()}', done_checksum = NULL"
    )
    with pytest.raises(MigrationInterrupted):
        await library.migrate(table.url, migrations=files)


async def test_a_runner_at_work_is_no_interruption(table: Database) -> None:
    """A second runner waits for the first to finish its file, and says so in the status meanwhile."""
    files = scripts(f"{NT}-- lock-timeout: 0\nCALL slow()")
    await table.execute(
        "CREATE PROCEDURE slow() LANGUAGE plpgsql AS 'BEGIN COMMIT; PERFORM pg_advisory_xact_lock(1); END'"
    )
    async with transaction(table, "SELECT pg_advisory_xact_lock(1)") as gate, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: library.migrate(table.url, migrations=files))

        async def at_it() -> bool:
            return len(await ampds(table)) >= 2 and (await history(table) if await there(table) else []) == [
                (1, False, 0)
            ]

        await until(at_it)
        found = await library.status(table.url, migrations=files)
        assert (found.plan.conflicts, found.plan.pending, found.up_to_date) == ((), (), False)
        (running,) = found.plan.running
        assert (running.state, running.runner and running.runner.pid in await ampds(table)) == ("running", True)
        assert found.summary() == "no migration applied, 1 running"
        with pytest.raises(library.MigrationConflict, match="is behind: 1 migration pending"):
            async with library.open_pool(library.MetadataDb(url=library.DatabaseUrl(table.url)), migrations=files):
                pass
        assert (await library.status(table.url, migrations=())).plan.ahead
        await gate.execute("COMMIT")
    with anyio.fail_after(GENEROUS):
        assert (await library.status(table.url, migrations=files)).up_to_date


async def there(database: Database) -> bool:
    """Tell whether there is a history yet."""
    return await database.fetchval("SELECT to_regclass('ampd_schema_migrations')") is not None


async def owner_of(database: Database, migrator: Role) -> str:
    """Make a role with a schema of its own name and a table `t` in it, and the migrator a member."""
    owner = f"{database.name}_owner"
    await database.execute(
        f"CREATE ROLE {owner}; GRANT {owner} TO {migrator.name}; CREATE SCHEMA {owner} AUTHORIZATION {owner};"
        f"CREATE TABLE {owner}.t (id integer); ALTER TABLE {owner}.t OWNER TO {owner}"
    )
    return owner


@pytest.mark.parametrize("inherits", ["INHERIT", "NOINHERIT"])
async def test_the_catalog_is_asked_with_the_role_of_the_file(table: Database, inherits: str) -> None:
    """What the role that a file has set finds on its search path is what counts, and it may look where we may not."""
    migrator = await table.role("migrator", "CREATE, USAGE ON SCHEMA public")
    await table.execute(f"ALTER ROLE {migrator.name} {inherits}")
    owner = await owner_of(table, migrator)
    files = scripts(f"{NT}SET ROLE {owner}; CREATE INDEX CONCURRENTLY i ON t (id)", f"{NT}SET ROLE {owner}; VACUUM t")
    await library.migrate(migrator.url, migrations=files)
    assert await indexes(table, f"{owner}.t") == [(f"{owner}.i", True)]
    assert await history(table) == [(1, True, 2), (2, True, 2)]


async def test_an_index_dropped_by_another_role_is_looked_for_where_that_role_looks(table: Database) -> None:
    """That our own search path has no such index does not mean that it is dropped."""
    migrator = await table.role("migrator", "CREATE, USAGE ON SCHEMA public")
    owner = await owner_of(table, migrator)
    await table.execute(f"CREATE INDEX i ON {owner}.t (id)")
    files = scripts(f"{NT}SET ROLE {owner}; DROP INDEX CONCURRENTLY i")
    async with transaction(table, f"SELECT FROM {owner}.t"):
        with pytest.raises(LockTimeout):
            await library.migrate(migrator.url, migrations=files, limits=Limits(lock_retry_secs=1))
    assert await indexes(table, f"{owner}.t") == [(f"{owner}.i", False)]
    await library.migrate(migrator.url, migrations=files)
    assert await indexes(table, f"{owner}.t") == []


@pytest.mark.parametrize("build", ["CREATE INDEX CONCURRENTLY ON t (id)", "CREATE INDEX CONCURRENTLY i ON t (id)"])
async def test_a_build_that_had_to_wait_for_another_was_not_begun(table: Database, build: str) -> None:
    """What was never sent to the server can simply be run later, and an index made meanwhile is not taken for it."""
    files = scripts(NT + build)
    async with transaction(table, "LOCK TABLE t IN SHARE UPDATE EXCLUSIVE MODE") as other:
        with pytest.raises(LockTimeout) as raised:
            await library.migrate(table.url, migrations=files, limits=Limits(lock_retry_secs=0.5))
        assert raised.value.message.startswith(
            f"1_step.sql:2: session {other.get_server_pid()} is building an index (or similar) on the same"
        )
    await table.execute("CREATE INDEX i ON t (more)")
    if " i " in build:
        with pytest.raises(MigrationFailed, match='relation "i" already exists'):
            await library.migrate(table.url, migrations=files)
    else:
        await library.migrate(table.url, migrations=files)
        assert await indexes(table) == [("i", True), ("t_id_idx", True)]


async def test_what_needs_something_temporary_is_not_resumed_without_it(table: Database) -> None:
    """A later session has no temporary table, and might take a permanent one of that name for it."""
    files = scripts(f"{NT}CREATE TEMP TABLE t AS SELECT 1 AS id;\nSELECT 1 / count(*) FROM gate;\nDELETE FROM t")
    await table.execute("CREATE TABLE gate (id integer)")
    with pytest.raises(MigrationFailed, match="division by zero") as raised:
        await library.migrate(table.url, migrations=files)
    hint = "it is recorded as unfinished: check how far it got; `ampd status` says how to resolve it"
    assert raised.value.hint == hint
    await table.execute("INSERT INTO gate VALUES (1)")
    with pytest.raises(MigrationInterrupted):
        await library.migrate(table.url, migrations=files)
    assert await table.fetchval("SELECT count(*) FROM t") == 3


@pytest.mark.parametrize("login", ["INHERIT", "NOINHERIT"])
async def test_the_role_that_a_login_begins_with_keeps_the_history(database: Database, login: str) -> None:
    """Logins that come and go, each with the same role by default, leave one owner behind and write as that one."""
    owner = f"{database.name}_owner"
    await database.execute(f"CREATE ROLE {owner}; GRANT CREATE, USAGE ON SCHEMA public TO {owner}")
    files = scripts(f"{NT}CREATE TABLE t (id integer); CREATE INDEX CONCURRENTLY i ON t (id)", "CREATE TABLE u ()", NT)
    for last, name in enumerate(("first", "second"), start=2):
        role = await database.role(name)
        await database.execute(
            f"ALTER ROLE {role.name} {login}; GRANT {owner} TO {role.name}; ALTER ROLE {role.name} SET role = {owner}"
        )
        await library.migrate(role.url, migrations=files[:last])
    rows = await database.fetch("SELECT DISTINCT applied_by, tableowner FROM ampd_schema_migrations, pg_tables"
                                " WHERE schemaname = 'public'")  # fmt: skip
    assert [tuple(row) for row in rows] == [(owner, owner)]


async def test_a_plain_reindex_clears_nothing_away(table: Database) -> None:
    """It leaves no copies of its own behind, and those of somebody else are not its business."""
    heard = Heard()
    limits = Limits(lock_timeout_secs=0.05)
    await table.execute("CREATE TABLE u (id integer); INSERT INTO u VALUES (1), (1); CREATE INDEX t_id ON t (id)")
    async with transaction(table, "INSERT INTO t VALUES (4, 4)") as writer, anyio.create_task_group() as tasks:

        async def fail_elsewhere() -> None:
            await heard.first(LockRetry)
            with pytest.raises(asyncpg.UniqueViolationError):
                await table.execute("CREATE UNIQUE INDEX CONCURRENTLY u_id_ccnew ON u (id)")
            await writer.execute("COMMIT")

        tasks.start_soon(fail_elsewhere)
        with anyio.fail_after(GENEROUS):
            await library.migrate(table.url, migrations=scripts(f"{NT}REINDEX TABLE t"), limits=limits, on_event=heard)
    assert await indexes(table, "u") == [("u_id_ccnew", False)]
    assert not heard.of(Warned)
    heard.assert_adds_up()


async def test_autovacuum_is_not_waited_for(server: Server) -> None:
    """Autovacuum gives way to a build by itself, though a role without privileges cannot see that it is autovacuum."""
    folder = Path(tempfile.mkdtemp(prefix="ampd-autovacuum-", dir=memory()))
    folder.chmod(0o711)
    settings = {"autovacuum": "on", "autovacuum_naptime": "1s", "fsync": "off"}
    try:
        data_dir = copy_cluster(server.cluster, folder / "db")
        async with local_server(data_dir, bindir=Path(server.bindir), tcp=True, settings=settings) as local:
            database = Database(server_of(local), "amp")
            role = await database.role("migrator", "CREATE, USAGE ON SCHEMA public")
            await database.execute(
                "CREATE TABLE t (id integer, filler text) WITH (autovacuum_vacuum_scale_factor = 0, "
                "autovacuum_vacuum_threshold = 1, autovacuum_vacuum_cost_delay = 100, autovacuum_vacuum_cost_limit = 1"
                ");"
                "INSERT INTO t SELECT i, repeat('x', 500) FROM generate_series(1, 20000) i;"
                "DELETE FROM t WHERE id % 2 = 0;"
                f"ALTER TABLE t OWNER TO {role.name}"
            )

            async def at_work() -> bool:
                locks = "SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE"
                mode = "relation = 't'::regclass AND mode = 'ShareUpdateExclusiveLock'"
                found: bool = await database.fetchval(f"{locks} {mode} AND backend_type = 'autovacuum worker')")
                return found

            await until(at_work)
            heard = Heard()
            files = scripts(f"{NT}CREATE INDEX CONCURRENTLY t_id ON t (id)")
            limits = Limits(lock_retry_secs=GENEROUS)
            await library.migrate(role.url, migrations=files, limits=limits, on_event=heard)
            assert not heard.of(LockRetry)
            assert await indexes(database) == [("t_id", True)]
    finally:
        shutil.rmtree(folder)
    heard.assert_adds_up()
