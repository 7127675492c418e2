"""Runs that share few connections: of one pool, of a role with a limit, of a pooler. None starves another."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import anyio
import asyncpg
import pytest

import ampd as library
from ampd import ConnectionFailed, Report, Waiting, WaitingForConnection
from ampd.advisory_lock import lock_key
from ampd.apply import table_locks
from ampd.config import HISTORY_TABLE as HISTORY
from ampd.config import Limits
from tests.repetition import TIMES
from tests.scenes import GENEROUS, Heard, report_at_once, scripts, transaction, until, waiting_for_a_lock
from tests.servers import Database, Role, pgbouncer

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

GATE = "SELECT pg_advisory_xact_lock(1)"
TABLE = "CREATE TABLE t (id integer)"
INDEX = "-- no-transaction\nCREATE INDEX CONCURRENTLY t_id ON t (id)"
FILES = scripts(TABLE, INDEX, "ALTER TABLE t ADD COLUMN name text", "-- no-transaction\nVACUUM t")
LONG = Limits(advisory_lock_wait_secs=120, connect_wait_secs=10)


def for_some_secs(error: library.AmpdError) -> str:
    """Return the message of an error without how long was waited."""
    return re.sub(r"\d+ s$", "N s", error.message)


def pool_of(database: Database, size: int, url: str | None = None) -> asyncpg.Pool:
    """Return a pool of a service's own with at most so many connections."""
    return asyncpg.create_pool(url or database.url, min_size=0, max_size=size)


async def together(*runs: Callable[[], Awaitable[Report]]) -> list[Report]:
    """Begin all runs at once and return their reports."""
    with anyio.fail_after(120):
        return list(await asyncio.gather(*(run() for run in runs)))


async def owner(database: Database, limit: int) -> Role:
    """Return a role that may create schemas, and have so many connections at a time."""
    role = await database.role("tenants")
    await database.execute(
        f"GRANT CREATE ON DATABASE {database.name} TO {role.name}; ALTER ROLE {role.name} CONNECTION LIMIT {limit}"
    )
    return role


@pytest.mark.parametrize("tenants", [2, 12 * TIMES])
async def test_tenants_share_a_pool_of_two(database: Database, tenants: int) -> None:
    """As many runs as there are tenants take turns at two connections, and each migration is applied."""
    async with pool_of(database, 2) as pool:
        reports = await together(
            *(
                lambda name=f"tenant_{number}": library.migrate(pool, migrations=FILES, schema=name, limits=LONG)
                for number in range(tenants)
            )
        )
        assert [len(report.applied) for report in reports] == [len(FILES)] * tenants
        statuses = await asyncio.gather(
            *(library.status(pool, migrations=FILES, schema=f"tenant_{number}") for number in range(tenants))
        )
        assert all(each.up_to_date for each in statuses)
        assert pool.get_idle_size() == pool.get_size()


async def test_runs_of_one_schema_share_a_pool_of_two(database: Database) -> None:
    """Whoever waits for another run's lock leaves that run the connections that it needs."""
    async with pool_of(database, 2) as pool:
        reports = await together(*[lambda: library.migrate(pool, migrations=FILES, limits=LONG)] * 6)
    assert sorted(each.version for report in reports for each in report.applied) == [1, 2, 3, 4]
    assert {report.current_version for report in reports} == {4}


@pytest.mark.parametrize(("limit", "runs"), [(2, 2), (2, 5), (3, 5)])
async def test_runs_share_what_a_role_may_have(database: Database, limit: int, runs: int) -> None:
    """Where a role may have few connections, runs by URL let go of what they have got and try again, all of them."""
    role = await owner(database, limit)
    reports = await together(
        *(
            lambda name=f"tenant_{number}": library.migrate(role.url, migrations=FILES, schema=name, limits=LONG)
            for number in range(runs)
        )
    )
    assert [len(report.applied) for report in reports] == [len(FILES)] * runs


async def test_runs_of_one_schema_share_what_a_role_may_have(database: Database) -> None:
    """The same for runs that wait for one another's lock."""
    role = await owner(database, 2)
    reports = await together(*[lambda: library.migrate(role.url, migrations=FILES, schema="tenant", limits=LONG)] * 6)
    assert sorted(each.version for report in reports for each in report.applied) == [1, 2, 3, 4]


@pytest.mark.parametrize("pool_mode", ["session", "transaction"])
@pytest.mark.parametrize("schemas", [1, 4])
async def test_runs_share_a_small_pooler(database: Database, pool_mode: str, schemas: int) -> None:
    """A pooler with two server connections lets waiting clients stand in line: a run that got one lets it go again."""
    files = scripts(TABLE, "-- no-transaction\nINSERT INTO t VALUES (1); INSERT INTO t VALUES (2)")
    with pgbouncer(database.server, pool_mode, default_pool_size=2) as pooler:
        reports = await together(
            *(
                lambda name=f"tenant_{number % schemas}": library.migrate(
                    pooler.url(database.name), migrations=files, schema=name, limits=LONG
                )
                for number in range(4)
            )
        )
    assert sum(len(report.applied) for report in reports) == len(files) * schemas
    for number in range(schemas):
        assert await database.fetch(f"SELECT id FROM tenant_{number}.t ORDER BY id") == [(1,), (2,)]


async def test_a_run_that_waits_holds_no_connection(database: Database) -> None:
    """Waiting for a runner elsewhere, a run leaves the pool to the service but for a look now and then."""
    heard = Heard()
    async with (
        transaction(database, f"SELECT pg_advisory_xact_lock({lock_key('public', HISTORY)})") as other,
        pool_of(database, 1) as pool,
    ):
        run = asyncio.create_task(library.migrate(pool, migrations=scripts(TABLE), on_event=heard))
        await heard.first(Waiting)

        async def all_idle() -> bool:
            return int(pool.get_idle_size()) == 1

        await until(all_idle)
        await other.execute("COMMIT")
        with anyio.fail_after(GENEROUS):
            assert len((await run).applied) == 1


async def test_a_look_at_a_long_migration_holds_no_connection(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection from which a migration is watched is given back after each look, so that others can run."""
    for name in ("QUIET_SECS", "_LOOK_EVERY_SECS"):
        monkeypatch.setattr(table_locks, name, 0.05)
    slow = scripts("-- lock-timeout: 0\nSELECT pg_advisory_xact_lock(1)")
    async with transaction(database, GATE) as gate, pool_of(database, 3) as pool:
        run = asyncio.create_task(library.migrate(pool, migrations=slow, schema="slow"))
        await waiting_for_a_lock(database)
        for _ in range(5):
            async with pool.acquire(timeout=GENEROUS), pool.acquire(timeout=GENEROUS):
                await anyio.sleep(0.05)
        await gate.execute("COMMIT")
        assert len((await run).applied) == 1


async def test_a_run_that_waits_long_says_so(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that waits for a connection for over a second tells why and how long it will; so it does at the limit."""
    monkeypatch.setattr("ampd.postgres.database.CONNECT_TIMEOUT_SECS", 1.0)
    slow, heard = scripts("-- lock-timeout: 0\nSELECT pg_advisory_xact_lock(1)"), Heard()
    impatient = Limits(advisory_lock_wait_secs=1, connect_wait_secs=0)
    needs_two = scripts("-- no-transaction\nVACUUM pg_am")
    async with pool_of(database, 2) as pool, transaction(database, GATE) as gate, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: library.migrate(pool, migrations=slow, schema="slow"))
        await waiting_for_a_lock(database)
        waiting = asyncio.create_task(library.migrate(pool, migrations=needs_two, schema="b", on_event=heard))
        told = await heard.first(WaitingForConnection)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        with pytest.raises(ConnectionFailed) as raised:
            await library.migrate(pool, migrations=needs_two, schema="b", limits=impatient)
        await gate.execute("COMMIT")
    assert (told.reason, told.limit) == ("two of the pool's 2 connections are needed and not free", 600)
    assert 1 <= told.waited < 60
    assert for_some_secs(raised.value) == f"{told.reason}, for N s"
    assert (
        raised.value.hint == "make the pool larger, migrate fewer schemas at a time, or raise advisory_lock_wait_secs"
    )


async def test_a_service_that_uses_its_pool_up(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that the service itself keeps are not waited for as long as those of other runs."""
    monkeypatch.setattr("ampd.postgres.database.CONNECT_TIMEOUT_SECS", 1.0)
    limits = Limits(connect_wait_secs=0, advisory_lock_wait_secs=600)
    hint = "make the pool larger, or migrate before the service takes connections from it"
    async with pool_of(database, 2) as pool, pool.acquire():
        with pytest.raises(ConnectionFailed) as raised:
            await library.migrate(pool, migrations=FILES[1:], limits=limits)
        assert for_some_secs(raised.value) == "two of the pool's 2 connections are needed and not free, for N s"
        assert raised.value.hint == hint
        assert pool.get_idle_size() == 1
        async with pool.acquire():
            with pytest.raises(ConnectionFailed) as raised:
                await library.status(pool, migrations=FILES, limits=limits)
        assert for_some_secs(raised.value) == "none of the pool's 2 connections is free, for N s"
        assert raised.value.hint == hint


async def test_a_limit_that_is_never_lifted(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the way, and for how long, is in the event and in the error, with the way out."""
    report_at_once(monkeypatch)
    role, heard = await owner(database, 1), Heard()
    await library.migrate(role.url, migrations=FILES[:1], schema="a")
    with pytest.raises(ConnectionFailed) as raised:
        await library.migrate(
            role.url,
            migrations=FILES[:2],
            schema="a",
            limits=Limits(advisory_lock_wait_secs=1, connect_wait_secs=0),
            on_event=heard,
        )
    where = f"127.0.0.1:{database.server.port}/{database.name}"
    reason = f'{where} takes no more connections: too many connections for role "{role.name}"'
    assert (raised.value.sqlstate, for_some_secs(raised.value)) == ("53300", f"{reason}, for N s")
    assert raised.value.hint == (
        "close idle connections, or raise max_connections (or the role's or database's CONNECTION LIMIT); "
        "a no-transaction migration needs two at a time"
    )
    assert {event.reason for event in heard.of(WaitingForConnection)} == {reason}


@pytest.mark.parametrize("when", ["in line", "at the head", "between two"])
async def test_a_cancelled_wait_gives_everything_back(database: Database, when: str) -> None:
    """Wherever it is cancelled, a waiting run leaves no connection lent and nobody in line behind it."""
    files = FILES[1:2]
    await database.execute("CREATE TABLE t (id integer)")
    async with pool_of(database, 2) as pool:
        async with AsyncExitStack() as held:
            for _ in range(1 if when == "between two" else 2):
                await held.enter_async_context(pool.acquire())
            first = asyncio.create_task(library.migrate(pool, migrations=files))
            await anyio.sleep(0.3)
            second = asyncio.create_task(library.migrate(pool, migrations=files))
            await anyio.sleep(0.1)
            for task in (second,) if when == "in line" else (first, second):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
        if when != "in line":
            first = asyncio.create_task(library.migrate(pool, migrations=files))
        with anyio.fail_after(GENEROUS):
            assert len((await first).applied) == 1
        assert pool.get_idle_size() == pool.get_size()
