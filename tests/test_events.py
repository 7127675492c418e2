"""Events: typed, frozen, public, in words; the law that those of a run follow; and callbacks that fail."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from typing import Any, get_args

import anyio
import asyncpg
import pytest
from msgspec.structs import replace

import ampd
from ampd.apply import session_state
from ampd.config import Limits, MetadataDb
from ampd.database_url import DatabaseUrl
from ampd.emitter import Emitter
from ampd.events import (
    UNFINISHED,
    Applied,
    Blocked,
    Event,
    EventBase,
    Failed,
    Finished,
    LockRetry,
    Planned,
    Progressed,
    Retrying,
    ServerMessage,
    Starting,
    StatementStarted,
    Stopped,
    Waiting,
    Warned,
    ignore,
)
from ampd.other_sessions import Blocker, Holder
from ampd.report import AppliedNow, PendingMigration, Report
from ampd.statement_progress import StatementProgress
from tests.scenes import GENEROUS, Heard, assert_no_trace, history, meanwhile, scripts, transaction, until
from tests.servers import Database

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("blocker", "line"),
    [
        (
            Blocker(7, "amp", "psql", "10.0.0.1", "idle in transaction", NOON, "SELECT * FROM jobs"),
            "pid 7: user amp, application psql, from 10.0.0.1, idle in transaction, since 2026-01-02 12:00:00+0000, "
            "SELECT * FROM jobs",
        ),
        (Blocker(7, None, None, None, None, None, None), "pid 7: user ?, application ?, state unknown"),
        (Blocker(7, "amp", "", None, "active", None, ""), "pid 7: user amp, application ?, active"),
        (
            Blocker(7, "amp", "service", None, "idle in transaction", NOON, "SELECT 1", own_pool=True),
            "pid 7, a connection of this very process's own pool, idle in transaction",
        ),
        (
            Blocker(7, None, None, None, None, None, None, own_pool=True),
            "pid 7, a connection of this very process's own pool, state unknown",
        ),
    ],
)
def test_a_blocker_in_one_line(blocker: Blocker, line: str) -> None:
    """A blocker tells who it is and what it does, as far as the role may see it."""
    assert blocker.describe() == line


def test_every_event_is_public() -> None:
    """Whatever `on_event=` receives has a public name to match it by."""
    public = {getattr(ampd, name) for name in ampd.__all__}
    assert Warned in EventBase.__subclasses__()
    assert [each.__name__ for each in EventBase.__subclasses__() if each not in public] == []


def test_the_union_of_events_is_closed() -> None:
    """`ampd.Event` has every kind of event, so that a `match` over it can be exhaustive."""
    assert set(get_args(Event)) == set(EventBase.__subclasses__())


def test_events_are_values() -> None:
    """An event is equal to its like, and cannot be changed by whoever receives it."""
    event = Warned(message="so")
    assert event == Warned(message="so")
    with pytest.raises(AttributeError):
        event.message = "otherwise"  # type: ignore[misc]
    ignore(event)


STARTING = Starting(version=2, name="jobs", number=1, total=3, statements=4, database="h:1/d", schema="s")
BLOCKER = Blocker(7, "amp", None, None, "active", None, None)
REPORT = Report("h:1/d", "s", 1, (AppliedNow(1, "users", 12),), ())
STOPPED = "nothing was applied; 2 jobs was stopped"


@pytest.mark.parametrize(
    ("event", "text"),
    [
        (Planned(applied=2, pending=(), ahead=(), total=2, database="h:1/d"), "h:1/d: nothing to apply"),
        (
            Planned(applied=1, pending=(PendingMigration(2, "jobs"),), ahead=(), total=2, database="h:1/d"),
            "h:1/d: 1 of 2 to apply, from 2 jobs",
        ),
        (
            Planned(applied=1, pending=(), ahead=(2, 3), total=1, database="h:1/d"),
            "h:1/d: ahead of this build (newest: 3), nothing to apply",
        ),
        (STARTING, "[1/3] 2 jobs …"),
        (replace(STARTING, resumed_at=2), "[1/3] 2 jobs …, resumed at statement 3"),
        (
            StatementStarted(version=2, name="jobs", migration=1, total=3, number=2, statements=4, line=9),
            "[1/3] 2 jobs: statement 2/4, line 9",
        ),
        (Applied(version=2, name="jobs", number=1, total=3, duration_ms=12), "[1/3] 2 jobs  12 ms"),
        (
            Applied(version=2, name="jobs", number=1, total=3, duration_ms=12, retries=2, longest_attempt_secs=1.04),
            "[1/3] 2 jobs  12 ms, at attempt 3 to lock its tables; nobody was seen to wait behind it",
        ),
        (
            Applied(
                version=2,
                name="jobs",
                number=1,
                total=3,
                duration_ms=12,
                retries=2,
                longest_attempt_secs=1.04,
                most_queued=4,
            ),
            "[1/3] 2 jobs  12 ms, at attempt 3 to lock its tables; 4 sessions waited behind it for 1.0 s at most",
        ),
        (
            Failed(
                version=2, name="jobs", number=1, total=3, duration_ms=12, error=ampd.MigrationFailed("no", hint="x")
            ),
            "[1/3] 2 jobs failed: no",
        ),
        (Finished(report=REPORT), "h:1/d: applied 1 migration in 12 ms, now at version 1"),
        (Finished(report=REPORT, error=ampd.LockTimeout("no", hint="wait")), "error: no\nhint: wait"),
        (Stopped(report=REPORT, confirmed=True), "applied 1 users"),
        (
            Stopped(report=REPORT, confirmed=True, waiting=True),
            "applied 1 users; the rest was waiting for the migration lock",
        ),
        (
            Stopped(report=replace(REPORT, applied=()), confirmed=True, running=STARTING),
            f"{STOPPED}, rolled back",
        ),
        (
            Stopped(report=replace(REPORT, applied=()), confirmed=False, running=STARTING),
            f"{STOPPED}, and the server did not confirm the rollback: run `ampd status`",
        ),
        (
            Stopped(report=replace(REPORT, applied=()), confirmed=True, running=replace(STARTING, transactional=False)),
            f"{STOPPED}, unfinished: run `ampd migrate` again; it resumes or says what to do",
        ),
        (Retrying(reason="refused", waited=1, limit=30), "refused; trying for 29 s more"),
        (
            Waiting(waited=2, limit=9, holder=Holder(pid=7)),
            "waiting for the migration lock (2 s so far), held by a session that is not ampd: pid 7",
        ),
        (
            Waiting(
                waited=2,
                limit=9,
                holder=Holder(pid=7, client="h", application="ampd", query="/* ampd 1f 2 jobs */ BEGIN", since=NOON),
            ),
            "waiting for the migration lock (2 s so far), held by pid 7, on h, application ampd, migration 2 jobs, "
            "since 2026-01-02 12:00:00+0000",
        ),
        (
            Progressed(version=2, name="jobs", number=1, total=3, progress=StatementProgress("COPY FROM", 43)),
            "[1/3] 2 jobs: COPY FROM 43 %",
        ),
        (
            Blocked(version=2, waited=2, limit=300, blockers=(BLOCKER,), queued=3),
            "blocked for 2 s (limit 300 s) by:\n  pid 7: user amp, application ?, active\n"
            "  3 more wait behind this migration",
        ),
        (
            LockRetry(version=2, took=1, delay=0.25, waited=5, limit=300),
            "lock not available: rolled back, trying again in 0.2 s",
        ),
        (ServerMessage(severity="NOTICE", message="half way"), "notice: half way"),
        (Warned(message="odd"), "warning: odd"),
    ],
)
def test_an_event_in_words(event: Event, text: str) -> None:
    """`str(event)` is what the command line prints of it."""
    assert str(event) == text


# --- callbacks that cannot be called, or that raise


class Asynchronous:
    """An object that is called as a coroutine function is."""

    async def __call__(self, event: Event) -> None:
        """Take one event."""


async def asynchronous(event: Event) -> None:
    """Take one event."""


ASYNCHRONOUS = "and this one is an async def: let a plain function put the event into a queue"
NOWHERE = "postgresql://127.0.0.1:1/nowhere"


@pytest.mark.parametrize(
    ("callback", "why"),
    [
        (asynchronous, ASYNCHRONOUS),
        (partial(partial(asynchronous)), ASYNCHRONOUS),
        (Asynchronous(), ASYNCHRONOUS),
        (partial(Asynchronous()), ASYNCHRONOUS),
        (Asynchronous().__call__, ASYNCHRONOUS),
        (None, "not NoneType"),
        ("print", "not str"),
    ],
)
async def test_a_callback_that_cannot_be_called(callback: Any, why: str) -> None:
    """An `async def` would never run: it is refused before anything connects, in whatever shape it comes."""
    configured = MetadataDb(url=DatabaseUrl(NOWHERE), auto_migrate=True)
    resolve = partial(ampd.resolve, version=1, resolution=ampd.Resolution.APPLIED)
    runs: list[Callable[..., Awaitable[object]]] = [ampd.migrate, ampd.status, resolve]
    for run in runs:
        with pytest.raises(TypeError) as refused:
            await run(NOWHERE, migrations=(), on_event=callback)
        assert str(refused.value) == f"on_event= takes a plain function of one event, {why}"
    for auto_migrate in (True, False):
        with pytest.raises(TypeError, match="on_event= takes a plain function"):
            async with ampd.open_pool(replace(configured, auto_migrate=auto_migrate), on_event=callback):
                pass


async def test_a_callback_that_returns_a_coroutine(database: Database) -> None:
    """A lambda around an `async def` is found out at the first event, before anything is applied."""
    with pytest.raises(TypeError, match="and this one returns a coroutine"):
        await ampd.migrate(
            database.url,
            migrations=scripts("CREATE TABLE t ()"),
            on_event=lambda event: asyncio.sleep(1, event),  # type: ignore[arg-type]
        )
    assert await database.fetchval("SELECT to_regclass('t')") is None


FIRST, SECOND = "CREATE TABLE t (id int)", "INSERT INTO t VALUES (1); DROP TABLE IF EXISTS nothing; SELECT 1"


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"], ids=["transactional", "no_transaction"])
@pytest.mark.parametrize("source", ["url", "pool"])
async def test_a_callback_that_raises(database: Database, directive: str, source: str) -> None:
    """At whichever event, it ends the run with just that error, and hears no more; the next run completes."""
    files = scripts(FIRST, directive + SECOND, "CREATE TABLE u ()")
    complete = Heard()
    await ampd.migrate(database.url, migrations=files, on_event=complete)
    async with asyncpg.create_pool(database.url, min_size=0, max_size=3) as pool:
        for fatal in range(len(complete)):
            await database.execute("DROP TABLE t, u, ampd_schema_migrations")
            heard = Heard()
            ours = fatal % 2 == (source == "pool")  # so that each event meets an error of either kind
            error: Exception = ampd.ConnectionFailed("mine") if ours else ValueError("mine")

            def listen(event: Event, heard: Heard = heard, fatal: int = fatal, error: Exception = error) -> None:
                heard(event)
                if len(heard) == fatal + 1:
                    raise error

            with pytest.raises(type(error)) as raised:
                await ampd.migrate(database.url if source == "url" else pool, migrations=files, on_event=listen)
            assert raised.value is error
            assert error.__cause__ is None
            assert [type(event) for event in heard] == [type(event) for event in complete][: fatal + 1]
            applied = [event.version for event in heard.of(Applied)]
            begun = await database.fetchval("SELECT to_regclass('ampd_schema_migrations') IS NOT NULL")
            rows = await history(database) if begun else []
            assert [version for version, finished, _ in rows if finished][: len(applied)] == applied
            await assert_no_trace(database)
            report = await ampd.migrate(database.url, migrations=files)
            assert report.current_version == 3
            assert await database.fetchval("SELECT array_agg(id) FROM t") == [1]


async def test_a_callback_that_raises_before_there_is_a_connection() -> None:
    """The same holds for every command, and for what is told of a server that is not there yet."""
    limits, error = ampd.Limits(connect_wait_secs=GENEROUS), ampd.ConnectionFailed("mine")
    resolve = partial(ampd.resolve, version=1, resolution=ampd.Resolution.APPLIED)
    runs: list[Callable[..., Awaitable[object]]] = [ampd.migrate, ampd.status, resolve]
    for run in runs:
        heard = Heard()

        def listen(event: Event, heard: Heard = heard) -> None:
            heard(event)
            raise error

        with pytest.raises(ampd.ConnectionFailed) as raised:
            await run(NOWHERE, migrations=(), schema="s", limits=limits, on_event=listen)
        assert raised.value is error
        assert [(type(event), event.database, event.schema) for event in heard] == [
            (Retrying, "127.0.0.1:1/nowhere", "s")
        ]


async def test_a_callback_that_raises_stops_the_running_statement(database: Database) -> None:
    """It need not wait for the end of what runs: that is cancelled and rolled back."""

    def listen(event: Event) -> None:
        if isinstance(event, StatementStarted) and event.number == 2:
            raise ValueError("mine")

    with anyio.fail_after(GENEROUS), pytest.raises(ValueError, match="mine"):
        await ampd.migrate(database.url, migrations=scripts("CREATE TABLE t (); SELECT pg_sleep(600)"), on_event=listen)
    assert await database.fetchval("SELECT to_regclass('t')") is None
    await assert_no_trace(database)


async def test_a_callback_that_is_slow(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for; if it holds up the event loop for longer than the lock's lease, the run ends and can go on."""
    monkeypatch.setattr(session_state, "LEASE_SECS", 1)
    files = scripts("CREATE TABLE t (id int); SELECT 1", "-- no-transaction\nVACUUM t; VACUUM t", "SELECT 3")
    heard = Heard()

    def dawdle(event: Event) -> None:
        heard(event)
        if isinstance(event, StatementStarted) and event.number == 1:
            time.sleep(2)

    with pytest.raises(ampd.ConnectionFailed) as raised:
        await ampd.migrate(database.url, migrations=files, on_event=dawdle)
    heard.assert_adds_up()
    assert raised.value.message == (
        "the session that held the lock for this run was ended by the server after 1 s of silence: something, such as "
        "a slow on_event= callback, has held up the event loop of this process for so long"
    )
    assert [event.version for event in heard.of(Applied)] == [1]
    assert (await ampd.migrate(database.url, migrations=files)).current_version == 3
    await assert_no_trace(database)


# --- the law, for runs that meet one another


@pytest.mark.parametrize("source", ["url", "pool"])
@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"], ids=["transactional", "no_transaction"])
async def test_runners_that_race(database: Database, source: str, directive: str) -> None:
    """Of six that start at once on an empty database each one's events add up, and whoever has started has applied."""
    files = scripts("CREATE TABLE a ()", f"{directive}CREATE TABLE b (); SELECT 1", "CREATE TABLE c ()")
    heard = [Heard() for _ in range(6)]
    async with asyncpg.create_pool(database.url, min_size=0, max_size=12) as pool:
        place = database.url if source == "url" else pool
        await asyncio.gather(*(ampd.migrate(place, migrations=files, on_event=each) for each in heard))
    for each in heard:
        each.assert_adds_up()
        assert not each.of(Failed)
    assert sorted(event.version for each in heard for event in each.of(Starting)) == [1, 2, 3]


async def test_a_plan_is_told_again_if_it_has_changed(database: Database) -> None:
    """Whoever has waited while another runner applied a part is told what is left; its own doing is no news."""
    files, heard = scripts("CREATE TABLE a ()", "CREATE TABLE b ()", "CREATE TABLE c ()"), Heard()

    def another_is_faster(event: Event) -> None:
        if isinstance(event, Planned) and not heard:
            meanwhile(lambda: ampd.migrate(database.url, migrations=files, target=1))
        heard(event)

    report = await ampd.migrate(database.url, migrations=files, on_event=another_is_faster)
    assert [(event.applied, len(event.pending), event.total) for event in heard.of(Planned)] == [(0, 3, 3), (1, 2, 3)]
    assert [event.version for event in heard.of(Starting)] == [2, 3]
    assert heard[-1] == Finished(report=report, database=report.database, schema="public")
    heard.assert_adds_up()


async def test_another_runner_takes_over_while_one_rests(database: Database) -> None:
    """A start whose attempts end in lock timeouts ends as failed when another runner has applied the migration."""
    await database.execute("CREATE TABLE t (id int)")
    files, heard = scripts("ALTER TABLE t ADD COLUMN added int"), Heard()
    faster = [replace(files[0], sql="SELECT 1")]  # the same by its checksum, and waits for nobody

    def listen(event: Event) -> None:
        heard(event)
        if isinstance(event, LockRetry) and len(heard.of(LockRetry)) == 2:
            meanwhile(lambda: ampd.migrate(database.url, migrations=faster))

    limits = Limits(lock_timeout_secs=0.1)
    async with transaction(database, "SELECT FROM t"):
        report = await ampd.migrate(database.url, migrations=files, limits=limits, on_event=listen)
    assert (report.applied, report.current_version) == ((), 1)
    (failed,) = heard.of(Failed)
    assert (failed.error.code, failed.error.version) == ("interrupted", 1)
    assert failed.error.message == "another runner has gone on with 1 step"
    assert [(event.applied, len(event.pending)) for event in heard.of(Planned)] == [(0, 1), (1, 0)]
    assert len(heard.of(Starting)) == 1
    heard.assert_adds_up()


async def test_a_plan_comes_before_scripts_are_taken_apart(database: Database) -> None:
    """A script that cannot run is refused after the plan was told, and nothing has started."""
    heard = Heard()
    with pytest.raises(ampd.InvalidMigration) as raised:
        await ampd.migrate(database.url, migrations=scripts("\\copy t"), on_event=heard)
    assert [type(event) for event in heard] == [Planned, Finished]
    assert heard.of(Finished)[0].error is raised.value
    heard.assert_adds_up()


async def test_a_cancelled_run_ends_what_it_has_started(database: Database) -> None:
    """Both ways, the running migration ends before the run does, and says what became of it."""
    for directive, end in (("", "rolled back"), ("-- no-transaction\n", UNFINISHED)):
        heard = Heard()
        files = scripts("SELECT 1", f"{directive}SELECT 1; SELECT pg_sleep(600)")
        async with anyio.create_task_group() as tasks:

            async def stop(heard: Heard = heard, scope: anyio.CancelScope = tasks.cancel_scope) -> None:
                async def asleep() -> bool:
                    return any(event.number == 2 for event in heard.of(StatementStarted))

                await until(asleep)
                scope.cancel()

            tasks.start_soon(stop)
            await ampd.migrate(database.url, migrations=files, on_event=heard)
        heard.assert_adds_up()
        failed, stopped = heard[-2:]
        assert isinstance(failed, Failed)
        assert isinstance(stopped, Stopped)
        assert (failed.error.code, failed.error.version, failed.error.file) == ("interrupted", 2, "2_step.sql")
        assert failed.error.message == f"2 step was stopped, {end}"
        assert str(stopped).endswith(f"; 2 step was stopped, {end}")
        await database.execute("DROP TABLE ampd_schema_migrations")


def test_nothing_comes_after_the_last_event() -> None:
    """Whatever else there would be to say."""
    heard = list[ampd.Event]()
    emit = Emitter(heard.append, lambda: ("h:1/d", "s"))
    emit(ampd.Finished(report=Report("h:1/d", "s", None, (), ())))
    emit(ampd.Warned(message="late"))
    assert [type(event) for event in heard] == [ampd.Finished]
