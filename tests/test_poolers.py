"""Through a real PgBouncer, in transaction mode and in session mode: everything works, and nothing is left behind."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

import ampd as library
from ampd import (
    AuthenticationFailed,
    ConfigError,
    ConnectionFailed,
    DatabaseMissing,
    MigrationFailed,
    Report,
    StatementStarted,
)
from ampd.apply import table_locks
from ampd.config import Limits, MetadataDb, Migrations
from ampd.database_url import DatabaseUrl
from ampd.events import Event
from tests.scenes import (
    GENEROUS,
    Heard,
    building,
    far_away,
    folder_of,
    history,
    indexes,
    meanwhile,
    scripts,
    transaction,
    until,
    waiting_for_a_lock,
)
from tests.servers import Ampd, Database, pgbouncer

pytestmark = pytest.mark.anyio

CONNECTIONS = 6  # enough for a few sessions at once, a guard, and a look from outside
FIFTEEN_AND_MORE = 18
GATE = "SELECT pg_advisory_xact_lock(1)"
MESSY = """
CREATE TABLE {name} (id integer);
SET search_path = elsewhere; SET work_mem = '123kB'; SET lock_timeout = '3s';
CREATE TEMPORARY TABLE mine (); PREPARE planned AS SELECT 1; LISTEN ears;
SELECT pg_advisory_lock(7);
"""
FILES = (
    MESSY.format(name="t"),
    "-- no-transaction\nCREATE INDEX CONCURRENTLY t_more ON t (id, id); VACUUM t;",
    "CREATE TABLE v ()",
    f"-- no-transaction\n{MESSY.format(name='u')}RESET search_path; CREATE INDEX CONCURRENTLY t_id ON public.t (id);",
)


@pytest.fixture(params=["transaction", "session"])
async def pooled(request: pytest.FixtureRequest, database: Database) -> AsyncIterator[Database]:
    """A database behind PgBouncer; it has limits of its own, which ampd has to lift and then to leave as they were."""
    await database.execute(
        f"ALTER DATABASE {database.name} SET lock_timeout = '7s';"
        f"ALTER DATABASE {database.name} SET statement_timeout = '9min'"
    )
    size = FIFTEEN_AND_MORE if "fifteen" in request.node.name else CONNECTIONS
    with pgbouncer(database.server, request.param, default_pool_size=size) as pooler:
        yield Database(pooler, database.name)


async def assert_clean(pooled: Database, connections: int = CONNECTIONS) -> None:
    """Insist that each server connection of the pooler is as new: none can hide, for all are taken at once."""
    facts = """SELECT pg_backend_pid(), (SELECT count(*) FROM pg_prepared_statements),
        (SELECT count(*) FROM pg_listening_channels()),
        (SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()),
        (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()),
        current_setting('search_path'), current_setting('work_mem'), current_setting('lock_timeout'),
        current_setting('statement_timeout')"""
    seen = set[tuple[Any, ...]]()
    async with AsyncExitStack() as stack:
        for _ in range(connections):
            connection = await stack.enter_async_context(pooled.connect(statement_cache_size=0))
            await connection.execute("BEGIN")
            seen.add(tuple(await connection.fetchrow(facts)))
    assert len(seen) == connections
    assert {each[1:] for each in seen} == {(0, 0, 0, 0, '"$user", public', "4MB", "7s", "9min")}


async def test_a_whole_run(pooled: Database, database: Database) -> None:
    """Every sort of migration works through a pooler, and whatever it does to the session is taken back."""
    report = await library.migrate(pooled.url, migrations=scripts(*FILES))
    assert [each.version for each in report.applied] == [1, 2, 3, 4]
    assert [finished for _, finished, _ in await history(database)] == [True] * 4
    assert await indexes(database) == [("t_id", True), ("t_more", True)]
    await assert_clean(pooled)
    assert (await library.status(pooled.url, migrations=scripts(*FILES))).up_to_date


@pytest.mark.any_server
async def test_a_whole_run_among_other_traffic(pooled: Database, database: Database) -> None:
    """Where each message may meet another server connection, none of those is left with what we have set on it."""
    stop = anyio.Event()
    files = scripts("CREATE TABLE t (id integer)", *FILES[1:2])

    async def traffic() -> None:
        async with pooled.connect(statement_cache_size=0) as connection:
            while not stop.is_set():
                await connection.execute("SELECT 1")
                await anyio.sleep(0.001)

    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(traffic)
        await library.migrate(pooled.url, migrations=files)
        stop.set()
    assert await indexes(database) == [("t_more", True)]
    await assert_clean(pooled)


WHERE = [
    ("app", ""),
    (None, "SET search_path = app; "),
    (None, "SELECT set_config('search_path', 'app', false); "),
]


@pytest.mark.parametrize(("schema", "setting"), WHERE, ids=["schema", "SET", "set_config"])
async def test_what_could_land_in_a_wrong_schema(
    request: pytest.FixtureRequest, pooled: Database, database: Database, schema: str | None, setting: str
) -> None:
    """What could land in a wrong schema is refused where each message may meet another session, and nowhere else."""
    await database.execute("CREATE SCHEMA app; CREATE TABLE app.t (id integer); CREATE TABLE t (id integer)")
    files = scripts(f"-- no-transaction\nSELECT 1; {setting}CREATE INDEX CONCURRENTLY i ON t (id)")
    if "session" in request.node.name:
        await library.migrate(pooled.url, migrations=files, schema=schema)
        assert await indexes(database, "app.t") == [("app.i", True)]
        await assert_clean(pooled)
        return
    with pytest.raises(ConfigError) as raised:
        await library.migrate(pooled.url, migrations=files, schema=schema)
    what = setting.strip("; ")
    needs = f"`{what}` in line 2" if what else "schema = 'app'"
    where = f"1_step.sql:2: runs outside of a transaction, where {needs} does not reach it behind a pooler in"
    assert raised.value.message == f"{where} transaction mode"
    await database.execute(f"ALTER DATABASE {database.name} SET search_path = app")
    with pgbouncer(database.server, default_pool_size=CONNECTIONS) as fresh:
        files = scripts("-- no-transaction\nSELECT 1; CREATE INDEX CONCURRENTLY i ON t (id)")
        await library.migrate(fresh.url(database.name), migrations=files, schema=schema)
    assert await indexes(database, "app.t") == [("i", True)]  # on the search path by now


async def test_what_a_pooler_sets_on_its_connections_stays(database: Database) -> None:
    """A pooler's own `connect_query` is in force for each migration, and for everybody afterwards."""
    await database.execute("CREATE SCHEMA app")
    files = scripts(
        "CREATE TABLE a (); SET search_path = public", "CREATE TABLE b ()", "-- no-transaction\nCREATE TABLE c ()"
    )
    with pgbouncer(database.server, connect_query="SET search_path = app") as pooler:
        await library.migrate(pooler.url(database.name), migrations=files)
        async with database.connect(pooler.url(database.name), statement_cache_size=0) as connection:
            assert await connection.fetchval("SELECT current_setting('search_path')") == "app"
    names = await database.fetchval(
        "SELECT array_agg(tablename::text ORDER BY tablename) FROM pg_tables WHERE schemaname = 'app'"
    )
    assert names == ["a", "ampd_schema_migrations", "b", "c"]


@pytest.mark.parametrize(
    ("script", "left"),
    [
        ("SET work_mem = '3MB'; RESET work_mem; RESET lock_timeout", ("9MB", "8s", "app")),
        ("RESET ALL; SET search_path = public; SET work_mem = '3MB'", ("9MB", "8s", "app")),
        ("SELECT set_config('ampd.found', '{}', false); SET work_mem = '3MB'", ("9MB", "8s", "app")),
    ],
)
async def test_what_was_remembered_is_remembered_once(
    database: Database, script: str, left: tuple[str, str, str]
) -> None:
    """Each run goes by what it has found itself, and a file that takes that away leaves nothing of its own behind."""
    await database.execute("CREATE SCHEMA app")
    facts = "SELECT current_setting('work_mem'), current_setting('lock_timeout'), current_setting('search_path')"
    first = "-- no-transaction\nVACUUM pg_am"
    with pgbouncer(database.server, default_pool_size=2) as pooler:
        url = pooler.url(database.name)

        async def on_both(sql: str) -> list[asyncpg.Record]:
            async with (
                database.connect(url, statement_cache_size=0) as one,
                database.connect(url, statement_cache_size=0) as two,
            ):
                await one.execute("BEGIN")
                await two.execute("BEGIN")
                rows = [await each.fetchrow(sql) for each in (one, two)]
                await one.execute("COMMIT")
                await two.execute("COMMIT")
                return rows

        found = "set_config('lock_timeout', '8s', false), set_config('search_path', 'app', false)"
        await on_both(f"SELECT set_config('work_mem', '7MB', false), {found}")
        await library.migrate(url, migrations=scripts(first))
        assert {tuple(row) for row in await on_both(facts)} == {("7MB", "8s", "app")}
        note = "SELECT COALESCE(current_setting('ampd.found', true), '')"
        assert {tuple(row) for row in await on_both(note)} == {("",)}
        await on_both("SELECT set_config('work_mem', '9MB', false)")
        await library.migrate(url, migrations=scripts(first, script))
        assert {tuple(row) for row in await on_both(facts)} == {("9MB", "8s", "app"), left}


async def test_what_is_temporary_may_be_gone_behind_a_pooler(
    pooled: Database, database: Database, request: pytest.FixtureRequest
) -> None:
    """A table that the next message may not find is refused, lest it find a permanent one of that name."""
    files = scripts("CREATE TABLE t ()", "-- no-transaction\nCREATE TEMP TABLE t ();\nDROP TABLE t")
    if "session" in request.node.name:
        await library.migrate(pooled.url, migrations=files)
    else:
        with pytest.raises(ConfigError) as raised:
            await library.migrate(pooled.url, migrations=files)
        assert raised.value.message == (
            "2_step.sql:3: the temporary t (made in line 2) may be missing here: "
            "a pooler in transaction mode can run each statement in another session"
        )
    assert await database.fetchval("SELECT to_regclass('t') IS NOT NULL")
    await assert_clean(pooled)


async def test_a_server_connection_that_others_hide(pooled: Database) -> None:
    """What a file leaves on a server connection is taken back though the pooler hands out another one ever since."""

    async def hide() -> None:
        async with AsyncExitStack() as stack:
            every = [await stack.enter_async_context(pooled.connect(statement_cache_size=0)) for _ in range(4)]
            for each in every:
                await each.execute("BEGIN")
            for each in every:  # the first was given the one used last, and now gives it back first
                await each.execute("ROLLBACK")

    def hide_it(event: Event) -> None:
        if isinstance(event, StatementStarted) and event.number == 3:
            meanwhile(hide)

    files = scripts("-- no-transaction\nPREPARE planned AS SELECT 1; LISTEN ears; SELECT 1; VACUUM; VACUUM")
    await library.migrate(pooled.url, migrations=files, on_event=hide_it)
    await assert_clean(pooled)


async def test_a_failed_migration_leaves_nothing_behind(pooled: Database) -> None:
    """What no rollback takes back is taken back too: session locks, prepared statements, settings of sequences."""
    with pytest.raises(MigrationFailed):
        await library.migrate(pooled.url, migrations=scripts(f"{MESSY.format(name='t')}SELECT 1/0"))
    await assert_clean(pooled)


@pytest.mark.one_version
async def test_fifteen_processes_race(pooled: Database, database: Database, ampd: Ampd, tmp_path: Path) -> None:
    """Processes that start together all succeed, and each migration has run once."""
    folder = folder_of(tmp_path / "files", *FILES[:3])
    processes = [ampd.start("migrate", "--migrations", folder, url=pooled.url) for _ in range(15)]
    ended = [await anyio.to_thread.run_sync(process.communicate) for process in processes]
    assert [(process.returncode, stderr) for process, (_, stderr) in zip(processes, ended, strict=True)
            if process.returncode] == []  # fmt: skip
    assert [finished for _, finished, _ in await history(database)] == [True] * 3
    assert await indexes(database) == [("t_more", True)]
    await assert_clean(pooled, FIFTEEN_AND_MORE)


@pytest.mark.any_server
@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"], ids=["transactional", "no_transaction"])
async def test_a_kill_in_mid_statement(
    pooled: Database, database: Database, ampd: Ampd, tmp_path: Path, directive: str
) -> None:
    """A runner that is killed leaves neither a lock nor half a migration on the pooler's server connections."""
    # Before PostgreSQL 14 only the timeout ends a wait whose client is gone.
    files = (f"{directive}-- lock-timeout: 5s\nCREATE TABLE t (); SELECT 1; {GATE}; CREATE TABLE u ()",)
    async with transaction(database, GATE):
        process = ampd.start("migrate", "--migrations", folder_of(tmp_path / "files", *files), url=pooled.url)
        await waiting_for_a_lock(database)
        process.kill()
        process.communicate()

        async def freed() -> bool:
            waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = $1 AND wait_event_type = 'Lock')"
            return not await database.fetchval(waits, database.name)

        await until(freed)
    report = await library.migrate(pooled.url, migrations=scripts(*files))
    assert len(report.applied) == 1
    assert [finished for _, finished, _ in await history(database)] == [True]
    await assert_clean(pooled)


@pytest.mark.any_server
async def test_a_kill_in_mid_build(pooled: Database, database: Database, ampd: Ampd, tmp_path: Path) -> None:
    """Behind a pooler too the next runner waits for a build that goes on without its runner, and keeps its index."""
    await database.execute("CREATE TABLE t (id integer)")
    files = (FILES[1],)
    heard, reports = Heard(), list[Report]()

    async def run() -> None:
        reports.append(await library.migrate(pooled.url, migrations=scripts(*files), on_event=heard))

    async with transaction(database, "SELECT FROM t") as reader, anyio.create_task_group() as tasks:
        process = ampd.start("migrate", "--migrations", folder_of(tmp_path / "files", *files), url=pooled.url)
        orphan = await building(database)
        process.kill()
        process.communicate()
        tasks.start_soon(run)
        assert (await heard.first(library.Waiting)).holder.pid == orphan
        await reader.execute("COMMIT")
    assert [len(report.applied) for report in reports] == [1]
    assert not heard.of(library.Warned)
    assert await indexes(database) == [("t_more", True)]
    await assert_clean(pooled)
    heard.assert_adds_up()


@pytest.mark.any_server
async def test_a_full_pool_is_no_dead_server(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """With no server connection to spare for a look from outside, a long migration runs on undisturbed."""
    for name in ("QUIET_SECS", "_LOOK_EVERY_SECS"):
        monkeypatch.setattr(table_locks, name, 0.1)
    monkeypatch.setattr(table_locks, "_ANSWER_SECS", 1.0)  # in which a pooler greets even on a busy machine,
    monkeypatch.setattr(table_locks, "_SILENCE_SECS", 2.5)  # once at least in so long
    files = scripts("CREATE TABLE t (id integer); SELECT pg_sleep(4)", FILES[1])
    with pgbouncer(database.server, default_pool_size=1) as pooler:
        await library.migrate(pooler.url(database.name), migrations=files[:1])
    heard = Heard()
    with pgbouncer(database.server, default_pool_size=2) as pooler:
        async with transaction(database, "SELECT FROM t") as reader, anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: library.migrate(pooler.url(database.name), migrations=files, on_event=heard))
            await building(database)
            await anyio.sleep(4)  # with nothing heard from within
            await reader.execute("COMMIT")
    assert [finished for _, finished, _ in await history(database)] == [True, True]
    heard.assert_adds_up()


@pytest.mark.one_version
async def test_a_waiter_behind_a_pooler_gives_its_connection_back(pooled: Database, database: Database) -> None:
    """Thirty waiting runners share the server connections with the one that has the lock."""
    reports = list[Report]()

    async def run() -> None:
        reports.append(
            await library.migrate(pooled.url, migrations=scripts(f"-- lock-timeout: 0\nCREATE TABLE t (); {GATE}"))
        )

    async with transaction(database, GATE) as gate, anyio.create_task_group() as tasks:
        for _ in range(31):
            tasks.start_soon(run)
        await waiting_for_a_lock(database)
        await gate.execute("COMMIT")
    assert sorted(len(report.applied) for report in reports) == [0] * 30 + [1]
    await assert_clean(pooled)


@pytest.mark.one_version
async def test_runners_take_turns_over_a_slow_line(pooled: Database, database: Database) -> None:
    """A rollback that takes longer than closing may is waited for: all end well, and leave nothing behind."""
    files, heard, reports = scripts(*FILES), Heard(), list[Report]()

    async def run(far: Database) -> None:
        reports.append(await library.migrate(far.url, migrations=files, on_event=heard))

    async with far_away(pooled) as far, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(run, far)
    assert sorted(each.version for report in reports for each in report.applied) == [1, 2, 3, 4]
    assert [finished for _, finished, _ in await history(database)] == [True] * 4
    assert not heard.of(library.Warned)
    await assert_clean(pooled)


@pytest.mark.one_version
@pytest.mark.parametrize("pool_mode", ["transaction", "session"])
async def test_what_a_pooler_refuses(database: Database, pool_mode: str) -> None:
    """An unknown database, an unknown user and a wrong password are told apart, at once, in the pooler's own words."""
    users = Path(tempfile.gettempdir(), f"{database.name}.users")  # PgBouncer's user may not reach tmp_path
    users.write_text('"postgres" "right"\n')
    limits = Limits(connect_wait_secs=GENEROUS)
    try:
        with pgbouncer(database.server, pool_mode, auth_type="scram-sha-256", auth_file=users) as pooler:
            right = pooler.url(database.name, password="right")
            await library.migrate(right, migrations=scripts("SELECT 1"), limits=limits)
            with pytest.raises(DatabaseMissing, match="nowhere"):
                await library.migrate(pooler.url("nowhere", password="right"), migrations=(), limits=limits)
            with pytest.raises(AuthenticationFailed) as wrong:
                await library.migrate(pooler.url(database.name, password="wrong"), migrations=(), limits=limits)
            with pytest.raises(AuthenticationFailed):
                await library.migrate(pooler.url(database.name, "nobody", "right"), migrations=(), limits=limits)
    finally:
        users.unlink()
    assert "wrong" not in str(wrong.value)


async def test_a_pooler_that_has_lost_its_server(database: Database) -> None:
    """When the server ends the connection under a pooler, that is a lost connection, and running again completes."""
    files = scripts(f"-- lock-timeout: 0\nCREATE TABLE t (); {GATE}")
    with pgbouncer(database.server) as pooler:
        async with transaction(database, GATE), anyio.create_task_group() as tasks:

            async def end_it() -> None:
                (worker,) = await waiting_for_a_lock(database)
                await database.fetchval("SELECT pg_terminate_backend($1)", worker)

            tasks.start_soon(end_it)
            with pytest.raises(ConnectionFailed, match="connection to the server was lost"):
                await library.migrate(pooler.url(database.name), migrations=files)
        assert len((await library.migrate(pooler.url(database.name), migrations=files)).applied) == 1


async def test_a_role_reaches_what_runs_in_a_transaction_and_nothing_else(database: Database) -> None:
    """In transaction mode migrations run as the configured role, and it is not left behind; other files are refused."""
    owner = await database.role("owner", "USAGE, CREATE ON SCHEMA public")
    outside = "-- no-transaction\nCREATE TABLE b ();\nCREATE INDEX CONCURRENTLY i ON a (id);"
    files = scripts("CREATE TABLE a (id integer)", outside)
    migrations = Migrations(role=owner.name)
    with pgbouncer(database.server) as pooler:
        there = MetadataDb(url=DatabaseUrl(pooler.url(database.name)), migrations=migrations)
        await library.migrate(there, migrations=files[:1])
        with pytest.raises(ConfigError) as refusal:
            await library.migrate(there, migrations=files)
        assert f"where role = {owner.name!r} does not reach it behind a pooler" in refusal.value.message
        async with database.connect(pooler.url(database.name), statement_cache_size=0) as other:
            assert await other.fetchval("SELECT current_user") == "postgres"
    with pgbouncer(database.server, "session") as pooler:
        there = MetadataDb(url=DatabaseUrl(pooler.url(database.name)), migrations=migrations)
        assert len((await library.migrate(there, migrations=files)).applied) == 1
    rows = await database.fetch(
        "SELECT DISTINCT pg_get_userbyid(relowner) AS name FROM pg_class "
        "WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i')"
    )
    assert [row["name"] for row in rows] == [owner.name]
