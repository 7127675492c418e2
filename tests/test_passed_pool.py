"""A pool that a service passes to `ampd.migrate`: it comes back as it was, whatever happens."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
import asyncpg
import pytest

import ampd
from ampd.advisory_lock import lock_key
from ampd.config import HISTORY_TABLE as TABLE
from ampd.postgres.connection import Session
from tests.pools import INDEX, ONE, TWO, migration, on_each, tables, until_none_is_left
from tests.scenes import Heard, history, scripts
from tests.servers import Database

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]


@asynccontextmanager
async def lent_pool(database: Database, **options: Any) -> AsyncIterator[asyncpg.Pool]:
    """Hold a pool such as a service makes for itself, prepared statements and all."""
    async with asyncpg.create_pool(database.url, **{"min_size": 2, "max_size": 2, **options}) as pool:
        yield pool


async def end_the_sleeper(database: Database) -> None:
    """Wait for a session that is in pg_sleep, and terminate it."""
    await until_none_is_left(
        lambda: database.fetchval(
            "SELECT 1 - count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE wait_event = 'PgSleep' "
            "AND datname = current_database()"
        )
    )


async def advisory_locks(database: Database) -> int:
    """Return how many advisory locks are held in a database."""
    held: int = await database.fetchval(
        "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database "
        "WHERE locktype = 'advisory' AND datname = current_database()"
    )
    return held


@pytest.mark.parametrize("size", [1, 2])
async def test_a_lent_pool_comes_back_as_it_was(database: Database, size: int) -> None:
    """After a run every connection has its settings, its codecs and no lock, and the pool is open; one is enough."""

    async def prepare(connection: asyncpg.Connection) -> None:
        await connection.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=lambda text: f"<{text}>")

    async with lent_pool(database, min_size=size, max_size=size, init=prepare) as pool:
        settings = """SELECT pg_backend_pid(), current_user, '1'::json, (
            SELECT json_object_agg(name, setting ORDER BY name) FROM pg_settings WHERE source = 'session')"""
        before = await on_each(pool, settings)
        wild = migration(
            9,
            "wild",
            "SET search_path = pg_catalog; SET statement_timeout = '1h'; SET ROLE pg_monitor; LISTEN noise; "
            "SELECT pg_advisory_lock(7); PREPARE mine AS SELECT 1;",
        )
        report = await ampd.migrate(pool, migrations=[ONE, TWO, wild])
        assert [done.version for done in report.applied] == [1, 2, 9]
        assert report.database == f"127.0.0.1:{database.server.port}/{database.name}"
        assert sorted(await on_each(pool, settings)) == sorted(before)
        assert await on_each(pool, "SELECT pg_listening_channels()") == [[]] * size
        assert await advisory_locks(database) == 0
        assert (await ampd.status(pool, migrations=[ONE, TWO, wild])).up_to_date


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_cached_statements_survive_the_change(database: Database, in_transaction: bool) -> None:
    """No connection of a lent pool stumbles over a statement that it had prepared on the old schema."""
    await ampd.migrate(database.url, migrations=[ONE])
    async with lent_pool(database) as pool:
        assert await on_each(pool, "SELECT * FROM jobs") == [[(1,)]] * 2
        await ampd.migrate(pool, migrations=[ONE, TWO])
        assert await on_each(pool, "SELECT * FROM jobs", in_transaction=in_transaction) == [[(1, "new")]] * 2


async def test_a_pool_of_one_cannot_run_outside_of_a_transaction(database: Database) -> None:
    """A no-transaction file needs a second connection: a pool of one is told so before anything runs."""
    async with lent_pool(database, min_size=1, max_size=1) as pool:
        with pytest.raises(ampd.ConfigError) as caught:
            await ampd.migrate(pool, migrations=[ONE, INDEX])
        assert (caught.value.message, caught.value.hint) == (
            "3 job_index runs outside of a transaction and needs two connections; the pool has one",
            "give `ampd.migrate` a pool with max_size of at least 2, or the URL",
        )
        assert await pool.fetchval("SELECT to_regclass('ampd_schema_migrations')") is None
        assert caught.value.report is not None
        assert [each.version for each in caught.value.report.pending] == [1, 3]


async def test_a_pool_of_two_runs_outside_of_a_transaction(database: Database) -> None:
    """Two connections of a lent pool are enough for a no-transaction file, and both come back clean."""
    async with lent_pool(database) as pool:
        settings = "SELECT count(*) FROM pg_settings WHERE source = 'session' AND name ~ 'timeout|search_path'"
        before = await on_each(pool, settings)
        await ampd.migrate(pool, migrations=[ONE, INDEX], schema="amp")
        assert await pool.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'amp.jobs_id'::regclass")
        assert await on_each(pool, settings) == before
        assert await advisory_locks(database) == 0


async def test_a_waiting_run_lets_the_service_use_its_pool(database: Database) -> None:
    """While a run waits for another runner the pool's other connections serve, and the run follows when it may."""
    async with lent_pool(database) as pool, database.connect() as other, other.transaction():
        await other.execute(f"SELECT pg_advisory_xact_lock({lock_key('public', TABLE)})")
        run = asyncio.create_task(ampd.migrate(pool, migrations=[ONE]))
        for _ in range(50):
            assert await pool.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == 0
        assert not run.done()
        await other.execute("COMMIT; BEGIN")
        with anyio.fail_after(30):
            assert (await run).current_version == 1


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
async def test_a_lent_pool_outlives_its_backend(database: Database, directive: str) -> None:
    """When the server ends the connection that migrates, the run says so, and the pool opens another one."""
    slow = migration(4, "slow", f"{directive}SELECT pg_sleep(600);\n")
    begun = asyncio.Event()
    async with lent_pool(database) as pool:
        run = asyncio.create_task(ampd.migrate(pool, migrations=[slow], on_event=lambda event: _slow(begun, event)))
        with anyio.fail_after(30):
            await begun.wait()
            await end_the_sleeper(database)
            with pytest.raises(ampd.ConnectionFailed, match="the connection to the server was lost"):
                await run
        assert await on_each(pool, "SELECT 1") == [[(1,)]] * 2
        assert await advisory_locks(database) == 0


BRIEF = 0.2  # seconds: shorter than anything below


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
async def test_the_drivers_timeout_is_not_ours(database: Database, directive: str) -> None:
    """A pool's command_timeout ends no migration, no wait for a lock, and no wait for another runner."""
    files = [
        migration(1, "slow", f"{directive}CREATE TABLE t (); SELECT pg_sleep({3 * BRIEF})"),
        migration(2, "blocked", f"{directive}ALTER TABLE t ADD COLUMN x int"),
        migration(3, "index", "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON t (x)"),
    ]
    limits, heard, others = ampd.Limits(lock_timeout_secs=2 * BRIEF), Heard(), Heard()

    async def run(pool: asyncpg.Pool, events: Heard) -> None:
        await ampd.migrate(pool, migrations=files, limits=limits, on_event=events)

    async with (
        lent_pool(database, command_timeout=BRIEF) as pool,
        lent_pool(database, command_timeout=BRIEF) as other,
        database.connect() as reader,
        anyio.create_task_group() as tasks,
    ):
        await ampd.migrate(pool, migrations=files[:1])
        await reader.execute("BEGIN; SELECT FROM t")
        tasks.start_soon(run, pool, heard)
        await heard.first(ampd.LockRetry)
        tasks.start_soon(run, other, others)
        await asyncio.sleep(2 * BRIEF)
        await reader.execute("COMMIT")
    assert await history(database) == [(1, True, 2), (2, True, 1), (3, True, 1)]
    assert await advisory_locks(database) == 0


async def test_a_lost_connection_of_a_pool_with_a_timeout(database: Database) -> None:
    """Where the driver's timeout plays no part, a connection that the server has ended is told as that."""
    slow, begun = migration(4, "slow", "SELECT pg_sleep(600)"), asyncio.Event()
    async with lent_pool(database, command_timeout=BRIEF, ssl=False) as pool:
        run = asyncio.create_task(ampd.migrate(pool, migrations=[slow], on_event=lambda event: _slow(begun, event)))
        await begun.wait()
        await asyncio.sleep(2 * BRIEF)
        await end_the_sleeper(database)
        with pytest.raises(ampd.ConnectionFailed, match="terminat"):
            await run


def _slow(begun: asyncio.Event, event: ampd.Event) -> None:
    if isinstance(event, ampd.StatementStarted):
        begun.set()


async def cancel_by_asyncio(run: Callable[[], Coroutine[Any, Any, Any]], begun: asyncio.Event) -> None:
    """Cancel as asyncio does, by the task."""
    task = asyncio.create_task(run())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def cancel_by_anyio(run: Callable[[], Coroutine[Any, Any, Any]], begun: asyncio.Event) -> None:
    """Cancel as anyio does, by the scope, and so at every await from then on."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await begun.wait()
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("cancel", [cancel_by_asyncio, cancel_by_anyio])
@pytest.mark.parametrize(
    ("directive", "left"),
    [("", []), ("-- no-transaction\n", [(4, 1, False)])],
)
async def test_a_cancelled_run_gives_clean_connections_back(
    database: Database, cancel: Callable[..., Awaitable[None]], directive: str, left: list[tuple[object, ...]]
) -> None:
    """Cancelled in mid-statement, a run stops it, keeps what was done, and returns the connections fit for use."""
    slow = migration(4, "slow", f"{directive}CREATE TABLE slow (id int);\nSELECT pg_sleep(600);\n")
    begun = asyncio.Event()
    events: list[ampd.Event] = []

    def listen(event: ampd.Event) -> None:
        events.append(event)
        if isinstance(event, ampd.StatementStarted) and (event.version, event.number) == (4, 2):
            begun.set()

    async with lent_pool(database) as pool:
        with anyio.fail_after(30):
            await cancel(lambda: ampd.migrate(pool, migrations=[ONE, slow], on_event=listen), begun)
        assert await on_each(pool, "SELECT 1") == [[(1,)]] * 2
        assert await pool.fetch(
            "SELECT version, statements_done, finished_at IS NOT NULL FROM ampd_schema_migrations ORDER BY version"
        ) == [(1, 2, True), *left]
        assert await pool.fetchval("SELECT to_regclass('slow') IS NOT NULL") == bool(left)
        asleep = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
        assert await pool.fetchval(asleep) == 0
        assert await advisory_locks(database) == 0
    assert [event.version for event in events if isinstance(event, ampd.Applied)] == [1]


async def test_what_the_service_sets_on_its_connections_holds_throughout(database: Database) -> None:
    """What `setup` sets is in force for each migration, and for the service afterwards; what a file sets is not."""
    owner = await database.role("owner", "ALL ON SCHEMA public")
    await database.execute(f"CREATE SCHEMA app AUTHORIZATION {owner.name}")

    async def setup(connection: asyncpg.Connection) -> None:
        await connection.execute(f"SET search_path = app; SET ROLE {owner.name}; SET app.tenant = 'blue'")

    noisy = "RESET ROLE; SET search_path = public; SET app.tenant = 'red'; SET work_mem = '123kB'; SET app.mood = 'ill'"
    files = [
        migration(1, "first", f"CREATE TABLE one (); {noisy}"),
        migration(2, "second", "CREATE TABLE two ()"),
        migration(3, "third", f"-- no-transaction\nCREATE TABLE three (); SELECT 1; {noisy}; VACUUM"),
        migration(4, "fourth", "CREATE TABLE four ()"),
    ]
    names = ("search_path", "app.tenant", "work_mem")
    facts = f"SELECT current_user, {', '.join(f'current_setting({name!r})' for name in names)}"
    async with asyncpg.create_pool(database.url, min_size=2, max_size=2, setup=setup) as pool:
        await ampd.migrate(pool, migrations=files)
        for row in await asyncio.gather(*(pool.fetchrow(facts) for _ in range(4))):
            assert tuple(row) == (owner.name, "app", "blue", "4MB")
    rows = await database.fetch(
        "SELECT schemaname, tablename, tableowner FROM pg_tables WHERE schemaname IN ('app', 'public') ORDER BY 2"
    )
    assert [tuple(row) for row in rows] == [
        ("app", name, owner.name) for name in ("ampd_schema_migrations", "four", "one", "three", "two")
    ]


@pytest.mark.parametrize(
    "texts",
    [
        pytest.param(("CREATE TABLE a ()", "RESET ALL", "CREATE TABLE b ()"), id="RESET ALL"),
        pytest.param(("CREATE TABLE a ()", "DO $$ BEGIN RESET ALL; END $$", "CREATE TABLE b ()"), id="in a block"),
        pytest.param(("CREATE TABLE a ()", "DEALLOCATE ALL", "CREATE TABLE b ()"), id="DEALLOCATE ALL"),
        pytest.param(("-- no-transaction\nRESET ALL; SELECT 1; CREATE TABLE a ()", "CREATE TABLE b ()"), id="outside"),
        pytest.param(("-- no-transaction\nCREATE TABLE a ()", "CREATE TABLE b ()"), id="first of all outside"),
        pytest.param(("-- no-transaction\nCALL off()", "CREATE TABLE a ()", "CREATE TABLE b ()"), id="in a procedure"),
    ],
)
async def test_reset_all_keeps_the_role_of_a_lent_pool(database: Database, texts: tuple[str, ...]) -> None:
    """RESET ALL takes away what ampd has noted in a setting, but not the role that the pool's owner has set."""
    owner = await database.role("owner", "ALL ON SCHEMA public")
    await database.execute("CREATE PROCEDURE off() LANGUAGE plpgsql AS 'BEGIN RESET ALL; COMMIT; END'")

    async def init(connection: asyncpg.Connection) -> None:
        await connection.execute(f"SET ROLE {owner.name}")

    async with asyncpg.create_pool(database.url, min_size=2, max_size=2, init=init) as pool:
        await ampd.migrate(pool, migrations=scripts(*texts))
        assert await on_each(pool, "SELECT current_user::text") == [[(owner.name,)]] * 2
        assert await on_each(pool, "SELECT FROM pg_prepared_statements WHERE from_sql") == [[]] * 2
    owned = "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert await database.fetch(owned) == [(owner.name,)]
    assert await database.fetch("SELECT DISTINCT applied_by FROM ampd_schema_migrations") == [(owner.name,)]


async def test_a_session_authorization_comes_back(database: Database) -> None:
    """A pool whose owner has given up a superuser's rights has no more of them after a run, nor has a migration."""
    owner, other = await database.role("owner", "ALL ON SCHEMA public"), await database.role("other")
    await database.execute(f"GRANT {other.name} TO {owner.name}")

    async def init(connection: asyncpg.Connection) -> None:
        await connection.execute(f"SET SESSION AUTHORIZATION {owner.name}; SET ROLE {other.name}; RESET ROLE")

    outside = "-- no-transaction\nCREATE TABLE c (); RESET SESSION AUTHORIZATION; SELECT 1; DO $$ BEGIN END $$"
    files = scripts("CREATE TABLE a ()", f"SET ROLE {other.name}", outside, "CREATE TABLE d ()", "SELECT 1/0")
    async with asyncpg.create_pool(database.url, min_size=2, max_size=2, init=init) as pool:
        with pytest.raises(ampd.MigrationFailed, match="5_step"):
            await ampd.migrate(pool, migrations=files)
        facts = "SELECT session_user::text, current_user::text"
        assert await on_each(pool, facts) == [[(owner.name, owner.name)]] * 2
    async with database.connect() as connection:
        await init(connection)
        await ampd.migrate(connection, migrations=scripts(*(file.sql for file in files[:4]), "CREATE TABLE e ()"))
        assert await connection.fetchrow(facts) == (owner.name, owner.name)
    owned = "SELECT DISTINCT pg_get_userbyid(relowner) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert await database.fetch(owned) == [(owner.name,)]
    assert await database.fetch("SELECT DISTINCT applied_by FROM ampd_schema_migrations") == [(owner.name,)]


async def test_reset_all_keeps_the_settings_of_a_passed_connection(database: Database) -> None:
    """What the owner of a connection has set is there again afterwards; if no note of it is left, the file fails."""
    async with database.connect() as connection:
        await connection.execute("SET lock_timeout = '7s'")
        files = scripts("CREATE TABLE a ()", "RESET ALL; SET work_mem = '1MB'", "RESET ALL; DEALLOCATE ALL")
        with pytest.raises(ampd.MigrationFailed) as caught:
            await ampd.migrate(connection, migrations=files)
        assert str(caught.value) == (
            "3_step.sql: what others had set on the connection is lost: the migration ran RESET ALL and DEALLOCATE ALL "
            "at the end of the migration (SQLSTATE AM003)\n"
            "hint: nothing of this migration was kept: fix the file and run again"
        )
        assert await connection.fetchrow("SELECT current_setting('lock_timeout'), current_setting('work_mem')") == (
            "7s",
            "4MB",
        )
        assert await connection.fetch("SELECT FROM pg_prepared_statements WHERE from_sql") == []
    assert await database.fetchval("SELECT max(version) FROM ampd_schema_migrations") == 2


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
async def test_a_limit_that_was_set_to_none_comes_back(database: Database, directive: str) -> None:
    """Where ampd itself, or the file, has the same value for a transaction, the session has another one beneath it."""

    async def init(connection: asyncpg.Connection) -> None:
        await connection.execute("SET statement_timeout = 0; SET lock_timeout = '1s'; SET work_mem = '1MB'")

    async def keep(_: asyncpg.Connection) -> None:
        pass

    twice = "SET statement_timeout = '5s'; SET lock_timeout = '9s'; SET work_mem = '2MB'; SET LOCAL work_mem = '1MB'"
    names = ("statement_timeout", "lock_timeout", "work_mem")
    async with asyncpg.create_pool(database.url, min_size=2, max_size=2, init=init, reset=keep) as pool:
        await ampd.migrate(pool, migrations=scripts("CREATE TABLE a ()", f"{directive}CREATE TABLE b (); {twice}"))
        facts = f"SELECT {', '.join(f'current_setting({name!r})' for name in names)}"
        assert await on_each(pool, facts) == [[("0", "1s", "1MB")]] * 2


async def test_discard_all_on_a_lent_pool(database: Database) -> None:
    """DISCARD ALL would take the pool's own settings and the driver's statements away: it is refused before the run."""
    text = "-- no-transaction\nCREATE TABLE t ();\nDISCARD ALL"
    async with lent_pool(database) as pool:
        with pytest.raises(ampd.ConfigError) as caught:
            await ampd.migrate(pool, migrations=scripts("CREATE TABLE s ()", text))
        assert (caught.value.message, caught.value.hint) == (
            "2_step.sql:3: DISCARD ALL would also discard what the pool has set and prepared in the session",
            "give the URL, for connections of ampd's own; or take the statement out, if the migration is applied "
            "nowhere yet",
        )
        assert await pool.fetchval("SELECT to_regclass('ampd_schema_migrations')") is None


async def test_a_connection_that_cannot_be_cleaned_is_not_given_back(database: Database) -> None:
    """What a file has set with a role that is gone again, and we may not take back, goes with its connection."""
    role = await database.role("migrator", "CREATE, USAGE ON SCHEMA public")
    powerful = f"{database.name}_powerful"
    await database.execute(f"CREATE ROLE {powerful} SUPERUSER; GRANT {powerful} TO {role.name}")
    wild = f"-- no-transaction\nSET ROLE {powerful}; SET session_replication_role = replica; CREATE TABLE t ()"
    async with asyncpg.create_pool(role.url, min_size=2, max_size=2) as pool:
        await ampd.migrate(pool, migrations=[migration(1, "wild", wild)])
        assert (
            await on_each(pool, "SELECT current_user::text, current_setting('session_replication_role')")
            == [[(role.name, "origin")]] * 2
        )


async def test_a_statement_timeout_of_the_file_does_not_end_the_cleaning(database: Database) -> None:
    """However short the file wants its statements, what it has set is taken back, after an error too."""
    many = "DO $$BEGIN FOR i IN 1..300 LOOP EXECUTE 'CREATE TEMP TABLE t' || i || ' ()'; END LOOP; END$$"
    short = f"-- no-transaction\n{many}; SET work_mem = '123kB'; SET statement_timeout = '1ms'; SELECT pg_sleep(600)"
    async with lent_pool(database) as pool:
        before = await on_each(pool, "SELECT pg_backend_pid()")
        with pytest.raises(ampd.MigrationFailed, match="statement timeout"):
            await ampd.migrate(pool, migrations=[migration(1, "short", short)])
        facts = "SELECT current_setting('work_mem'), current_setting('statement_timeout')"
        assert await on_each(pool, facts) == [[("4MB", "0")]] * 2
        assert sorted(await on_each(pool, "SELECT pg_backend_pid()")) == sorted(before)


@pytest.mark.one_version
async def test_the_statement_timeout_of_a_file_is_not_meant_for_what_follows_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement runs under the limit that held when it began: none for what takes more than a moment."""
    sent: list[str] = []
    run = Session.run

    async def noted(session: Session, message: str, **options: Any) -> None:
        sent.append(message)
        await run(session, message, **options)

    monkeypatch.setattr(Session, "run", noted)
    files = scripts("CREATE TABLE t ()", "SET statement_timeout = '10s'", "CREATE TABLE u ()")
    async with database.connect() as connection:
        await ampd.migrate(connection, migrations=files)
    _, *ends = max(sent, key=len).split("SET CONSTRAINTS ALL IMMEDIATE; ")
    assert len(ends) == len(files)
    assert all(end.startswith("SET LOCAL statement_timeout = 0; ") for end in ends)


OPENED = "hint: pass a pool that has been opened, and is closed after the run"


async def test_a_pool_that_is_not_open(database: Database) -> None:
    """A pool that was not opened, or is closed, is a mistake of the caller's and told as one."""
    pool = asyncpg.create_pool(database.url, min_size=1, max_size=1)
    with pytest.raises(ampd.ConfigError) as unopened:
        await ampd.migrate(pool, migrations=[ONE])
    assert str(unopened.value) == f"the pool is not initialized\n{OPENED}"
    await (await pool).close()
    for run in (ampd.migrate, ampd.status):
        with pytest.raises(ampd.ConfigError) as closed:
            await run(pool, migrations=[ONE])
        assert str(closed.value) == f"the pool is closed\n{OPENED}"
    assert await tables(database) == []


async def test_a_pool_of_another_event_loop(database: Database) -> None:
    """A pool that was opened in another event loop is refused, and not waited for."""
    loop = asyncio.new_event_loop()
    try:
        make = asyncpg.create_pool(database.url, min_size=1, max_size=1, loop=loop)
        pool = await anyio.to_thread.run_sync(loop.run_until_complete, make)
        with pytest.raises(ampd.ConfigError) as refused:
            await ampd.migrate(pool, migrations=[ONE])
        assert str(refused.value) == (
            "the pool belongs to another event loop\nhint: open the pool in the loop that migrates"
        )
        await anyio.to_thread.run_sync(loop.run_until_complete, pool.close())
    finally:
        loop.close()


async def test_what_is_no_database() -> None:
    """Whatever is neither a URL nor a pool nor a connection nor a configuration is named and refused."""
    kinds = (
        "the database is a PostgreSQL URL, an asyncpg.Pool, an asyncpg.Connection or the metadata_db section of a "
        "configuration, not "
    )
    config = "Config; give its metadata_db"
    for source, kind in ((asyncio.Lock(), "Lock"), (None, "NoneType"), (ampd.Config(), config)):
        for run in (ampd.migrate, ampd.status):
            with pytest.raises(TypeError) as refused:
                await run(source, migrations=[ONE])
            assert str(refused.value) == kinds + kind
    url = "postgresql://alice:hush@h/d"
    of_url, own_pool = "of a URL make one: ampd.MetadataDb(url=...)", "a pool of your own goes to ampd.migrate"
    for given, kind in (
        (ampd.Config(), config),
        (url, f"str; {of_url}"),
        (ampd.DatabaseUrl(url), f"DatabaseUrl; {of_url}"),
        (None, f"NoneType; {of_url}"),
        (asyncpg.create_pool(url), f"Pool; {own_pool}"),
    ):
        with pytest.raises(TypeError) as refused:
            async with ampd.open_pool(given):  # type: ignore[arg-type]
                pass
        assert str(refused.value) == f"open_pool takes the metadata_db section of a configuration, not {kind}"
    with pytest.raises(TypeError, match="a database URL is a str, not bytes"):
        ampd.DatabaseUrl(b"postgresql://h/d")  # type: ignore[arg-type]
