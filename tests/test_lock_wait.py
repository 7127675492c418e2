"""Waiting for the advisory lock: who holds it, how long, and not a moment longer than the schema needs."""

import re
import signal

import anyio
import asyncpg
import pytest

import ampd as library
from ampd import AdvisoryLockTimeout, MigrationFailed, MigrationInterrupted, Report, Waiting, Warned
from ampd.advisory_lock import lock_key
from ampd.config import HISTORY_TABLE as TABLE
from ampd.config import Limits
from ampd.events import Event
from tests.scenes import (
    GENEROUS,
    Heard,
    ampds,
    assert_no_trace,
    end_backend,
    far_away,
    folder_of,
    history,
    meanwhile,
    report_at_once,
    scripts,
    transaction,
    until,
    waiting_for_a_lock,
)
from tests.servers import Ampd, Database

pytestmark = [pytest.mark.anyio, pytest.mark.any_server]

GATE = "SELECT pg_advisory_xact_lock(1)"
AT_THE_GATE = f"-- lock-timeout: 0\nCREATE TABLE t (id integer); {GATE}"


@pytest.mark.parametrize(
    "script", [AT_THE_GATE, f"-- no-transaction\n{AT_THE_GATE}"], ids=["transactional", "no_transaction"]
)
async def test_a_waiter_says_whom_it_waits_for(database: Database, script: str) -> None:
    """Whoever waits for over a second names pid, host, application, migration and since when; then it is done."""
    heard, reports = Heard(), list[Report]()
    files = scripts(script)
    async with transaction(database, GATE) as gate, anyio.create_task_group() as tasks:

        async def run(events: Heard) -> None:
            reports.append(await library.migrate(database.url, migrations=files, on_event=events))

        tasks.start_soon(run, Heard())
        (worker,) = await waiting_for_a_lock(database)
        tasks.start_soon(run, heard)
        waiting = await heard.first(Waiting)
        since = await database.fetchval("SELECT xact_start FROM pg_stat_activity WHERE pid = $1", worker)
        await gate.execute("COMMIT")
    assert (waiting.holder.pid, waiting.holder.client) == (worker, "127.0.0.1")
    assert (waiting.holder.application or "").startswith("ampd")
    assert (waiting.holder.migration, waiting.holder.since, waiting.limit) == ("1 step", since, 600)
    assert 1 <= waiting.waited < 600
    assert [len(report.applied) for report in reports] == [1, 0]
    assert [report.current_version for report in reports] == [1, 1]
    await assert_no_trace(database)
    heard.assert_adds_up()


async def test_a_waiter_holds_nothing(database: Database) -> None:
    """A waiting runner has no transaction open: nobody's CREATE INDEX CONCURRENTLY could wait for it."""
    files, seen = scripts(AT_THE_GATE), list[tuple[object, ...]]()

    async def look() -> None:
        (worker,) = await waiting_for_a_lock(database)
        for pid in set(await ampds(database)) - {worker}:
            activity = "SELECT state, xact_start, backend_xmin FROM pg_stat_activity WHERE pid = $1"
            seen.append(tuple((await database.fetch(activity, pid))[0].values()))

    def on_event(event: Event) -> None:
        if isinstance(event, Waiting):
            meanwhile(look)

    async with transaction(database, GATE) as gate, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: library.migrate(database.url, migrations=files))
        await waiting_for_a_lock(database)
        tasks.start_soon(lambda: library.migrate(database.url, migrations=files, on_event=on_event))

        async def looked() -> bool:
            return bool(seen)

        await until(looked)
        await gate.execute("COMMIT")
    assert set(seen) == {("idle", None, None)}


async def test_a_runner_in_another_database_is_nobodys_business(database: Database) -> None:
    """A migration that runs in another database of the same server keeps no one waiting."""
    other = Database(database.server, f"{database.name}_other")
    interrupted = scripts("-- no-transaction\nDO $$ BEGIN RAISE 'no'; END $$")
    with pytest.raises(MigrationFailed):
        await library.migrate(database.url, migrations=interrupted)
    await database.execute(f"CREATE DATABASE {other.name}")
    try:
        async with transaction(other, GATE) as gate, anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: library.migrate(other.url, migrations=scripts(AT_THE_GATE)))
            await waiting_for_a_lock(other)
            with pytest.raises(MigrationInterrupted):  # after a look at who might still be at it
                await library.migrate(database.url, migrations=interrupted, limits=Limits(advisory_lock_wait_secs=1))
            await gate.execute("COMMIT")
    finally:
        await database.execute(f"DROP DATABASE {other.name} WITH (FORCE)")


async def test_a_waiter_gives_up_in_time(database: Database, ampd: Ampd) -> None:
    """A waiter that gives up has the code advisory_lock_timeout, and names the holder and how to end it."""
    files = scripts(AT_THE_GATE)
    (ampd.folder / files[0].file).write_text(files[0].sql)
    async with transaction(database, GATE) as gate, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: library.migrate(database.url, migrations=files))
        (worker,) = await waiting_for_a_lock(database)
        patience = {"AMP_CONFIG_METADATA_DB__MIGRATIONS__ADVISORY_LOCK_WAIT_SECS": "0.5"}
        ended = await anyio.to_thread.run_sync(
            lambda: ampd("migrate", "--json", "--migrations", ".", url=database.url, env=patience)
        )
        await gate.execute("COMMIT")
    assert ended.returncode == 1
    assert '"code":"advisory_lock_timeout"' in re.sub(r":\s+", ":", ended.stdout)
    told = re.sub(r"since [-\d]+ [:\d]+\+\d+", "since T", ended.stderr)
    told = re.sub(r"\d+ s\b", "N s", told)
    whom = f"pid {worker}, user postgres, on 127.0.0.1, application ampd, migration 1 step (1 of 1), since T"
    waiting = f"waiting for the migration lock (N s so far), held by {whom}\n"  # which it says only if it is slow
    assert told.replace(waiting, "") == (
        f"error: timed out after N s waiting for the migration lock, held by {whom}\n"
        "hint: wait for it and run again, raise advisory_lock_wait_secs, or end it: "
        f"SELECT pg_terminate_backend({worker})\n"
    )


async def test_a_session_that_is_no_runner_is_called_one(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever holds the lock without saying that it is ampd is told as a session, with its user."""
    report_at_once(monkeypatch)
    role = await database.role("stranger")
    heard, lock = Heard(), f"SELECT pg_advisory_lock({lock_key('public', TABLE)})"
    async with database.connect(role.url, server_settings={"application_name": "psql"}) as stranger:
        await stranger.execute(lock)
        with pytest.raises(AdvisoryLockTimeout) as timeout:
            await library.migrate(
                database.url, migrations=scripts("SELECT 1"), limits=Limits(advisory_lock_wait_secs=0.5), on_event=heard
            )
        pid = stranger.get_server_pid()
    whom = f"held by a session that is not ampd: pid {pid}, user {role.name}, on 127.0.0.1, application psql"
    message = re.sub(r"\d+ s waiting", "N s waiting", timeout.value.message)
    assert message.startswith("timed out after N s waiting for the migration lock, " + whom)
    assert {event.holder.user for event in heard.of(Waiting)} == {role.name}
    assert f"s so far), {whom}" in str(heard.of(Waiting)[0])


async def test_a_waiter_that_is_stopped_speaks_of_itself(database: Database, ampd: Ampd) -> None:
    """What another runner is at was not stopped with the waiter, nor rolled back."""
    folder = folder_of(ampd.folder / "files", "SELECT 1", AT_THE_GATE)
    async with transaction(database, GATE):
        processes = [ampd.start("migrate", "--migrations", folder, url=database.url)]
        await waiting_for_a_lock(database)
        processes.append(ampd.start("migrate", "--migrations", folder, url=database.url))
        waits, told = processes[1].stderr, []
        assert waits is not None
        await anyio.to_thread.run_sync(lambda: told.append(waits.readline()))
        assert told[0].startswith("waiting for the migration lock (")
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            told.append(process.communicate(timeout=GENEROUS)[1].splitlines()[-1])
    assert told[1:] == [
        "SIGTERM: nothing was applied; the rest was waiting for the migration lock",
        "SIGTERM: applied 1 step; 2 step was stopped, rolled back",
    ]


async def test_a_waiter_stops_when_its_schema_is_current(database: Database) -> None:
    """A waiter whose own migrations are done does not wait for the rest of what another runner has to do."""
    first, second = f"-- lock-timeout: 0\n{GATE}", "-- lock-timeout: 0\nSELECT pg_advisory_xact_lock(2)"
    limits = Limits(advisory_lock_wait_secs=GENEROUS)
    files, heard = scripts(first, second), Heard()
    async with (
        transaction(database, first) as gate,
        transaction(database, second) as next_gate,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(lambda: library.migrate(database.url, migrations=files))
        await waiting_for_a_lock(database)

        async def open_the_first() -> None:
            await heard.first(Waiting)
            await gate.execute("COMMIT")

        tasks.start_soon(open_the_first)
        report = await library.migrate(database.url, migrations=files, target=1, limits=limits, on_event=heard)
        assert (report.current_version, report.applied) == (1, ())
        assert await history(database) == [(1, True, 1)]  # and the second is still at its gate
        await waiting_for_a_lock(database)
        await next_gate.execute("COMMIT")
    assert await history(database) == [(1, True, 1), (2, True, 1)]
    heard.assert_adds_up()


async def test_old_replicas_start_while_a_newer_one_migrates(database: Database) -> None:
    """A build that the database is ahead of starts with a warning, waits for nobody and applies nothing."""
    files, heard = scripts("CREATE TABLE a ()", "CREATE TABLE b ()", f"-- lock-timeout: 0\n{GATE}"), Heard()
    await library.migrate(database.url, migrations=files[:2])
    async with transaction(database, GATE) as gate, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: library.migrate(database.url, migrations=files))
        await waiting_for_a_lock(database)
        report = await library.migrate(database.url, migrations=files[:1], on_event=heard)
        await gate.execute("COMMIT")
    assert (report.current_version, report.applied, report.ahead) == (2, (), (2,))
    assert [event.message for event in heard.of(Warned)] == [
        "the database is ahead of this build by 1 migration (newest: 2); nothing is applied"
    ]
    assert not heard.of(Waiting)
    heard.assert_adds_up()


@pytest.mark.one_version
async def test_fifteen_runners_take_turns(database: Database) -> None:
    """Runners that start together on an empty database apply each migration once, and all report the same version."""
    files = scripts(*(f"CREATE TABLE t{number} ()" for number in range(12)))
    reports = list[Report]()

    async def run() -> None:
        reports.append(await library.migrate(database.url, migrations=files))

    async with anyio.create_task_group() as tasks:
        for _ in range(15):
            tasks.start_soon(run)
    assert sorted(each.version for report in reports for each in report.applied) == list(range(1, 13))
    assert {report.current_version for report in reports} == {12}
    await assert_no_trace(database)


@pytest.mark.one_version
@pytest.mark.parametrize("lent", [False, True], ids=["url", "pool"])
async def test_runners_take_turns_over_a_slow_line(database: Database, lent: bool) -> None:
    """A rollback that takes longer than closing may is waited for: all runners end well, and say nothing of it."""
    files = scripts("CREATE TABLE a ()", "-- no-transaction\nCREATE TABLE b ()", "CREATE TABLE c ()")
    reports, heard = list[Report](), Heard()

    async def run(far: Database) -> None:
        if not lent:
            reports.append(await library.migrate(far.url, migrations=files, on_event=heard))
            return
        async with asyncpg.create_pool(far.url, min_size=0, max_size=3) as pool:
            reports.append(await library.migrate(pool, migrations=files, on_event=heard))

    async with far_away(database) as far, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(run, far)
    assert sorted(each.version for report in reports for each in report.applied) == [1, 2, 3]
    assert {report.current_version for report in reports} == {3}
    assert not heard.of(Warned)


@pytest.mark.parametrize("lent", [False, True], ids=["url", "pool"])
async def test_a_waiter_that_has_lost_its_connection_waits_on(database: Database, lent: bool) -> None:
    """While a runner only waits it holds nothing: in place of a lost connection it opens another, and another."""
    files, heard, reports = scripts(AT_THE_GATE), Heard(), list[Report]()
    url = f"{database.url}?application_name=waiter"

    async def wait() -> None:
        if not lent:
            reports.append(await library.migrate(url, migrations=files, on_event=heard))
            return
        async with asyncpg.create_pool(url, min_size=0, max_size=1) as pool:
            reports.append(await library.migrate(pool, migrations=files, on_event=heard))

    async with transaction(database, GATE) as gate, anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: library.migrate(database.url, migrations=files))
        await waiting_for_a_lock(database)
        tasks.start_soon(wait)
        await heard.first(Waiting)

        async def waiter() -> int:
            pid: int = await database.fetchval(
                "SELECT max(pid) FROM pg_stat_activity WHERE application_name = 'waiter'"
            )
            return pid

        for _ in range(3):
            await end_backend(database, await until(waiter))
        await until(waiter)
        await gate.execute("COMMIT")
    assert [len(report.applied) for report in reports] == [0]
