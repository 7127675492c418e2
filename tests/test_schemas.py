"""`ampd.migrate_schemas`: hundreds of schemas, so many at a time; each with its own report, or its own error."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import asyncpg
import pytest

import ampd
from ampd import Finished, Result, Retrying, Starting, Stopped, WaitingForConnection
from tests.scenes import Heard, assert_no_trace, scripts, transaction, waiting_for_a_lock
from tests.servers import Database, Proxy

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]

FILES = scripts(
    "CREATE TABLE t (id integer);",
    "-- no-transaction\nCREATE INDEX CONCURRENTLY t_id ON t (id);",
    "ALTER TABLE t ADD COLUMN name text;",
)
GATE = "SELECT pg_advisory_xact_lock(1)"
WAITS = scripts(f"-- lock-timeout: 0\n{GATE};")
SOME = tuple(f"tenant_{number}" for number in range(7))


def heard_of(events: Heard, schema: str) -> Heard:
    """Return the events of one schema; one that waits for a connection of a pool may not know its database yet."""
    return Heard(event for event in events if event.schema == schema and not isinstance(event, WaitingForConnection))


@asynccontextmanager
async def given(database: Database, kind: str) -> AsyncIterator[Any]:
    """Yield the database as a URL, a configuration or a pool."""
    if kind == "pool":
        async with asyncpg.create_pool(database.url, min_size=0, max_size=2) as pool:
            yield pool
            assert pool.get_idle_size() == pool.get_size()
    elif kind == "configuration":
        yield ampd.MetadataDb(url=ampd.DatabaseUrl(database.url), schema="elsewhere")
    else:
        yield database.url


@pytest.mark.parametrize("kind", ["URL", "configuration", "pool"])
async def test_each_schema_is_migrated(database: Database, kind: str) -> None:
    """Every schema is made and migrated, by files of both kinds; a second call finds all of them up to date."""
    heard = Heard()
    async with given(database, kind) as source:
        report = await ampd.migrate_schemas(source, iter(SOME), concurrency=3, migrations=FILES, on_event=heard)
        again = await ampd.migrate_schemas(source, SOME, migrations=FILES)
    assert (list(report.reports), report.errors) == (list(SOME), {})
    assert {len(each.applied) for each in report.reports.values()} == {3}
    assert [each.schema for each in report.reports.values()] == list(SOME)
    assert (report.text(), again.text()) == ("7 schemas: 7 migrated", "7 schemas: 7 up to date")
    assert {each.result for each in again.reports.values()} == {Result.UP_TO_DATE}
    for name in SOME:
        heard_of(heard, name).assert_adds_up()
    assert {event.schema for event in heard} == set(SOME)
    built = "SELECT count(*) FROM pg_index WHERE indisvalid AND indexrelid::regclass::text ~ 't_id'"
    assert await database.fetchval(built) == 7
    await assert_no_trace(database)


async def test_one_after_the_other_on_a_connection(database: Database) -> None:
    """A single connection does as well, for migrations that need no second one."""
    async with database.connect() as connection:
        report = await ampd.migrate_schemas(connection, SOME[:3], migrations=FILES[:1], table="history")
    assert report.text() == "3 schemas: 3 migrated"
    assert await database.fetchval("SELECT count(*) FROM pg_class WHERE relname = 'history'") == 3


async def test_an_error_of_one_stops_no_other(database: Database) -> None:
    """Whatever keeps one schema from being migrated is in the report, beside the others' success."""
    await database.execute("CREATE SCHEMA tenant_1 CREATE TABLE t (); CREATE SCHEMA tenant_3")
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"), schema="tenant_3")
    names = (*SOME[:5], "pg_tenant", "x" * 64)
    report = await ampd.migrate_schemas(database.url, names, concurrency=2, migrations=FILES)
    assert list(report.reports) == ["tenant_0", "tenant_2", "tenant_4"]
    assert {name: type(error) for name, error in report.errors.items()} == {
        "tenant_1": ampd.MigrationFailed,
        "tenant_3": ampd.MigrationConflict,
        "pg_tenant": ampd.ConfigError,
        "x" * 64: ampd.ConfigError,
    }
    assert report.errors["tenant_1"].report is not None
    assert report.text() == (
        "7 schemas: 3 migrated, 4 failed\n"
        'tenant_1: 1_step.sql:1: relation "t" already exists (SQLSTATE 42P07)\n'
        "tenant_3: 1 step was applied and its file has changed since\n"
        "pg_tenant: the schema pg_tenant is reserved by PostgreSQL\n"
        f"{'x' * 64}: the schema's name is longer than 63 bytes, or holds a NUL byte"
    )


async def test_so_many_at_a_time(database: Database) -> None:
    """No more runs than asked for are under way, in as many connections, which are used for all schemas."""
    heard = Heard()
    async with (
        Proxy(database.server.host, database.server.port) as line,
        transaction(database, GATE) as gate,
    ):
        url = f"postgresql://postgres@{line.host}:{line.port}/{database.name}?sslmode=disable"
        run = asyncio.create_task(ampd.migrate_schemas(url, SOME, concurrency=3, migrations=WAITS, on_event=heard))
        await waiting_for_a_lock(database, count=3)
        assert {event.schema for event in heard} == set(SOME[:3])
        await gate.execute("COMMIT")
        assert (await run).text() == "7 schemas: 7 migrated"
        assert line.connections <= 2 * 3
    running = set[str | None]()
    for event in heard:
        running.add(event.schema)
        assert len(running) <= 3
        if isinstance(event, Finished):
            running.discard(event.schema)


async def test_two_processes_with_the_same_schemas(database: Database) -> None:
    """Replicas that start together share the work, and both find every schema current."""
    runs = [ampd.migrate_schemas(database.url, SOME, concurrency=3, migrations=FILES) for _ in range(2)]
    reports = await asyncio.gather(*runs)
    assert [report.errors for report in reports] == [{}, {}]
    applied = [len(each.applied) for report in reports for each in report.reports.values()]
    assert sum(applied) == len(SOME) * len(FILES)


async def test_a_cancellation_stops_all(database: Database) -> None:
    """Every run that is under way is rolled back and says so; none is begun any more, and nothing is left."""
    heard = Heard()
    async with transaction(database, GATE):
        with anyio.CancelScope() as scope:

            async def cancel() -> None:
                await waiting_for_a_lock(database, count=3)
                scope.cancel()

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(cancel)
                await ampd.migrate_schemas(database.url, SOME, concurrency=3, migrations=WAITS, on_event=heard)
        assert scope.cancelled_caught
        for name in SOME[:3]:
            heard_of(heard, name).assert_adds_up()
            assert isinstance(heard_of(heard, name)[-1], Stopped)
        assert {event.schema for event in heard} == set(SOME[:3])
    await assert_no_trace(database)


async def test_what_the_callback_raises_ends_all(database: Database) -> None:
    """It is raised as it is, the callback is not called again by any of the runs, and nothing is left of them."""
    calls = list[str]()

    def raising(event: ampd.Event) -> None:
        calls.append(str(event))
        if isinstance(event, Starting) and event.schema == "tenant_2":
            raise ZeroDivisionError("of the caller's")

    with pytest.raises(ZeroDivisionError, match="of the caller's") as raised:
        await ampd.migrate_schemas(database.url, SOME, concurrency=2, migrations=FILES, on_event=raising)
    assert raised.value.__context__ is None
    assert calls[-1] == "[1/3] 1 step …"
    await assert_no_trace(database)


async def test_a_server_that_is_not_there_is_one_error(database: Database) -> None:
    """What is wrong for all of them is raised before any schema is begun."""
    heard = Heard()
    limits = ampd.Limits(connect_wait_secs=0)
    with pytest.raises(ampd.DatabaseMissing):
        await ampd.migrate_schemas(f"{database.url}_not", SOME, migrations=FILES, limits=limits, on_event=heard)
    with pytest.raises(ampd.ConfigError, match="there is no migration with version 9"):
        await ampd.migrate_schemas(database.url, SOME, migrations=FILES, target=9, on_event=heard)
    with pytest.raises(ampd.ConfigError, match="the table pg_x is reserved by PostgreSQL"):
        await ampd.migrate_schemas(database.url, SOME, migrations=FILES, table="pg_x", on_event=heard)
    assert heard == []
    nothing = await ampd.migrate_schemas(f"{database.url}_not", [], migrations=FILES)
    assert (nothing.reports, nothing.errors, nothing.text()) == ({}, {}, "0 schemas")


async def test_a_server_that_goes_away_is_waited_for_once(database: Database) -> None:
    """Once a run could not connect in time, those after it try once each, lest hundreds of them wait."""
    heard = Heard()

    async with Proxy(database.server.host, database.server.port) as line:

        def on_event(event: ampd.Event) -> None:
            heard(event)
            if isinstance(event, Finished):  # of the first schema
                line._server.close()
                line.cut()

        report = await ampd.migrate_schemas(
            f"postgresql://postgres@{line.host}:{line.port}/{database.name}?sslmode=disable",
            SOME,
            concurrency=1,
            migrations=FILES,
            limits=ampd.Limits(connect_wait_secs=0.2),
            on_event=on_event,
        )
    assert (list(report.reports), list(report.errors)) == ([SOME[0]], list(SOME[1:]))
    assert {type(error) for error in report.errors.values()} == {ampd.ConnectionFailed}
    assert {event.schema for event in heard.of(Retrying)} <= {SOME[1], SOME[2]}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"schemas": "acme"}, "schemas= takes the names of schemas, a list of str, not str"),
        ({"schemas": ["acme", 7]}, "schemas= takes the names of schemas, a list of str, not int"),
        ({"concurrency": 2.5}, "concurrency= takes an int, not float"),
        ({"concurrency": True}, "concurrency= takes an int, not bool"),
        ({"concurrency": 0}, "concurrency is at least 1, not 0"),
        ({"on_event": 7}, "on_event= takes a plain function of one event, not int"),
    ],
)
async def test_wrong_arguments(arguments: dict[str, Any], error: str) -> None:
    """An argument of the wrong type is refused before anything is connected to."""
    call: Callable[..., Any] = ampd.migrate_schemas
    with pytest.raises((TypeError, ampd.ConfigError), match=error):
        await call("postgresql://u@127.0.0.1:1/d", **({"schemas": ["acme"], "migrations": FILES} | arguments))
