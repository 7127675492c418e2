"""Whoever dies or is stopped: the next run ends in the same schema, nothing twice, and nobody is kept waiting."""

import asyncio
import os
import random
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import anyio
import asyncpg
import msgspec
import pytest

import ampd as library
from ampd import ConnectionFailed, NoAnswer, Report
from ampd.apply import guard, session_state, table_locks
from ampd.config import Limits
from ampd.local_server.server import local_server
from tests.cli_output import plain
from tests.folders import memory
from tests.scenes import (
    GENEROUS,
    Heard,
    ampds,
    assert_no_trace,
    building,
    end_backend,
    folder_of,
    history,
    indexes,
    scripts,
    transaction,
    until,
    waiting_for_a_lock,
)
from tests.servers import Ampd, Database, Proxy, Server, copy_cluster, pgbouncer, server_of

pytestmark = pytest.mark.anyio

GATE = "SELECT pg_advisory_xact_lock(1)"
FIRST = "CREATE TABLE t (id integer); INSERT INTO t VALUES (1)"
SECOND = f"INSERT INTO t VALUES (2); {GATE}; INSERT INTO t VALUES (3)"
PATIENT = "-- lock-timeout: 0\n"
both_ways = pytest.mark.parametrize(
    "directive", [PATIENT, f"{PATIENT}-- no-transaction\n"], ids=["transactional", "no_transaction"]
)


async def assert_complete(database: Database, files: tuple[str, ...]) -> None:
    """Run what is left, and insist that everything has happened exactly once."""
    with anyio.fail_after(GENEROUS):
        await library.migrate(database.url, migrations=scripts(*files))
    assert await database.fetchval("SELECT array_agg(id ORDER BY id) FROM t") == [1, 2, 3]
    assert [finished for _, finished, _ in await history(database)] == [True] * len(files)
    await assert_no_trace(database)


@both_ways
async def test_a_killed_runner(database: Database, ampd: Ampd, tmp_path: Path, directive: str) -> None:
    """The server notices within seconds that a runner was killed, though the statement it ran still waits."""
    files = (FIRST, f"{directive}{SECOND}")
    async with transaction(database, GATE):  # which stays: the dead one's statement can never end by itself
        process = ampd.start("migrate", "--migrations", folder_of(tmp_path / "files", *files), url=database.url)
        (worker,) = await waiting_for_a_lock(database)
        process.kill()
        process.communicate()
        if database.server.major < 14:  # it has no client_connection_check_interval
            await end_backend(database, worker)

        async def noticed() -> bool:
            return worker not in await ampds(database)

        await until(noticed)
    await assert_complete(database, files)


@both_ways
async def test_a_terminated_backend(database: Database, directive: str) -> None:
    """When an administrator ends the worker's session, the error says what happened, and running again completes."""
    files, heard = (FIRST, directive + SECOND), Heard()
    async with transaction(database, GATE), anyio.create_task_group() as tasks:

        async def end_it() -> None:
            (worker,) = await waiting_for_a_lock(database)
            await end_backend(database, worker)

        tasks.start_soon(end_it)
        with pytest.raises(ConnectionFailed) as raised:
            await library.migrate(database.url, migrations=scripts(*files), on_event=heard)
    assert raised.value.message.startswith("the connection to the server was lost: ")
    assert raised.value.message.endswith("terminating connection due to administrator command")
    assert (raised.value.code, raised.value.version, raised.value.file) == ("connection", 2, "2_step.sql")
    assert raised.value.hint == (
        "2_step.sql was being applied; run the command again: what was committed stays, nothing is applied twice"
    )
    assert raised.value.report is not None
    assert [each.version for each in raised.value.report.applied] == [1]
    await assert_complete(database, files)
    heard.assert_adds_up()


async def test_a_terminated_guard(database: Database) -> None:
    """Once the session that holds the lock is gone nothing more is begun, and what was done meanwhile is kept."""
    build = "-- no-transaction\nCREATE INDEX CONCURRENTLY t_id ON t (id); INSERT INTO t VALUES (2), (3)"
    heard = Heard()
    files = (FIRST, build)
    await library.migrate(database.url, migrations=scripts(FIRST))
    async with transaction(database, "SELECT FROM t") as reader, anyio.create_task_group() as tasks:

        async def end_it() -> None:
            worker = await building(database)
            guards = "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND state = 'idle in transaction'" \
                     " AND application_name ~ '^ampd( |$)' AND pid <> $2"  # fmt: skip
            await end_backend(database, await database.fetchval(guards, database.name, worker))
            await reader.execute("COMMIT")

        tasks.start_soon(end_it)
        with pytest.raises(ConnectionFailed) as raised:
            await library.migrate(database.url, migrations=scripts(*files), on_event=heard)
    assert raised.value.message == (
        "the session that held the lock for this run was ended from outside, by pg_terminate_backend, say"
    )
    assert raised.value.hint == (
        "2_step.sql was being applied; nothing more was begun: run `ampd migrate` again; "
        "it resumes after the last statement done"
    )
    assert (await history(database))[1][:2] == (2, False)
    assert await database.fetchval("SELECT array_agg(id) FROM t") == [1]
    assert [event.version for event in heard.of(library.Failed)] == [2]
    heard.assert_adds_up()
    await assert_complete(database, files)
    assert await indexes(database) == [("t_id", True)]


@pytest.fixture
async def fragile(server: Server) -> AsyncIterator[Callable[[], Awaitable[Database]]]:
    """A way to start a server of the test's own again and again, on the same data."""
    folder = Path(tempfile.mkdtemp(prefix="ampd-fragile-", dir=memory()))
    folder.chmod(0o711)
    data_dir = copy_cluster(server.cluster, folder / "db")
    stop, one_at_a_time = anyio.Event(), anyio.Lock()
    settings = {"max_connections": "30", "shared_buffers": "16MB"}

    async def keep(*, task_status: anyio.abc.TaskStatus[Database]) -> None:
        async with (
            one_at_a_time,
            local_server(data_dir, bindir=Path(server.bindir), tcp=True, settings=settings) as local,
        ):
            task_status.started(Database(server_of(local), "amp"))
            while local.process.poll() is None and not stop.is_set():  # noqa: ASYNC110 - a crash raises no event
                await anyio.sleep(0.02)

    async with anyio.create_task_group() as tasks:

        async def start() -> Database:
            database: Database = await tasks.start(keep)
            return database

        yield start
        stop.set()
    shutil.rmtree(folder)


@pytest.mark.any_server
@both_ways
async def test_a_crashed_server(fragile: Callable[[], Awaitable[Database]], directive: str) -> None:
    """A server that goes down at once is a lost connection; back again, it has whatever was said to be applied."""
    database = await fragile()
    heard = Heard()
    files = (FIRST, directive + SECOND)
    async with database.connect() as gate, anyio.create_task_group() as tasks:
        await gate.execute(f"BEGIN; {GATE}")

        async def crash() -> None:
            await waiting_for_a_lock(database)
            pid = int((Path(database.server.data_dir) / "postmaster.pid").read_text().split("\n")[0])
            os.kill(pid, signal.SIGQUIT)

        tasks.start_soon(crash)
        with pytest.raises(ConnectionFailed) as raised:
            await library.migrate(database.url, migrations=scripts(*files), on_event=heard)
        gate.terminate()
    assert raised.value.report is not None
    assert [each.version for each in raised.value.report.applied] == [1]
    assert [event.version for event in heard.of(library.Failed)] == [2]
    heard.assert_adds_up()
    await assert_complete(await fragile(), files)


@pytest.mark.any_server
@both_ways
async def test_a_network_that_falls_silent(database: Database, monkeypatch: pytest.MonkeyPatch, directive: str) -> None:
    """A cut network is noticed though nobody says so; the server forgets the runner, and the next one completes."""
    monkeypatch.setattr(guard, "_HEARTBEAT_SECS", 0.1)
    monkeypatch.setattr(session_state, "LEASE_SECS", 2)
    heard = Heard()
    files = (FIRST, directive + SECOND)

    async def at_the_gate() -> bool:
        return any((event.version, event.number) == (2, 2) for event in heard.of(library.StatementStarted))

    async with transaction(database, GATE) as gate, Proxy(database.server.host, database.server.port) as proxy:
        async with anyio.create_task_group() as tasks:

            async def cut() -> None:
                await waiting_for_a_lock(database)
                await until(at_the_gate)
                proxy.silent = True
                for name in ("_ANSWER_SECS", "_SILENCE_SECS", "_LOOK_EVERY_SECS"):  # too short for one that speaks
                    monkeypatch.setattr(table_locks, name, 0.3)
                monkeypatch.setattr("ampd.postgres.connection.Session.ask.__kwdefaults__", {"timeout": 0.3})

            tasks.start_soon(cut)
            url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{database.name}"
            with anyio.fail_after(GENEROUS), pytest.raises(ConnectionFailed) as raised:
                await library.migrate(url, migrations=scripts(*files), on_event=heard)
        assert raised.value.message == "the connection to the server was lost: the server has not answered for 0.3 s"
        monkeypatch.undo()
        await gate.execute("COMMIT")
        with anyio.fail_after(GENEROUS):
            await library.migrate(database.url, migrations=scripts(*files))
    assert [event.version for event in heard.of(library.Failed)] == [2]
    heard.assert_adds_up()
    await assert_complete(database, files)


@pytest.mark.any_server
async def test_a_network_that_is_silent_from_the_start(database: Database) -> None:
    """A server that never says a word is given up after connect_timeout, and told apart from one that refuses."""
    async with Proxy(database.server.host, database.server.port) as proxy:
        proxy.silent = True
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{database.name}?connect_timeout=1"
        with pytest.raises(NoAnswer, match="no answer in time"):
            await library.migrate(url, migrations=scripts(FIRST), limits=Limits(connect_wait_secs=0))


@pytest.mark.parametrize(
    ("sign", "code", "directive", "end"),
    [
        (signal.SIGTERM, 143, "", "rolled back"),
        (signal.SIGINT, 130, "", "rolled back"),
        (
            signal.SIGTERM,
            143,
            "-- no-transaction\n",
            "unfinished: run `ampd migrate --migrations FOLDER` again; it resumes or says what to do",
        ),
    ],
)
async def test_a_signal(
    database: Database, ampd: Ampd, tmp_path: Path, sign: signal.Signals, code: int, directive: str, end: str
) -> None:
    """The running statement is cancelled, its transaction rolled back, and the last line says what was applied."""
    files = (FIRST, directive + SECOND)
    async with transaction(database, GATE):
        process = ampd.start("migrate", "--migrations", folder_of(tmp_path / "files", *files), url=database.url)
        await waiting_for_a_lock(database)
        process.send_signal(sign)
        while process.poll() is None:  # who is impatient and repeats it changes nothing
            await anyio.sleep(0.002)
            process.send_signal(sign)
        stdout, stderr = process.communicate(timeout=GENEROUS)
        await assert_no_trace_but_the_gate(database)
    assert (process.returncode, stdout) == (code, "")
    told = plain(stderr).replace(str(tmp_path / "files"), "FOLDER")
    assert told == f"[1/2] 1 step  N ms\n{sign.name}: applied 1 step; 2 step was stopped, {end}\n"
    await assert_complete(database, files)


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
async def test_a_signal_before_anything_is_begun(ampd: Ampd, tmp_path: Path, sign: signal.Signals, code: int) -> None:
    """While it still reads its configuration, here from a pipe, the process ends at once and without a word."""
    os.mkfifo(tmp_path / "pipe")
    process = ampd.start("status", "--config", "pipe")
    with (tmp_path / "pipe").open("wb"):  # as soon as it is opened on the other side
        process.send_signal(sign)
        assert process.communicate(timeout=GENEROUS) == ("", "")
    assert process.returncode == code


async def assert_no_trace_but_the_gate(database: Database) -> None:
    """Insist that while the gate is still closed no session of ampd is left, nor a table that it had locked."""

    async def gone() -> bool:
        return not await ampds(database)

    await until(gone)


async def by_asyncio(run: Callable[[], Awaitable[Report]], secs: float) -> None:
    """Cancel a task from outside."""
    task = asyncio.ensure_future(run())
    await asyncio.sleep(secs)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def by_anyio(run: Callable[[], Awaitable[Report]], secs: float) -> None:
    """Cancel by a scope, again and again at every await."""
    with anyio.move_on_after(secs):
        await run()


async def by_timeout(run: Callable[[], Awaitable[Report]], secs: float) -> None:
    """Cancel by asyncio's own timeout."""
    try:
        async with asyncio.timeout(secs):
            await run()
    except TimeoutError:
        pass


@pytest.mark.any_server
@pytest.mark.parametrize("source", ["url", "pool"])
@pytest.mark.parametrize("cancelled", [by_asyncio, by_anyio, by_timeout])
async def test_a_cancelled_task(
    database: Database, source: str, cancelled: Callable[[Callable[[], Awaitable[Report]], float], Awaitable[None]]
) -> None:
    """Cancelled at any moment, however, a run leaves no lock and no half migration, and the pool as good as new."""
    texts = [FIRST, *("INSERT INTO t VALUES (9); DELETE FROM t WHERE id = 9",) * 3]
    texts += ["-- no-transaction\nCREATE INDEX CONCURRENTLY t_id ON t (id); SELECT 1; SET work_mem = '99kB'"]
    texts += ["SET search_path = nowhere; SELECT pg_advisory_lock(5)", "INSERT INTO t VALUES (2), (3)"]
    files, chance = scripts(*texts), random.Random(7)
    anew, url = "DROP TABLE IF EXISTS t, ampd_schema_migrations", f"{database.url}?sslmode=disable"
    # asyncpg complains of its own negotiation of TLS when it is cancelled in the midst of that.
    async with asyncpg.create_pool(url, min_size=0, max_size=4) as pool:

        async def run() -> Report:
            heard = Heard()
            try:
                return await library.migrate(pool if source == "pool" else url, migrations=files, on_event=heard)
            finally:
                heard.assert_adds_up()

        longest = 0.3
        for _ in range(12):
            await cancelled(run, chance.uniform(0, longest))
            await lent_clean(pool)
            if await database.fetchval("SELECT to_regclass('ampd_schema_migrations')") is None:
                continue
            rows = await history(database)
            assert all(finished for version, finished, _ in rows if version != 5)
            if len(rows) == len(files) and all(finished for _, finished, _ in rows):
                assert await database.fetchval("SELECT array_agg(id ORDER BY id) FROM t") == [1, 2, 3]
                await database.execute(anew)
                longest *= 0.8
        with anyio.fail_after(GENEROUS):
            await run()
        assert await database.fetchval("SELECT array_agg(id ORDER BY id) FROM t") == [1, 2, 3]
        assert await indexes(database) == [("t_id", True)]
    await assert_no_trace(database)


async def lent_clean(pool: asyncpg.Pool) -> None:
    """Wait until all is given back, borrow every connection of the pool at once, and insist that each is as new."""

    async def all_back() -> bool:
        return bool(pool.get_idle_size() == pool.get_size())

    await until(all_back)
    async with pool.acquire() as one, pool.acquire() as two, pool.acquire() as three, pool.acquire() as four:
        for connection in (one, two, three, four):
            assert not connection.is_in_transaction()
            assert tuple(
                await connection.fetchrow(
                    "SELECT current_setting('search_path'), current_setting('work_mem'), (SELECT count(*) FROM pg_locks"
                    " WHERE pid = pg_backend_pid() AND locktype = 'advisory')"
                )
            ) == ('"$user", public', "4MB", 0)


@pytest.mark.any_server
async def test_a_signal_in_a_silent_network(database: Database, ampd: Ampd, tmp_path: Path) -> None:
    """With a server that answers nothing any more the process ends all the same, and claims no more than it knows."""
    files = (FIRST, SECOND)
    folder = folder_of(tmp_path / "files", *files)
    async with (
        transaction(database, GATE) as gate,
        Proxy(database.server.host, database.server.port) as proxy,
    ):
        url = f"postgresql://postgres@127.0.0.1:{proxy.port}/{database.name}?sslmode=disable"
        process = ampd.start("migrate", "--json", "--migrations", folder, url=url)
        await waiting_for_a_lock(database)
        assert process.stderr is not None
        assert "1 step" in await anyio.to_thread.run_sync(process.stderr.readline)  # it knows
        proxy.silent = True
        process.send_signal(signal.SIGTERM)
        stdout, stderr = await anyio.to_thread.run_sync(lambda: process.communicate(timeout=GENEROUS))
        await gate.execute("COMMIT")
    assert process.returncode == 143
    told = "SIGTERM: applied 1 step; 2 step was stopped, "
    told += "and the server did not confirm the rollback: run `ampd status`"
    assert stderr.splitlines()[-1] == told.replace("ampd status", f"ampd status --migrations {folder}")
    document = msgspec.json.decode(stdout)
    assert (document["result"], document["current_version"]) == ("failed", 1)
    assert [each["version"] for each in document["applied"]] == [1]
    assert [each["version"] for each in document["pending"]] == [2]
    assert (document["error"]["code"], document["error"]["message"]) == ("interrupted", told)
    await assert_complete(database, files)


@pytest.mark.any_server
async def test_a_signal_while_a_script_is_taken_apart(database: Database, ampd: Ampd, tmp_path: Path) -> None:
    """A huge file does not keep a signal waiting for the end of its reading."""
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "1_huge.sql").write_text("INSERT INTO t VALUES (1);\n" * 1_000_000)
    process = ampd.start("migrate", "--migrations", folder, url=database.url)

    async def connected() -> bool:
        return bool(await ampds(database))

    await until(connected)
    process.send_signal(signal.SIGTERM)
    _, stderr = await anyio.to_thread.run_sync(lambda: process.communicate(timeout=GENEROUS))
    assert (process.returncode, stderr) == (143, "SIGTERM: nothing was applied\n")
    assert await database.fetchval("SELECT to_regclass('ampd_schema_migrations')") is None


@pytest.mark.parametrize("pooled", [False, True], ids=["pool", "pooler"])
async def test_a_cancelled_run_costs_no_connection(database: Database, pooled: bool) -> None:
    """What is cancelled is rolled back where it ran: pool and pooler keep the very connection."""
    files = scripts(SECOND.replace("INSERT INTO t VALUES (2)", FIRST))
    async with AsyncExitStack() as stack:
        place = stack.enter_context(pgbouncer(database.server, default_pool_size=1)) if pooled else database.server
        url = place.url(database.name)
        options = {"min_size": 1, "max_size": 1, "statement_cache_size": 0}
        pool = await stack.enter_async_context(asyncpg.create_pool(url, **options))
        before = await pool.fetchval("SELECT pg_backend_pid()")
        async with transaction(database, GATE), anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: library.migrate(url if pooled else pool, migrations=files))
            await waiting_for_a_lock(database)
            tasks.cancel_scope.cancel()
        assert await pool.fetchval("SELECT pg_backend_pid()") == before
    await assert_no_trace(database)
