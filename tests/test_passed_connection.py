"""A single connection that a service passes: it comes back as it was, and open; what it cannot bear is refused."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.to_thread
import asyncpg
import pytest

import ampd
from ampd import applying
from ampd.advisory_lock import lock_key
from ampd.config import HISTORY_TABLE as TABLE
from ampd.postgres import connection as session
from ampd.postgres import database as postgres_database
from tests.pools import INDEX, ONE, TWO, migration, tables
from tests.scenes import GENEROUS, Heard, history, until, waiting_for_a_lock
from tests.servers import Database

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]

RESOLVE = ampd.Resolution.APPLIED
FUNCTIONS: dict[str, Callable[[Any], Awaitable[object]]] = {
    "migrate": lambda connection: ampd.migrate(connection, migrations=[ONE]),
    "status": lambda connection: ampd.status(connection, migrations=[ONE]),
    "resolve": lambda connection: ampd.resolve(connection, 1, RESOLVE, migrations=[ONE]),
    "baseline": lambda connection: ampd.baseline(connection, 1, migrations=[ONE]),
}
STATE = """SELECT pg_backend_pid(), current_user, '1'::json, pg_my_temp_schema(), (
    SELECT json_object_agg(name, setting ORDER BY name) FROM pg_settings
    WHERE source = 'session' AND setting <> reset_val)"""


@asynccontextmanager
async def of_its_own(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """A connection as `asyncpg.connect` makes it."""
    async with database.connect() as connection:
        yield connection


@asynccontextmanager
async def of_a_pool(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """A connection as a pool gives it."""
    async with asyncpg.create_pool(database.url, min_size=1, max_size=1) as pool, pool.acquire() as connection:
        yield connection


WAYS = (of_its_own, of_a_pool)


@pytest.mark.parametrize("made", WAYS)
async def test_a_connection_comes_back_as_it_was(database: Database, made: Callable[[Database], Any]) -> None:
    """Whatever the files set, afterwards it is open and has its settings, its codecs and no lock; it serves again."""
    wild = migration(
        9,
        "wild",
        "SET search_path = pg_catalog; SET work_mem = '1MB'; SET ROLE pg_monitor; LISTEN noise; SET app.x = 'y'; "
        "SELECT pg_advisory_lock(7); PREPARE mine AS SELECT 1; CREATE TEMP TABLE t (); RESET statement_timeout",
    )
    async with made(database) as connection:
        await connection.set_type_codec("json", schema="pg_catalog", encoder=str, decoder=lambda text: f"<{text}>")
        await connection.execute("SET app.tenant = 'blue'; SET statement_timeout = '1h'; SET search_path = public")
        before = tuple(await connection.fetchrow(STATE))
        report = await ampd.migrate(connection, migrations=[ONE, TWO, wild])
        assert [done.version for done in report.applied] == [1, 2, 9]
        assert report.database == f"127.0.0.1:{database.server.port}/{database.name}"
        after = tuple(await connection.fetchrow(STATE))
        assert after[:3] + after[4:] == before[:3] + before[4:]
        assert await connection.fetch("SELECT FROM pg_listening_channels()") == []
        held = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
        assert await connection.fetch(held) == []
        assert (await ampd.status(connection, migrations=[ONE, TWO, wild])).up_to_date
        assert await connection.fetch("SELECT * FROM jobs") == [(1, "new")]


@pytest.mark.parametrize("made", WAYS)
@pytest.mark.parametrize("begun", ["transaction", "BEGIN", "failed"])
@pytest.mark.parametrize("name", FUNCTIONS)
async def test_a_connection_in_a_transaction(
    database: Database, made: Callable[[Database], Any], begun: str, name: str
) -> None:
    """It is refused before anything is sent, and the caller's transaction goes on as if nothing had been."""
    async with made(database) as connection:
        transaction = connection.transaction()
        if begun == "transaction":
            await transaction.start()
        else:
            await connection.execute("BEGIN")
        await connection.execute("CREATE TABLE mine ()")
        if begun == "failed":
            with pytest.raises(asyncpg.PostgresError):
                await connection.execute("SELECT 1/0")
        sent = await _last_query(database, connection)
        with pytest.raises(ampd.ConfigError) as refused:
            await FUNCTIONS[name](connection)
        assert str(refused.value) == (
            "the connection that was passed is in a transaction, which a migration would commit\n"
            "hint: pass it before the transaction begins or after it has ended; or pass a pool, or the URL"
        )
        assert await _last_query(database, connection) == sent
        assert connection.is_in_transaction()
        await (transaction.rollback() if begun == "transaction" else connection.execute("ROLLBACK"))
        assert await tables(database) == []
        await ampd.migrate(connection, migrations=[ONE])
    assert await history(database) == [(1, True, 2)]


async def _last_query(database: Database, connection: asyncpg.Connection) -> tuple[object, ...]:
    asked = "SELECT query, state_change FROM pg_stat_activity WHERE pid = $1"
    (row,) = await database.fetch(asked, connection.get_server_pid())
    return tuple(row)


async def test_every_function_takes_a_connection(database: Database) -> None:
    """Status, baseline and resolve do with it what they do with a URL, and leave it open."""
    broken = migration(4, "broken", "-- no-transaction\nSELECT 1; CALL gone();\n")
    async with database.connect() as connection:
        assert (await ampd.baseline(connection, 1, migrations=[ONE])).ready
        await connection.execute("CREATE TABLE jobs ()")
        assert not (await ampd.status(connection, migrations=[ONE, TWO])).ready
        await ampd.migrate(connection, migrations=[ONE, TWO])
        with pytest.raises(ampd.MigrationFailed):
            await ampd.migrate(database.url, migrations=[ONE, TWO, broken])
        edited = migration(4, "broken", "-- no-transaction\nSELECT 2")
        found = await ampd.status(connection, migrations=[ONE, TWO, edited])
        assert [conflict.version for conflict in found.conflicts] == [4]
        assert (await ampd.resolve(connection, 4, RESOLVE, migrations=[ONE, TWO, broken])).ready
        assert not connection.is_closed()


async def test_a_migration_that_needs_two_connections(database: Database) -> None:
    """It is refused by name, before anything is applied."""
    async with database.connect() as connection:
        with pytest.raises(ampd.ConfigError) as refused:
            await ampd.migrate(connection, migrations=[ONE, INDEX])
        assert str(refused.value) == (
            "3 job_index runs outside of a transaction and needs two connections; one was passed\n"
            "hint: give `ampd.migrate` a pool with max_size of at least 2, or the URL"
        )
        assert await connection.fetchval("SELECT 1") == 1
    assert await tables(database) == []


@pytest.mark.parametrize(
    ("made", "what"),
    [
        ("CREATE TEMP TABLE mine ()", "temporary tables"),
        ("LISTEN mine", "LISTEN"),
        ("SELECT pg_advisory_lock(7)", "advisory locks"),
        ("BEGIN; DECLARE mine CURSOR WITH HOLD FOR SELECT 1; COMMIT", "cursors WITH HOLD"),
        ("PREPARE mine AS SELECT 1", "prepared statements"),
        ("LISTEN mine; CREATE TEMP TABLE mine ()", "temporary tables, LISTEN"),
    ],
)
async def test_what_a_reset_would_take_away(database: Database, made: str, what: str) -> None:
    """A caller's own temporary tables and the like are not dropped: the run is refused before anything is applied."""
    async with database.connect() as connection:
        await database.execute("GRANT CREATE, USAGE ON SCHEMA public TO pg_monitor")
        await connection.execute(made)
        with pytest.raises(ampd.ConfigError) as refused:
            await ampd.migrate(connection, migrations=[ONE])
        assert str(refused.value) == (
            f"the connection that was passed has {what}, which the reset after a migration would take away\n"
            "hint: pass another connection, a pool or the URL"
        )
        assert await tables(database) == []
        assert (await ampd.status(connection, migrations=[ONE])).pending
        await ampd.migrate(database.url, migrations=[ONE])
        await database.execute("GRANT SELECT ON ALL TABLES IN SCHEMA public TO pg_monitor")
        assert (await ampd.migrate(connection, migrations=[ONE])).result == "up_to_date"


async def test_runs_that_share_a_connection(database: Database) -> None:
    """They take turns, and so do a pool's."""
    async with database.connect() as connection:
        runs = (ampd.migrate(connection, migrations=[ONE, TWO]) for _ in range(5))
        reports = await asyncio.gather(*runs)
        assert sorted(len(each.applied) for each in reports) == [0, 0, 0, 0, 2]
        assert await connection.fetchval("SELECT count(*) FROM ampd_schema_migrations") == 2


async def test_a_connection_that_another_task_uses(database: Database) -> None:
    """It is refused, and what the other task runs goes on, in the transaction that it has begun."""
    async with database.connect() as connection, database.connect() as holder:
        await holder.execute("SELECT pg_advisory_lock(7)")
        other = asyncio.create_task(connection.execute("BEGIN; CREATE TABLE mine (); SELECT pg_advisory_lock(7)"))
        await waiting_for_a_lock(database)
        with pytest.raises(ampd.ConfigError) as refused:
            await ampd.migrate(connection, migrations=[ONE])
        assert str(refused.value) == (
            "the connection that was passed is in use by another task\n"
            "hint: let nothing else use it during the call; or pass a pool, or the URL"
        )
        await holder.execute("SELECT pg_advisory_unlock(7)")
        assert await other == "SELECT 1"
        assert await connection.fetchval("SELECT to_regclass('mine') IS NOT NULL")


async def test_a_long_wait_leaves_the_connection_to_its_owner(database: Database) -> None:
    """While another runner has the lock the caller may use it; one that is in a transaction then is refused."""
    heard = Heard()
    async with database.connect() as connection, database.connect() as other, other.transaction():
        await other.execute(f"SELECT pg_advisory_xact_lock({lock_key('public', TABLE)})")
        run = asyncio.create_task(ampd.migrate(connection, migrations=[ONE], on_event=heard))
        await heard.first(ampd.Waiting)
        await other.execute("COMMIT; BEGIN")
        with anyio.fail_after(30):
            assert (await run).current_version == 1
        assert await connection.fetchval("SELECT 1") == 1


@pytest.mark.parametrize("made", WAYS)
async def test_a_cancelled_run_leaves_the_connection_open(
    database: Database, made: Callable[[Database], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was running is rolled back, and the connection serves on; so it does after an error."""
    for module in (session, postgres_database, applying):  # however slow the machine is
        monkeypatch.setattr(module, "CLOSE_TIMEOUT_SECS", GENEROUS)
    slow, heard = migration(4, "slow", "CREATE TABLE slow (); SET work_mem = '1MB'; SELECT pg_sleep(600)"), Heard()
    async with made(database) as connection:
        run = asyncio.create_task(ampd.migrate(connection, migrations=[ONE, slow], on_event=heard))
        await until(lambda: _asleep(database))
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert not connection.is_in_transaction()
        assert await connection.fetchval("SELECT current_setting('work_mem')") == "4MB"
        with pytest.raises(ampd.MigrationFailed):
            await ampd.migrate(connection, migrations=[ONE, migration(5, "bad", "SELECT 1/0")])
        assert await connection.fetchval("SELECT max(version) FROM ampd_schema_migrations") == 1
    heard.assert_adds_up()


async def _asleep(database: Database) -> int:
    asked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    found: int = await database.fetchval(asked)
    return found


async def test_a_connection_that_is_lost(database: Database) -> None:
    """A run says that it was lost; the next one that it is closed, and so does one that its pool has taken back."""
    slow = migration(4, "slow", "SELECT pg_sleep(600)")
    closed = (
        "the connection that was passed is closed\n"
        "hint: pass one that is open; given a pool or the URL, ampd connects again by itself"
    )
    async with database.connect() as connection:
        run = asyncio.create_task(ampd.migrate(connection, migrations=[slow]))
        await until(lambda: _asleep(database))
        await database.execute(f"SELECT pg_terminate_backend({connection.get_server_pid()})")
        with pytest.raises(ampd.ConnectionFailed, match="the connection to the server was lost"):
            await run
        assert connection.is_closed()
        with pytest.raises(ampd.ConnectionFailed) as refused:
            await ampd.migrate(connection, migrations=[ONE])
        assert str(refused.value) == closed
    async with of_a_pool(database) as lent:
        pass
    with pytest.raises(ampd.ConnectionFailed) as refused:
        await ampd.status(lent, migrations=[ONE])
    assert str(refused.value) == closed


async def test_a_connection_of_another_event_loop(database: Database) -> None:
    """It is refused, and not waited for."""
    loop = asyncio.new_event_loop()
    try:
        connect = asyncpg.connect(database.url, loop=loop)
        connection = await anyio.to_thread.run_sync(loop.run_until_complete, connect)
        with pytest.raises(ampd.ConfigError) as refused:
            await ampd.migrate(connection, migrations=[ONE])
        assert str(refused.value) == (
            "the connection belongs to another event loop\nhint: open the connection in the loop that migrates"
        )
        await anyio.to_thread.run_sync(loop.run_until_complete, connection.close())
    finally:
        loop.close()
