"""Large files: several messages of one transaction, bounded memory, and an event loop that goes on."""

import time
from pathlib import Path

import anyio
import asyncpg
import msgspec
import pytest

import ampd as library
import benchmarks.large
from ampd import ConnectionFailed, Event, InvalidMigration, MigrationFailed, StatementStarted
from ampd.apply.prepared import prepare
from ampd.apply.transaction_message import parts
from ampd.plan import make_plan
from ampd.sql import splitter
from tests.scenes import (
    GENEROUS,
    Heard,
    assert_no_trace,
    blind_to_problems,
    end_backend,
    history,
    meanwhile,
    never_look,
    scripts,
    transaction,
)
from tests.servers import Database, Proxy, pgbouncer

pytestmark = [pytest.mark.anyio, pytest.mark.one_version]

ROWS = [f"INSERT INTO t VALUES ({number})" for number in range(1, 40)]
SCRIPT = ";\n".join(("CREATE TABLE t (a int PRIMARY KEY)", *ROWS))
ALL = list(range(1, 40))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every script be a large one, of which a few statements go into each message."""
    monkeypatch.setattr("ampd.apply.transaction_message.LARGE", 0)
    monkeypatch.setattr("ampd.apply.transaction_message._PART", 100)


async def rows(database: Database) -> list[int] | None:
    """Return what the script has inserted; None without its table."""
    if not await database.fetchval("SELECT to_regclass('t') IS NOT NULL"):
        return None
    return [row["a"] for row in await database.fetch("SELECT a FROM t ORDER BY a")]


@pytest.mark.parametrize("before", ["", "-- no-transaction\nBEGIN;\n", "-- no-transaction\nBEGIN READ WRITE;\n"])
@pytest.mark.usefixtures("small_parts")
async def test_a_large_migration_takes_several_messages_of_one_transaction(database: Database, before: str) -> None:
    """All of it is committed at once, with its record, however many messages it takes."""
    after = ";\nCOMMIT" if before else ""
    told, seen = Heard(), list[object]()

    def heard(event: Event) -> None:
        told(event)
        if isinstance(event, StatementStarted) and event.number in (10, 20, 30):
            seen.append(meanwhile(lambda: rows(database)))

    files = scripts(f"{before}{SCRIPT}{after}")
    await library.migrate(database.url, migrations=files, on_event=heard)
    assert await rows(database) == ALL
    assert seen == [None] * 3  # to others there was nothing before the end
    numbers = [each.number for each in told.of(StatementStarted)]
    assert numbers == list(range(1, len(splitter.split(files[0].sql)) + 1))
    assert [(version, finished) for version, finished, _ in await history(database)] == [(1, True)]
    async with Proxy(database.server.host, database.server.port) as proxy:
        await database.execute("DROP TABLE t; DROP TABLE ampd_schema_migrations")
        await library.migrate(f"postgresql://postgres@{proxy.host}:{proxy.port}/{database.name}", migrations=files)
        assert proxy.round_trips > 10


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.usefixtures("small_parts")
async def test_what_a_large_script_sets_holds_until_its_end(database: Database, *, pooled: bool) -> None:
    """Settings, role, search path and savepoints reach from one message to the next, through a pooler as well."""
    padding = "".join(f"SELECT {number} AS {'x' * 60};\n" for number in range(5))
    script = padding.join(
        (
            "CREATE SCHEMA app; SET LOCAL search_path = app; SET work_mem = '123kB'; SET ROLE pg_monitor;\n",
            "RESET ROLE; CREATE TABLE t (a int); SAVEPOINT s; CREATE TABLE u ();\n",
            "ROLLBACK TO s; INSERT INTO t SELECT 1 WHERE current_setting('work_mem') = '123kB';\n",
            "CREATE TEMPORARY TABLE mine ON COMMIT DROP AS SELECT 2 AS a;\n",
            "INSERT INTO t SELECT a FROM mine",
        )
    )
    if pooled:
        with pgbouncer(database.server, "transaction", default_pool_size=3) as pooler:
            await library.migrate(Database(pooler, database.name).url, migrations=scripts(script))
    else:
        async with asyncpg.create_pool(database.url, min_size=1, max_size=1) as pool:
            await library.migrate(pool, migrations=scripts(script))
            assert await pool.fetchval("SELECT current_setting('work_mem')") == "4MB"
    assert await database.fetchval("SELECT array_agg(a ORDER BY a) FROM app.t") == [1, 2]
    assert await database.fetchval("SELECT to_regclass('app.u')") is None


@pytest.mark.parametrize(
    ("broken", "line", "column"),
    [
        ("SELECT 1/0", 31, 1),  # of which the server tells no position
        ("INSERT INTO t\n  VALUES (nothing)", 32, 11),
        ("INSERT INTO t VALUES (3)", 31, 1),
    ],
)
@pytest.mark.parametrize("before", ["", "-- no-transaction\nBEGIN;"])
@pytest.mark.usefixtures("small_parts")
async def test_an_error_in_a_later_message_is_found_in_the_file(
    database: Database, before: str, broken: str, line: int, column: int
) -> None:
    """Line and column are those in the file, and nothing of the migration is left."""
    statements = SCRIPT.split(";\n")
    script = before + ";\n".join((*statements[:30], broken, *statements[30:])) + ";\nCOMMIT" * bool(before)
    with pytest.raises(MigrationFailed) as failed:
        await library.migrate(database.url, migrations=scripts(script))
    assert (failed.value.line, failed.value.column) == (line + bool(before), column)
    assert await rows(database) is None


@pytest.mark.usefixtures("small_parts")
async def test_a_lock_timeout_in_a_later_message_starts_all_of_it_again(database: Database) -> None:
    """Between two attempts nothing is held, and the next one begins with the first message."""
    await database.execute("CREATE TABLE busy ()")
    script = SCRIPT + ";\nALTER TABLE busy ADD a int"
    told = Heard()
    limits = library.Limits(lock_timeout_secs=0.05)
    async with anyio.create_task_group() as tasks, transaction(database, "SELECT FROM busy"):
        tasks.start_soon(
            lambda: library.migrate(database.url, migrations=scripts(script), limits=limits, on_event=told)
        )
        await told.first(library.LockRetry)
    assert await rows(database) == ALL
    assert len([each for each in told.of(StatementStarted) if each.number == 1]) > 1


@pytest.mark.usefixtures("small_parts")
async def test_cancelled_in_a_later_message_a_large_migration_is_rolled_back(database: Database) -> None:
    """A cancellation, in a message or between two, leaves neither a row nor a session behind."""
    for number in (7, 20, 33):
        with anyio.CancelScope() as scope:

            def stop(event: Event, at: int = number, scope: anyio.CancelScope = scope) -> None:
                if isinstance(event, StatementStarted) and event.number == at:
                    scope.cancel()

            await library.migrate(database.url, migrations=scripts(SCRIPT), on_event=stop)
        assert scope.cancelled_caught
        await assert_no_trace(database)
        assert await rows(database) is None


@pytest.mark.usefixtures("small_parts")
async def test_a_connection_that_is_lost_between_two_messages_ends_the_migration(database: Database) -> None:
    """The server has rolled back what it had, and the error is that of a lost connection."""

    def end(event: Event) -> None:
        if isinstance(event, StatementStarted) and event.number == 30:

            async def work() -> None:
                pid = await database.fetchval(
                    "SELECT pid FROM pg_stat_activity WHERE datname = $1 AND application_name ~ '^ampd( |$)'",
                    database.name,
                )
                await end_backend(database, pid)

            meanwhile(work)

    with pytest.raises(ConnectionFailed, match="was lost"):
        await library.migrate(database.url, migrations=scripts(SCRIPT), on_event=end)
    assert await rows(database) is None


@pytest.mark.usefixtures("small_parts")
async def test_a_slow_client_keeps_its_transaction(database: Database) -> None:
    """What ends idle transactions does not end one that a busy event loop has kept waiting between two messages."""
    await database.execute(f"ALTER DATABASE {database.name} SET idle_in_transaction_session_timeout = '50ms'")

    def dawdle(event: Event) -> None:
        if isinstance(event, StatementStarted) and event.number in (10, 20, 30):
            time.sleep(0.2)

    for script in (SCRIPT, f"-- no-transaction\nBEGIN;\n{SCRIPT};\nCOMMIT"):
        await library.migrate(database.url, migrations=scripts(script), on_event=dawdle)
        assert await rows(database) == ALL
        await database.execute("DROP TABLE t; DROP TABLE ampd_schema_migrations")


@pytest.mark.parametrize("before", ["", "-- no-transaction\nBEGIN;\n"])
@pytest.mark.usefixtures("small_parts")
async def test_another_encoding_does_not_reach_the_next_message(database: Database, before: str) -> None:
    """What a script sets for itself garbles no name of ampd's in its later messages."""
    script = f"{before}SET LOCAL client_encoding = 'SJIS';{SCRIPT}" + ";\nCOMMIT" * bool(before)
    (file,) = scripts(script)
    await library.migrate(database.url, schema="имя", migrations=[msgspec.structs.replace(file, name="größe")])
    assert await database.fetchval('SELECT count(*) FROM "имя".t') == len(ROWS)


@pytest.mark.parametrize("before", ["", "-- no-transaction\nBEGIN;\n"])
@pytest.mark.usefixtures("small_parts")
async def test_a_runner_that_is_cut_off_strands_no_transaction(
    database: Database, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    """The server waits so long for the next message and no longer, though the network says nothing of the loss."""
    monkeypatch.setattr("ampd.apply.session_state.LEASE_SECS", 2)
    monkeypatch.setattr("ampd.apply.guard._HEARTBEAT_SECS", 0.1)
    files = scripts(f"{before}{SCRIPT}" + ";\nCOMMIT" * bool(before))
    async with Proxy(database.server.host, database.server.port) as proxy, anyio.create_task_group() as tasks:

        def cut(event: Event) -> None:
            if isinstance(event, StatementStarted) and event.number == 20:
                proxy.silent = True
                tasks.cancel_scope.cancel()

        url = f"postgresql://postgres@{proxy.host}:{proxy.port}/{database.name}"
        tasks.start_soon(lambda: library.migrate(url, migrations=files, on_event=cut))
        with anyio.CancelScope(shield=True), anyio.fail_after(GENEROUS):
            while not proxy.silent:  # noqa: ASYNC110 - what is waited for raises no event
                await anyio.sleep(0.01)
            await library.migrate(database.url, migrations=files)
    assert await rows(database) == ALL


@pytest.mark.parametrize("end", ["COMMIT", "COMMIT; BEGIN"])
@pytest.mark.usefixtures("small_parts")
async def test_what_ends_the_transaction_ends_the_run(
    database: Database, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    """If a script could end its transaction, none of its later messages would run outside of it."""

    blind_to_problems(monkeypatch)
    statements = SCRIPT.split(";\n")
    script = ";\n".join((*statements[:10], end, *statements[10:]))
    with pytest.raises(MigrationFailed, match="ended its own transaction"):
        await library.migrate(database.url, migrations=scripts(script))
    assert len(await rows(database) or ()) < 20


@pytest.mark.usefixtures("small_parts")
async def test_a_unit_whose_first_query_is_large(database: Database) -> None:
    """BEGIN and SET TRANSACTION may fill a message of their own, ahead of anything that ampd adds."""
    long = f"CREATE TABLE t (a int); INSERT INTO t SELECT length('{'x' * 500}')"
    script = f"-- no-transaction\nBEGIN;{'SET TRANSACTION ISOLATION LEVEL SERIALIZABLE;' * 3}{long}; COMMIT"
    await library.migrate(database.url, migrations=scripts(script))
    assert await rows(database) == [500]


def test_parts_hold_each_statement_once() -> None:
    """Whatever the lengths, the parts put together are all statements in order, and few parts are enough."""
    for lengths in ((), (1,), (300_000,) * 10, (1_200_000, 5, 5), (5,) * 20 + (2_000_000,) + (5,) * 20, (900_000, 99)):
        statements = splitter.split(";".join(f"'{'x' * length}'" for length in lengths))
        found = list(parts(statements))
        assert [number for part in found for number in part] == list(range(len(lengths)))
        assert all(found) or not lengths
        assert len(found) <= (-(-sum(lengths) // (256 * 1024)) + 1 if sum(lengths) > 1_000_000 else 1)


def literals(count: int) -> str:
    """Return statements of 33 kB."""
    return ";\n".join(f"SELECT length('{'x' * 33_000}')" for _ in range(count))


async def test_a_large_migration_costs_a_round_trip_for_each_quarter_of_a_megabyte(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 1 MB a migration is one message; beyond, one for each 256 kB."""
    never_look(monkeypatch)
    for number, (count, expected) in enumerate(((30, 1), (40, 6), (160, 21)), start=1):
        script = literals(count)
        assert expected == (1 if len(script) < 1_000_000 else -(-len(script) // (256 * 1024)))
        files = scripts(*("SELECT 1" for _ in range(number)), script)
        await library.migrate(database.url, migrations=files[:number])
        async with Proxy(database.server.host, database.server.port) as proxy:
            await library.migrate(f"postgresql://postgres@{proxy.host}:{proxy.port}/{database.name}", migrations=files)
            assert proxy.connections == 1
            assert expected - (expected > 1) <= proxy.round_trips - 1 <= expected, number
        await database.execute(f"DELETE FROM ampd_schema_migrations WHERE version = {number + 1}")


MEGABYTE = 2**20
PAUSE_SECS = 0.25  # of some 20 ms; what is not taken apart in slices takes seconds


@pytest.fixture(scope="module")
def large_files() -> dict[str, str]:
    """The texts of large files."""
    return {
        "rows": benchmarks.large.inserts(20_000, width=640),
        "literal": "SELECT length('" + "ab ''c\n" * 2_000_000 + "')",
        "refused": benchmarks.large.inserts(170_000) + "COMMIT;\n",
        "many": benchmarks.large.inserts(30_000) + "COMMIT;\n",
    }


@pytest.mark.parametrize("name", ["rows", "literal", "refused"])
def test_what_a_large_file_costs_a_service(
    database: Database, tmp_path: Path, large_files: dict[str, str], name: str
) -> None:
    """14 MB take at most three times as much memory, and 50 MB, and keep the event loop for no long pause.

    A pause is told in processor time: others use the same machine. A statement that is large itself is one message,
    which the driver encodes at once. `python -m benchmarks.large` has the figures.
    """
    script = large_files[name]
    (tmp_path / "1_big.sql").write_text(script)
    load = benchmarks.large.measure(database.url, tmp_path)
    assert load.peak_memory < 3 * len(script) + 50 * MEGABYTE
    assert (load.error is None) is (name != "refused")
    assert load.longest_pause < PAUSE_SECS or name == "literal"


def test_the_last_of_many_statements_is_found_at_once(large_files: dict[str, str]) -> None:
    """A finding at the end of a file of 30,000 statements is told with its line and column."""
    (step,) = make_plan(scripts(large_files["many"]), ()).migrations
    with pytest.raises(InvalidMigration, match="COMMIT in a migration") as refused:
        prepare([step])
    assert (refused.value.line, refused.value.column) == (30_002, 1)
    assert len(refused.value.excerpt or "") in range(10, 200)


async def test_nothing_is_silent_for_long(database: Database, tmp_path: Path, large_files: dict[str, str]) -> None:
    """What is planned is told before scripts are taken apart."""
    (tmp_path / "1_big.sql").write_text(large_files["many"])
    told = Heard()
    with pytest.raises(InvalidMigration):
        await library.migrate(database.url, migrations=library.read_migrations(tmp_path), on_event=told)
    assert [type(event) for event in told] == [library.Planned, library.Finished]


async def test_a_run_can_be_cancelled_while_it_reads(database: Database, large_files: dict[str, str]) -> None:
    """While a script is taken apart the event loop hears of a cancellation."""
    files = scripts(large_files["many"])
    with anyio.CancelScope() as scope:
        await library.migrate(database.url, migrations=files, on_event=lambda _: scope.cancel())
    assert scope.cancelled_caught
