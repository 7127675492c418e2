"""What the tests of faults share: scripts made on the spot, and ways to wait for a state instead of for a time."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import asyncpg
import msgspec
import pytest

from ampd import applying
from ampd.apply import pooler, table_locks
from ampd.backoff import Backoff
from ampd.events import (
    Applied,
    Event,
    Failed,
    Finished,
    Planned,
    Progressed,
    Retrying,
    Starting,
    StatementStarted,
    Stopped,
    Waiting,
    WaitingForConnection,
    Warned,
)
from ampd.migration import Migration, checksum
from ampd.postgres import connection
from ampd.postgres import database as postgres_database
from ampd.sql.checks import Problem
from ampd.sql.slices import Slices
from tests.servers import Database, Proxy

T = TypeVar("T")
Kind = TypeVar("Kind", bound=Event)

GENEROUS = 30.0  # seconds: only there to end a test that hangs


def scripts(*texts: str) -> tuple[Migration, ...]:
    """Return migrations 1, 2, … with these texts."""
    return tuple(
        Migration(version, "step", f"{version}_step.sql", text, checksum(text.encode()))
        for version, text in enumerate(texts, start=1)
    )


def folder_of(path: Path, *texts: str) -> Path:
    """Write the same migrations as files."""
    path.mkdir(exist_ok=True)
    for migration in scripts(*texts):
        (path / migration.file).write_text(migration.sql)
    return path


SLOW_SECS = 0.04  # each way: there and back takes longer than closing may while being cancelled, as it is here
FAREWELL_SECS = 0.07


@asynccontextmanager
async def far_away(database: Database) -> AsyncIterator[Database]:
    """A database as it is seen from the other end of a slow line, where closing is cut short all the sooner."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (connection, postgres_database, pooler, applying):
            patch.setattr(module, "CLOSE_TIMEOUT_SECS", FAREWELL_SECS)
        async with Proxy(database.server.host, database.server.port, delay=SLOW_SECS) as line:
            yield Database(msgspec.structs.replace(database.server, host=line.host, port=line.port), database.name)


def report_at_once(patch: pytest.MonkeyPatch) -> None:
    """Let a run tell at its first look or attempt what it waits for."""
    patch.setattr(table_locks, "QUIET_SECS", 0.1)
    patch.setattr(Backoff.__init__, "__kwdefaults__", {**(Backoff.__init__.__kwdefaults__ or {}), "quiet_secs": 0.0})


def never_look(patch: pytest.MonkeyPatch) -> None:
    """Let no migration take so long that it is looked at from another connection."""
    patch.setattr(table_locks.LockMonitor, "run", lambda *_: anyio.sleep_forever())


def blind_to_problems(patch: pytest.MonkeyPatch) -> None:
    """Let scripts be run that contain what cannot work."""

    def blind(*_: object, **__: object) -> Slices[tuple[Problem, ...]]:
        yield
        return ()

    patch.setattr("ampd.sql.checks.finding_problems", blind)


async def until(question: Callable[[], Awaitable[T]]) -> T:
    """Ask until the answer is true, and return it."""
    with anyio.fail_after(GENEROUS):
        while not (answer := await question()):  # noqa: ASYNC110 - what is waited for raises no event
            await anyio.sleep(0.01)
        return answer


def unplaced(event: Event) -> Event:
    """Return an event as it is without the database and the schema that every one knows."""
    return msgspec.structs.replace(event, database="", schema=None)


class Heard(list[Event]):
    """A listener that remembers the events of a run, and can be waited on."""

    def __call__(self, event: Event) -> None:
        """Take one event."""
        self.append(event)

    def of(self, kind: type[Kind]) -> list[Kind]:
        """Return the events of one kind."""
        return [event for event in self if isinstance(event, kind)]

    def assert_adds_up(self) -> None:
        """Insist on the law of a run's events: the plan, one end for each start, one last event; all of one place."""
        running: Starting | None = None
        planned: Planned | None = None
        for number, event in enumerate(self):
            told = f"event {number}, {event!r}, of {list(self)}"
            match event:
                case Planned():
                    assert running is None, told
                    planned = event
                case Starting():
                    assert running is None, told
                    assert planned is not None, told
                    assert event.version in [each.version for each in planned.pending], told
                    running = event
                case StatementStarted():
                    assert running is not None, told
                    of = (running.version, running.name, running.number, running.total)
                    assert (event.version, event.name, event.migration, event.total) == of, told
                case Applied() | Failed():
                    assert running is not None, told
                    of = (running.version, running.name, running.number, running.total)
                    assert (event.version, event.name, event.number, event.total) == of, told
                    running = None
                case Progressed():
                    assert running is not None, told
                    of = (running.version, running.name, running.number, running.total)
                    assert (event.version, event.name, event.number, event.total) == of, told
                case Waiting():
                    assert running is None, told
                    assert planned is not None, told
                case Finished() | Stopped():
                    assert (running, number) == (None, len(self) - 1), told
                case Warned() | Retrying() | WaitingForConnection():
                    pass
                case _:
                    assert planned is not None, told
            assert event.database, told
            assert event.schema or planned is None, told
            assert str(event), told
        assert self, "no event at all"
        last = self[-1]
        assert isinstance(last, Finished | Stopped), f"the last event is {last!r}"
        if isinstance(last, Finished) and last.error is None:
            assert planned is not None
        applied = [(each.version, each.name) for each in last.report.applied]
        assert [(each.version, each.name) for each in self.of(Applied)] == applied
        assert len({event.database for event in self}) == 1

    async def first(self, kind: type[Kind]) -> Kind:
        """Wait for an event of one kind and return it."""

        async def found() -> list[Kind]:
            return self.of(kind)

        return (await until(found))[0]


def meanwhile(work: Callable[[], Awaitable[T]]) -> T:
    """Do something on another event loop while this one, and with it the runner under test, stands still."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(lambda: asyncio.run(_awaited(work))).result(GENEROUS)


async def _awaited(work: Callable[[], Awaitable[T]]) -> T:
    return await work()


@asynccontextmanager
async def transaction(database: Database, *statements: str, **options: Any) -> AsyncIterator[asyncpg.Connection]:
    """Hold a transaction open in which these statements were run; it is rolled back unless the test ends it."""
    async with database.connect(**options) as connection:
        await connection.execute(";".join(("BEGIN ISOLATION LEVEL REPEATABLE READ", *statements)))
        yield connection
        if not connection.is_closed() and connection.is_in_transaction():
            await connection.execute("ROLLBACK")


async def waiting_for_a_lock(database: Database, *, count: int = 1, kind: str = "%") -> list[int]:
    """Wait until so many sessions of the database wait for a heavyweight lock, and return their process ids."""

    async def waiters() -> list[int]:
        rows = await database.fetch(
            "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND wait_event_type = 'Lock' AND wait_event LIKE $2",
            database.name,
            kind,
        )
        return [row["pid"] for row in rows] if len(rows) >= count else []

    return await until(waiters)


async def building(database: Database) -> int:
    """Wait until an index build waits for other transactions, and return the process id of its backend."""

    async def pids() -> list[int]:
        rows = await database.fetch(
            "SELECT pid FROM pg_stat_progress_create_index WHERE datname = $1 AND phase LIKE 'waiting for %'",
            database.name,
        )
        return [row["pid"] for row in rows]

    return (await until(pids))[0]


async def end_backend(database: Database, pid: int) -> None:
    """Terminate a backend and wait until it is gone."""
    await database.fetchval("SELECT pg_terminate_backend($1)", pid)

    async def gone() -> bool:
        return not await database.fetchval("SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1)", pid)

    await until(gone)


async def ampds(database: Database) -> list[int]:
    """Return the process ids of ampd's sessions in the database."""
    rows = await database.fetch(
        "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND application_name ~ '^ampd( |$)'", database.name
    )
    return [row["pid"] for row in rows]


async def assert_no_trace(database: Database) -> None:
    """Insist that soon no session of ampd is left, and no advisory lock."""

    async def gone() -> bool:
        return not await ampds(database)

    await until(gone)
    locks = "SELECT count(*) FROM pg_locks l JOIN pg_database d ON d.oid = l.database WHERE locktype = 'advisory'"
    assert await database.fetchval(f"{locks} AND datname = $1", database.name) == 0


async def history(database: Database) -> list[tuple[int, bool, int]]:
    """Return version, whether finished, and the statements done, of each row of the history."""
    rows = await database.fetch(
        "SELECT version, finished_at IS NOT NULL AS finished, statements_done FROM ampd_schema_migrations ORDER BY 1"
    )
    return [(row["version"], row["finished"], row["statements_done"]) for row in rows]


async def indexes(database: Database, table: str = "t") -> list[tuple[str, bool]]:
    """Return the names of a table's indexes, each with whether it is valid."""
    rows = await database.fetch(
        "SELECT indexrelid::regclass::text AS name, indisvalid FROM pg_index WHERE indrelid = $1::regclass ORDER BY 1",
        table,
    )
    return [(row["name"], row["indisvalid"]) for row in rows]


def skip_before(database: Database, major: int, what: str) -> None:
    """Skip the test on servers that lack something."""
    if database.server.major < major:
        pytest.skip(f"PostgreSQL {database.server.major} has no {what}")
