"""Locks under live traffic: short attempts, rests between them, and the names of those who stand in the way."""

import re
from collections.abc import Callable
from datetime import UTC, datetime

import anyio
import asyncpg
import pytest

import ampd as library
from ampd import Blocked, LockRetry, LockTimeout, MigrationFailed, StatementStarted, backoff
from ampd.apply import pooler, table_locks
from ampd.config import Limits
from ampd.events import Event
from ampd.history import reading
from ampd.postgres import connection, database
from tests.scenes import (
    GENEROUS,
    Heard,
    ampds,
    assert_no_trace,
    building,
    far_away,
    history,
    indexes,
    meanwhile,
    report_at_once,
    scripts,
    transaction,
    until,
    waiting_for_a_lock,
)
from tests.servers import Database, Proxy

pytestmark = pytest.mark.anyio

ADD = "ALTER TABLE t ADD COLUMN added integer"
BRIEF = Limits(lock_timeout_secs=0.1, lock_retry_secs=60)


@pytest.fixture
async def table(database: Database) -> Database:
    """A database with a table `t` that is in use."""
    await database.execute("CREATE TABLE t (id integer)")
    return database


async def free_after(retries: int, heard: Heard, blocker: asyncpg.Connection) -> None:
    """End a transaction that is in the way once so many attempts have ended at it."""

    async def tried() -> bool:
        return len(heard.of(LockRetry)) >= retries

    await until(tried)
    await blocker.execute("COMMIT")


async def test_a_busy_table_is_tried_again_until_it_is_free(table: Database) -> None:
    """A lock that cannot be had in time is tried for again and again, and the migration is applied once in the end."""
    heard = Heard()
    async with transaction(table, "SELECT FROM t") as reader, anyio.create_task_group() as tasks:
        tasks.start_soon(free_after, 3, heard, reader)
        report = await library.migrate(table.url, migrations=scripts(ADD), limits=BRIEF, on_event=heard)
    assert [each.version for each in report.applied] == [1]
    assert await history(table) == [(1, True, 1)]
    retries = heard.of(LockRetry)
    assert all(event.delay >= 5 * event.took for event in retries)
    (applied,) = heard.of(library.Applied)
    assert (applied.retries, applied.longest_attempt_secs) == (len(retries), max(event.took for event in retries))
    heard.assert_adds_up()


def test_a_rest_leaves_room_for_one_more_attempt() -> None:
    """It is five times as long as the attempt, but never so long that the limit comes before another."""
    wait = backoff.Backoff(10, longest_pause=1)
    assert 5 <= wait.rest(1) <= 6
    assert wait.rest(5) <= 5
    assert wait.rest(11) < 0


def test_an_attempt_that_is_refused_at_once_is_not_made_again_at_once() -> None:
    """The rests after such attempts grow as any pauses do."""
    wait = backoff.Backoff(1000, longest_pause=1)
    rests = [wait.rest(0) for _ in range(30)]
    assert rests[0] > 0
    assert min(rests[-10:]) >= 0.5


@pytest.mark.any_server
@pytest.mark.parametrize("directive", ["", "-- no-transaction\nSELECT 1; "], ids=["transactional", "no_transaction"])
async def test_a_busy_table_is_tried_again_over_a_slow_line(
    table: Database, monkeypatch: pytest.MonkeyPatch, directive: str
) -> None:
    """A rollback that takes longer than closing may does not end the attempts."""
    monkeypatch.setattr(backoff, "_RESTS", 0)
    heard = Heard()
    async with transaction(table, "SELECT FROM t") as reader, anyio.create_task_group() as tasks:
        tasks.start_soon(free_after, 2, heard, reader)
        async with far_away(table) as far:
            files = scripts(f"{directive}{ADD}", "CREATE TABLE u ()")
            report = await library.migrate(far.url, migrations=files, limits=BRIEF, on_event=heard)
    assert [each.version for each in report.applied] == [1, 2]


@pytest.mark.any_server
@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"], ids=["transactional", "no_transaction"])
@pytest.mark.parametrize("lent", [False, True], ids=["url", "pool"])
async def test_a_connection_that_does_not_roll_back_is_replaced(
    table: Database, monkeypatch: pytest.MonkeyPatch, directive: str, lent: bool
) -> None:
    """Where no rollback is answered in time, each attempt has a connection of its own, with what the file has set."""
    monkeypatch.setattr(backoff, "_RESTS", 0)
    for module in (connection, database, pooler):
        monkeypatch.setattr(module, "close_timeout", lambda: 0.05)
    await table.execute("CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.t ()")
    files = scripts(f"{directive}SET search_path = elsewhere; {ADD}", "CREATE TABLE u ()")
    heard = Heard()
    async with (
        transaction(table, "SELECT FROM elsewhere.t") as reader,
        Proxy(table.server.host, table.server.port, delay=0.05) as line,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(free_after, 3, heard, reader)
        url = table.url.replace(str(table.server.port), str(line.port))
        if lent:
            async with asyncpg.create_pool(url, min_size=0, max_size=2) as pool:
                report = await library.migrate(pool, migrations=files, limits=BRIEF, on_event=heard)
                assert await pool.fetchval("SELECT current_setting('search_path')") == '"$user", public'
        else:
            report = await library.migrate(url, migrations=files, limits=BRIEF, on_event=heard)
        assert line.connections > 3
    assert [each.version for each in report.applied] == [1, 2]
    columns = "SELECT count(*) FROM pg_attribute WHERE attname = 'added' AND attrelid = 'elsewhere.t'::regclass"
    assert await table.fetchval(columns) == 1
    assert await table.fetchval("SELECT to_regclass('public.u') IS NOT NULL")


@pytest.mark.any_server
async def test_nothing_is_held_while_resting(table: Database) -> None:
    """Between two attempts the runner has no transaction, no lock and no snapshot, and a reader gets through."""
    looked = 0
    held = (
        "SELECT count(*) FROM pg_stat_activity a WHERE datname = current_database() "
        "AND application_name ~ '^ampd( |$)' AND "
        "(state IS DISTINCT FROM 'idle' OR xact_start IS NOT NULL OR backend_xmin IS NOT NULL"
        " OR EXISTS (SELECT FROM pg_locks l WHERE l.pid = a.pid))"
    )

    async def nothing_is_held() -> bool:
        return not await table.fetchval(held)

    async def look() -> None:
        await until(nothing_is_held)  # the server may still be answering a look of the runner, which stands still
        async with table.connect() as reader:
            await reader.execute("SET lock_timeout = '1ms'")
            await reader.execute("SELECT FROM t")

    def on_event(event: Event) -> None:
        nonlocal looked
        if isinstance(event, LockRetry):
            assert meanwhile(lambda: ampds(table))
            meanwhile(look)
            looked += 1
        heard(event)

    heard = Heard()
    async with transaction(table, "SELECT FROM t") as reader, anyio.create_task_group() as tasks:
        tasks.start_soon(free_after, 2, heard, reader)
        await library.migrate(table.url, migrations=scripts(ADD), limits=BRIEF, on_event=on_event)
    assert looked >= 2


async def test_an_attempt_that_ends_names_who_was_in_the_way(table: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who was seen to block an attempt is told when it ends, and not only when the next one has waited as well."""
    monkeypatch.setattr(backoff, "_RESTS", 0)
    heard = Heard()
    async with transaction(table, "SELECT FROM t") as reader, anyio.create_task_group() as tasks:
        tasks.start_soon(free_after, 1, heard, reader)
        await library.migrate(table.url, migrations=scripts(ADD), on_event=heard)
        pid = reader.get_server_pid()
    told = [event for event in heard if isinstance(event, Blocked | LockRetry)]
    assert [type(event) for event in told] == [Blocked, LockRetry]
    assert isinstance(told[0], Blocked)
    assert [blocker.pid for blocker in told[0].blockers] == [pid]
    assert re.sub(r"since \S+ \S+,|\d\.\d(?= s)", "…", "\n".join(map(str, told))) == (
        "blocked for 1 s (limit 300 s) by:\n"
        f"  pid {pid}: user postgres, application ?, from 127.0.0.1, idle in transaction, … "
        "BEGIN ISOLATION LEVEL REPEATABLE READ;SELECT FROM t\n"
        "lock not available: rolled back, trying again in … s"
    )


async def test_giving_up_names_who_is_in_the_way(table: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it waits and when it gives up, the runner names the blocking session and counts those queued behind."""
    report_at_once(monkeypatch)
    limits, heard, queue = Limits(lock_timeout_secs=2, lock_retry_secs=2), Heard(), anyio.Event()
    watch = table_locks.LockMonitor.run

    async def run(monitor: table_locks.LockMonitor, first_look: float) -> None:
        await queue.wait()
        await watch(monitor, first_look)

    monkeypatch.setattr(table_locks.LockMonitor, "run", run)
    settings = {"application_name": "nightly report"}
    before = datetime.now(UTC)
    async with (
        transaction(table, "SELECT\n  1 FROM   t", server_settings=settings) as reader,
        table.connect() as queued,
        anyio.create_task_group() as tasks,
    ):

        async def queue_up() -> None:
            await waiting_for_a_lock(table)
            tasks.start_soon(queued.execute, "SELECT FROM t")
            await waiting_for_a_lock(table, count=2)
            queue.set()

        tasks.start_soon(queue_up)
        with pytest.raises(LockTimeout) as raised:
            await library.migrate(table.url, migrations=scripts(f"\n{ADD}"), limits=limits, on_event=heard)
        pid = reader.get_server_pid()
    (blocked,) = heard.of(Blocked)
    (blocker,) = blocked.blockers
    assert (blocked.version, blocked.limit, blocked.queued) == (1, 2, 1)
    assert (blocker.pid, blocker.user, blocker.application) == (pid, "postgres", "nightly report")
    assert (blocker.client, blocker.state, blocker.own_pool) == ("127.0.0.1", "idle in transaction", False)
    assert blocker.query == "BEGIN ISOLATION LEVEL REPEATABLE READ;SELECT 1 FROM t"
    assert blocker.since is not None
    assert before <= blocker.since <= datetime.now(UTC)
    error = raised.value
    assert re.sub(r"\d\.\d s", "N s", str(error)) == (
        "1_step.sql:2: canceling statement due to lock timeout (SQLSTATE 55P03); gave up after N s\n"
        f"  blocked by pid {pid}: user postgres, application nightly report, from 127.0.0.1, idle in transaction, "
        f"since {blocker.since:%Y-%m-%d %H:%M:%S%z}, BEGIN ISOLATION LEVEL REPEATABLE READ;SELECT 1 FROM t\n"
        "  1 session queued behind this migration\n"
        "1_step.sql:2:1\n"
        "  |\n"
        "2 | ALTER TABLE t ADD COLUMN added integer\n"
        "  | ^\n"
        f"hint: wait for the blocking transaction, or end it (pg_terminate_backend of {pid}), and run again; "
        "nothing of this migration was kept"
    )
    assert (error.code, error.sqlstate, error.version, error.line) == ("lock_timeout", "55P03", 1, 2)
    assert error.fields()["blockers"] == [blocker]
    await assert_no_trace(table)
    heard.assert_adds_up()


async def test_a_short_wait_needs_no_second_connection(table: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock that is had before the first look is not worth another connection."""
    monkeypatch.setattr(table_locks, "QUIET_SECS", GENEROUS)
    heard, limits = Heard(), Limits(lock_timeout_secs=2 * GENEROUS)
    most = 0
    async with transaction(table, "SELECT FROM t") as reader, anyio.create_task_group() as tasks:

        async def free_it() -> None:
            nonlocal most
            await waiting_for_a_lock(table)
            most = len(await ampds(table))
            await reader.execute("COMMIT")

        tasks.start_soon(free_it)
        await library.migrate(table.url, migrations=scripts(ADD), limits=limits, on_event=heard)
    assert most == 1
    assert not heard.of(Blocked)
    heard.assert_adds_up()


@pytest.mark.any_server
async def test_the_own_pool_in_the_way_is_named(table: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that blocks itself through the pool it lends is told so."""
    monkeypatch.setattr(table_locks, "QUIET_SECS", 0.1)
    limits = Limits(lock_timeout_secs=2, lock_retry_secs=2)
    async with asyncpg.create_pool(table.url, min_size=1, max_size=4) as pool, pool.acquire() as connection:
        async with connection.transaction():
            await connection.execute("SELECT FROM t")
            with pytest.raises(LockTimeout) as raised:
                await library.migrate(pool, migrations=scripts(ADD), limits=limits)
        pid = connection.get_server_pid()
    (blocker,) = raised.value.blockers
    assert (blocker.pid, blocker.own_pool) == (pid, True)
    assert (
        f"blocked by pid {pid}, a connection of this very process's own pool, idle in transaction\n"
        in raised.value.message
    )
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("the service blocks itself: migrate before it uses its pool")


async def test_a_deadlock_is_tried_again(table: Database) -> None:
    """A deadlock that goes against the migration rolls it back, and it is applied at the next attempt."""
    await table.execute(
        f"CREATE TABLE u (); ALTER DATABASE {table.name} SET deadlock_timeout = '50ms'; SELECT pg_advisory_lock(1)"
    )
    heard = Heard()
    script = "LOCK TABLE t; SELECT pg_advisory_xact_lock(1); LOCK TABLE u; CREATE TABLE made ()"
    async with (
        table.connect() as gate,
        table.connect(server_settings={"deadlock_timeout": "1h"}) as other,
        anyio.create_task_group() as tasks,
    ):
        await gate.execute("SELECT pg_advisory_lock(1)")

        async def cross() -> None:
            await other.execute("BEGIN; LOCK TABLE u")
            await waiting_for_a_lock(table)  # the migration has t and stands at the gate
            async with anyio.create_task_group() as crossing:
                crossing.start_soon(other.execute, "LOCK TABLE t; COMMIT")
                await waiting_for_a_lock(table, count=2)
                await gate.execute("SELECT pg_advisory_unlock(1)")

        tasks.start_soon(cross)
        report = await library.migrate(table.url, migrations=scripts(script), on_event=heard)
    assert len(report.applied) == 1
    assert len(heard.of(LockRetry)) == 1
    assert await history(table) == [(1, True, 4)]
    heard.assert_adds_up()


@pytest.mark.any_server
@pytest.mark.parametrize(
    ("directives", "lock_timeout", "statement_timeout"),
    [
        ("", "1500ms", "2h"),
        ("-- lock-timeout: 250ms\n", "250ms", "2h"),
        ("-- a remark\n-- statement-timeout: 10min\n", "1500ms", "10min"),
        ("-- lock-timeout: 0\n-- statement-timeout: 1.5s\n", "0", "1500ms"),
        ("-- no-transaction\n-- lock-timeout: 2\n-- statement-timeout: 3min\n", "2s", "3min"),
        ("-- no-transaction\n", "1500ms", "2h"),
    ],
)
async def test_directives_override_the_configured_limits(
    database: Database, directives: str, lock_timeout: str, statement_timeout: str
) -> None:
    """A file runs under the configured limits, except for those that its leading comments set."""
    script = "CREATE TABLE seen AS SELECT current_setting('lock_timeout'), current_setting('statement_timeout') AS s"
    limits = Limits(lock_timeout_secs=1.5, statement_timeout_secs=7200)
    await library.migrate(database.url, migrations=scripts(directives + script), limits=limits)
    assert [tuple(row) for row in await database.fetch("TABLE seen")] == [(lock_timeout, statement_timeout)]


async def test_a_statement_that_takes_too_long_fails(database: Database) -> None:
    """Beyond its statement timeout a migration fails, is rolled back, and is told how to get more time."""
    with pytest.raises(MigrationFailed) as raised:
        await library.migrate(
            database.url, migrations=scripts("-- statement-timeout: 300ms\nCREATE TABLE t (); SELECT pg_sleep(60)")
        )
    assert (raised.value.sqlstate, raised.value.line) == ("57014", 2)
    assert raised.value.hint == (
        "if it needs longer, raise statement_timeout_secs or begin the file with `-- statement-timeout: 10min`; "
        "nothing of this migration was kept: fix the file and run again"
    )
    assert await database.fetchval("SELECT to_regclass('t')") is None


async def test_a_busy_history_table_is_a_lock_like_any_other(table: Database) -> None:
    """A dump that reads the history keeps a migration waiting as long as any other blocker, and no longer."""
    files = scripts(ADD, "-- no-transaction\nVACUUM t", "-- no-transaction\nSELECT 1")
    await library.migrate(table.url, migrations=files[:1])
    await table.execute("ALTER TABLE ampd_schema_migrations DROP done_checksum")  # as an older release has made it
    heard = Heard()
    dump = "LOCK TABLE ampd_schema_migrations IN ACCESS SHARE MODE"
    async with transaction(table, dump) as reader, anyio.create_task_group() as tasks:

        async def free_it() -> None:
            await heard.first(LockRetry)
            await reader.execute("COMMIT")

        tasks.start_soon(free_it)
        report = await library.migrate(table.url, migrations=files, limits=BRIEF, on_event=heard)
    assert [each.version for each in report.applied] == [2, 3]
    heard.clear()
    async with transaction(table, "LOCK TABLE ampd_schema_migrations IN SHARE MODE"):
        with pytest.raises(LockTimeout) as raised:
            await library.migrate(
                table.url,
                migrations=(*files, *scripts(*["SELECT 1"] * 4)[3:]),
                limits=Limits(lock_timeout_secs=0.1, lock_retry_secs=0.3),
                on_event=heard,
            )
    assert raised.value.version == 4
    assert "4_step.sql: canceling statement due to lock timeout (SQLSTATE 55P03); gave up" in raised.value.message
    assert not heard.of(StatementStarted)


@pytest.mark.any_server
async def test_a_listener_that_raises(table: Database) -> None:
    """What a listener raises while it is told of a lock comes out as it is."""

    def listen(event: Event) -> None:
        if isinstance(event, Blocked):
            raise ZeroDivisionError

    async with transaction(table, "SELECT FROM t"):
        with pytest.raises(ZeroDivisionError):
            await library.migrate(table.url, migrations=scripts(ADD), on_event=listen)
    await assert_no_trace(table)


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"], ids=["transactional", "no_transaction"])
async def test_a_server_that_tells_nothing_of_its_sessions(
    table: Database, monkeypatch: pytest.MonkeyPatch, directive: str
) -> None:
    """Without track_activities a look from outside finds nothing out, and takes nobody for dead."""
    for name in ("QUIET_SECS", "_LOOK_EVERY_SECS"):
        monkeypatch.setattr(table_locks, name, 0.05)
    await table.execute(f"ALTER DATABASE {table.name} SET track_activities = off")
    files = scripts(f"{directive}SELECT 1; CALL slow()")
    await table.execute("CREATE PROCEDURE slow() LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(1); END'")
    assert len((await library.migrate(table.url, migrations=files)).applied) == 1


@pytest.mark.any_server
async def test_a_pool_without_a_connection_to_look_from(table: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two connections, both taken, the one that holds the lock sees who is in the way, and the limit holds."""
    monkeypatch.setattr(table_locks, "_ANSWER_SECS", 0.1)
    heard = Heard()
    files = scripts("-- no-transaction\nCREATE INDEX CONCURRENTLY i ON t (id)")
    async with (
        transaction(table, "INSERT INTO t VALUES (1)") as writer,
        asyncpg.create_pool(table.url, min_size=0, max_size=2) as pool,
    ):
        pid = await writer.fetchval("SELECT pg_backend_pid()")
        with pytest.raises(LockTimeout) as raised:
            await library.migrate(pool, migrations=files, limits=Limits(lock_retry_secs=1), on_event=heard)
        assert [blocker.pid for blocker in raised.value.blockers] == [pid]
    assert heard.of(Blocked)
    await library.migrate(table.url, migrations=files)
    await assert_no_trace(table)
    heard.assert_adds_up()


async def test_a_look_from_the_guard_comes_to_its_end(table: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that outlives the statement is not cut off, which would end the guard's transaction and its lock."""
    for name in ("QUIET_SECS", "_ANSWER_SECS", "_LOOK_EVERY_SECS"):
        monkeypatch.setattr(table_locks, name, 0.01)
    quick = table_locks.LockMonitor._body

    def slow(watch: table_locks.LockMonitor, note: Callable[[str], str]) -> str:
        return quick(watch, note).replace("BEGIN", "BEGIN PERFORM pg_catalog.pg_sleep(0.2);", 1)

    monkeypatch.setattr(table_locks.LockMonitor, "_body", slow)
    files = scripts("-- no-transaction\n" + "SELECT pg_sleep(0.3);" * 4)
    async with asyncpg.create_pool(table.url, min_size=0, max_size=2) as pool:
        await library.migrate(pool, migrations=files)
    assert await history(table) == [(1, True, 4)]


async def test_a_locked_history(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A history that somebody keeps locked is a lock that could not be acquired, not a lost connection."""
    monkeypatch.setattr(reading, "READ_LOCK_SECS", 1)
    files = scripts("CREATE TABLE t ()")
    await library.migrate(database.url, migrations=files)
    async with transaction(database, "LOCK TABLE ampd_schema_migrations") as holder:
        with pytest.raises(LockTimeout, match="another session has locked the history table") as raised:
            await library.status(database.url, migrations=files)
        pid = holder.get_server_pid()
    assert raised.value.code == "lock_timeout"
    assert raised.value.hint == f"wait for its transaction, or end it (pg_terminate_backend of {pid}), and run again"


async def test_a_build_on_a_table_at_which_another_is_at_work(table: Database) -> None:
    """Two concurrent builds on one table would deadlock: ours is begun only when the other one is through."""
    heard = Heard()
    async with (
        table.connect() as builder,
        anyio.create_task_group() as tasks,
        transaction(table, "INSERT INTO t VALUES (1)") as writer,
    ):
        tasks.start_soon(builder.execute, "CREATE INDEX CONCURRENTLY theirs ON t (id)")
        await building(table)

        async def free_it() -> None:
            await heard.first(LockRetry)
            await writer.execute("COMMIT")

        tasks.start_soon(free_it)
        files = scripts("-- no-transaction\nCREATE INDEX CONCURRENTLY ours ON t (id)")
        await library.migrate(table.url, migrations=files, on_event=heard)
    assert await indexes(table) == [("ours", True), ("theirs", True)]
    heard.assert_adds_up()
